"""Every test runs offline, on two threads, and leaves no accelerate state behind."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ.setdefault("WANDB_SILENT", "true")
# Before numpy comes: its matrices here are small, and OpenBLAS's threads gain nothing on them but must outlive every fork of a test.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import pytest
import torch

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))  # on a busy machine two threads wait for each other: set 1


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    """Accelerate keeps device and precision in singletons, and one test's choice must not be the next one's."""
    yield
    if state := sys.modules.get("accelerate.state"):
        state.AcceleratorState._reset_state(reset_partial_state=True)
        state.GradientState._reset_state()


@pytest.fixture(autouse=True)
def ordinary_priority() -> Iterator[None]:
    """No test leaves the process with real-time priority, in which it would starve what it starts (SVT-AV1 does that as root)."""
    yield
    if hasattr(os, "sched_getscheduler"):
        assert os.sched_getscheduler(0) == os.SCHED_OTHER


@pytest.fixture(autouse=True)
def fresh_attention() -> Iterator[None]:
    """diffusers makes the attention that one model was given the default of the process: other bits for every later test."""
    yield
    if dispatch := sys.modules.get("diffusers.models.attention_dispatch"):
        dispatch._AttentionBackendRegistry.set_active_backend(dispatch.AttentionBackendName(dispatch.DIFFUSERS_ATTN_BACKEND))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available() and "KLING_GPU_TESTS" not in os.environ:  # cpu: the same tests there, to see that they are whole
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))

"""Every test runs offline, on two threads, and leaves no accelerate state behind."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ.setdefault("WANDB_SILENT", "true")
# Set before numpy is imported: its matrices here are small, so OpenBLAS's threads gain nothing, but they would have to survive every fork.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import pytest
import torch

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))  # on a busy machine two threads wait for each other: set 1


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    """Accelerate keeps device and precision in singletons; one test's choice must not affect the next."""
    yield
    if state := sys.modules.get("accelerate.state"):
        state.AcceleratorState._reset_state(reset_partial_state=True)
        state.GradientState._reset_state()


@pytest.fixture(autouse=True)
def ordinary_priority() -> Iterator[None]:
    """No test may leave the process with real-time priority, which would starve its child processes (SVT-AV1 sets it when run as root)."""
    yield
    if hasattr(os, "sched_getscheduler"):
        assert os.sched_getscheduler(0) == os.SCHED_OTHER


@pytest.fixture(autouse=True)
def fresh_attention() -> Iterator[None]:
    """diffusers makes the attention backend chosen for one model the default of the process, which would change the bits of later tests."""
    yield
    if dispatch := sys.modules.get("diffusers.models.attention_dispatch"):
        dispatch._AttentionBackendRegistry.set_active_backend(dispatch.AttentionBackendName(dispatch.DIFFUSERS_ATTN_BACKEND))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available() and "KLING_GPU_TESTS" not in os.environ:  # =cpu runs them on the CPU, to check the tests themselves
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))

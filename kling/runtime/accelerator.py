"""Devices, processes and precision of a run. Only `kling/runtime` imports accelerate."""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from datetime import timedelta
from pathlib import Path
from types import FrameType

import torch
from accelerate import Accelerator, PartialState
from accelerate.parallelism_config import ParallelismConfig
from accelerate.state import AcceleratorState
from accelerate.utils import (
    DDPCommunicationHookType,
    DistributedDataParallelKwargs,
    DistributedType,
    FullyShardedDataParallelPlugin,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
)
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

from kling.errors import UserError, unknown
from kling.runtime.device import multiply_in_tf32
from kling.runtime.precision import describe, pick_precision

EXIT_STOPPED = 143  # 128 + SIGTERM: what a scheduler expects of a job that it asked to stop
TRACKERS = ("tensorboard", "wandb")
PATIENCE = timedelta(hours=2)  # processes wait so long while one encodes, samples or exports; NCCL's default, 10 minutes, is too short


def make_accelerator(
    out: str | Path,
    mixed_precision: str = "auto",
    gradient_accumulation: int = 1,
    trackers: Sequence[str] = (),
    some_unused: bool = False,
    bf16_reduction: bool = False,
) -> Accelerator:
    """The Accelerator of a run in the folder `out`, on whatever `accelerate launch` set up, or on one device.

    mixed_precision: auto | bf16 | fp32 (see `pick_precision`). trackers: any of tensorboard, wandb, next to metrics.jsonl.
    some_unused: some parameters are not used in every step. bf16_reduction: processes exchange gradients in bf16, which halves the bytes;
    unsharded (DDP) training supports it on CUDA only.
    Sharded (FSDP2) weights are stored in fp32 and computed in bf16; wrap the forward pass in `accelerator.autocast()`.
    """
    for name in trackers:
        if name not in TRACKERS:
            raise unknown("tracker", name, TRACKERS)
        if importlib.util.find_spec(name) is None:
            raise UserError(f"tracker '{name}' is not installed: pip install 'kling[{name}]', or leave it out")
    if gradient_accumulation < 1:
        raise UserError(f"gradient_accumulation {gradient_accumulation}: give 1 or more")
    if mixed_precision == "fp16":  # its loss scaler would have to be combined with accumulation, the guard and the log of every step
        raise UserError("mixed_precision fp16 is for sampling: train in bf16, which has the range of fp32, or in fp32")
    multiply_in_tf32()
    precision = pick_precision(mixed_precision)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.accelerator.is_available():
        os.environ["ACCELERATE_USE_CPU"] = "true"  # `accelerate launch` does not set it: each process would silently train alone
    sharded, cpu = (os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() == "true" for name in ("FSDP", "CPU"))
    if sharded and cpu:
        os.environ["ACCELERATE_USE_PARALLELISM_CONFIG"] = "false"  # accelerate refuses it on a CPU; `_shard_on_cpu` reads its sizes
    if bf16_reduction and not sharded and (cpu or not torch.cuda.is_available()):
        raise UserError("bf16_reduction on a CPU needs sharded weights: start with configs/accelerate/fsdp2.yaml, or leave it out")
    hook = DDPCommunicationHookType.BF16 if bf16_reduction and not sharded else DDPCommunicationHookType.NO
    if AcceleratorState._shared_state.get("_mixed_precision", named(precision)) != named(precision):
        AcceleratorState._reset_state()  # a second program in the same process may use another precision
    # unless gradients are reduced in every micro-step, FSDP2 keeps the whole fp32 gradient on each process until the last one
    accumulation = GradientAccumulationPlugin(
        gradient_accumulation, adjust_scheduler=False, sync_with_dataloader=False, sync_each_batch=sharded
    )
    try:
        accelerator = Accelerator(
            mixed_precision=named(precision),
            gradient_accumulation_plugin=accumulation,
            log_with=list(trackers) or None,
            project_dir=str(out),
            kwargs_handlers=[
                DistributedDataParallelKwargs(find_unused_parameters=some_unused, comm_hook=hook),
                InitProcessGroupKwargs(timeout=PATIENCE),
            ],
        )
    except ValueError as error:  # for example the sizes of a layout do not multiply to the number of processes
        raise UserError(f"accelerate refuses this configuration: {str(error).splitlines()[0]}") from None
    check_same_precision(accelerator, precision)
    if accelerator.is_main_process:
        print(describe(precision), file=sys.stderr, flush=True)
    if sharded and cpu and accelerator.num_processes > 1:
        _shard_on_cpu(accelerator)
    if sharded and accelerator.num_processes > 1 and not accelerator.is_fsdp2:
        raise UserError("sharding needs fsdp_version: 2 in the accelerate configuration: start from configs/accelerate/fsdp2.yaml")
    if accelerator.is_fsdp2:
        # FSDP would cast every input to bf16, noise levels too: it casts weights only, and autocast does the rest
        param = torch.bfloat16 if precision == "bf16" else None
        reduced = torch.bfloat16 if bf16_reduction else torch.float32
        accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(param, reduced, cast_forward_inputs=False)
    return accelerator


def named(precision: str) -> str:
    """Accelerate's name of a precision."""
    return "no" if precision == "fp32" else precision


def check_same_precision(accelerator: Accelerator, precision: str) -> None:
    """Raises `UserError` if "auto" has chosen different precisions on processes of unlike machines."""
    if accelerator.num_processes > 1:
        own = torch.tensor([float(precision == "bf16")], device=accelerator.device)
        if 0 < float(accelerator.reduce(own, reduction="sum")) < accelerator.num_processes:
            raise UserError("mixed_precision auto: some processes are faster in bf16 and some in fp32: set mixed_precision=bf16 or fp32")


def wrap_what_is_there(accelerator: Accelerator, model: nn.Module) -> None:
    """Choose the modules that FSDP gathers one at a time: those classes of the launcher's configuration that the model contains, and the
    model's direct parts. Accelerate refuses classes that are missing, and a training from published weights has no text encoder of ours;
    sampling calls the parts without the model around them."""
    if not accelerator.is_fsdp2:
        return
    plugin, there = accelerator.state.fsdp_plugin, {type(module).__name__ for module in model.modules()}
    if plugin.auto_wrap_policy is not transformer_auto_wrap_policy:
        raise UserError("sharding needs fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP: start from configs/accelerate/fsdp2.yaml")
    named = [*(plugin.transformer_cls_names_to_wrap or ()), *(type(part).__name__ for part in model.children())]
    plugin.transformer_cls_names_to_wrap = [name for name in dict.fromkeys(named) if name in there]


def shard_frozen(accelerator: Accelerator, module: nn.Module, blocks: Iterable[nn.Module]) -> None:
    """Shard a module that is not trained, such as a teacher, and gather its blocks one at a time. Only if the run shards its own."""
    if accelerator.is_fsdp2:
        mesh = accelerator.torch_device_mesh[tuple(accelerator.parallelism_config.fsdp_dim_names)]
        for part in (*blocks, module):
            fully_shard(part, mesh=mesh, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False))


def keep_in_fp32(accelerator: Accelerator, module: nn.Module) -> None:
    """Gather this module's weights in fp32, although FSDP casts the others to bf16. Call it before the optimizer is made; run the module
    outside autocast."""
    if accelerator.is_fsdp2 and accelerator.mixed_precision == "bf16":
        mesh = accelerator.torch_device_mesh[tuple(accelerator.parallelism_config.fsdp_dim_names)]
        fully_shard(module, mesh=mesh, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False))


def _shard_on_cpu(accelerator: Accelerator) -> None:
    """FSDP2 over gloo, so that a laptop and the tests can run what a cluster runs. Accelerate's FSDP2 code works on CPUs unchanged, but it
    is only turned on for accelerators; on CPUs it silently trains unsharded."""
    state = accelerator.state
    state.fsdp_plugin = FullyShardedDataParallelPlugin()
    state.distributed_type = DistributedType.FSDP
    PartialState().distributed_type = DistributedType.FSDP  # every new AcceleratorState copies it, also the one that `prepare` makes
    state.parallelism_config = sizes = ParallelismConfig()
    if sizes.total_size == 1:  # no layout given: one group of all
        state.parallelism_config = sizes = ParallelismConfig(dp_shard_size=accelerator.num_processes)
    if sizes.total_size != accelerator.num_processes:
        raise UserError(
            f"the layout of {sizes.total_size} processes was started with {accelerator.num_processes}: "
            "make num_processes the product of the parallelism_config sizes"
        )
    state.device_mesh = sizes.get_device_mesh("cpu")


def set_threads(n: int | None) -> None:
    """Use n CPU threads inside an operation; None leaves torch's choice (OMP_NUM_THREADS, or all cores)."""
    if n is not None:
        torch.set_num_threads(n)


class StopSignal:
    """Turns the first SIGTERM, SIGUSR1 or SIGINT into a flag, so that a loop can finish its step, save, and exit with `EXIT_STOPPED`.

        with StopSignal() as stop:
            for step in ...:
                ...
                if stop.seen(accelerator):
                    save(); raise SystemExit(EXIT_STOPPED)

    A second signal has its usual effect (a second Ctrl-C interrupts at once).
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    EVERY = 5.0  # seconds between the messages by which processes agree: torchrun and Slurm kill 30 s after their signal

    def __init__(self) -> None:
        self.name: str | None = None  # of the signal received
        self._before: dict[int, object] = {}
        self._calls = 0  # of `seen` since the last message, the same number on every process
        self._wait = 1  # calls until the next message
        self._sent: float | None = None  # when the last one was

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
            self._before = {s: signal.signal(s, self._note) for s in self.SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for s, handler in self._before.items():
            signal.signal(s, handler)  # type: ignore[arg-type]
        self._before = {}

    def _note(self, number: int, _: FrameType | None) -> None:
        self.name = signal.Signals(number).name
        self.__exit__()

    def __bool__(self) -> bool:
        return self.name is not None

    def seen(self, accelerator: Accelerator) -> bool:
        """Whether any process got a signal: the same answer on all, which must leave at the same step. Every step calls it once.

        Several processes agree by a message, for which a GPU's host waits, so they send one about every `EVERY` seconds.
        """
        if accelerator.num_processes == 1:
            return bool(self)
        self._calls += 1
        if self._calls < self._wait:
            return False
        now = time.monotonic()
        each = 0.0 if self._sent is None else (now - self._sent) / self._calls  # seconds of a step, here
        flags, each = accelerator.reduce(torch.tensor([float(bool(self)), each], device=accelerator.device), reduction="mean").tolist()
        self._calls, self._sent, self._wait = 0, now, 1 if each == 0 else max(1, min(1000, int(self.EVERY / each)))
        return flags > 0

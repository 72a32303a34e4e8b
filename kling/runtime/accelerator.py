"""Where the computation happens: devices, processes and precision. Only `kling/runtime` imports accelerate."""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
import threading
from collections.abc import Sequence
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

EXIT_STOPPED = 143  # 128 + SIGTERM: what a scheduler expects of a job that it asked to leave
TRACKERS = ("tensorboard", "wandb")
PATIENCE = timedelta(hours=2)  # that processes wait for one that encodes, samples or exports alone; NCCL's own 10 minutes end a sound run


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
    some_unused: in some steps some parameters are not used. bf16_reduction: processes exchange gradients in bf16, half the bytes; whole
    copies (DDP) need CUDA for it.
    Sharded (FSDP2) weights are fp32, and bf16 where they compute; wrap the forward pass in `accelerator.autocast()`.
    """
    for name in trackers:
        if name not in TRACKERS:
            raise unknown("tracker", name, TRACKERS)
        if importlib.util.find_spec(name) is None:
            raise UserError(f"tracker '{name}' is not installed: pip install 'kling[{name}]', or leave it out")
    if gradient_accumulation < 1:
        raise UserError(f"gradient_accumulation {gradient_accumulation}: give 1 or more")
    if mixed_precision == "fp16":  # a loss scaler would have to agree with accumulation, the guard and the record of every step
        raise UserError("mixed_precision fp16 is for sampling: train in bf16, which has the range of fp32, or in fp32")
    multiply_in_tf32()
    precision = pick_precision(mixed_precision)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.accelerator.is_available():
        os.environ["ACCELERATE_USE_CPU"] = "true"  # `accelerate launch` forgets it: each process would train alone and say nothing
    sharded, cpu = (os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() == "true" for name in ("FSDP", "CPU"))
    if sharded and cpu:
        os.environ["ACCELERATE_USE_PARALLELISM_CONFIG"] = "false"  # refused there; `_shard_on_cpu` reads its sizes
    if bf16_reduction and not sharded and (cpu or not torch.cuda.is_available()):
        raise UserError("bf16_reduction on a CPU needs sharded weights: start with configs/accelerate/fsdp2.yaml, or leave it out")
    hook = DDPCommunicationHookType.BF16 if bf16_reduction and not sharded else DDPCommunicationHookType.NO
    if AcceleratorState._shared_state.get("_mixed_precision", named(precision)) != named(precision):
        AcceleratorState._reset_state()  # one program after another in the same process, in another precision
    # without a reduction in every micro-step FSDP2 keeps the whole fp32 gradient on each process until the last one
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
    except ValueError as error:  # sizes of a layout that do not multiply to the number of processes, and the like
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
    """A precision as accelerate calls it."""
    return "no" if precision == "fp32" else precision


def check_same_precision(accelerator: Accelerator, precision: str) -> None:
    """Raises `UserError` where processes on unlike machines have measured their way to different precisions."""
    if accelerator.num_processes > 1:
        own = torch.tensor([float(precision == "bf16")], device=accelerator.device)
        if 0 < float(accelerator.reduce(own, reduction="sum")) < accelerator.num_processes:
            raise UserError("mixed_precision auto: some processes are faster in bf16 and some in fp32: set mixed_precision=bf16 or fp32")


def wrap_what_is_there(accelerator: Accelerator, model: nn.Module) -> None:
    """Which modules FSDP gathers one at a time. Of the classes that the launcher's configuration names, those that the model has:
    accelerate refuses the others, and a training from published weights has no text encoder of ours. And the model's own parts, which
    samples call without the model around them."""
    if not accelerator.is_fsdp2:
        return
    plugin, there = accelerator.state.fsdp_plugin, {type(module).__name__ for module in model.modules()}
    if plugin.auto_wrap_policy is not transformer_auto_wrap_policy:
        raise UserError("sharding needs fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP: start from configs/accelerate/fsdp2.yaml")
    named = [*(plugin.transformer_cls_names_to_wrap or ()), *(type(part).__name__ for part in model.children())]
    plugin.transformer_cls_names_to_wrap = [name for name in dict.fromkeys(named) if name in there]


def keep_in_fp32(accelerator: Accelerator, module: nn.Module) -> None:
    """Gather this module's weights in fp32 where FSDP casts all others to bf16. Before the optimizer is made; call it outside autocast."""
    if accelerator.is_fsdp2 and accelerator.mixed_precision == "bf16":
        mesh = accelerator.torch_device_mesh[tuple(accelerator.parallelism_config.fsdp_dim_names)]
        fully_shard(module, mesh=mesh, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False))


def _shard_on_cpu(accelerator: Accelerator) -> None:
    """FSDP2 over gloo. Accelerate turns it on for devices with a name of their own only, and trains unsharded without a word elsewhere;
    its code runs on CPUs as it is, and so a laptop and the tests can run what a cluster runs."""
    state = accelerator.state
    state.fsdp_plugin = FullyShardedDataParallelPlugin()
    state.distributed_type = DistributedType.FSDP
    PartialState().distributed_type = DistributedType.FSDP  # every new AcceleratorState copies it, the one that `prepare` makes too
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

    A second signal acts as it did before (a second Ctrl-C interrupts at once).
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

    def __init__(self) -> None:
        self.name: str | None = None  # of the signal that came
        self._before: dict[int, object] = {}

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
        """True on every process as soon as one of them got a signal: they must leave at the same step."""
        if accelerator.num_processes == 1:
            return bool(self)
        flag = torch.tensor(float(bool(self)), device=accelerator.device)
        return bool(accelerator.reduce(flag, reduction="sum").item() > 0)

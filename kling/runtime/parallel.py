"""How a run is distributed over processes, and how they communicate.

    DDP          every process has all weights and its own batch
    FSDP2, HSDP  the same, with weights, gradients, optimizer and average sharded by rows over the processes (of one group)
    context      the processes of a group share a batch, and each takes a part of its token sequence

The file given to `accelerate launch --config_file configs/accelerate/*.yaml` chooses; this module reads the choice.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from diffusers import ContextParallelConfig, ModelMixin
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from kling.errors import UserError, unknown

SPLITS = ("ulysses", "ring")


@dataclass(frozen=True)
class Layout:
    """`ranks` different batches per micro-step; this process works on number `rank`, together with `split` - 1 other processes."""

    rank: int = 0
    ranks: int = 1
    split: int = 1
    sharded: bool = False


def lay_out(accelerator: Accelerator) -> Layout:
    """The layout that the launcher chose. Processes that share a batch are neighbours."""
    sizes = accelerator.parallelism_config
    split = sizes.cp_size if sizes else 1
    return Layout(accelerator.process_index // split, accelerator.num_processes // split, split, accelerator.is_fsdp2)


def split_sequence(model: ModelMixin, layout: Layout, accelerator: Accelerator, method: str = "ulysses") -> None:
    """Cut the model's token sequence over the processes that share a batch, by diffusers' context parallelism.

    ulysses: attention is split by heads, whose number must be divisible. ring: keys travel between processes, and partial results are
    combined by their log-sums, which PyTorch's own flash attention returns (GPU, bf16). Every process then has the whole output, and the
    gradient of its own tokens: multiply the loss by `split`, since data-parallel reduction takes the mean over all processes.
    """
    if method not in SPLITS:
        raise unknown("context_parallel", method, SPLITS)
    if layout.split == 1:
        return
    heads = model.config.num_attention_heads
    if method == "ulysses" and heads % layout.split:
        raise UserError(f"{heads} attention heads do not divide over {layout.split} processes: change cp_size, or use ring")
    if method == "ring":
        model.set_attention_backend(ring_backend(accelerator))
    degrees = {"ring": 1, "ulysses": 1} | {method: layout.split}
    mesh = init_device_mesh(accelerator.device.type, (layout.ranks, *degrees.values()), mesh_dim_names=("batch", *degrees))
    model.enable_parallelism(config=ContextParallelConfig(**{f"{name}_degree": n for name, n in degrees.items()}, mesh=mesh))


def ring_backend(accelerator: Accelerator) -> str:
    """diffusers' name of PyTorch's flash attention. Raises `UserError` if it is not available."""
    if accelerator.device.type != "cuda" or accelerator.mixed_precision == "no":
        raise UserError("context_parallel=ring needs flash attention, so a GPU and mixed_precision=bf16: use ulysses")
    return "_native_flash"


def check_draws(accelerator: Accelerator, layout: Layout, draw: Tensor) -> None:
    """Raise `UserError` if processes that share a batch draw different numbers, or two others draw the same. draw: any draw, on the CPU."""
    mine = torch.stack([draw.double().sum(), draw.double().square().sum()]).to(accelerator.device, torch.float32)
    rows = accelerator.gather(mine[None]).cpu().unflatten(0, (layout.ranks, layout.split))  # (ranks, split, 2)
    if not (rows == rows[:, :1]).all():
        raise UserError("processes that share a batch draw different noise: give them the same seed and data")
    if len(rows[:, 0].unique(dim=0)) != layout.ranks:
        raise UserError("two data-parallel processes draw the same noise: their batches must differ")


def total(accelerator: Accelerator, values: Tensor) -> Tensor:
    """The sum of a tensor over all processes, on all of them."""
    return values if accelerator.num_processes == 1 else accelerator.reduce(values, reduction="sum")


def same_for_all(accelerator: Accelerator, number: int) -> int:
    """The main process's number, on all of them."""
    if accelerator.num_processes == 1:
        return number
    return int(broadcast(torch.tensor(number, device=accelerator.device)))


def whole(value: Tensor) -> Tensor:
    """A number on the device as a plain tensor; it may be a DTensor, as the norm of sharded gradients is."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def scalar(value: Tensor) -> float:
    """The same as a Python float."""
    return float(whole(value))


@contextmanager
def same_rng(device: torch.device) -> Iterator[None]:
    """Restore the global random generators at the end of the block."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield


# ---------------------------------------------------------------------------------------------------------------- shards


def local(t: Tensor) -> Tensor:
    """The rows of a tensor that this process holds: all rows of a plain tensor."""
    return t.detach().to_local() if isinstance(t, DTensor) else t.detach()


def first_row(t: Tensor) -> int:
    """The index of the first of those rows in the whole tensor."""
    if not isinstance(t, DTensor):
        return 0
    return compute_local_shape_and_global_offset(t.shape, t.device_mesh, t.placements)[1][0]


def reshard(model: nn.Module) -> None:
    """Free the gathered copies of weights that FSDP2 keeps after a forward pass: the root's always, all of them with
    `fsdp_reshard_after_forward: false`. Call it after changing weights other than by an optimizer step, or the copies are stale."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def is_mine(t: Tensor, rank: int) -> bool:
    """True on the one process that writes these rows; if several hold them, the first."""
    if not isinstance(t, DTensor):
        return rank == 0
    place = t.device_mesh.get_coordinate()
    copies = [at for at, placement in zip(place, t.placements, strict=True) if isinstance(placement, Replicate)]
    return not any(copies) and local(t).numel() > 0


def trained(model: nn.Module) -> dict[str, Tensor]:
    """The part of a model's state that a run changes: everything but frozen parameters."""
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    return {name: t for name, t in model.state_dict().items() if name not in frozen}

"""AdamW or Muon, its state by name, and its learning rate, as functions.

The learning rate is a closed form of the step, set by the loop: Accelerate's wrapped schedulers advance once per process, and a
closed form has no state to save.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from kling.errors import UserError, unknown
from kling.runtime.checkpoint import Rows, restore
from kling.training.muon import Muon, is_matrix

SCHEDULES = ("constant", "cosine")


def adamw(
    named: nn.Module | Iterable[tuple[str, Tensor]],
    lr: float,
    betas: tuple[float, float] = (0.9, 0.95),
    weight_decay: float = 0.01,
    eps: float = 1e-8,
) -> AdamW:
    """AdamW over the parameters that train. Vectors and scalars (norms, biases, gates) do not decay: only matrices and kernels do."""
    params = trainable(named)
    decay, plain = [p for p in params if p.ndim >= 2], [p for p in params if p.ndim < 2]
    groups = [{"params": decay, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return AdamW([g for g in groups if g["params"]], lr=lr, betas=tuple(betas), eps=eps, fused=True)


def muon(
    model: nn.Module,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.95),
    weight_decay: float = 0.01,
    momentum: float = 0.95,
    exact: bool = False,
) -> Muon:
    """Muon over the matrices and kernels that train, and AdamW over the rest: vectors, scalars and embeddings, whose rows are looked up
    one at a time. `lr` is of AdamW's size for both. exact: in fp32 even where bf16 is faster, as a run in fp32 is."""
    looked_up = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    params = trainable(model)
    turned = [p for p in params if is_matrix(p) and id(p) not in looked_up]
    inside = {id(p) for p in turned}
    plain = [p for p in params if id(p) not in inside]
    groups = [{"params": turned, "weight_decay": weight_decay, "momentum": momentum}, {"params": plain, "weight_decay": 0.0}]
    return Muon([g for g in groups if g["params"]], lr=lr, betas=tuple(betas), fused=True, exact=exact)


def make_optimizer(
    name: str, model: nn.Module, lr: float, betas: Iterable[float] = (0.9, 0.95), weight_decay: float = 0.01, exact: bool = False
) -> AdamW:
    """The optimizer of a config's `optimizer:`. exact: see `muon`. Raises `UserError` for a name that is none."""
    if name not in OPTIMIZERS:
        raise unknown("optimizer", name, OPTIMIZERS)
    extra = {"exact": exact} if name == "muon" else {}
    return OPTIMIZERS[name](model, lr, betas=tuple(betas), weight_decay=weight_decay, **extra)


OPTIMIZERS = {"adamw": adamw, "muon": muon}
MOMENTS = {"adamw": 2, "muon": 1}  # tensors that each keeps for a parameter; Muon's vectors and embeddings, which have two, are few


def check_names(optimizer: str, schedule: str) -> None:
    """Refuse what `make_optimizer` and `lr_at` would refuse, before hours go into a cache."""
    for thing, name, known in (("optimizer", optimizer, OPTIMIZERS), ("schedule", schedule, SCHEDULES)):
        if name not in known:
            raise unknown(thing, name, known)


def trainable(named: nn.Module | Iterable[tuple[str, Tensor]]) -> list[Tensor]:
    """The parameters that train. Raises `UserError` if there are none."""
    named = named.named_parameters() if isinstance(named, nn.Module) else named
    params = [p for _, p in named if p.requires_grad]
    if not params:
        raise UserError("nothing to train: no parameter has requires_grad")
    return params


def lr_at(step: int, *, lr: float, warmup: int = 0, steps: int | None = None, schedule: str = "constant", floor: float = 0.0) -> float:
    """The learning rate of update number `step` (0-based).

    Linear from lr / warmup over `warmup` updates, then constant, or half a cosine down to `floor · lr` at `steps`:
    lr(s) = lr · (floor + (1 - floor) · (1 + cos π (s - warmup) / (steps - warmup)) / 2).
    """
    if schedule not in SCHEDULES:
        raise unknown("schedule", schedule, SCHEDULES)
    if step < warmup:
        return lr * (step + 1) / warmup
    if schedule == "constant":
        return lr
    if steps is None:
        raise UserError("schedule 'cosine' has no end: give steps")
    done = min(1.0, (step - warmup) / max(1, steps - warmup))
    return lr * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done)))


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every group."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """The optimizer's state as {"<parameter name>/<exp_avg | exp_avg_sq | step | momentum>": tensor}; learning rates are the loop's."""
    names = {id(p): name for name, p in model.named_parameters()}
    return {f"{names[id(p)]}/{key}": value for p, state in optimizer.state.items() for key, value in state.items()}


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module, saved: Rows) -> None:
    """Put back what `optimizer_tensors` gave, each process its own rows. A parameter that had no gradient yet, as a VAE's over time on lone
    frames, has no state. Raises `UserError` if a state belongs to no parameter, or has another shape."""
    names = {id(p): name for name, p in model.named_parameters()}
    params = {names[id(p)]: p for group in optimizer.param_groups for p in group["params"]}
    state: dict[Tensor, dict[str, Tensor]] = {}
    for full in saved:
        name, _, key = full.rpartition("/")
        if name not in params:
            raise UserError(f"optimizer state of '{name}' fits no parameter that trains: the model differs from the checkpoint's")
        p = params[name]
        like = torch.zeros((), device=p.device) if key == "step" else torch.zeros_like(p, requires_grad=False)
        state.setdefault(p, {})[key] = like
    into = {f"{name}/{key}": t for name, p in params.items() for key, t in state.get(p, {}).items()}
    restore(saved, into, "optimizer state")
    optimizer.state.clear()
    optimizer.state.update(state)

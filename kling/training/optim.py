"""AdamW or Muon, its state by name, and its learning rate, as functions.

The learning rate is a closed form of the step, set by the loop: Accelerate's wrapped schedulers advance once per process, and a
closed form has no state to save.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from kling.errors import UserError, unknown
from kling.runtime.checkpoint import Rows, restore
from kling.training.muon import Muon, is_matrix

SCHEDULES = ("constant", "cosine")
NONE: Mapping[str, float] = MappingProxyType({})


def adamw(
    model: nn.Module, lr: float, betas: tuple[float, float] = (0.9, 0.95), weight_decay: float = 0.01, eps: float = 1e-8,
    lr_of: Mapping[str, float] = NONE,
) -> AdamW:  # fmt: skip
    """AdamW over the trained parameters. Only those of `layer_weights` decay. lr_of: see `make_optimizer`."""
    groups = _groups(model, layer_weights(model), lr_of, weight_decay=weight_decay)
    return AdamW(groups, lr=lr, betas=tuple(betas), eps=eps, fused=True)


def muon(
    model: nn.Module,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.95),
    weight_decay: float = 0.01,
    momentum: float = 0.95,
    exact: bool = False,
    lr_of: Mapping[str, float] = NONE,
) -> Muon:
    """Muon over those of `layer_weights` that are matrices (`is_matrix`), with decay, and AdamW without decay over the rest. `lr` has the
    scale of AdamW's for both. exact: in fp32 even if bf16 is faster, for a run in fp32. lr_of: see `make_optimizer`."""
    groups = _groups(model, filter(is_matrix, layer_weights(model)), lr_of, weight_decay=weight_decay, momentum=momentum)
    return Muon(groups, lr=lr, betas=tuple(betas), fused=True, exact=exact)


def layer_weights(model: nn.Module) -> list[Tensor]:
    """The matrices and kernels that multiply inputs: `weight` of linear layers and convolutions.

    Embeddings, learned tables (modulation, positions), gains of norms and biases are not included. Rows of an embedding that a batch does
    not use have no gradient, and decay alone would pull them to 0.
    """
    layers = [m for m in model.modules() if not isinstance(m, nn.Embedding)]
    return [p for m in layers for name, p in m.named_parameters(recurse=False) if name == "weight" and p.ndim >= 2]


def _groups(model: nn.Module, first: Iterable[Tensor], lr_of: Mapping[str, float], **settings: float) -> list[dict[str, Any]]:
    """The trained parameters as non-empty groups of an optimizer: `first` with these settings, and the others without decay; those of
    another learning rate in groups of their own, with its multiple as "lr_scale"."""
    inside, params, times = {id(p) for p in first}, trainable(model), _multiples(model, lr_of)
    groups = []
    for scale in sorted({times.get(id(p), 1.0) for p in params}, key=lambda scale: (scale != 1, scale)):
        own, more = [p for p in params if times.get(id(p), 1.0) == scale], {} if scale == 1 else {"lr_scale": scale}
        groups.append({"params": [p for p in own if id(p) in inside], **settings, **more})
        groups.append({"params": [p for p in own if id(p) not in inside], "weight_decay": 0.0, **more})
    return [group for group in groups if group["params"]]


def _multiples(model: nn.Module, lr_of: Mapping[str, float]) -> dict[int, float]:
    """The multiple of the learning rate of parameters, by id, that `lr_of` names; of two names of one parameter the longer counts. Raises
    `UserError` for a name that none has."""
    times: dict[int, float] = {}
    for part, scale in sorted(lr_of.items(), key=lambda item: len(item[0])):
        found = [id(p) for name, p in model.named_parameters() if part in name.split(".") or name.startswith(part)]
        if not found or not 0 <= scale < math.inf:
            what = "name a part of the model, such as track_embedding, with a multiple of lr, or with 0 to freeze it"
            raise UserError(f"lr_of {part} {scale:g}: {what}")
        times |= dict.fromkeys(found, scale)
    return times


def freeze(model: nn.Module, lr_of: Mapping[str, float]) -> None:
    """Stop training the parameters whose multiple in `lr_of` is 0: no gradient, decay, average or state of the optimizer.

    Raises `UserError` if none is left to train.
    """
    times = _multiples(model, lr_of)
    for p in model.parameters():
        if times.get(id(p)) == 0:
            p.requires_grad_(False)
    if lr_of and not any(p.requires_grad for p in model.parameters()):
        raise UserError(f"lr_of {dict(lr_of)} freezes every parameter that trains: leave one part above 0")


def make_optimizer(
    name: str, model: nn.Module, lr: float, betas: Iterable[float] = (0.9, 0.95), weight_decay: float = 0.01, exact: bool = False,
    lr_of: Mapping[str, float] = NONE,
) -> AdamW:  # fmt: skip
    """The optimizer of a config's `optimizer:`. exact: see `muon`. lr_of: parts of the model, by a word or the beginning of their names,
    and the multiple of lr that they take (of 0: `freeze` them first). Raises `UserError` for an unknown name."""
    if name not in OPTIMIZERS:
        raise unknown("optimizer", name, OPTIMIZERS)
    extra = {"exact": exact} if name == "muon" else {}
    return OPTIMIZERS[name](model, lr, betas=tuple(betas), weight_decay=weight_decay, lr_of=lr_of, **extra)


OPTIMIZERS = {"adamw": adamw, "muon": muon}
MOMENTS = {"adamw": 2, "muon": 1}  # tensors of state per parameter; Muon's vectors and embeddings, which have two, are few


def check_names(optimizer: str, schedule: str, betas: Sequence[float] = (0.9, 0.95)) -> None:
    """Refuse what `make_optimizer` and `lr_at` would refuse, before hours go into a cache."""
    if len(betas) != 2:
        raise UserError(f"betas {list(betas)}: give two numbers, of the first and of the second moment")
    for thing, name, known in (("optimizer", optimizer, OPTIMIZERS), ("schedule", schedule, SCHEDULES)):
        if name not in known:
            raise unknown(thing, name, known)


def trainable(model: nn.Module) -> list[Tensor]:
    """The trained parameters. Raises `UserError` if there are none."""
    params = [p for p in model.parameters() if p.requires_grad]
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
    """Set the learning rate of every group, times the group's own multiple."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


def optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """The optimizer's state as {"<parameter name>/<exp_avg | exp_avg_sq | step | momentum>": tensor}; learning rates are not included."""
    names = {id(p): name for name, p in model.named_parameters()}
    return {f"{names[id(p)]}/{key}": value for p, state in optimizer.state.items() for key, value in state.items()}


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module, saved: Rows) -> None:
    """Restore the result of `optimizer_tensors`, each process its own rows. A parameter that has had no gradient, such as a VAE's over
    time on single frames, has no state. Raises `UserError` if a state belongs to no parameter, or has another shape."""
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

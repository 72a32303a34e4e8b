"""Checkpoints that are whole or absent: safetensors + JSON, never pickle.

    run/step-00001000/   model.safetensors  optimizer.safetensors  ema.safetensors  meta.json  manifest.json
    run/latest           the name of the newest folder

`save` writes a `.tmp` folder, syncs it to disk, renames it, checks it by reading it back, moves `latest`, and only then deletes old
ones; so at any moment, a kill included, the run folder holds a complete checkpoint. `load` believes a folder only if every file has
the size and the SHA-256 of the manifest, and `load_latest` falls back to the newest folder that does.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from kling.config import flatten, read_yaml
from kling.errors import UserError

log = logging.getLogger(__name__)

Groups = dict[str, dict[str, Tensor]]

MANIFEST, META, LATEST = "manifest.json", "meta.json", "latest"
_FOLDER = re.compile(r"step-(\d{8,})(\.old)?")

# Settings that may differ when a run goes on: how long, how often, and where to tell. Everything else changes what is learned.
MAY_CHANGE = (
    "out",
    "resume",
    "steps",
    "save_every",
    "keep_last",
    "log_every",
    "sample_every",
    "eval_every",
    "trackers",
    "workers",
    "threads",
)


@dataclass
class Checkpoint:
    """What `save` was given, and the folder it came from. Tensors are on the CPU."""

    step: int
    tensors: Groups
    meta: dict[str, Any] = field(default_factory=dict)
    path: Path = Path()


def save(run_dir: str | Path, step: int, tensors: Groups, meta: dict[str, Any] | None = None, keep_last: int = 2) -> Path:
    """Write `run_dir/step-<step>` and return it. Call it on the main process only.

    tensors: {"model": {name: tensor}, "optimizer": {...}, ...}, one file each. meta: anything JSON can hold. The newest `keep_last`
    folders stay (0 keeps all). Raises `UserError` if the disk is full or read-only; older checkpoints are then untouched.
    """
    run_dir = Path(run_dir)
    final = run_dir / f"step-{step:08d}"
    temporary, replaced = final.with_suffix(".tmp"), final.with_suffix(".old")
    try:
        for stale in run_dir.glob("step-*.tmp"):  # of a save that was killed
            shutil.rmtree(stale, ignore_errors=True)
        temporary.mkdir(parents=True)
        for name, group in tensors.items():
            save_file({key: t.detach().contiguous() for key, t in group.items()}, temporary / f"{name}.safetensors")
        (temporary / META).write_text(json.dumps(meta or {}, ensure_ascii=False, indent=2), encoding="utf-8")
        files = {p.name: {"bytes": p.stat().st_size, "sha256": _sha256(p)} for p in sorted(temporary.iterdir())}
        (temporary / MANIFEST).write_text(json.dumps({"step": step, "files": files}, indent=2), encoding="utf-8")
        for path in (*temporary.iterdir(), temporary):
            _sync(path)
        if final.exists():  # the same step again: the old one stays loadable until the new one is in place
            shutil.rmtree(replaced, ignore_errors=True)
            final.rename(replaced)
        temporary.rename(final)
        _sync(run_dir)
        verify(final)
        write_atomic(run_dir / LATEST, final.name + "\n")
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"checkpoint {final} was not written ({reason}): older ones are untouched; free space or change `out`") from None
    shutil.rmtree(replaced, ignore_errors=True)
    if keep_last > 0:  # folders of a later step belong to a future that was given up: they go first
        others = sorted((p for p in _folders(run_dir) if p != final), key=lambda p: p.name > final.name)
        for old in others[keep_last - 1 :]:
            shutil.rmtree(old, ignore_errors=True)
    return final


def load(path: str | Path, groups: Iterable[str] | None = None) -> Checkpoint:
    """Read one checkpoint folder, whole or only the named groups. Raises `UserError` naming the file that is missing or damaged."""
    path = Path(path)
    manifest = verify(path)
    held = [name.removesuffix(".safetensors") for name in manifest["files"] if name.endswith(".safetensors")]
    wanted = held if groups is None else list(groups)
    if absent := [g for g in wanted if g not in held]:
        raise UserError(f"checkpoint {path} has no '{absent[0]}': it holds {', '.join(held)}")
    tensors = {g: load_file(path / f"{g}.safetensors") for g in wanted}
    return Checkpoint(manifest["step"], tensors, json.loads((path / META).read_text(encoding="utf-8")), path)


def load_latest(run_dir: str | Path, groups: Iterable[str] | None = None) -> Checkpoint | None:
    """The newest good checkpoint of a run; None if the run has none yet.

    A folder that fails `verify` is passed over with a warning that names it and the reason. Raises `UserError` if none is good: to
    start over silently would throw the run away.
    """
    bad: list[str] = []
    for folder in _folders(Path(run_dir)):
        try:
            return load(folder, groups)
        except UserError as error:
            log.warning("checkpoint passed over: %s", error)
            bad.append(str(error))
    if bad:
        raise UserError(f"no good checkpoint in {run_dir}: {bad[0]}; move the step-* folders away to start over")
    return None


def verify(path: str | Path) -> dict[str, Any]:
    """The manifest of a checkpoint folder, after checking every file against it. Raises `UserError` naming the first bad file."""
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"checkpoint {path} does not exist: give a step-* folder")
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        files = {name: (entry["bytes"], entry["sha256"]) for name, entry in manifest["files"].items()}
        manifest["step"] = int(manifest["step"])
    except FileNotFoundError:
        raise UserError(f"checkpoint {path} is half-written: {MANIFEST} is missing") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"checkpoint {path} is damaged: {MANIFEST} is not readable") from None
    for name, (size, digest) in files.items():
        file = path / name
        if not file.is_file():
            raise UserError(f"checkpoint {path} is damaged: {name} is missing")
        if file.stat().st_size != size:
            raise UserError(f"checkpoint {path} is damaged: {name} has {file.stat().st_size} bytes, not {size}")
        if _sha256(file) != digest:
            raise UserError(f"checkpoint {path} is damaged: {name} has another SHA-256 than when it was written")
    return manifest


def check_same_config(run_dir: str | Path, config: dict[str, Any], may_change: Iterable[str] = MAY_CHANGE) -> None:
    """Refuse to go on with a run under other settings than `run_dir/config.yaml` (if there is one).

    config: `to_dict` of the new one. A name in `may_change` covers its dotted key and everything below it. Raises `UserError` that
    lists the keys with both values.
    """
    path = Path(run_dir) / "config.yaml"
    if not path.is_file():
        return
    before, now = flatten(read_yaml(path)), flatten(config)
    allowed = tuple(may_change)
    changed = [
        f"{key} {before.get(key, 'absent')!r} -> {now.get(key, 'absent')!r}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key, "absent") != now.get(key, "absent") and not any(key == a or key.startswith(a + ".") for a in allowed)
    ]
    if changed:
        raise UserError(f"run {run_dir} was started with other settings: {'; '.join(changed)}; take them back or choose another `out`")


# ------------------------------------------------------------------------------------------------------------- optimizer


def optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """The optimizer's state as {"<parameter name>/<exp_avg | exp_avg_sq | step>": tensor}; learning rates are the loop's, not state."""
    names = {id(p): name for name, p in model.named_parameters()}
    return {f"{names[id(p)]}/{key}": value for p, state in optimizer.state.items() for key, value in state.items()}


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` gave. Raises `UserError` if a name does not belong to the optimizer's parameters."""
    names = {id(p): name for name, p in model.named_parameters()}
    order = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]  # state_dict numbers parameters like this
    index = {name: i for i, name in enumerate(order)}
    state: dict[int, dict[str, Tensor]] = {}
    for full, tensor in tensors.items():
        name, _, key = full.rpartition("/")
        if name not in index:
            raise UserError(f"optimizer state of '{name}' fits no parameter that trains: the model differs from the checkpoint's")
        state.setdefault(index[name], {})[key] = tensor.clone()
    if tensors and (absent := [n for n in order if index[n] not in state]):
        raise UserError(f"optimizer state of '{absent[0]}' is not in the checkpoint: the model differs from the checkpoint's")
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


# ----------------------------------------------------------------------------------------------------------------- files


def write_atomic(path: str | Path, text: str) -> None:
    """Replace a small text file so that a reader sees the old one or the new one, never half of one."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    _sync(temporary)
    temporary.replace(path)
    _sync(path.parent)


def _folders(run_dir: Path) -> list[Path]:
    """Finished checkpoint folders: the one that `latest` names, then the others from the newest to the oldest."""
    if not run_dir.is_dir():
        return []
    found = {p: m for p in run_dir.iterdir() if p.is_dir() and (m := _FOLDER.fullmatch(p.name))}
    pointer = run_dir / LATEST
    latest = pointer.read_text(encoding="utf-8", errors="replace").strip() if pointer.is_file() else ""
    return sorted(found, key=lambda p: (p.name == latest, int(found[p][1]), found[p][2] is None), reverse=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

"""Checkpoints that are either complete or absent: safetensors + JSON, never pickle.

    run/step-00001000/   model.safetensors  optimizer.safetensors  ema.safetensors  meta.json  manifest.json
    run/latest           the name of the newest folder

A sharded run writes `model.00000.safetensors`, `model.00001.safetensors` ...: each process writes its own rows, and the files in order
make the whole tensor. A reader asks for tensors, or for some of their rows, whatever the number of files.

`save` writes a `.tmp` folder, syncs it to disk, renames it, checks it by reading it back, moves `latest`, and only then deletes old
checkpoints: at any moment, even if the process is killed, the run folder holds a complete one. `load` accepts a folder only if every file
has the size and the SHA-256 of the manifest, and `load_latest` falls back to the newest folder that does.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kling.config import flatten, read_yaml
from kling.errors import UserError
from kling.runtime.files import as_umask, parse_object, sha256, sync_to_disk, write_atomic
from kling.runtime.parallel import first_row, local

log = logging.getLogger(__name__)

Groups = Mapping[str, Mapping[str, Tensor]]

MANIFEST, META, LATEST = "manifest.json", "meta.json", "latest"
_FOLDER = re.compile(r"step-(\d{8,})(\.old)?")
_FILE = re.compile(r"(\w+)(\.\d{5})?\.safetensors")

# Settings that may change when a run is resumed: its length, intervals, logging, and how the work is distributed over the machine. All
# others change what is learned.
MAY_CHANGE = (
    "out",
    "steps",
    "save_every",
    "save_in_background",
    "keep_last",
    "keep_every",
    "log_every",
    "samples",
    "sample_every",
    "sample_tasks",
    "validation",
    "eval_every",
    "watchdog",
    "gradient_accumulation",
    "activation_checkpointing",
    "compile",
    "context_parallel",
    "trackers",
    "workers",
    "threads",
)


class Rows(Mapping[str, Tensor]):
    """The tensors of one group, read from its files when asked for: whole by `rows[name]`, or only some rows."""

    def __init__(self, files: Iterable[Path]) -> None:
        self._where: dict[str, list[Any]] = {}  # name -> the open files that hold its rows, in order
        for path in sorted(files):
            file = safe_open(path, framework="pt")
            for name in file.keys():  # noqa: SIM118 - not a dict
                self._where.setdefault(name, []).append(file)

    def __getitem__(self, name: str) -> Tensor:
        parts = [file.get_tensor(name) for file in self._where[name]]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def part(self, name: str, start: int, stop: int) -> Tensor:
        """Rows start … stop - 1 of a tensor."""
        found, at = [], 0
        for file in self._where[name]:
            piece = file.get_slice(name)
            rows = piece.get_shape()[0]
            begin, end = max(start - at, 0), min(stop - at, rows)
            found += [piece[begin:end]] if begin < end else []
            at += rows
        return torch.cat(found)

    def shape(self, name: str) -> torch.Size:
        shapes = [file.get_slice(name).get_shape() for file in self._where[name]]
        return torch.Size([sum(s[0] for s in shapes), *shapes[0][1:]] if shapes[0] else [])

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)


@dataclass
class Checkpoint:
    """The arguments of `save`, and the folder they were read from. Tensors are read when they are used."""

    step: int
    tensors: dict[str, Rows]
    meta: dict[str, Any] = field(default_factory=dict)
    path: Path = Path()


def save(
    run_dir: str | Path, step: int, tensors: Groups, meta: dict[str, Any] | None = None, keep_last: int = 2, keep_every: int = 0
) -> Path:
    """Write `run_dir/step-<step>` from one process and return it; `runtime/saver.py` does the same from many, or in the background.

    tensors: {"model": {name: tensor}, "optimizer": {...}, ...}, one file each. meta: anything JSON can hold. The newest `keep_last`
    folders stay (0 keeps all), and those of every `keep_every`-th step. Raises `UserError` if the disk is full or read-only; older
    checkpoints are then untouched.
    """
    with disk_errors(run_dir, step):
        begin(run_dir, step)
        files = write(run_dir, step, tensors)
        return finish(run_dir, step, files, meta or {}, keep_last, keep_every)


def folder(run_dir: str | Path, step: int) -> Path:
    """The folder of a step's checkpoint; while it is written, it has the suffix .tmp."""
    return Path(run_dir) / f"step-{step:08d}"


@contextmanager
def disk_errors(run_dir: str | Path, step: int) -> Iterator[None]:
    """Turn the error of a full or unwritable disk into a `UserError`, and delete the unfinished folder."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        shutil.rmtree(folder(run_dir, step).with_suffix(".tmp"), ignore_errors=True)
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(
            f"checkpoint {folder(run_dir, step)} was not written ({reason}): older ones are untouched; free space or change `out`"
        ) from None


def begin(run_dir: str | Path, step: int) -> None:
    """Make the temporary folder, and delete those of interrupted saves."""
    for stale in Path(run_dir).glob("step-*.tmp"):
        shutil.rmtree(stale, ignore_errors=True)
    folder(run_dir, step).with_suffix(".tmp").mkdir(parents=True)


def write(run_dir: str | Path, step: int, tensors: Groups, part: str = "") -> dict[str, dict[str, Any]]:
    """Write one process's files into the temporary folder, sync them, and return their sizes and SHA-256 by name."""
    temporary, files = folder(run_dir, step).with_suffix(".tmp"), {}
    for name, group in tensors.items():
        path = temporary / f"{name}{part}.safetensors"
        save_file({key: t.detach().contiguous() for key, t in group.items()}, path)
        files[path.name] = _seal(path)
    as_umask(temporary)
    return files


def finish(
    run_dir: str | Path, step: int, files: dict[str, dict[str, Any]], meta: dict[str, Any], keep_last: int, keep_every: int = 0
) -> Path:
    """Write the manifest, rename the temporary folder, verify it, update `latest`, and delete old checkpoints."""
    run_dir, final = Path(run_dir), folder(run_dir, step)
    temporary, replaced = final.with_suffix(".tmp"), final.with_suffix(".old")
    (temporary / META).write_text(json.dumps(meta, ensure_ascii=False, indent=2), encoding="utf-8")
    files = files | {META: _seal(temporary / META)}
    (temporary / MANIFEST).write_text(json.dumps({"step": step, "files": files}, indent=2), encoding="utf-8")
    sync_to_disk(temporary / MANIFEST)
    sync_to_disk(temporary)
    if final.exists():  # the same step again: the old one stays loadable until the new one is in place
        shutil.rmtree(replaced, ignore_errors=True)
        final.rename(replaced)
    temporary.rename(final)
    sync_to_disk(run_dir)
    verify(final)
    write_atomic(run_dir / LATEST, final.name + "\n")
    shutil.rmtree(replaced, ignore_errors=True)
    if keep_last > 0:  # folders of later steps are left from a continuation that was given up: they are deleted first
        others = sorted((p for p in _folders(run_dir) if p != final), key=lambda p: p.name > final.name)
        for old in others[keep_last - 1 :]:
            milestone = keep_every and step_of(old) % keep_every == 0 and old.name < final.name
            if not milestone:
                shutil.rmtree(old, ignore_errors=True)
    return final


def load(path: str | Path, groups: Iterable[str] | None = None) -> Checkpoint:
    """Open one checkpoint folder, whole or only the named groups. Raises `UserError` naming the file that is missing or damaged."""
    verify(Path(path))
    return open_folder(path, groups)


def open_folder(path: str | Path, groups: Iterable[str] | None = None) -> Checkpoint:
    """`load` without the check: for a folder that another process has just verified."""
    path = Path(path)
    manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    held: dict[str, list[Path]] = {}
    for name in manifest["files"]:
        if found := _FILE.fullmatch(name):
            held.setdefault(found[1], []).append(path / name)
    wanted = sorted(held) if groups is None else list(groups)
    if absent := [g for g in wanted if g not in held]:
        raise UserError(f"checkpoint {path} has no '{absent[0]}': it holds {', '.join(sorted(held))}")
    try:
        tensors = {g: Rows(held[g]) for g in wanted}
    except SafetensorError as error:
        raise UserError(f"checkpoint {path} is damaged: not safetensors ({error})") from None
    return Checkpoint(int(manifest["step"]), tensors, json.loads((path / META).read_text(encoding="utf-8")), path)


def restore(rows: Rows, into: Mapping[str, Tensor], what: str = "weight") -> None:
    """Copy a group into the tensors of a model, or into the rows of them that this process holds.

    Raises `UserError` if a name is missing or unexpected, or a shape differs.
    """
    if odd := sorted(rows.keys() ^ into.keys()):
        missing = odd[0] in into
        raise UserError(f"{what} '{odd[0]}' is {'not in the checkpoint' if missing else 'not in the model'}: they do not fit each other")
    with torch.no_grad():
        for name, t in into.items():
            if rows.shape(name) != t.shape:
                raise UserError(f"{what} '{name}' has shape {tuple(rows.shape(name))} in the checkpoint, the model's has {tuple(t.shape)}")
            mine, start = local(t), first_row(t)
            if mine.shape == t.shape:
                mine.copy_(rows[name])
            elif mine.numel():
                mine.copy_(rows.part(name, start, start + len(mine)))


def load_latest(run_dir: str | Path) -> Checkpoint | None:
    """The newest intact checkpoint of a run; None if the run has none yet.

    A folder that fails `verify` is skipped with a warning that names it and the reason. Raises `UserError` if none is intact: starting
    over silently would discard the run.
    """
    bad: list[str] = []
    for folder in _folders(Path(run_dir)):
        try:
            return load(folder)
        except UserError as error:
            log.warning("checkpoint skipped: %s", error)
            bad.append(str(error))
    if bad:
        raise UserError(f"no intact checkpoint in {run_dir}: {bad[0]}; move the step-* folders away to start over")
    return None


def verify(path: str | Path) -> dict[str, Any]:
    """The manifest of a checkpoint folder, after checking every file against it. Raises `UserError` naming the first bad file."""
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"checkpoint {path} does not exist: give a step-* folder")
    try:
        manifest = parse_object((path / MANIFEST).read_text(encoding="utf-8"))
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
        if sha256(file) != digest:
            raise UserError(f"checkpoint {path} is damaged: the SHA-256 of {name} is not the one in the manifest")
    return manifest


def check_same_config(run_dir: str | Path, config: dict[str, Any], defaults: Mapping[str, Any] | None = None) -> None:
    """Refuse to resume a run whose settings differ from `run_dir/config.yaml` (if there is one).

    config: `to_dict` of the new settings. defaults: values of settings that did not exist when the run began. A name in
    `MAY_CHANGE` covers its dotted key and everything below it. Raises `UserError` that lists the keys with both values.
    """
    path = Path(run_dir) / "config.yaml"
    if not path.is_file():
        return
    before, now = flatten(read_yaml(path)), flatten(config)
    before = {key: value for key, value in flatten(dict(defaults or {})).items() if key in now} | before
    changed = [
        f"{key} {before.get(key, 'absent')!r} -> {now.get(key, 'absent')!r}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key, "absent") != now.get(key, "absent") and not any(key == a or key.startswith(a + ".") for a in MAY_CHANGE)
    ]
    if changed:
        raise UserError(f"run {run_dir} was started with other settings: {'; '.join(changed)}; restore them or choose another `out`")


# ----------------------------------------------------------------------------------------------------------------- files


def _folders(run_dir: Path) -> list[Path]:
    """Finished checkpoint folders: the one that `latest` names, then the others from the newest to the oldest."""
    if not run_dir.is_dir():
        return []
    found = {p: m for p in run_dir.iterdir() if p.is_dir() and (m := _FOLDER.fullmatch(p.name))}
    pointer = run_dir / LATEST
    latest = pointer.read_text(encoding="utf-8", errors="replace").strip() if pointer.is_file() else ""
    return sorted(found, key=lambda p: (p.name == latest, int(found[p][1]), found[p][2] is None), reverse=True)


def step_of(path: Path) -> int:
    """The step in a folder's name."""
    return int(_FOLDER.fullmatch(path.name)[1])


def _seal(path: Path) -> dict[str, Any]:
    """Sync a file to disk; its size and hash."""
    sync_to_disk(path)
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}

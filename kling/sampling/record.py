"""The record of a video: a JSON beside it, FILE.json (`a.mp4.json`, `a.gif.json`), from which it can be made again and compared.

    {"kling", "command", "request", "settings", "model": {"path", "sha256"}, "inputs": {file: sha256},
     "machine": {"torch", ..., "device", "threads"}, "output": {"path", "format", "fps", "seconds"}, "frames": {"shape", "sha256", "each"}}

Settings are the plan's, with the checkpoint's defaults filled in. Paths of inputs are absolute.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kling import __version__
from kling.cameras.axes import WORDS
from kling.errors import UserError
from kling.runtime.files import head, parse_json, sha256, written
from kling.runtime.versions import versions
from kling.sampling.brush import tracks_of
from kling.sampling.request import Request

Record = dict[str, Any]
# Goes up when the same request and settings give other frames. 1 (not written down): nothing pasted back around a mask. 2: noise of the
# clip changed with the number of appended frames (keyframes, references), and `frame_delay` counted them as later frames. 3: the decoder
# remembered the shot before a cut, nothing faded after a join, and a camera that only the prompt says was never read.
RECIPE = 4
NEEDED = {  # part -> what of it is read, and what that is
    "request": {"keyframes": list},
    "settings": {},
    "model": {"path": str, "sha256": dict},
    "inputs": {},
    "machine": {"threads": int},
    "output": {"format": str, "fps": int | float},
    "frames": {"sha256": str, "each": str},
}
THREADS = 4096  # more than any machine gives a process


def make_record(request: Request, plan: Any, model: Record, device: torch.device, frames: np.ndarray, dtype: str, **more: Any) -> Record:
    """Everything that determines the frames of `request` (one video): uint8 (T, H, W, 3).

    dtype: short name of the transformer's dtype. more: other entries to keep.
    """
    return {
        "kling": __version__,
        "recipe": RECIPE,
        "request": dataclasses.asdict(request),
        "settings": settings(plan),
        "model": model,
        "inputs": input_hashes(request),
        "machine": machine(device) | {"dtype": dtype},
        "frames": frame_hashes(frames),
        **more,
    }


def write_record(path: str | Path, record: Record) -> None:
    with written(path) as temporary:
        temporary.write_text(json.dumps(record, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def record_path(output: Path) -> Path:
    """The path of the record of a file, or of a folder of frames."""
    return output.with_name(f"{output.name}.json")


def find_record(output: Path) -> Path | None:
    """The record of a file, or one of an earlier version (`a.json` for `a.mp4`) if it belongs to this file. None if there is none."""
    if (path := record_path(output)).is_file():
        return path
    earlier = output.with_suffix(".json")
    with suppress(UserError):
        if earlier.is_file() and Path(read_record(earlier)["output"].get("path", output)).name == output.name:
            return earlier
    return None


def read_record(path: str | Path) -> Record:
    """Read a record from its file. Raises `UserError` if it is none."""
    head(Path(path))
    try:
        record = parse_json(Path(path).read_text(encoding="utf-8"))
        parts = all(isinstance(record[part], dict) for part in NEEDED)
        fields = all(isinstance(record[part][name], kind) for part, names in NEEDED.items() for name, kind in names.items())
        if parts and fields and 1 <= record["machine"]["threads"] <= THREADS and isinstance(record["machine"].get("dtype", ""), str):
            return record
    except (ValueError, KeyError, TypeError):
        pass
    raise UserError(f"{path} is not the JSON that kling-sample writes beside a video: give that one")


def request_of(record: Record, source: str) -> Request:
    """The request of a record, after checking that its input files are still the same. `source` names the record in errors."""
    recipe = record.get("recipe", 1)
    fields = record["request"] if recipe > 1 else _as_understood_then(record["request"])
    if recipe < 4 and fields.get("camera") is None and not fields.get("shots"):
        fields = fields | {"camera": WORDS}
    names = {field.name for field in dataclasses.fields(Request)}
    if other := [name for name in fields if name not in names]:
        raise UserError(f"{source} was written by kling {record.get('kling')}, whose requests have '{other[0]}': use that version")
    request = Request(**fields)
    for path, digest in record["inputs"].items():
        if input_hash(Path(path)) != digest:
            raise UserError(f"{path} is not the file that {source} was made from: put that one back")
    return request


def _as_understood_then(fields: Record) -> Record:
    """A request of recipe 1 without fields that it accepted but ignored: later versions use or refuse them."""
    fields = dict(fields)
    if fields.get("video") and any(fields.get(name) is not None for name in ("strength", "mask", "outpaint")):
        fields |= {"duration": None, "num_frames": None, "extend_to": None}
    if fields.get("video"):
        fields |= {"last_image": None, "keyframes": []}
        if fields.get("extend_to"):
            fields |= {"duration": None, "num_frames": None}
    if fields.get("outpaint"):
        fields |= {"aspect": None} if fields.get("video") else {"aspect": fields["outpaint"], "outpaint": None}
    if not fields.get("camera"):
        fields |= {"camera_scale": 1.0}
    return fields


def check_same_model(record: Record, model: Record, source: str) -> None:
    """Raise `UserError` for another model, naming the first file that differs."""
    old, new = record["model"]["sha256"], model["sha256"]
    if changed := [name for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)]:
        raise UserError(f"model {model['path']} is not that of {source}, {changed[0]} differs: give the same one with --model")


def check_same_settings(record: Record, plan: Any, source: str) -> None:
    """Raise `UserError` if this version of the code would use other settings than the recorded ones."""
    now = settings(plan)
    for name, value in record["settings"].items():
        if now.get(name) != value:
            raise UserError(f"{source} was made with {name} {value}, but kling {__version__} takes {now.get(name)}: use the same version")


def difference(old: Record, new: Record) -> str | None:
    """None if the frames are identical; else which frames differ, and how the machine differs."""
    if old["frames"]["sha256"] == new["frames"]["sha256"]:
        return None
    then, now = (record["frames"]["each"].split() for record in (old, new))
    other = [t for t, (a, b) in enumerate(zip_longest(then, now)) if a != b]
    before, after = ({**record["machine"], "recipe": record.get("recipe", 1)} for record in (old, new))
    changed = [f"{name} {before.get(name)} -> {value}" for name, value in after.items() if before.get(name) != value]
    frames = f"{len(other)} of {len(now)} frames, the first is {min(other, default=0)}"
    return f"{frames} ({', '.join(changed) or 'same versions, device and threads'})"


def doubts(record: Record, device: torch.device, dtype: str) -> str | None:
    """Why this machine may not reproduce a record exactly: how it differs; None if it does not."""
    now, then = machine(device) | {"dtype": dtype}, record["machine"]
    other = [name for name in ("torch", "device", "threads", "dtype") if name in then and then[name] != now[name]]
    return ", ".join(f"{name} {then[name]} -> {now[name]}" for name in other) or None


def settings(plan: Any) -> Record:
    """The plain values of a plan, with defaults filled in."""
    return {"frames": plan.frames} | {name: value for name, value in vars(plan).items() if isinstance(value, int | float | str)}


def frame_hashes(frames: np.ndarray) -> Record:
    """Hashes of raw uint8 (T, H, W, 3): SHA-256 of all, and 8 digits for each frame."""
    each = [hashlib.sha256(np.ascontiguousarray(frame)).hexdigest()[:8] for frame in frames]
    return {"shape": list(frames.shape), "sha256": hashlib.sha256(np.ascontiguousarray(frames)).hexdigest(), "each": " ".join(each)}


def model_hashes(folder: Path, others: Sequence[Path] = ()) -> Record:
    """A model folder with the SHA-256 of its weights and configs, and of files from elsewhere."""
    files = sorted(path for path in folder.rglob("*") if path.suffix in (".safetensors", ".json"))
    hashes = {str(path.relative_to(folder)): input_hash(path) for path in files}
    return {"path": str(folder.absolute()), "sha256": hashes | {str(path): input_hash(path) for path in others}}


def input_hashes(request: Request) -> dict[str, str]:
    """Every file that the request reads, and its SHA-256. Raises `UserError` for a missing, empty or unreadable one."""
    return {str(path): input_hash(path) for path in _input_files(request)}


def _input_files(request: Request) -> Iterator[Path]:
    for given in (
        request.image,
        request.last_image,
        *(picture for picture, _, _ in request.keyframes),
        request.video,
        request.control,
        request.mask,
        *request.references,
        *(track.mask for track in tracks_of(request.tracks)),
        *([request.shots] if isinstance(request.shots, str) else []),
        *([request.tracks] if isinstance(request.tracks, str) else []),
    ):
        if isinstance(given, str | Path):
            yield Path(given)
    for camera in (request.camera, *(shot.camera for shot in request.storyboard)):
        if isinstance(camera, str) and Path(camera).is_file():
            yield Path(camera)


def machine(device: torch.device) -> Record:
    """What affects the last bit apart from the model and the request. Threads split sums, which changes rounding."""
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} {torch.backends.cpu.get_cpu_capability()}"
    return {
        "python": platform.python_version(),
        **versions("torch", "diffusers", "numpy", "av"),
        "device": kind,
        "threads": torch.get_num_threads(),
    }


def input_hash(path: Path) -> str:
    """SHA-256 of a file. Raises `UserError` if it is missing, empty or unreadable."""
    head(path)
    blob = path.resolve()
    if blob.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", blob.name):
        return blob.name  # the hub's cache names large files by their SHA-256
    return sha256(path)

"""Restores the form from a replay JSON, or from a video that contains one or is still on the shelf."""

from __future__ import annotations

import dataclasses
import json
import re
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import av
from kling_programs.sample.studio.form import canvas_size

from kling.cameras.axes import UNITS, WORDS, parse_axes
from kling.errors import UserError
from kling.runtime.files import head, sniff
from kling.sampling.record import input_hash, read_record
from kling.sampling.request import Request

if TYPE_CHECKING:
    from kling_programs.sample.studio.shelf import Shelf
    from kling_programs.sample.studio.studio import Studio

MAX_JSON = 4 * 2**20  # bytes
NAMES, NAME = 6, 40  # names in a remark, and characters of one
SAME = (  # fields of the page with the same names as the request's
    *("prompt", "negative_prompt", "loop", "strength", "outpaint", "camera_scale", "aspect", "extend_to", "mode"),
    *("num_inference_steps", "guidance_scale", "shift", "sigma_c", "seed"),
    *("camera_guidance_scale", "brush_guidance_scale", "reference_guidance_scale"),
)
FILES = ("image", "last_image", "video", "mask")
Remarks = list[tuple[str, dict[str, Any]]]  # words of the page, and their values


def record_at(path: Path, name: str, shelf: Shelf) -> dict[str, Any]:
    """The record in a file, inside a video, or of a video on the shelf. Raises `UserError` if there is none."""
    refusal = UserError(f"{name} says nothing about how it was made", code="not_a_record", file=name)
    demuxer, _ = sniff(head(path))
    if demuxer is None and path.suffix.lower() not in (".png", ".gif"):
        if path.stat().st_size > MAX_JSON:
            raise refusal
        try:
            return read_record(path)
        except (UserError, RecursionError):
            raise refusal from None
    try:
        if demuxer:
            with av.open(f"file:{path}", format=demuxer, metadata_errors="replace") as container:
                carried = list(container.metadata.values())
            for text in carried:
                if text.lstrip().startswith("{") and len(text) <= MAX_JSON and (record := _parsed(text)):
                    return record
    except (av.FFmpegError, OSError):
        pass
    digest = input_hash(path)
    for one in shelf.results():  # downloaded from here, and possibly renamed
        if one.path.stat().st_size == path.stat().st_size and input_hash(one.path) == digest:
            return one.record
    raise refusal


def _parsed(text: str) -> dict[str, Any] | None:
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):
        return None
    record = record.get("kling_record", record) if isinstance(record, dict) else None
    return record if isinstance(record, dict) and isinstance(record.get("request"), dict) and "keyframes" in record["request"] else None


def fields_of(record: dict[str, Any], studio: Studio) -> tuple[dict[str, Any], Remarks]:
    """(fields of the page, remarks). Files are looked up in the store; others that the record names must be uploaded again."""
    asked = record["request"]
    defaults = {field.name: field.default for field in dataclasses.fields(Request)}
    fields: dict[str, Any] = {name: asked.get(name, defaults[name]) for name in SAME}
    fields |= {
        "aspect": asked.get("aspect") or "auto",
        "num_videos": asked.get("num_videos") or 1,
        "lora_scale": 1.0,
        "model": "",
        "lora": "",
    }
    fields |= {name: fields[name] or 0 for name in SAME if name in ("num_inference_steps", "shift", "extend_to") or "guidance" in name}
    fields["negative_prompt"] = fields["negative_prompt"] or ""
    missing: list[str] = []

    def file(value: Any) -> str | None:
        if value is None:
            return None
        path = Path(str(value))
        digest = str((record.get("inputs") or {}).get(str(value), ""))
        for kept in (path, *(studio.uploads.store.glob(f"{digest[:24]}*") if re.fullmatch("[0-9a-f]{64}", digest) else ())):
            if kept.parent == studio.uploads.store:
                with suppress(UserError):
                    return str(studio.uploads.place(str(kept)))
        missing.append(path.name)
        return None

    fields |= {name: file(asked.get(name)) for name in FILES}
    rows = [(file(picture), t, strength) for picture, t, strength in asked.get("keyframes") or []]
    fields["keyframes"] = [{"file": f, "frame": t, "strength": strength} for f, t, strength in rows if f]
    fields["references"] = [kept for picture in asked.get("references") or [] if (kept := file(picture))]
    chosen = [use for use, name in (("restyle", "strength"), ("fill", "mask"), ("outpaint", "outpaint")) if asked.get(name) is not None]
    fields["use"] = chosen[0] if chosen else "continue"
    fields |= dict.fromkeys(UNITS, 0) | _camera(asked.get("camera"), file)
    fps = studio.pipe.config.fps
    frames = asked.get("num_frames")
    fields["still"] = frames == 1
    fields["duration"] = asked.get("duration") or ((frames - 1) / fps if isinstance(frames, int) and frames > 1 else None)
    if fields["duration"] is None:
        del fields["duration"]
    drawn = _drawn(asked.get("tracks"), fields, studio)
    fields |= {"brush_guidance_scale": 0} if drawn is None else {"tracks": drawn}
    story = _story(asked.get("shots"))
    fields |= {} if story is None else {"shots": story}
    remarks: Remarks = []
    if missing:
        remarks.append(("again", {"names": _some(missing)}))
    shown = {*fields, *SAME, *FILES, "keyframes", "references", "camera", "num_frames", "num_videos", "duration"}
    if asked.get("camera") == WORDS:  # the page reads it from the prompt
        shown -= {"camera"}
    others = [name for name, value in asked.items() if name not in shown and value not in (defaults.get(name), None)]
    if others:
        remarks.append(("elsewhere", {"names": _some(others)}))
    weights = studio.weights_from(record)
    if weights is None:
        remarks.append(("other_model", {}))
    else:
        fields |= {"model": weights.model, "lora": weights.lora, "lora_scale": weights.scale}
    return fields, remarks


def _some(names: list[str]) -> str:
    """The first names of a list, which a file may make as long as it likes."""
    return ", ".join(name[:NAME] for name in names[:NAMES]) + (" …" if len(names) > NAMES else "")


def _drawn(tracks: Any, fields: dict[str, Any], studio: Studio) -> list[dict[str, Any]] | None:
    """Tracks without masks as the page's arrows; None for others, which it cannot show."""
    if not tracks:
        return []
    if not isinstance(tracks, list) or any(track["mask"] is not None for track in tracks):
        return None
    H, W = canvas_size(fields, studio.uploads)
    return [{"points": [[(x + 0.5) / W, (y + 0.5) / H] for x, y in track["points"]]} for track in tracks]


def _story(shots: Any) -> list[dict[str, Any]] | None:
    """Shots as the page's rows; None for those of a file or with a camera file, which it cannot show."""
    if not shots:
        return []
    if not isinstance(shots, list) or any(not isinstance(shot["camera"], str | None) or "." in (shot["camera"] or "") for shot in shots):
        return None
    return [{"prompt": shot["prompt"], "seconds": shot["seconds"], "camera": shot["camera"] or ""} for shot in shots]


def _camera(camera: Any, file: Any) -> dict[str, Any]:
    """The camera as values of the page's sliders, or as the trajectory file."""
    if isinstance(camera, dict):
        return {name: value for name, value in camera.items() if isinstance(value, int | float)}
    if not isinstance(camera, str):
        return {"camera_file": None}
    if camera.endswith((".txt", ".json")):
        return {"camera_file": file(camera)}
    try:
        return {"camera_file": None} | parse_axes(camera)
    except UserError:
        return {"camera_file": None}

"""OpenAI's `/v1/videos`, which vLLM and SGLang serve too: `create`, `retrieve`, `list`, `delete`, `content`."""

from __future__ import annotations

from typing import Any

from kling_programs.sample.server.desk import EXTENSIONS, Ask, Desk
from kling_programs.sample.server.store import DAY, DONE, FAILED, RUNNING, WAITING, Task
from pydantic import BaseModel, ConfigDict, Field

from kling.errors import UserError, unknown
from kling.shapes import ASPECTS, nearest_aspect

STATUS = {WAITING: "queued", RUNNING: "in_progress", DONE: "completed", FAILED: "failed"}
NAMES = {"duration": "seconds", "image": "input_reference"}
SIZES = ("720x1280", "1280x720", "1024x1792", "1792x1024")  # theirs, which stand for an aspect where the model lacks them
WHOLE = ("seed", "num_inference_steps", "num_frames")
NUMBERS = ("guidance_scale", "shift", "camera_scale", "sigma_c", "brush_guidance_scale", "reference_guidance_scale")
OWN = ("model", "prompt", "seconds", "size", "negative_prompt", "input_reference", "mode", *EXTENSIONS)


class Body(BaseModel):
    """As JSON or as a form, whose numbers are text. Fields after `size` are ours, or vLLM's."""

    model_config = ConfigDict(extra="allow")

    prompt: str
    model: str | None = None
    seconds: str | int | float | None = None
    size: str | None = Field(None, description="WIDTHxHEIGHT of the model; one of OpenAI's own sizes stands for its aspect")
    input_reference: Any = Field(None, description="the first frame: a file in a form, or {'image_url': URL or data URL}")
    negative_prompt: str | None = None
    mode: str = "std"


def read(desk: Desk, form: dict[str, Any], base: str) -> Ask:
    """What a form or a JSON object asks for; a file in it is bytes. Raises `UserError`."""
    for name in form:
        if name not in OWN:
            raise unknown("field", name, OWN)
    if not isinstance(form.get("prompt"), str) or not form["prompt"]:
        raise UserError("prompt is empty: say what the video shows")
    model = form.get("model")
    if model is not None and not str(model).startswith("sora-"):
        desk.check_name(str(model), "model")
    fields: dict[str, Any] = {"prompt": form["prompt"], "mode": form.get("mode", "std")}
    if form.get("negative_prompt"):
        fields["negative_prompt"] = form["negative_prompt"]
    if form.get("seconds") is not None:
        fields["duration"] = _number("seconds", form["seconds"], float)
    for name in EXTENSIONS:
        if name != "size" and form.get(name) is not None:
            kind = int if name in WHOLE else float if name in NUMBERS else None
            fields[name] = _number(name, form[name], kind) if kind else form[name]
    if fields.get("loop") in ("true", "false"):
        fields["loop"] = fields["loop"] == "true"
    if size := form.get("size"):
        sizes = desk.pipe.config.get("sizes") or ASPECTS
        own = {f"{w}x{h}" for h, w in sizes.values()}
        width, _, height = str(size).partition("x")
        fields |= {"aspect": nearest_aspect(int(height), int(width))} if size in SIZES and size not in own else {"size": str(size)}
    pictures, given = {}, form.get("input_reference")
    if isinstance(given, dict):
        if not isinstance(given.get("image_url"), str) or len(given) != 1:
            raise UserError("input_reference: give {'image_url': URL or data URL}, or a file in a form")
        given = given["image_url"]
    if given is not None:
        if not isinstance(given, str | bytes):
            raise UserError("input_reference: give a file in a form, or {'image_url': URL or data URL}")
        pictures["image"] = given.partition(",")[2] if isinstance(given, str) and given.startswith("data:") else given
    sent = {name: value if not isinstance(value, bytes) else f"{len(value)} bytes" for name, value in form.items()}
    return Ask("image2video" if pictures else "text2video", fields, pictures, base=base, body=sent, names=NAMES)


def _number(name: str, value: Any, kind: type) -> int | float:
    try:
        if isinstance(value, bool) or (kind is int and isinstance(value, float) and value != int(value)):
            raise ValueError
        return kind(value)
    except (TypeError, ValueError, OverflowError):  # infinity is no whole number
        raise UserError(f"{name} {str(value)[:20]!r} is no {'whole number' if kind is int else 'number'}: give one") from None


def task_data(task: Task, desk: Desk) -> dict[str, Any]:
    """A task as OpenAI tells a video; times are whole seconds."""
    done = task.status == DONE
    share = 100 if done else round(100 * task.step / task.steps) if task.steps else 0
    data: dict[str, Any] = {
        "id": task.id, "object": "video", "model": desk.name, "status": STATUS[task.status], "progress": share,
        "prompt": task.request["prompt"],
        "created_at": int(task.created), "completed_at": int(task.finished) if done else None,
        "expires_at": int(task.finished + desk.store.limits.days * DAY) if done else None,
        "seconds": f"{task.made['seconds']:g}" if done else str(task.asked.get("seconds", "")), "seed": task.seed,
        "size": f"{task.made['width']}x{task.made['height']}" if done else str(task.asked.get("size", "")), "remixed_from_video_id": None,
        "error": {"code": "failed", "message": task.message} if task.status == FAILED else None,
    }  # fmt: skip
    return data

"""Kling's newer wire: `POST /text-to-video/MODEL`, `POST /image-to-video/MODEL`, and `GET /tasks`. Written after what public clients of it
send and read."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from kling_programs.sample.server.classic import Number, Whole, read_camera, seconds_of, video_data
from kling_programs.sample.server.desk import EXTENSIONS, Ask, Desk
from kling_programs.sample.server.store import DONE, Task
from kling_programs.sample.server.wire import Shape
from pydantic import Field

from kling.errors import UserError, unknown

KINDS = {"text-to-video": "text2video", "image-to-video": "image2video"}
NAMES = {"image": "first_frame", "last_image": "last_frame", "aspect": "settings.aspect_ratio", "duration": "settings.duration"}
STATUS = {DONE: "succeeded"}
FRAMES = {"first_frame": "image", "last_frame": "last_image"}
RESOLUTIONS = ("720p", "1080p", "4k")


class Content(Shape):
    type: str = Field(description="prompt, first_frame or last_frame")
    text: str | None = None
    url: str | None = Field(None, description="a URL, or base64")


class Settings(Shape):
    """Fields after `multi_shot` are ours."""

    resolution: str | None = Field(None, description="accepted and told: the model has sizes of its own")
    aspect_ratio: str | None = None
    duration: Whole | Number | None = None
    audio: Literal["off", "native"] = "off"
    multi_shot: bool = False
    mode: Literal["std", "pro", "fast"] = "std"
    camera_control: dict[str, Any] | None = None
    seed: Whole | None = None
    num_inference_steps: Whole | None = None
    guidance_scale: Number | None = None
    solver: str | None = None
    shift: Number | None = None
    size: str | None = None
    loop: bool = False
    num_frames: Whole | None = None
    camera_scale: Number | None = None
    sigma_c: Number | None = None
    brush_guidance_scale: Number | None = None
    reference_guidance_scale: Number | None = None


class Options(Shape):
    callback_url: str | None = None
    external_task_id: str | None = None
    watermark_info: dict[str, Any] | None = None


class Body(Shape):
    prompt: Annotated[str, Field(max_length=3072)] | None = None
    negative_prompt: Annotated[str, Field(max_length=2500)] | None = None
    contents: list[Content] | None = None
    settings: Settings = Settings()
    options: Options = Options()


def read(desk: Desk, path: str, model: str, body: Body, base: str) -> Ask:
    """What a body asks for. Raises `UserError`."""
    desk.check_name(model, "model")
    settings, options = body.settings, body.options
    if settings.audio != "off":
        desk.need("sound", "settings.audio")
    if settings.multi_shot:
        desk.need("shots", "settings.multi_shot")
        raise UserError("settings.multi_shot: no words of single shots are known on this path: use multi_prompt of /v1/videos/text2video")
    if settings.resolution not in (None, *RESOLUTIONS):
        raise unknown("settings.resolution", settings.resolution, RESOLUTIONS)
    if (options.watermark_info or {}).get("enabled"):
        raise UserError("options.watermark_info.enabled is true: this server adds no watermark: leave it out")
    fields: dict[str, Any] = {name: value for name in EXTENSIONS if (value := getattr(settings, name)) is not None and value is not False}
    fields |= {"prompt": body.prompt or "", "mode": settings.mode}
    fields |= {ours: value for ours, value in (("aspect", settings.aspect_ratio), ("negative_prompt", body.negative_prompt)) if value}
    if (duration := seconds_of(settings.duration, strict=False)) is not None:
        fields["duration"] = duration
    if settings.camera_control is not None:
        fields["camera"] = read_camera(desk, settings.camera_control)
    pictures: dict[str, str] = {}
    for content in body.contents or []:
        if content.type == "prompt":
            if fields["prompt"]:
                raise UserError("contents has a prompt beside another one: give one")
            fields["prompt"] = content.text or ""
        elif content.type not in FRAMES:
            raise unknown("type in contents", content.type, ["prompt", *FRAMES])
        elif not content.url or FRAMES[content.type] in pictures:
            raise UserError(f"contents needs one {content.type} with a url: give a URL or base64, once")
        else:
            pictures[FRAMES[content.type]] = content.url
    if path == "text-to-video" and pictures:
        raise UserError("contents has pictures: use /image-to-video")
    if path == "image-to-video" and not pictures:
        raise UserError("contents has no first_frame and no last_frame: give one, or use /text-to-video")
    if path == "text-to-video" and not fields["prompt"]:
        raise UserError("prompt is empty: say what the video shows")
    sent = body.model_dump(exclude_unset=True)
    return Ask(
        KINDS[path], fields, pictures, external=options.external_task_id or None, callback=options.callback_url or None, base=base,
        body=sent, names=NAMES,
    )  # fmt: skip


def task_data(task: Task, url: str) -> dict[str, Any]:
    """A task as this wire tells it."""
    data: dict[str, Any] = {
        "id": task.id,
        "status": STATUS.get(task.status, task.status),
        "message": task.message,
        "create_time": round(task.created * 1000),
        "update_time": round(task.updated * 1000),
    }
    if task.external:
        data["external_id"] = task.external
    if task.status == DONE:
        data["outputs"] = [{"type": "video", **video_data(task, url)}]
    return data

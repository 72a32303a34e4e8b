"""Kling's classic wire: `POST /v1/videos/text2video` and its siblings, their queries and lists."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from kling_programs.sample.server.desk import EXTENSIONS, Ask, Desk
from kling_programs.sample.server.store import DONE, Task
from kling_programs.sample.server.wire import Shape
from pydantic import Field

from kling.cameras.kling_http import axes_from_wire
from kling.errors import UserError

KINDS = ("text2video", "image2video", "multi-image2video", "video-extend")
NAMES = {"last_image": "image_tail", "aspect": "aspect_ratio", "references": "image_list"}  # ours -> theirs
NEUTRAL = {"sound": "off", "multi_shot": False}  # what says nothing, where that is not null or empty
# Fields for which a model must have been trained, and for what.
TRAINED = {
    "static_mask": "brush", "dynamic_masks": "brush", "multi_shot": "shots", "shot_type": "shots", "multi_prompt": "shots",
    "sound": "sound", "voice_list": "sound", "element_list": "reference", "image_list": "reference",
}  # fmt: skip

Text = Annotated[str, Field(max_length=2500)]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Whole = Annotated[int, Field(strict=True)]


class Body(Shape):
    """What all of them take. Fields after `watermark_info` are ours."""

    model_name: str | None = Field(None, description="any of Kling's names, or this model's own: the server has one model")
    model: str | None = Field(None, description="the earlier name of model_name")
    prompt: Text | None = None
    negative_prompt: Text | None = None
    cfg_scale: Annotated[float, Field(strict=True, ge=0, le=1)] = Field(0.5, description="0.5 is the checkpoint's own guidance, 0 none")
    mode: Literal["std", "pro", "fast"] = Field("std", description="fast is ours")
    duration: str | Whole | Number | None = Field(None, description="seconds, as text: '5'")
    camera_control: dict[str, Any] | None = None
    callback_url: str | None = None
    external_task_id: str | None = Field(None, description="the same one again returns the first task")
    watermark_info: dict[str, Any] | None = None
    sound: Literal["on", "off"] = "off"
    multi_shot: bool = False
    shot_type: str | None = None
    multi_prompt: list[dict[str, Any]] | None = None
    voice_list: list[Any] | None = None
    element_list: list[Any] | None = None
    seed: Whole | None = Field(None, description="0 to 4294967295; drawn if it is missing, and told in the result")
    num_inference_steps: Whole | None = None
    guidance_scale: Number | None = Field(None, description="instead of cfg_scale")
    solver: str | None = None
    shift: Number | None = None
    size: str | None = Field(None, description="WIDTHxHEIGHT, instead of an aspect ratio")
    loop: bool = False
    num_frames: Whole | None = Field(None, description="1 + 4k, instead of duration")
    camera_scale: Number | None = None
    sigma_c: Number | None = None
    brush_guidance_scale: Number | None = None
    reference_guidance_scale: Number | None = None


class Text2Video(Body):
    aspect_ratio: str | None = Field(None, description="16:9, 9:16 or 1:1")


class Image2Video(Text2Video):
    image: str | None = Field(None, description="the first frame: a URL, or base64")
    image_tail: str | None = Field(None, description="the last frame, alone or with the first")
    static_mask: str | None = None
    dynamic_masks: list[dict[str, Any]] | None = None


class MultiImage2Video(Text2Video):
    image_list: list[dict[str, Any]] | None = Field(None, description="up to 4 things, each {'image': URL or base64}, to which words point")


class VideoExtend(Body):
    video_id: str | None = Field(None, description="of a result, or its task")
    task_id: str | None = Field(None, description="instead of video_id")


BODIES: dict[str, type[Body]] = {
    "text2video": Text2Video, "image2video": Image2Video, "multi-image2video": MultiImage2Video, "video-extend": VideoExtend,
}  # fmt: skip


def read(desk: Desk, kind: str, body: Body, base: str) -> Ask:
    """What a body asks for. Raises `UserError` for what Kling, in strict mode, or the model does not know."""
    sent = body.model_dump(exclude_unset=True)
    _check_known(desk, body)
    if kind == "multi-image2video":
        desk.need("reference", "image_list")
        if not body.image_list or any(row.keys() != {"image"} or not isinstance(row["image"], str) for row in body.image_list):
            raise UserError("image_list: give a list of {'image': a URL or base64}")
    fields: dict[str, Any] = {name: value for name in EXTENSIONS if (value := getattr(body, name)) is not None and value is not False}
    fields |= {"prompt": body.prompt or "", "mode": body.mode}
    if body.negative_prompt:
        fields["negative_prompt"] = body.negative_prompt
    if (duration := seconds_of(body.duration, desk.rules.strict)) is not None:
        fields["duration"] = duration
    if (guidance := desk.guidance(body.cfg_scale)) is not None:
        if body.guidance_scale is not None:
            raise UserError(f"both cfg_scale {body.cfg_scale:g} and guidance_scale {body.guidance_scale:g} were given: give one of them")
        fields["guidance_scale"] = guidance
    if body.camera_control is not None:
        fields["camera"] = read_camera(desk, body.camera_control)
    if getattr(body, "aspect_ratio", None):
        fields["aspect"] = body.aspect_ratio
    pictures, brush, video = {}, {}, None
    if isinstance(body, Image2Video):
        pictures = {ours: given for ours, given in (("image", body.image), ("last_image", body.image_tail)) if given}
        if not pictures:
            raise UserError("image and image_tail are empty: give one of them, or use text2video")
        brush = {name: sent[name] for name in ("static_mask", "dynamic_masks") if sent.get(name)}
        extras = {"image_tail": body.image_tail, "camera_control": body.camera_control, next(iter(brush), ""): brush}
        given = [name for name, value in extras.items() if value]
        if desk.rules.strict and len(given) > 1:
            raise UserError(f"{' and '.join(given)} were given: leave one of them out")
    elif isinstance(body, VideoExtend):
        video = _named(body)
    elif not body.prompt and not body.multi_prompt:
        raise UserError("prompt is empty: say what the video shows")
    if body.multi_shot or body.multi_prompt or body.shot_type:
        fields["shots"] = read_shots(body, fields.pop("duration", None))
    return Ask(
        kind, fields, pictures, references=[row["image"] for row in getattr(body, "image_list", None) or []], brush=brush, video=video,
        external=body.external_task_id or None, callback=body.callback_url or None, base=base, body=sent, names=NAMES,
    )  # fmt: skip


def _check_known(desk: Desk, body: Body) -> None:
    if (name := body.model_name or body.model) is not None:
        desk.check_name(name)
    for name, capability in TRAINED.items():
        value = getattr(body, name, None)
        if value and value != NEUTRAL.get(name):
            desk.need(capability, name)
    if (body.watermark_info or {}).get("enabled"):
        raise UserError("watermark_info.enabled is true: this server adds no watermark: leave it out")
    if desk.rules.strict and body.mode == "fast":
        raise UserError("mode 'fast': choose from std, pro")


def seconds_of(given: str | float | None, strict: bool) -> float | None:
    """Seconds of a duration, which Kling writes as text."""
    if given is None or given == "":
        return None
    if strict and given not in [str(n) for n in range(3, 16)]:
        raise UserError(f"duration {given!r}: give '3' to '15', as text")
    try:
        return float(given)
    except (ValueError, OverflowError):  # whole numbers of hundreds of digits
        raise UserError(f"duration {str(given)[:20]!r} is no number of seconds: give some, such as '5'") from None


def read_shots(body: Body, duration: float | None) -> list[dict[str, Any]]:
    """The shots of `multi_prompt`, in the order of their index. Raises `UserError` unless their durations sum to `duration`, where it is
    given, and for shots that the model should invent itself."""
    if not body.multi_prompt or body.shot_type not in (None, "customize"):
        raise UserError(f"shot_type {body.shot_type or '(none)'}: give shot_type customize, and multi_prompt with the words of every shot")
    if body.multi_shot is False:
        raise UserError("multi_prompt was given without multi_shot: set multi_shot to true, or leave multi_prompt out")
    if body.prompt:
        raise UserError("both prompt and multi_prompt were given: every shot has its own prompt; leave prompt out")
    for row in body.multi_prompt:
        if set(row) != {"index", "prompt", "duration"} or type(row["index"]) is not int:
            raise UserError("multi_prompt: give index (a whole number), prompt and duration for every shot")
    rows = sorted(body.multi_prompt, key=lambda row: row["index"])
    shots = [{"prompt": row["prompt"], "seconds": seconds_of(str(row["duration"]), False)} for row in rows]
    if duration is not None and sum(shot["seconds"] for shot in shots) != duration:
        raise UserError(f"multi_prompt lasts {sum(shot['seconds'] for shot in shots):g} s and duration is {duration:g}: let them be equal")
    return shots


def read_camera(desk: Desk, control: dict[str, Any]) -> dict[str, float]:
    for name in control:
        if name not in ("type", "config"):
            raise UserError(f"camera_control has '{name}': give type, and config with type simple")
    if not isinstance(control.get("config") or {}, dict):
        raise UserError("camera_control.config is no object: give the six axes, such as pan")
    axes = axes_from_wire(control, desk.rules.convention)
    if desk.rules.strict and control.get("type") == "simple" and sum(map(bool, axes.values())) != 1:
        raise UserError(f"camera_control.config has {sum(map(bool, axes.values()))} axes that are not zero: give exactly one")
    return axes


def _named(body: VideoExtend) -> str:
    if bool(body.video_id) == bool(body.task_id):
        raise UserError("video_id names the video to continue: give it, or its task's task_id, and not both")
    return body.video_id or body.task_id


def task_data(task: Task, url: str, parent: Task | None = None, status: str | None = None) -> dict[str, Any]:
    """A task as Kling tells it. url: of the server. status: another than the task's, for a callback about an earlier one."""
    status = status or task.status
    info: dict[str, Any] = {"external_task_id": task.external} if task.external else {}
    if parent is not None:
        info["parent_video"] = video_data(parent, url)
    data: dict[str, Any] = {
        "task_id": task.id,
        "task_status": status,
        "task_status_msg": task.message if status == task.status else "",
        "task_info": info,
        "created_at": round(task.created * 1000),
        "updated_at": round(task.updated * 1000),
    }
    if status == DONE:
        data["task_result"] = {"videos": [video_data(task, url)]}
    return data


def video_data(task: Task, url: str) -> dict[str, Any]:
    """The result of a task. `seed` and `record` are ours."""
    return {
        "id": task.video,
        "url": f"{url}/files/{task.token}.{task.made['kind']}",
        "duration": f"{task.made['seconds']:g}",
        "seed": task.seed,
        "record": f"{url}/files/{task.token}.json",
    }

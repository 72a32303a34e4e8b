"""Converts the values from the page or a client to a `Request`, and checks what this model can do with it.

Values come as JSON and are all validated. Every error is one line that names the field.
"""

from __future__ import annotations

import re
import secrets
from typing import Any

from kling.cameras.axes import LIMIT, UNITS, WORDS, parse_axes
from kling.condition.state import MOST_REFERENCES
from kling.data.image import read_image
from kling.data.video import probe
from kling.errors import UserError, unknown
from kling.sampling.brush import MOST, Track
from kling.sampling.inputs import clip_size
from kling.sampling.pipeline import KlingPipeline
from kling.sampling.request import MODES, SHIFTS, Request
from kling.sampling.shots import KEYS, Shot
from kling.sampling.shots import MOST as MOST_SHOTS
from kling.shapes import ASPECTS

LARGEST = 10**15  # larger numbers are not printed in messages
MAX_VIDEOS = 8  # per request, made one after another
MAX_PROMPT = 2000  # characters
MAX_STEPS = 100
MAX_SECONDS = 60.0
MAX_KEYFRAMES = 8
MAX_POINTS = 200  # of a track
USES = ("continue", "restyle", "fill", "outpaint")  # ways to use a given video

# The fields of the page, in the order in which they are sent.
FIELDS = (
    *("prompt", "negative_prompt", "image", "last_image", "keyframes", "references", "loop"),
    *("video", "use", "strength", "mask", "outpaint"),
    *("tracks", "shots"),
    *UNITS,
    *("camera_file", "camera_scale", "camera_guidance_scale"),
    *("brush_guidance_scale", "reference_guidance_scale"),
    *("aspect", "duration", "extend_to", "still", "mode"),
    *("num_inference_steps", "guidance_scale", "shift", "sigma_c", "seed", "num_videos"),
    *("model", "lora", "lora_scale"),
)


def request_of(fields: dict[str, Any], uploads: Any) -> Request:
    """The request that the fields describe; uploads: `Uploads`, which accepts or deletes the files. Raises `UserError`."""
    unasked = {name: value for name, value in fields.items() if name not in FIELDS}
    if unasked:
        raise unknown("field", next(iter(unasked)), FIELDS)
    given = Fields(fields)
    video = uploads.accept(fields.get("video"), "video")
    use = given.choice("use", USES) or "continue"
    axes = {name: value for name in UNITS if (value := given.number(name, -LIMIT, LIMIT))}
    camera_file = uploads.accept(fields.get("camera_file"), "camera")
    if camera_file and axes:
        field = next(iter(axes))
        line = f"both a trajectory file and {field} were given: remove the file or set the sliders to 0"
        raise UserError(line, code="file_and_sliders", field=field)
    still = given.flag("still")
    goes_on = not video or use == "continue"  # otherwise the clip is as long as the video
    extend_to = (given.number("extend_to", 0, MAX_SECONDS) or None) if goes_on else None
    image = uploads.accept(fields.get("image"), "image")
    camera = camera_file or ",".join(f"{name}={value:g}" for name, value in axes.items()) or None
    shots = given.shots()
    return Request(
        prompt=given.text("prompt"),
        negative_prompt=given.text("negative_prompt") or None,  # the checkpoint's own
        image=image,
        last_image=uploads.accept(fields.get("last_image"), "image"),
        keyframes=[(uploads.accept(file, "image"), frame, strength) for file, frame, strength in given.keyframes()],
        references=[uploads.accept(file, "image") for file in given.references()],
        loop=given.flag("loop"),
        video=video,
        strength=given.number("strength", 0, 1) if video and use == "restyle" else None,
        mask=_mask(fields.get("mask"), uploads) if video and use == "fill" else None,
        outpaint=given.choice("outpaint", ASPECTS) if video and use == "outpaint" else None,
        tracks=_tracks(given, uploads, video, image) or None,
        camera=camera,
        shots=shots or None,
        camera_scale=given.number("camera_scale", 0, 10, 1.0) if camera or any(shot.camera for shot in shots) else 1.0,
        camera_guidance_scale=given.number("camera_guidance_scale", 0, 20) or None,
        brush_guidance_scale=given.number("brush_guidance_scale", 0, 20) or None,
        reference_guidance_scale=given.number("reference_guidance_scale", 0, 20) or None,
        aspect=given.choice("aspect", ASPECTS) if not video or use != "outpaint" else None,
        duration=None if still or shots or not goes_on or (video and extend_to) else given.number("duration", 0.1, MAX_SECONDS),
        num_frames=1 if still else None,
        extend_to=extend_to,
        mode=given.choice("mode", MODES) or "std",
        num_inference_steps=given.whole("num_inference_steps", 0, MAX_STEPS) or None,  # 0: the model's own
        guidance_scale=given.number("guidance_scale", 0, 50) or None,
        shift=_shift(given),
        sigma_c=given.number("sigma_c", 0, 0.99, 0.0),
        seed=seed_of(given.whole("seed", -1, 2**32 - 1)),
        num_videos=given.whole("num_videos", 1, MAX_VIDEOS) or 1,
    )


def _shift(given: Fields) -> float | None:
    """0 is the model's own."""
    if value := given.number("shift", 0, 50):
        check_number("shift", value, SHIFTS[0], 50)
    return value or None


def check_used(fields: dict[str, Any]) -> None:
    """Raises `UserError` for a value that belongs to another use of a clip. Not for the page, whose hidden parts send theirs."""
    for name, use in (("strength", "restyle"), ("mask", "fill"), ("outpaint", "outpaint")):
        if fields.get(name) is not None and (fields.get("use") != use or fields.get("video") is None):
            line = f"{name} was given without a video to {use}: give video and use='{use}' too, or leave {name} out"
            raise UserError(line, code="unused", field=name)


def seed_of(asked: int | None) -> int:
    """The requested seed; -1 draws a random one."""
    return secrets.randbelow(2**31) if asked == -1 else asked or 0


def apart(request: Request) -> list[Request]:
    """A request of several videos as one request each: seeds n, n + 1, …"""
    return [request.replace(seed=(request.seed + i) % 2**32, num_videos=1) for i in range(request.num_videos)]


def checked(name: str, value: Any) -> Any:
    """The value of a field other than a file, in a form that the page can show. Raises `UserError` for an invalid value."""
    given = Fields({name: value})
    if name in TEXTS:
        return given.text(name)
    if name in CHOICES:
        return given.choice(name, CHOICES[name]) or value
    if name in FLAGS:
        return given.flag(name)
    return check_number(name, value, -LIMIT, 2**32 - 1)


KINDS = {"image": "image", "last_image": "image", "video": "video", "camera_file": "camera"}  # of files
TEXTS = ("prompt", "negative_prompt", "model", "lora")
FLAGS = ("loop", "still")
CHOICES = {"use": USES, "outpaint": ASPECTS, "aspect": ASPECTS, "mode": MODES}


class Fields:
    """Reads values of a given type: absent, None and "" give the default; values of another type are refused."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.values = values

    def text(self, name: str) -> str:
        value = self._given(name)
        value = "" if value is None else value
        if not isinstance(value, str):
            raise UserError(f"{name} is not text: write it in words", code="not_text", field=name)
        if len(value) > MAX_PROMPT:
            line = f"{name} of {len(value)} characters: give at most {MAX_PROMPT}"
            raise UserError(line, code="text_too_long", field=name, n=len(value), most=MAX_PROMPT)
        if odd := re.search("[\ud800-\udfff]", value):
            line = f"{name} holds half a character (a lone surrogate) at place {odd.start() + 1}: delete it, or type it again"
            raise UserError(line, code="half_character", field=name, n=odd.start() + 1)
        return value

    def number(self, name: str, low: float, high: float, default: float | None = None) -> float | None:
        return check_number(name, self.values.get(name), low, high, default)

    def whole(self, name: str, low: int, high: int) -> int | None:
        value = self.number(name, low, high)
        if value is not None and value != int(value):
            raise UserError(f"{name} {value:g}: give a whole number", code="not_whole", field=name, value=f"{value:g}")
        return None if value is None else int(value)

    def flag(self, name: str) -> bool:
        value = self._given(name)
        if not isinstance(value, bool | None):
            raise UserError(f"{name}: give true or false", code="not_a_flag", field=name)
        return bool(value)

    def choice(self, name: str, choices: Any) -> str | None:
        value = self._given(name)
        if value is None or value == "auto":
            return None
        if not isinstance(value, str) or value not in choices:
            shown, offered = str(value)[:40], ", ".join(choices)
            raise UserError(str(unknown(name, shown, choices)), code="unknown_choice", field=name, value=shown, choices=offered)
        return value

    def keyframes(self) -> list[tuple[Any, int, float]]:
        """[{"file": upload, "frame": t, "strength": s}, …]"""
        found = []
        for row in self._rows("keyframes", MAX_KEYFRAMES, ("file", "frame", "strength")):
            frame = check_number("keyframe's frame", row.get("frame"), 0, 10_000)
            if not row.get("file"):
                raise UserError("keyframes: each needs a file", code="keyframe_without_picture")
            if frame is None or frame != int(frame):
                line = f"keyframe's frame {frame}: give a whole number"
                raise UserError(line, code="not_whole", field="keyframe's frame", value="" if frame is None else f"{frame:g}")
            found.append((row["file"], int(frame), check_number("keyframe's strength", row.get("strength"), 0.01, 1, 1.0)))
        return found

    def references(self) -> list[Any]:
        """Uploads, in order; the page's gallery has each as {"image": upload}."""
        rows = self._given("references")
        rows = [] if rows is None else rows
        if not isinstance(rows, list) or not all(isinstance(row, dict | str) and row for row in rows):
            raise UserError("references: give a list of pictures", code="not_a_list", field="references")
        if len(rows) > MOST_REFERENCES:
            line = f"{len(rows)} references were given: give at most {MOST_REFERENCES}"
            raise UserError(line, code="too_many_references", most=MOST_REFERENCES)
        return [row.get("image") or row if isinstance(row, dict) else row for row in rows]

    def tracks(self) -> list[tuple[Any, list[tuple[float, float]]]]:
        """[{"mask": upload or none, "points": [[x, y], …]}, …], x and y as shares of the first frame's width and height"""
        found = []
        for row in self._rows("tracks", MOST, ("mask", "points")):
            points = row.get("points") or []
            whole = isinstance(points, list) and all(isinstance(point, list) and len(point) == 2 for point in points)
            if not whole or len(points) > MAX_POINTS or not (points or row.get("mask")) or any(v in (None, "") for p in points for v in p):
                raise UserError(f"tracks: each needs a mask, or 1 to {MAX_POINTS} points [x, y]", code="no_track", most=MAX_POINTS)
            found.append((row.get("mask"), [tuple(check_number("a track's point", value, -2, 3) for value in p) for p in points]))
        return found

    def shots(self) -> list[Shot]:
        """[{"prompt": words, "seconds": s, "camera": axes or a master shot, "" for what its words say, "words" to leave it to these}, …]"""
        found = []
        for number, row in enumerate(self._rows("shots", MOST_SHOTS, KEYS), 1):
            words, camera = Fields(row).text("prompt"), row.get("camera")
            if camera not in (None, "", WORDS):  # never a file of the server
                try:
                    parse_axes(camera if isinstance(camera, str) else str(camera)[:40])
                except UserError as error:
                    raise UserError(f"shot {number}: {error}", code="shot_camera", number=number, value=str(camera)[:40]) from None
            if not words.strip():
                raise UserError(f"shot {number} has no words: say what it shows", code="wordless_shot", number=number)
            found.append(Shot(words, check_number("a shot's seconds", row.get("seconds"), 0.1, MAX_SECONDS, 2.5), camera or None))
        if (whole := sum(shot.seconds for shot in found)) > MAX_SECONDS:
            line = f"shots of {whole:g} s in all: give at most {MAX_SECONDS:g} s"
            raise UserError(line, code="shots_too_long", seconds=f"{whole:g}", most=f"{MAX_SECONDS:g}")
        return found

    def _given(self, name: str) -> Any:
        """The value of a field; None for "", which an empty component gives."""
        value = self.values.get(name)
        return None if isinstance(value, str) and not value else value

    def _rows(self, name: str, most: int, keys: tuple[str, ...]) -> list[dict[str, Any]]:
        """A list of at most `most` rows with these keys."""
        rows = self._given(name)
        rows = [] if rows is None else rows
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise UserError(f"{name}: give a list of rows with {', '.join(keys)}", code="not_a_list", field=name)
        if len(rows) > most:
            raise UserError(f"{len(rows)} {name} were given: give at most {most}", code=f"too_many_{name}", most=most)
        for row in rows:
            for key in row:
                if key not in keys:
                    raise unknown(f"key of {name}", key[:40], keys)
        return rows


def check_number(name: str, value: Any, low: float, high: float, default: float | None = None) -> float | None:
    """A finite number in [low, high]; text and booleans are not accepted."""
    if value is None or value == "":
        return default
    told = {"field": name, "low": f"{low:.10g}", "high": f"{high:.10g}"}
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value:
        raise UserError(f"{name} is not a number: give one from {told['low']} to {told['high']}", code="not_a_number", **told)
    if not low <= value <= high:  # a whole number may be too large to be a float
        shown = f"{value:g}" if abs(value) < LARGEST else "is out of range"
        raise UserError(f"{name} {shown}: give a number from {told['low']} to {told['high']}", code="out_of_range", value=shown, **told)
    return float(value)


def canvas_size(fields: dict[str, Any], uploads: Any) -> tuple[int, int]:
    """(H, W) of the picture on which tracks are drawn: the first frame as it was given, or the clip's without one."""
    given = Fields(fields)
    if video := uploads.accept(fields.get("video"), "video"):
        info = probe(video)
        return info.height, info.width
    if image := uploads.accept(fields.get("image"), "image"):
        return tuple(read_image(image).shape[:2])
    last = uploads.accept(fields.get("last_image"), "image")
    return clip_size(Request(aspect=given.choice("aspect", ASPECTS), last_image=last), uploads.sizes)


def _tracks(given: Fields, uploads: Any, video: str | None, image: str | None) -> list[Track]:
    rows = given.tracks()
    if not rows:
        return []
    H, W = canvas_size(given.values | {"video": video, "image": image}, uploads)
    return [Track(mask and mask_of(mask, uploads), [(x * W - 0.5, y * H - 0.5) for x, y in points]) for mask, points in rows]


def mask_of(value: Any, uploads: Any) -> str | None:
    """The stored file of a drawing or an upload."""
    return uploads.accept_drawing(value) if isinstance(value, str) and value.startswith("data:") else uploads.accept(value, "image")


def _mask(value: Any, uploads: Any) -> str:
    """A drawing of the page (a data URL), or an uploaded picture."""
    mask = mask_of(value, uploads)
    if mask is None:
        raise UserError("nothing is marked: paint over the area to regenerate", code="nothing_marked")
    return mask


# The parts of the page that depend on a capability of the checkpoint.
NEEDS = {
    "image": "image",
    "last_image": "last",
    "keyframes": "keyframes",
    "loop": "first_last",
    "continue": "continuation",
    "restyle": "restyle",
    "fill": "inpaint",
    "outpaint": "inpaint",
    "still": "text_to_image",
    "extend_to": "continuation",
    "camera": "camera",
    "tracks": "brush",
    "brush_guidance_scale": "brush",
    "shots": "shots",
    "references": "reference",
    "reference_guidance_scale": "reference",
}


def missing(pipe: KlingPipeline, name: str) -> str | None:
    """The capability that field or use `name` needs and this model lacks; None if it has it."""
    need = NEEDS.get(name)
    return None if need is None or need in pipe.config.capabilities else need

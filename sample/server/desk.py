"""Takes requests in, whatever wire they came by: pictures are fetched, the model's own plan is made, and only then the task is queued."""

from __future__ import annotations

import base64
import binascii
import io
import re
import secrets
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from kling_programs.sample.server.fetch import Reach, check_url, fetch
from kling_programs.sample.server.store import DONE, New, Store, Task, digest
from kling_programs.sample.server.wire import NO_THING, TOO_MANY, WireError, refusal
from PIL import Image, ImageOps

from kling.condition.state import MOST_REFERENCES
from kling.data.image import read_image
from kling.errors import UserError, unknown
from kling.sampling.brush_http import tracks_from_wire
from kling.sampling.pipeline import ASSETS, KlingPipeline
from kling.sampling.plan import Plan
from kling.sampling.request import MAX_SECONDS, MODES, Request
from kling.sampling.rows import FILES, located
from kling.shapes import ASPECTS

MIB = 2**20
FORMATS = {"PNG": ".png", "JPEG": ".jpg", "MPO": ".jpg"}  # MPO: a phone's JPEG that holds a second picture
SEEDS = 2**31  # drawn ones
MOST_STEPS = 100_000  # of one task; three minutes of video in blocks of a few frames, with 100 steps for each, take a third of that
FETCHES = 8  # pictures that are fetched at once
READS = 4  # requests whose pictures are decoded at once: one can take 150 MB
DEFAULTS = ("num_inference_steps", "guidance_scale", "negative_prompt", "shift", "solver")
# Fields of a `Request` that the wires take as they are, beside Kling's own.
EXTENSIONS = (
    "seed", "num_inference_steps", "guidance_scale", "solver", "shift", "size", "loop", "num_frames", "camera_scale", "sigma_c",
    "brush_guidance_scale", "reference_guidance_scale",
)  # fmt: skip


@dataclass(frozen=True)
class Rules:
    """strict: refuse what Kling refuses. convention: what pan and tilt mean, see `kling.cameras.kling_http`. private: URLs may lead into
    private networks. urls: pictures may be given as URLs. picture: the most bytes of a picture, and pixels: the most that it has. side: the
    fewest pixels of a picture's sides, and ratio: of the longer to the shorter at most, both in strict mode."""

    strict: bool = False
    convention: str = "2024"
    private: bool = False
    urls: bool = True
    picture: int = 10 * MIB
    pixels: int = 50_000_000
    side: int = 300
    ratio: float = 2.5


@dataclass
class Ask:
    """A request as a wire understood it.

    fields: of a `Request`, without files. pictures: field -> URL, base64 or bytes. movies: field -> the bytes of a video. keyframes:
    (picture, frame, strength). references: as pictures. brush: `static_mask` and `dynamic_masks` as Kling has them. tracks: as `Request`
    has them, with bytes for masks. video: the id of a result to continue. body: what was sent. names: what the wire calls our fields.
    """

    kind: str
    fields: dict[str, Any]
    pictures: dict[str, str | bytes] = field(default_factory=dict)
    movies: dict[str, bytes] = field(default_factory=dict)
    keyframes: list[tuple[bytes, Any, Any]] = field(default_factory=list)
    references: list[str | bytes] = field(default_factory=list)
    brush: dict[str, Any] = field(default_factory=dict)
    tracks: list[dict[str, Any]] = field(default_factory=list)
    video: str | None = None
    external: str | None = None
    callback: str | None = None
    base: str = ""
    body: dict[str, Any] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)


class Desk:
    """model: a folder, or None for the shipped one. It is read without weights: for planning only."""

    def __init__(self, store: Store, model: str | None, rules: Rules) -> None:
        self.store, self.rules = store, rules
        self.pipe = KlingPipeline.from_pretrained(model, weights=False)
        self.name = ASSETS.parent.name if model is None else Path(model).resolve().name
        self._fetching, self._reading = threading.BoundedSemaphore(FETCHES), threading.Semaphore(READS)

    @property
    def able(self) -> list[str]:
        return list(self.pipe.config.capabilities)

    def need(self, capability: str, what: str) -> None:
        """Raises `UserError` if the model was not trained for something that the request has no field for."""
        if capability not in self.able:
            raise UserError(f"{what}: this model was not trained for '{capability}'; it can do {', '.join(self.able)}: leave {what} out")

    def take(self, key: str, ask: Ask) -> tuple[Task, bool]:
        """The task of a request, and whether it is new. Raises `WireError` for one that this model cannot do or that is one too many."""
        try:
            return self._take(key, ask)
        except UserError as error:
            raise refusal(error, ask.names) from None

    def _take(self, key: str, ask: Ask) -> tuple[Task, bool]:
        try:
            marks = digest([ask.kind, ask.body])
        except UnicodeEncodeError:
            raise UserError("the request has half a character, a surrogate without its other: send whole characters, as UTF-8") from None
        if ask.external is not None:
            if not 0 < len(ask.external) <= 256 or not ask.external.isprintable():
                raise UserError(f"external_task_id '{ask.external[:40]}': give 1 to 256 printable characters")
            if (first := self.store.get(key, ask.external)) and first.digest == marks:
                if first.gone is not None:
                    line = f"external_task_id '{ask.external}' is the name of a task whose result is gone ({first.gone}): choose another"
                    raise WireError(NO_THING, line)
                return first, False
        self.store.check_share(key)  # before anything is fetched or read
        if ask.callback is not None:
            check_url(ask.callback, "callback_url", Reach(self.rules.private))
        fields = {"seed": secrets.randbelow(SEEDS)} | ask.fields
        parent = None
        if ask.video is not None:
            parent = self._result(key, ask.video)
            fields["video"] = self.store.link_input(self.store.folder / parent.file)
            fields["prompt"] = fields.get("prompt") or parent.request.get("prompt", "")
        given = {name: self._bytes(picture, ask.names.get(name, name)) for name, picture in ask.pictures.items()}
        called = ask.names.get("references", "references")
        if len(ask.references) > MOST_REFERENCES:  # before they are fetched
            raise UserError(f"{called} has {len(ask.references)} pictures: give at most {MOST_REFERENCES}")
        things = [self._bytes(picture, called) for picture in ask.references]
        with self._reading:
            if things:
                fields["references"] = [self._picture(data, called) for data in things]
            for name, data in given.items():
                fields[name] = self._picture(data, ask.names.get(name, name))
            for name, data in ask.movies.items():
                fields[name] = self.store.put_input(data, ".mp4")  # whatever it is: files are known by their content
            if ask.keyframes:
                fields["keyframes"] = [[self._picture(data, "keyframes"), *rest] for data, *rest in ask.keyframes]
            if tracks := [*ask.tracks, *self._brushed(ask.brush, fields)]:
                kept = [track["mask"] and self._picture(track["mask"], "tracks") for track in tracks]
                fields["tracks"] = [track | {"mask": mask} for track, mask in zip(tracks, kept, strict=True)]
            self.plan(fields)
        shown = {name: value if len(str(value)) < 4096 else f"{str(value)[:64]}…" for name, value in ask.body.items()}
        new = New(key, ask.kind, shown, fields, marks, ask.base, ask.external, parent and parent.id, ask.callback)
        return self.store.add(new)

    def plan(self, fields: dict[str, Any]) -> Plan:
        """What the model would do. Raises `UserError` if it cannot."""
        try:
            plan = self.pipe.plan(Request(**located(fields, self.store.folder)))
        except UserError as error:
            raise UserError(self._without_paths(str(error), fields)) from None
        if plan.frames > MAX_SECONDS * plan.fps + 1:
            raise UserError(f"the video would last {plan.frames / plan.fps:.0f} s: {MAX_SECONDS:g} s are the most")
        if plan.total_steps > MOST_STEPS:
            steps = f"num_inference_steps {plan.num_inference_steps} and frame_delay {plan.frame_delay}: {plan.total_steps} steps"
            raise UserError(f"{steps}, and {MOST_STEPS} are the most of a video: give fewer")
        return plan

    def _without_paths(self, line: str, fields: dict[str, Any]) -> str:
        """A message in which a file of the store is called by the field that it was given as."""
        for name in FILES:
            if fields.get(name):
                line = line.replace(str((self.store.folder / fields[name]).absolute()), name)
        return line.replace(f"{self.store.folder.absolute()}/", "")

    def _result(self, key: str, video: str) -> Task:
        task = self.store.by_video(key, video)
        if task is None or task.status != DONE:
            raise WireError(NO_THING, f"video_id '{video[:64]}' is no result of this key: give the id of a video, or of its task")
        if task.gone is not None:
            raise WireError(NO_THING, f"video_id '{video[:64]}' is gone ({task.gone}): make it again, with seed {task.seed}")
        return task

    def _bytes(self, given: str | bytes, name: str) -> bytes:
        """The file of a picture that was given as URL, base64 or bytes."""
        if isinstance(given, bytes):
            return given
        return self._url(given, name) if re.match("(?i)https?://", given) else self._base64(given, name)

    def _picture(self, data: bytes, name: str) -> str:
        """Check and keep a picture; its name in the store."""
        if len(data) > self.rules.picture:
            raise UserError(f"{name}: the picture has {len(data) / MIB:.1f} MiB: give at most {self.rules.picture / MIB:g} MiB")
        try:
            with Image.open(io.BytesIO(data), formats=["PNG", "JPEG"]) as picture:
                (width, height), kind = picture.size, picture.format
        except Image.DecompressionBombError:
            width = height = self.rules.pixels
            kind = ""
        except Exception:  # as many kinds as formats
            raise UserError(f"{name} is no picture: give PNG or JPEG, as a URL or as base64 without a prefix") from None
        if width * height > self.rules.pixels:
            raise UserError(f"{name}: the picture has more than {self.rules.pixels / 1e6:g} million pixels: give a smaller one")
        if self.rules.strict and min(width, height) < self.rules.side:
            raise UserError(f"{name}: the picture is {width}x{height}: its sides must have {self.rules.side} pixels or more")
        if self.rules.strict and max(width, height) > self.rules.ratio * min(width, height):
            raise UserError(f"{name}: the picture is {width}x{height}: give one between 1:{self.rules.ratio:g} and {self.rules.ratio:g}:1")
        kept = self.store.put_input(data, FORMATS[kind])
        try:
            read_image(self.store.folder / kept)  # damaged ones
        except UserError as error:
            raise UserError(f"{name}: {str(error).replace(str(self.store.folder / kept), 'the picture')}") from None
        return kept

    def _brushed(self, brush: dict[str, Any], fields: dict[str, Any]) -> list[dict[str, Any]]:
        """The tracks of Kling's brush, whose y counts from the bottom of the first frame; masks as PNG."""
        if not brush:
            return []
        if fields.get("image") is None:
            raise UserError(f"{next(iter(brush))} was given without an image to brush on: give image too")
        with Image.open(self.store.folder / fields["image"]) as first:
            size = ImageOps.exif_transpose(first).size
        dynamic = enumerate(brush.get("dynamic_masks") or [])
        rows = [row | {"mask": self._mask(row.get("mask"), f"dynamic_masks[{i}].mask")} for i, row in dynamic]
        still = {"static_mask": self._mask(brush["static_mask"], "static_mask")} if brush.get("static_mask") else {}
        tracks = tracks_from_wire({"dynamic_masks": rows} | still, size[1])
        for track in tracks:
            if (has := track.mask.shape[::-1]) != size:
                raise UserError(f"a mask has {has[0]}x{has[1]} pixels, the image {size[0]}x{size[1]}: give masks of its size")
        return [{"mask": as_png(track.mask), "points": [list(point) for point in track.points]} for track in tracks]

    def _mask(self, given: Any, name: str) -> str:
        """A mask as base64, fetched if it is a URL."""
        if not isinstance(given, str) or not given:
            raise UserError(f"{name} is missing: give a picture, white where the thing is, as a URL or as base64")
        data = self._bytes(given, name)
        self._picture(data, name)  # within the limits
        return base64.b64encode(data).decode()

    def _url(self, url: str, name: str) -> bytes:
        if not self.rules.urls:
            raise UserError(f"{name}: this server fetches no URLs: give the picture as base64")
        if not self._fetching.acquire(blocking=False):
            raise WireError(TOO_MANY, f"{name}: {FETCHES} pictures are being fetched: try again in some seconds, or give base64")
        try:
            answer = fetch(url, Reach(self.rules.private, self.rules.picture), name)
        finally:
            self._fetching.release()
        if answer.status != 200:
            raise UserError(f"{name}: the URL answers with status {answer.status}: check it")
        return answer.data

    def _base64(self, text: str, name: str) -> bytes:
        if text.startswith("data:") and not self.rules.strict:
            text = text.partition(",")[2]
        if text.startswith("data:"):
            raise UserError(f"{name} begins with '{text[:22]}': give the base64 alone")
        if len(text) > self.rules.picture * 4 / 3 + 4:
            raise UserError(f"{name}: the picture has more than {self.rules.picture / MIB:g} MiB: give a smaller one")
        try:
            return base64.b64decode("".join(text.split()), validate=True)
        except (binascii.Error, ValueError):
            raise UserError(f"{name} '{text[:20]}…' is neither a URL nor base64: give one of them") from None

    # ---- what clients may ask ----

    def capabilities(self) -> dict[str, Any]:
        """What this server can do: from the checkpoint and from its settings."""
        pipe, able, rules = self.pipe, self.able, self.rules
        config = pipe.config
        fast = pipe.transformer_fast is not None
        return {
            "model": self.name,
            "model_names": [self.name, "kling-…"],
            "capabilities": able,
            "endpoints": {
                "text2video": "text" in able,
                "image2video": bool({"image", "last", "first_last"} & set(able)),
                "multi-image2video": "reference" in able,
                "video-extend": "continuation" in able,
            },
            "fields": {
                "image": "image" in able, "image_tail": "last" in able, "image with image_tail": "first_last" in able,
                "camera_control": "camera" in able, "static_mask, dynamic_masks": "brush" in able, "multi_shot": "shots" in able,
                "loop": "first_last" in able or "last" in able,
            },
            "camera_control": {"convention": rules.convention, "axes_at_once": 1 if rules.strict else 6, "dolly": False},
            "modes": [mode for mode in MODES if (mode != "fast" or fast) and not (mode == "fast" and rules.strict)],
            "sizes": {aspect: f"{w}x{h}" for aspect, (h, w) in (config.get("sizes") or ASPECTS).items()},
            "fps": config.fps,
            "seconds_at_once": config.max_frames / config.fps,
            "seconds": MAX_SECONDS if "continuation" in able else config.max_frames / config.fps,
            "defaults": {name: pipe.setting(name) for name in DEFAULTS},
            "extensions": list(EXTENSIONS),
            "pictures": {"formats": ["jpg", "png"], "mib": rules.picture / MIB, "urls": rules.urls,
                         **({"side": rules.side, "ratio": rules.ratio} if rules.strict else {})},
            "strict": rules.strict,
            "unfinished_tasks_of_a_key": self.store.limits.places,
            "new_tasks_a_minute_of_a_key": self.store.limits.rate,
            "days_kept": self.store.limits.days,
        }  # fmt: skip

    def check_name(self, name: str, what: str = "model_name") -> None:
        """Raises `UserError` for a model that this server is not: it has one, and answers to its own name and to Kling's."""
        if name != self.name and not name.startswith("kling-"):
            raise unknown(what, name, [self.name, "any of Kling's, such as kling-v1"])

    def guidance(self, cfg_scale: float) -> float | None:
        """Our guidance for Kling's `cfg_scale` in [0, 1]: 0 is none (1), 0.5 the checkpoint's own (None), 1 twice as far from none."""
        if cfg_scale == 0.5:
            return None
        return 1 + (self.pipe.setting("guidance_scale")[0] - 1) * cfg_scale / 0.5


def as_png(mask: np.ndarray) -> bytes:
    """(H, W) uint8 as a file."""
    out = io.BytesIO()
    Image.fromarray(mask).save(out, format="PNG")
    return out.getvalue()

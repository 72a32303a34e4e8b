"""What happens on the Create tab. Values arrive raw (`preprocess=False`): every file passes `Uploads`, every number passes the form."""

from __future__ import annotations

import secrets
import time
from collections.abc import Generator
from typing import Any

import gradio as gr
from kling_programs.sample.studio import camera, views
from kling_programs.sample.studio.create import Form, Stage
from kling_programs.sample.studio.form import FIELDS, Fields, check_number, request_of
from kling_programs.sample.studio.jobs import Stopped, Waiting
from kling_programs.sample.studio.shelf import Result
from kling_programs.sample.studio.studio import Step, Studio, guarded, public
from kling_programs.sample.studio.words import language, say

from kling.cameras.axes import LIMIT, MOVES, UNITS, axes_trajectory, parse_axes
from kling.cameras.files import load_trajectory, trajectory_json
from kling.data.image import read_image, write_png
from kling.data.transforms import fit
from kling.data.video import read_video
from kling.errors import UserError
from kling.sampling.inputs import asked_frames, clip_size
from kling.sampling.record import request_of as recorded_request
from kling.sampling.request import Request
from kling.shapes import ASPECTS, clip_frames

RAW = {"preprocess": False, "api_visibility": "private", "show_progress": "hidden"}
QUICK = RAW | {"queue": False, "trigger_mode": "always_last"}
NOTHING = {"ids": [], "chosen": None, "comparing": False}
CAMERA = (*UNITS, "camera_file", "camera_scale", "aspect", "duration")
WITH_MASK = f"(...v) => {{ v[{FIELDS.index('mask')}] = window.studioMask(); return v; }}"  # the drawing lives in the browser


class Events:
    """Functions behind the buttons, and their wiring."""

    def __init__(self, studio: Studio, form: Form, stage: Stage) -> None:
        self.studio, self.form, self.stage = studio, form, stage
        self._wire_form()
        self._wire_stage()

    # ---- the form ----

    def _wire_form(self) -> None:
        form, fields = self.form, self.form.fields
        for name, kind in {"image": "image", "last_image": "image", "video": "video", "camera_file": "camera"}.items():
            fields[name].upload(self._checker(kind), fields[name], fields[name], **RAW)
        form.key_image.upload(self._checker("image"), form.key_image, form.key_image, **RAW)
        keys = [form.key_image, form.key_frame, form.key_strength, fields["keyframes"], fields["duration"]]
        form.add_key.click(self.add_keyframe, keys, [fields["keyframes"], form.timeline, form.key_image], **RAW)
        form.clear_keys.click(
            lambda seconds: ([], self._timeline([], seconds)), fields["duration"], [fields["keyframes"], form.timeline], **RAW
        )
        fields["duration"].change(
            lambda rows, seconds: self._timeline(rows, seconds), [fields["keyframes"], fields["duration"]], form.timeline, **QUICK
        )

        shown = [fields["strength"], form.painting, fields["outpaint"]]
        fields["use"].change(
            lambda use: [gr.update(visible=use == u) for u in ("restyle", "fill", "outpaint")], fields["use"], shown, **QUICK
        )
        fields["video"].change(self.paint_on, [fields["video"], fields["aspect"]], fields["mask"], **RAW)

        form.shot.input(self.master_shot, form.shot, [fields[name] for name in UNITS], **QUICK)
        moved = [fields[name] for name in CAMERA]  # one event for all: answers to several would overtake each other
        gr.on([c.change for c in moved], self.draw_camera, moved, form.drawing, **QUICK)

        form.dice.click(lambda: secrets.randbelow(2**31), None, fields["seed"], **QUICK)
        planned = [c for name, c in fields.items() if name not in ("mask", "seed") and hasattr(c, "change")]
        gr.on([c.change for c in planned], self.explain, form.inputs, form.plan, js=WITH_MASK, **QUICK)

    def _checker(self, kind: str) -> Any:
        def check(request: gr.Request, payload: Any) -> Any:
            try:
                self.studio.uploads.accept(payload, kind)
                return gr.skip()
            except Exception as error:
                gr.Warning(public(error, request).message, duration=12, title="")
                return None

        return check

    def explain(self, request: gr.Request, *values: Any) -> str:
        """One line that says which task was understood, or what is wrong."""
        try:
            asked = request_of(dict(zip(FIELDS, values, strict=True)), self.studio.uploads)
            return views.understood(language(request), self.studio.pipe.plan(asked), asked)
        except Exception as error:
            return views.mistake(public(error, request).message)

    @guarded
    def add_keyframe(self, request: gr.Request, picture: Any, frame: Any, strength: Any, rows: Any, seconds: Any) -> Generator:
        kept = self.studio.uploads.accept(picture, "image")
        if kept is None:
            raise UserError("keyframe: upload its picture first")
        rows = [*(rows or []), {"file": kept, "frame": frame, "strength": strength}]
        Fields({"keyframes": rows}).keyframes()
        yield rows, self._timeline(rows, seconds), None

    def _timeline(self, rows: Any, seconds: Any) -> str:
        frames = clip_frames(check_number("duration", seconds, 0.1, 180, 5.0), self.studio.pipe.config.fps)
        marks = []
        for file, frame, strength in Fields({"keyframes": rows}).keyframes():
            thumb = views.still(fit(read_image(self.studio.uploads.accept(file, "image")), 48, 84).numpy())
            marks.append({"frame": frame, "strength": strength, "thumb": thumb})
        return views.timeline(frames, marks) if marks else ""

    @guarded
    def paint_on(self, request: gr.Request, payload: Any, aspect: Any) -> Generator:
        """The first frame of the clip, at the size that will be made, to paint the mask on."""
        video = self.studio.uploads.accept(payload, "video")
        if video is None:
            yield ""
            return
        asked = Request(video=video, aspect=Fields({"aspect": aspect}).choice("aspect", ASPECTS))
        yield views.painter(fit(read_video(video, num_frames=1).frames[0], *clip_size(asked, self.studio.sizes)).numpy())

    # ---- the camera ----

    def master_shot(self, shot: str) -> list[float]:
        axes = parse_axes(shot) if shot in ("static", *MOVES) else {}
        return [axes.get(name, 0) for name in UNITS]

    def trajectory(self, *values: Any) -> tuple[Any, int, int]:
        """The path that the camera fields ask for, over the clip, and the clip's (H, W)."""
        given = Fields(dict(zip(CAMERA, values, strict=True)))
        H, W = clip_size(Request(aspect=given.choice("aspect", ASPECTS)), self.studio.sizes)
        T = asked_frames(Request(duration=given.number("duration", 0.1, 180)), self.studio.pipe.config.fps)
        file = self.studio.uploads.accept(given.values["camera_file"], "camera")
        axes = {name: given.number(name, -LIMIT, LIMIT, 0.0) for name in UNITS}
        path = load_trajectory(file, T, (H, W)) if file else axes_trajectory(axes, T, H, W)
        return path.scaled(given.number("camera_scale", 0, 10, 1.0)), H, W

    def draw_camera(self, request: gr.Request, *values: Any) -> str:
        lang = language(request)
        try:
            path, H, W = self.trajectory(*values)
        except Exception as error:
            return views.mistake(public(error, request).message)
        drawn = camera.path_svg(path, say(lang, "path")), camera.motion_svg(path, H, W, say(lang, "motion"))
        return views.drawings(lang, *drawn, trajectory_json(path, self.studio.pipe.config.fps))

    # ---- the stage ----

    def _wire_stage(self) -> None:
        form, stage, fields = self.form, self.stage, self.form.fields
        outputs = [stage.screen, fields["seed"], stage.mine, stage.cards, form.generate, form.stop]
        form.generate.click(self.generate, [*form.inputs, form.lock, stage.mine], outputs, js=WITH_MASK, **RAW)
        stage.vary.click(self.vary, stage.mine, outputs, **RAW)
        form.stop.click(self.stop, None, None, **QUICK)
        stage.cards.select(self.choose, stage.mine, [stage.screen, stage.mine, stage.cards], **RAW)
        stage.compare.click(self.compare, stage.mine, [stage.screen, stage.mine], **RAW)
        stage.remove.click(self.remove, stage.mine, [stage.screen, stage.mine, stage.cards], **RAW)
        stage.use_last.click(self.use_last, stage.mine, [fields["image"], fields["video"], form.tabs], **RAW)
        stage.extend.click(self.extend, stage.mine, [fields["video"], fields["use"], form.tabs], **RAW)

    def welcome(self, request: gr.Request, mine: Any) -> tuple[str, str]:
        """What a visitor sees first: (stage, cards)."""
        lang, results = language(request), self._results(mine)
        return (views.result(lang, results[0]) if results else views.empty(lang)), views.cards(
            lang, results, results[0].id if results else None
        )

    def generate(self, request: gr.Request, *values: Any) -> Generator:
        *values, lock, mine = values
        lang = language(request)
        try:
            asked = request_of(dict(zip(FIELDS, values, strict=True)), self.studio.uploads)
            if not lock:
                asked = asked.replace(seed=secrets.randbelow(2**31))
        except Exception as error:
            yield self._end(views.failed(public(error, request).message))
            return
        yield from self._make(request, lang, asked, mine)

    def vary(self, request: gr.Request, mine: Any) -> Generator:
        """The chosen video's request again, with another seed."""
        lang = language(request)
        try:
            one = self._chosen(mine, lang)
            asked = recorded_request(one.record, "this video").replace(seed=secrets.randbelow(2**31))
        except Exception as error:
            yield self._end(views.failed(public(error, request).message))
            return
        yield from self._make(request, lang, asked, mine)

    def _make(self, request: gr.Request, lang: int, asked: Request, mine: Any) -> Generator:
        """Run a request on the stage: waiting, steps with previews, the video."""
        preview, began = "", 0.0
        yield views.waiting(lang, 0), asked.seed, gr.skip(), gr.skip(), gr.update(interactive=False), gr.update(interactive=True)
        work = self.studio.make(request.session_hash, asked)
        try:
            while True:
                event = next(work)
                if isinstance(event, Step):
                    began = began or time.perf_counter()
                    if event.preview is not None:
                        preview = views.moving(event.preview, self.studio.pipe.config.fps)
                    left = (time.perf_counter() - began) / event.step * (event.total - event.step) if event.step else None
                    yield views.progress(lang, event.step, event.total, left, preview), *[gr.skip()] * 5
                elif isinstance(event, Waiting) and (event.place or not began):
                    yield views.waiting(lang, event.place), *[gr.skip()] * 5
                else:
                    yield [gr.skip()] * 6  # a sign of life, by which Gradio notices a closed tab
        except StopIteration as done:
            mine = {**NOTHING, "ids": [done.value.id, *self._ids(mine)], "chosen": done.value.id}
            cards = views.cards(lang, self._results(mine), done.value.id)
            yield views.result(lang, done.value), asked.seed, mine, cards, gr.update(interactive=True), gr.update(interactive=False)
        except Stopped:
            yield self._end(views.ended(lang, "stopped"))
        except Exception as error:
            yield self._end(views.failed(public(error, request).message))
        finally:
            work.close()

    def _end(self, screen: str) -> list[Any]:
        return [screen, gr.skip(), gr.skip(), gr.skip(), gr.update(interactive=True), gr.update(interactive=False)]

    def stop(self, request: gr.Request) -> None:
        self.studio.queue.stop(request.session_hash)

    @guarded
    def choose(self, request: gr.Request, event: gr.EventData, mine: Any) -> Generator:
        """A click on a card: shown alone, or, after Compare, beside the one shown before."""
        lang, one = language(request), self.studio.shelf.get(event._data.get("value"))
        state = {**NOTHING, "ids": self._ids(mine), "chosen": one.id}
        if mine.get("comparing") and mine.get("chosen") not in (None, one.id):
            screen = views.result(lang, self.studio.shelf.get(mine["chosen"]), one)
        else:
            screen = views.result(lang, one)
        yield screen, state, views.cards(lang, self._results(state), one.id)

    @guarded
    def compare(self, request: gr.Request, mine: Any) -> Generator:
        lang = language(request)
        one = self._chosen(mine, lang)
        gr.Info(say(lang, "pick_two"), title="")
        yield views.result(lang, one), {**NOTHING, "ids": self._ids(mine), "chosen": one.id, "comparing": True}

    @guarded
    def remove(self, request: gr.Request, mine: Any) -> Generator:
        """Take the chosen video off this browser's list; the file goes when the shelf is tidied."""
        lang, gone = language(request), self._chosen(mine, language(request))
        state = {**NOTHING, "ids": [name for name in self._ids(mine) if name != gone.id]}
        yield views.empty(lang), state, views.cards(lang, self._results(state), None)

    @guarded
    def use_last(self, request: gr.Request, mine: Any) -> Generator:
        one = self._chosen(mine, language(request))
        path = self.studio.shelf.inputs / f"last-{one.id}.png"
        write_png(path, read_video(one.path).frames[-1] if one.path.suffix == ".mp4" else read_image(one.path))
        yield str(path), None, gr.Tabs(selected="pictures")

    @guarded
    def extend(self, request: gr.Request, mine: Any) -> Generator:
        one = self._chosen(mine, language(request))
        yield self.studio.uploads.keep(one.path), "continue", gr.Tabs(selected="video")

    def _ids(self, mine: Any) -> list[str]:
        ids = mine.get("ids") if isinstance(mine, dict) else None
        return [name for name in ids if isinstance(name, str)][:100] if isinstance(ids, list) else []

    def _results(self, mine: Any) -> list[Result]:
        """What of this browser's list is still on the shelf."""
        found = []
        for name in self._ids(mine):
            try:
                found.append(self.studio.shelf.get(name))
            except UserError:
                continue
        return found

    def _chosen(self, mine: Any, lang: int) -> Result:
        results = self._results(mine)
        chosen = mine.get("chosen") if isinstance(mine, dict) else None
        for one in results:
            if one.id == (chosen or results[0].id):
                return one
        raise UserError(say(lang, "choose_first"))

"""Events of the Create tab. Values arrive raw (`preprocess=False`): files are checked by `Uploads`, other values by the form."""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Callable, Generator
from contextlib import suppress
from typing import Any

import gradio as gr
from kling_programs.sample.studio import camera, views
from kling_programs.sample.studio.create import Form, Stage
from kling_programs.sample.studio.form import (
    FIELDS,
    KINDS,
    Fields,
    apart,
    canvas_size,
    check_number,
    checked,
    mask_of,
    missing,
    request_of,
)
from kling_programs.sample.studio.jobs import Stopped, Waiting
from kling_programs.sample.studio.mistakes import label, without_folders
from kling_programs.sample.studio.restore import fields_of, record_at
from kling_programs.sample.studio.shelf import Result
from kling_programs.sample.studio.studio import Step, Studio, Weights, guarded, in_place, inform, lenient, told, visitor, warn
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
BOARD = 720  # pixels of the longer side of the picture to draw tracks on
NOTHING = {"chosen": None, "comparing": False}
CAMERA = (*UNITS, "camera_file", "camera_scale", "aspect", "duration")
DRAWN = ("mask", "tracks", "shots")  # fields whose values page.js holds
PLACES = ", ".join(str(FIELDS.index(name)) for name in DRAWN)
# State in the browser: the drawn mask and tracks, the storyboard, the list of its results (shared by all tabs), and the tab's own name. See
# page.js.
WITH_MASK = f"(...v) => window.studio.withMask(v, {PLACES})"
KEEPING = f"(...v) => window.studio.keep(window.studio.withMask(v, {PLACES}))"
WITH_LIST = "(...v) => window.studio.withList(v)"
WITH_BOTH = f"(...v) => window.studio.withList(window.studio.withMask(v, {PLACES}))"
SAVED = "() => [window.studio.saved()]"
APPLY = "(mine) => window.studio.apply(mine)"
HOLD = "(painted) => window.studio.hold(painted)"
AWAKE = "() => window.studio.awake()"
SOON = "() => window.studio.soon()"


class Events:
    """The functions behind the buttons, and their connections."""

    def __init__(self, studio: Studio, form: Form, stage: Stage) -> None:
        self.studio, self.form, self.stage = studio, form, stage
        self._wire_form()
        self._wire_stage()

    # ---- the form ----

    def _wire_form(self) -> None:
        form, fields = self.form, self.form.fields
        for name, kind in {"image": "image", "last_image": "image", "video": "video", "camera_file": "camera"}.items():
            fields[name].upload(self._checker(kind), fields[name], fields[name], **RAW)
        fields["references"].upload(self.check_tray, fields["references"], fields["references"], **RAW)
        form.key_image.upload(self._checker("image"), form.key_image, form.key_image, **RAW)
        keys = [form.key_image, form.key_frame, form.key_strength, fields["keyframes"], fields["duration"]]
        form.add_key.click(self.add_keyframe, keys, [fields["keyframes"], form.timeline, form.key_image], **RAW)
        form.clear_keys.click(lambda: ([], ""), None, [fields["keyframes"], form.timeline], **RAW)
        fields["duration"].change(
            lenient(self.measure), [fields["keyframes"], fields["duration"], form.key_frame], [form.timeline, form.key_frame], **QUICK
        )

        shown = [fields["strength"], form.painting, fields["outpaint"]]
        fields["use"].change(self.show_use, fields["use"], shown, **QUICK)
        fields["video"].change(self.paint_on, [fields["video"], fields["aspect"], form.painted], fields["mask"], **RAW)

        seen = [fields[name] for name in ("image", "video", "last_image", "aspect")]
        gr.on([c.change for c in seen], self.draw_on, seen, fields["tracks"], **QUICK)

        form.shot.input(self.master_shot, form.shot, [fields[name] for name in UNITS], **QUICK)
        moved = [fields[name] for name in CAMERA]  # one event for all: responses to several could arrive out of order
        gr.on([c.change for c in moved], self.draw_camera, moved, form.drawing, **QUICK)

        if self.studio.pipe.transformer_fast is not None:
            gr.on([c.change for c in (fields["prompt"], *moved, form.live)], None, js=SOON, **QUICK)
            sent, overtakes = [*form.inputs, form.live], QUICK | {"trigger_mode": "multiple"}  # a newer rough clip stops the one before
            form.draft.click(self.draft, sent, form.rough, js=WITH_MASK, **overtakes)

        form.enhance.click(self.enhance, form.inputs, fields["prompt"], js=WITH_MASK, **RAW)
        form.dice.click(lambda: -1, None, fields["seed"], **QUICK)
        form.reuse.click(lenient(self.last_seed), self.stage.mine, fields["seed"], js=WITH_LIST, **QUICK)
        planned = [c for name, c in fields.items() if name not in DRAWN and hasattr(c, "change")]
        gr.on([*(c.change for c in planned), form.checked.click], self.explain, form.inputs, form.plan, js=KEEPING, **QUICK)
        filled = [*form.inputs, form.timeline, form.painted]
        form.restore.upload(self.restore, form.restore, filled, **RAW).then(None, form.painted, None, js=HOLD, **QUICK).then(
            self.explain, form.inputs, form.plan, js=KEEPING, **QUICK
        )
        self.filled = filled

    def _checker(self, kind: str) -> Any:
        @guarded
        def check(request: gr.Request, payload: Any) -> Any:
            try:
                note = self.studio.uploads.note(payload, kind)
            except UserError as error:
                warn(error, request)
                return None
            if note:
                inform(say(language(request), "copied" if kind == "image" else "brought", **note))
                return self.studio.uploads.accept(payload, kind)  # shows the file as it will be used
            return gr.skip()

        return check

    @guarded
    def check_tray(self, request: gr.Request, payload: Any) -> Any:
        """The pictures of a tray that can be used; those that cannot are taken out."""
        kept = []
        try:
            given = Fields({"references": payload}).references()
        except UserError as error:
            warn(error, request)
            return gr.skip()
        for picture in given:
            try:
                kept.append(self.studio.uploads.accept(picture, "image"))
            except UserError as error:
                warn(error, request)
        return kept

    @in_place
    def explain(self, request: gr.Request, *values: Any) -> str:
        """One line with the recognised task and its cost, or the error."""
        fields = dict(zip(FIELDS, values, strict=True))
        asked, pipe = request_of(fields, self.studio.uploads), self.studio.planner(fields)
        plan = pipe.plan(asked)
        clip, needs = self.studio.clip_seconds(asked, plan), self.studio.needs(pipe, plan, asked)
        return views.understood(language(request), plan, asked, clip, needs)

    @guarded
    def enhance(self, request: gr.Request, *values: Any) -> Generator:
        """The prompt as the chat model writes it out; it is changed or sent like one that a visitor wrote."""
        fields = dict(zip(FIELDS, values, strict=True))
        asked, pipe = request_of(fields, self.studio.uploads), self.studio.planner(fields)
        if not asked.prompt:
            raise UserError(say(language(request), "shots_have_words" if asked.shots else "nothing_to_enhance"))
        pipe.plan(asked.replace(prompt=""))  # raises for a mistake before the wait; an idea may be longer than a prompt
        work = self.studio.queue.run(
            visitor(request),
            lambda tell: self.studio.write_out(visitor(request), asked, pipe),
            request.session_hash or "",
            listening=self.studio.heard(request),
        )
        try:
            while True:
                next(work)
                yield gr.skip()
        except StopIteration as done:
            yield done.value

    def draft(self, request: gr.Request, *values: Any) -> Any:
        """A rough clip of the form as it is now; unchanged if a newer one overtook it, nothing where no clip can be made."""
        *values, live = values
        if not live:
            return ""
        try:
            fields = dict(zip(FIELDS, values, strict=True))
            asked, weights = request_of(fields, self.studio.uploads), self.studio.weights_of(fields)
            if weights != Weights() or not (any(asked.prompts) or asked.image) or asked.video:
                return ""
            frames = self.studio.rough(visitor(request), asked)
        except UserError:  # the line about the plan says what is wrong
            return ""
        return gr.skip() if frames is None else views.moving(frames, self.studio.pipe.config.fps)

    def show_use(self, use: Any) -> list[Any]:
        return [gr.update(visible=use == u) for u in ("restyle", "fill", "outpaint")]

    def last_seed(self, mine: Any) -> int:
        """The seed of the selected video."""
        return self._chosen(mine, 0).record["request"]["seed"]

    @guarded
    def restore(self, request: gr.Request, payload: Any) -> list[Any]:
        """Fill the form from a replay JSON, or from a video that contains one or is still on the shelf."""
        lang = language(request)
        try:
            file = self.studio.uploads.place(payload)
            name = without_folders(str(file))
            try:
                record = record_at(file, name, self.studio.shelf)
                fields, remarks = fields_of(record, self.studio)
                self.studio.remember(visitor(request), record)
            except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:  # of a record with any contents
                if isinstance(error, UserError):
                    raise
                raise UserError(f"{name} says nothing about how it was made", code="not_a_record", file=name) from None
        except UserError as error:
            warn(error, request)
            return [gr.skip()] * len(self.filled)
        if left := [label(lang, "field", field) for field, value in fields.items() if value and not self._able(field)]:
            remarks.append(("untrained", {"names": ", ".join(left)}))
        inform(". ".join([say(lang, "restored", name=name), *(say(lang, key, **values) for key, values in remarks)]))
        return self._fill(fields)

    def resume(self, request: gr.Request, saved: Any) -> list[Any]:
        """Restore this tab's form after reloading it."""
        if not isinstance(saved, list) or len(saved) != len(FIELDS):
            return [gr.skip()] * len(self.filled)
        return self._fill(dict(zip(FIELDS, saved, strict=True)))

    def _fill(self, fields: dict[str, Any]) -> list[Any]:
        """Updates of the form's components for these fields; invalid values leave a component unchanged."""
        fields = {name: value for name, value in fields.items() if self._able(name)}  # others could not be taken out again
        shown: list[Any] = []
        for name in FIELDS:
            value = fields.get(name)
            if name in DRAWN or (name not in fields):
                shown.append(gr.skip())
                continue
            try:
                if name in KINDS:
                    shown.append(self.studio.uploads.accept(value, KINDS[name]))
                elif name == "keyframes":
                    rows = Fields({name: value}).keyframes()
                    shown.append([{"file": self.studio.uploads.accept(f, "image"), "frame": t, "strength": w} for f, t, w in rows])
                elif name == "references":
                    shown.append([self.studio.uploads.accept(file, "image") for file in Fields({name: value}).references()])
                else:
                    shown.append(checked(name, value))
            except UserError:
                shown.append(gr.skip())
        video, painted = shown[FIELDS.index("video")], {}
        try:
            if isinstance(video, str) and (mask := mask_of(fields.get("mask"), self.studio.uploads)):
                painted = {"video": video, "mask": mask}
        except UserError:
            pass
        with suppress(UserError):
            painted["tracks"] = [{"points": [list(point) for point in points]} for mask, points in Fields(fields).tracks() if not mask]
        with suppress(UserError):
            painted["shots"] = [{"prompt": s.prompt, "seconds": s.seconds, "camera": s.camera or ""} for s in Fields(fields).shots()]
        rows = shown[FIELDS.index("keyframes")]
        try:
            shown.append(self._timeline(rows, fields.get("duration")) if isinstance(rows, list) else gr.skip())
        except UserError:
            shown.append(gr.skip())
        return [*shown, painted]

    def _able(self, name: str) -> bool:
        """Whether this model was trained for a field of the form."""
        return not missing(self.studio.pipe, "camera" if name in (*UNITS, "camera_file") else name)

    @guarded
    def add_keyframe(self, request: gr.Request, picture: Any, frame: Any, strength: Any, rows: Any, seconds: Any) -> Generator:
        kept = self.studio.uploads.accept(picture, "image")
        if kept is None:
            raise UserError("keyframe: upload its picture first", code="keyframe_without_picture")
        Fields({"keyframes": rows}).keyframes()
        rows = [*(rows or []), {"file": kept, "frame": frame, "strength": strength}]
        yield rows, self._timeline(rows, seconds), None

    def measure(self, rows: Any, seconds: Any, frame: Any) -> tuple[str, Any]:
        """Update the timeline and the keyframes' slider for a new length of the clip."""
        last = self.form.last_frame(check_number("duration", seconds, 0.1, 180, 5.0))
        frame = check_number("keyframe's frame", frame, 0, 10_000, 0)
        return self._timeline(rows, seconds), gr.update(maximum=last, value=min(last, int(frame)))

    def _timeline(self, rows: Any, seconds: Any) -> str:
        frames = clip_frames(check_number("duration", seconds, 0.1, 180, 5.0), self.studio.pipe.config.fps)
        marks = []
        for file, frame, strength in Fields({"keyframes": rows}).keyframes():
            thumb = views.still(fit(read_image(self.studio.uploads.accept(file, "image")), 48, 84).numpy())
            marks.append({"frame": frame, "strength": strength, "thumb": thumb})
        return views.timeline(frames, marks) if marks else ""

    @guarded
    def paint_on(self, request: gr.Request, payload: Any, aspect: Any, painted: Any) -> Generator:
        """Show the first frame of the clip, at the size of the result, to paint the mask on; with an earlier mask, if any."""
        video = self.studio.uploads.accept(payload, "video")
        if video is None:
            yield ""
            return
        asked = Request(video=video, aspect=Fields({"aspect": aspect}).choice("aspect", ASPECTS))
        before = None
        if isinstance(painted, dict) and painted.get("video") == video:
            before = self.studio.uploads.accept(painted.get("mask"), "image")
        picture = fit(read_video(video, num_frames=1).frames[0], *clip_size(asked, self.studio.sizes)).numpy()
        yield views.painter(language(request), picture, before)

    @in_place
    def draw_on(self, request: gr.Request, image: Any, video: Any, last_image: Any, aspect: Any) -> str:
        """The picture to draw tracks on: the first frame, the last one of a clip to continue, or an empty one of the clip's shape."""
        if missing(self.studio.pipe, "tracks"):
            return ""
        uploads, shown = self.studio.uploads, None
        H, W = canvas_size({"image": image, "video": video, "last_image": last_image, "aspect": aspect}, uploads)
        if clip := uploads.accept(video, "video"):
            shown = read_video(clip).frames[-1]
        elif first := uploads.accept(image, "image"):
            shown = read_image(first)
        scale = min(1.0, BOARD / max(H, W))
        size = max(1, round(H * scale)), max(1, round(W * scale))
        return views.board(size, None if shown is None else fit(shown, *size).numpy())

    def storyboard(self, request: gr.Request) -> str:
        """The place for the rows of shots, which page.js draws; empty for a model without shots."""
        return "" if missing(self.studio.pipe, "shots") else views.storyboard(language(request))

    # ---- the camera ----

    def master_shot(self, shot: str) -> list[float]:
        axes = parse_axes(shot) if isinstance(shot, str) and shot in ("static", *MOVES) else {}
        return [axes.get(name, 0) for name in UNITS]

    def trajectory(self, *values: Any) -> tuple[Any, int, int]:
        """The camera path from the camera fields, over the clip, and the clip's (H, W)."""
        given = Fields(dict(zip(CAMERA, values, strict=True)))
        H, W = clip_size(Request(aspect=given.choice("aspect", ASPECTS)), self.studio.sizes)
        T = asked_frames(Request(duration=given.number("duration", 0.1, 180)), self.studio.pipe.config.fps)
        file = self.studio.uploads.accept(given.values["camera_file"], "camera")
        axes = {name: given.number(name, -LIMIT, LIMIT, 0.0) for name in UNITS}
        path = load_trajectory(file, T, (H, W)) if file else axes_trajectory(axes, T, H, W)
        return path.scaled(given.number("camera_scale", 0, 10, 1.0)), H, W

    @in_place
    def draw_camera(self, request: gr.Request, *values: Any) -> str:
        lang, (path, H, W) = language(request), self.trajectory(*values)
        drawn = camera.path_svg(path, say(lang, "path")), camera.motion_svg(path, H, W, say(lang, "motion"))
        return views.drawings(lang, *drawn, trajectory_json(path, self.studio.pipe.config.fps))

    # ---- the stage ----

    def _wire_stage(self) -> None:
        form, stage, fields = self.form, self.stage, self.form.fields
        outputs = self.outputs = [stage.screen, stage.mine, stage.cards, form.generate, form.stop]
        for event in (
            form.generate.click(self.generate, [*form.inputs, stage.mine], outputs, js=WITH_BOTH, **RAW),
            stage.vary.click(self.vary, stage.mine, outputs, js=WITH_LIST, **RAW),
            stage.remove.click(self.remove, stage.mine, [stage.screen, stage.mine, stage.cards], js=WITH_LIST, **RAW),
        ):
            event.then(None, stage.mine, stage.mine, js=APPLY, **QUICK)
        form.stop.click(self.stop, stage.mine, None, js=WITH_LIST, **QUICK)
        stage.refresh.click(lenient(self.refresh), stage.mine, stage.cards, js=WITH_LIST, **QUICK)
        stage.cards.select(self.choose, stage.mine, [stage.screen, stage.mine, stage.cards], js=WITH_LIST, **RAW)
        stage.compare.click(self.compare, stage.mine, [stage.screen, stage.mine], js=WITH_LIST, **RAW)
        stage.use_last.click(self.use_last, stage.mine, [fields["image"], fields["video"], form.tabs], js=WITH_LIST, **RAW)
        begun = [fields[name] for name in ("video", "use", "image", "loop")]
        stage.extend.click(self.extend, stage.mine, [*begun, form.tabs], js=WITH_LIST, **RAW)

    def wire_load(self, page: gr.Blocks) -> None:
        """Connect the events of opening or reloading a tab."""
        form, stage = self.form, self.stage
        page.load(self.resume, stage.saved, self.filled, js=SAVED, **RAW).then(None, form.painted, None, js=HOLD, **QUICK).then(
            self.explain, form.inputs, form.plan, js=WITH_MASK, **QUICK
        ).then(None, js=AWAKE, **QUICK)
        page.load(self.welcome, stage.mine, self.outputs, js=WITH_LIST, **RAW).then(None, stage.mine, stage.mine, js=APPLY, **QUICK)
        page.load(self.draw_on, [form.fields[name] for name in ("image", "video", "last_image", "aspect")], form.fields["tracks"], **QUICK)
        page.load(self.storyboard, None, form.fields["shots"], **QUICK)
        page.load(self.draw_camera, [form.fields[name] for name in CAMERA], form.drawing, **QUICK)

    def welcome(self, request: gr.Request, mine: Any) -> Generator:
        """The first view: the job of this tab if there is one, else the last video of the browser, or nothing yet."""
        lang, results = language(request), self._results(mine)
        job = self.studio.queue.job(owner(request, mine))
        if job is not None:
            yield from self._watch(request, lang, self.studio.queue.follow(job.owner, self.studio.heard(request)), mine, came_back=True)
            return
        screen = views.result(lang, results[0]) if results else views.empty(lang)
        yield screen, gr.skip(), views.cards(lang, results, results[0].id if results else None), gr.skip(), gr.skip()

    def refresh(self, request: gr.Request, mine: Any) -> str:
        """Update the list after another tab has changed it."""
        return views.cards(language(request), self._results(mine), mine.get("chosen") if isinstance(mine, dict) else None)

    @guarded
    def generate(self, request: gr.Request, *values: Any) -> Generator:
        *values, mine = values

        def ask() -> tuple[Request, Weights | None]:
            fields = dict(zip(FIELDS, values, strict=True))
            return request_of(fields, self.studio.uploads), self.studio.weights_of(fields)

        yield from self._make(request, ask, mine)

    @guarded
    def vary(self, request: gr.Request, mine: Any) -> Generator:
        """Run the selected video's request again with another seed."""

        def ask() -> tuple[Request, Weights | None]:
            one = self._chosen(mine, language(request))
            asked = recorded_request(one.record, "this video").replace(seed=secrets.randbelow(2**31))
            self.studio.remember(visitor(request), one.record)
            return asked, self.studio.weights_from(one.record)

        yield from self._make(request, ask, mine)

    def _make(self, request: gr.Request, ask: Callable[[], tuple[Request, Weights | None]], mine: Any) -> Generator:
        """Run what `ask` returns and show it on the stage, or what is wrong with it."""
        lang = language(request)
        try:
            asked, weights = ask()
        except UserError as error:
            yield self._end(views.failed(told(error, request)))
            return
        yield views.waiting(lang, 0), gr.skip(), gr.skip(), gr.update(interactive=False), gr.update(interactive=True)
        kept = {"keep": True, "listening": self.studio.heard(request)}
        yield from self._watch(request, lang, self.studio.make(visitor(request), apart(asked), owner(request, mine), weights, **kept), mine)

    def _watch(self, request: gr.Request, lang: int, work: Generator, mine: Any, came_back: bool = False) -> Generator:
        """Show a job on the stage: waiting, steps with previews, the videos."""
        preview, began, first, added = "", 0.0, 0, []
        if came_back:
            yield views.waiting(lang, 0), gr.skip(), gr.skip(), gr.update(interactive=False), gr.update(interactive=True)
        try:
            while True:
                event = next(work)
                if isinstance(event, Step):
                    first = first if began else event.step
                    began = began or time.perf_counter()
                    if event.preview is not None:
                        preview = views.moving(event.preview, self.studio.pipe.config.fps)
                    done = event.step - first
                    left = (time.perf_counter() - began) / done * (event.total - event.step) if done else None
                    yield views.progress(lang, event.step, event.total, left, preview), *[gr.skip()] * 4
                elif isinstance(event, Waiting) and (event.place or not began):
                    yield views.waiting(lang, event.place), *[gr.skip()] * 4
                elif isinstance(event, Result):
                    added.insert(0, event.id)
                    mine = {**self._list(mine), "ids": [event.id, *self._ids(mine)], "chosen": event.id, "add": added}
                    yield gr.skip(), gr.skip(), views.cards(lang, self._results(mine), event.id), gr.skip(), gr.skip()
                else:
                    yield [gr.skip()] * 5  # lets Gradio notice a closed tab
        except StopIteration as done:
            if done.value is None:  # the tab was reloaded or duplicated, and the job is followed there
                yield self._end(views.ended(lang, "watched_elsewhere"))
                return
            made = done.value
            mine = {**self._list(mine), "ids": [*(one.id for one in reversed(made)), *self._ids(mine)], "chosen": made[-1].id}
            mine["ids"] = list(dict.fromkeys(mine["ids"]))
            mine["add"] = [one.id for one in reversed(made)]
            cards = views.cards(lang, self._results(mine), made[-1].id)
            yield views.result(lang, made[-1]), mine, cards, gr.update(interactive=True), gr.update(interactive=False)
            self.studio.queue.forget(owner(request, mine))
        except Stopped:
            yield self._end(views.ended(lang, "came_back" if came_back else "stopped"), mine if added else None)
            self.studio.queue.forget(owner(request, mine))
        except Exception as error:  # whatever ended the job belongs on the stage; `told` logs what is no mistake of the visitor
            yield self._end(views.failed(told(error, request)), mine if added else None)
            self.studio.queue.forget(owner(request, mine))
        finally:
            work.close()

    def _end(self, screen: str, mine: Any = None) -> list[Any]:
        return [screen, gr.skip() if mine is None else mine, gr.skip(), gr.update(interactive=True), gr.update(interactive=False)]

    def stop(self, request: gr.Request, mine: Any) -> None:
        self.studio.queue.stop(owner(request, mine))

    @guarded
    def choose(self, request: gr.Request, event: gr.EventData, mine: Any) -> Generator:
        """Show a clicked card alone, or, after Compare, next to the previous one."""
        clicked = event._data.get("value") if isinstance(event._data, dict) else None
        lang, one = language(request), self.studio.shelf.get(clicked)
        state = {**self._list(mine), "chosen": one.id}
        mine = mine if isinstance(mine, dict) else NOTHING
        if mine.get("comparing") and mine.get("chosen") not in (None, one.id):
            screen = views.result(lang, self.studio.shelf.get(mine["chosen"]), one)
        else:
            screen = views.result(lang, one)
        yield screen, state, views.cards(lang, self._results(state), one.id)

    @guarded
    def compare(self, request: gr.Request, mine: Any) -> Generator:
        lang = language(request)
        one = self._chosen(mine, lang)
        inform(say(lang, "pick_two"))
        yield views.result(lang, one), {**self._list(mine), "chosen": one.id, "comparing": True}

    @guarded
    def remove(self, request: gr.Request, mine: Any) -> Generator:
        """Remove the selected video from this browser's list; the file is deleted when the shelf is cleaned up."""
        lang, gone = language(request), self._chosen(mine, language(request))
        state = {**self._list(mine), "ids": [name for name in self._ids(mine) if name != gone.id], "drop": [gone.id]}
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
        yield self.studio.uploads.keep(one.path), "continue", None, False, gr.Tabs(selected="video")

    def _list(self, mine: Any) -> dict[str, Any]:
        """This browser's list and this tab's name, with nothing chosen."""
        tab = mine.get("tab") if isinstance(mine, dict) else None
        return {**NOTHING, "ids": self._ids(mine), "tab": tab}

    def _ids(self, mine: Any) -> list[str]:
        ids = mine.get("ids") if isinstance(mine, dict) else None
        return [name for name in ids if isinstance(name, str)][:100] if isinstance(ids, list) else []

    def _results(self, mine: Any) -> list[Result]:
        """The results in this browser's list that are still on the shelf."""
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


def owner(request: gr.Request, mine: Any) -> str:
    """The owner of a job on this page: the tab, by a name that cannot be guessed and survives reloading."""
    tab = mine.get("tab") if isinstance(mine, dict) else None
    return tab if isinstance(tab, str) and re.fullmatch(r"[0-9a-f]{32}", tab) else request.session_hash or ""

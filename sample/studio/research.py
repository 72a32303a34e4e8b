"""The Inspect tab, and with --run the Training tab. All computation goes through the queue, like the videos."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Generator
from pathlib import Path
from typing import Any

import cv2
import gradio as gr
import pandas as pd
from kling_programs.sample.studio import look, views
from kling_programs.sample.studio.create import Form
from kling_programs.sample.studio.events import DRAWN, QUICK, RAW, WITH_MASK
from kling_programs.sample.studio.form import FIELDS, check_number, request_of
from kling_programs.sample.studio.jobs import Stopped, Tell, Waiting, Work
from kling_programs.sample.studio.studio import Step, Studio, guarded, lenient, sample, visitor
from kling_programs.sample.studio.words import language, say, t

from kling.data.strip import strip
from kling.errors import UserError
from kling.sampling.request import Request
from kling.shapes import latent_of_frame, pixel_frames

CLICKED = 672  # width of the picture to click on, about
WALKS = 4  # visitors whose last inspection is kept, for clicks on its tokens


class Research:
    """Inspection jobs, each with its own status line."""

    def __init__(self, studio: Studio, form: Form) -> None:
        self.studio, self.form = studio, form
        self._walks: OrderedDict[str, look.Walk] = OrderedDict()  # session -> what was seen last

    def _asked(self, values: tuple) -> Request:
        return request_of(dict(zip(FIELDS, values, strict=True)), self.studio.uploads)

    def _run(self, request: gr.Request, work: Work, outputs: int) -> Generator[Any, None, Any]:
        """Yield (status, nothing …) while a job waits and runs, and its other events unchanged; return its result."""
        lang, began = language(request), time.perf_counter()
        yield views.working(say(lang, "starting")), *[gr.skip()] * outputs
        try:
            events = self.studio.queue.run(visitor(request), work, request.session_hash or "", listening=self.studio.heard(request))
            while True:
                event = next(events)
                if isinstance(event, Waiting) and event.place:
                    yield views.working(say(lang, "waiting", place=event.place)), *[gr.skip()] * outputs
                elif isinstance(event, Step):
                    began = time.perf_counter() if event.step == 0 else began
                    left = (time.perf_counter() - began) / event.step * (event.total - event.step) if event.step else None
                    status = views.working(views.steps_told(lang, event.step, event.total, left), event.step, event.total)
                    yield status, *[gr.skip()] * outputs
                elif not isinstance(event, Waiting):
                    yield event
                else:
                    yield [gr.skip()] * (1 + outputs)
        except StopIteration as done:
            return done.value

    # ---- inside one request ----

    def tab(self) -> None:
        pipe = self.studio.pipe
        gr.Markdown(t("inspect_hint"))
        self.status = gr.HTML(padding=False, elem_id="inspect-status")
        with gr.Tabs():
            with gr.Tab(t("look"), id="look"), gr.Column(elem_classes="inside"):
                go = self._go("look")
                with gr.Row(elem_classes="halves found"):
                    with gr.Column(min_width=300):
                        schedule = gr.LinePlot(x="step", y="sigma", label=t("schedule"), height=220, y_title="σ", elem_classes="plot")
                        steps = gr.HTML(padding=False, elem_id="steps", elem_classes="wide")
                    with gr.Column(min_width=300):
                        channels = gr.HTML(padding=False, elem_id="channels", elem_classes="wide")
                with gr.Row(elem_classes="halves found"):
                    with gr.Column(min_width=300):
                        gr.Markdown(t("attention_hint"))
                        picture = gr.Image(label=t("attention"), interactive=False, buttons=[], elem_id="click-me", format="png")
                        layers = len(pipe.transformer.blocks) - 1
                        layer = gr.Slider(0, max(1, layers), layers // 2, step=1, label=t("layer"), buttons=[])
                        sigma = gr.Slider(0.05, 0.95, 0.5, step=0.05, label=t("noise_level"), buttons=[])
                        frame = gr.Slider(0, pipe.config.max_frames - 1, 0, step=4, label=t("latent_frame"), buttons=[])
                    with gr.Column(min_width=300):
                        attention = gr.HTML(padding=False, elem_id="attention")
            with gr.Tab(t("sweep"), id="sweep"), gr.Column(elem_classes="inside"):
                scales = gr.Textbox("1, 2, 4, 8", label=t("scales"), elem_id="scales")
                run = self._go("run_sweep", "run-sweep")
                swept = gr.HTML(padding=False, elem_id="swept")
            with gr.Tab(t("vae"), id="vae"), gr.Column(elem_classes="inside"):
                clip = gr.Video(label=t("clip"), sources=["upload"], height=200, buttons=[], elem_id="vae-clip")
                again = self._go("reconstruct")
                with gr.Column(elem_classes="found"):
                    shown = gr.HTML(padding=False, elem_id="reconstruction")
                    quality = gr.LinePlot(x="frame", y="PSNR", label="PSNR (dB)", height=220, elem_classes="plot")
        inside = [self.status, schedule, channels, steps, picture, attention, frame]
        go.click(self.look, self.form.inputs, inside, js=WITH_MASK, **RAW)
        picture.select(self.attend, [layer, sigma, frame], [self.status, attention], **RAW)
        frame.release(lenient(self.show_frame), frame, picture, **RAW)
        run.click(self.sweep, [scales, *self.form.inputs], [self.status, swept], js=_shifted(1), **RAW)
        again.click(self.reconstruct, clip, [self.status, shown, quality], **RAW)

    def _go(self, word: str, name: str | None = None, hint: bool = True) -> gr.Button:
        """A button that starts something, next to one that stops it. hint: a text that is shown until there is a result."""
        with gr.Row():
            go = gr.Button(t(word), variant="primary", scale=4, elem_id=name or word)
            gr.Button(t("stop"), variant="stop", scale=1, min_width=80).click(self.stop, None, None, **QUICK)
        if hint:
            gr.Markdown(t("nothing_inside"), elem_classes="nothing")  # page.css hides it
        return go

    def stop(self, request: gr.Request) -> None:
        self.studio.queue.stop(request.session_hash)

    @guarded
    def look(self, request: gr.Request, *values: Any) -> Generator:
        asked = self._asked(values)
        lang = language(request)
        try:
            walk = yield from self._run(request, lambda tell: look.walk(self.studio.pipe, asked, tell), 6)
        except Stopped:
            yield views.told(say(lang, "stopped")), *[gr.skip()] * 6
            return
        self._walks.pop(request.session_hash, None)
        self._walks[request.session_hash] = walk
        while len(self._walks) > WALKS:
            self._walks.popitem(last=False)
        schedule = pd.DataFrame({"step": range(len(walk.sigmas)), "sigma": walk.sigmas})
        rows = [
            (views.still(strip([frames], min(look.COLUMNS, len(frames)), gap=0).numpy()), f"x̂₀ · {say(lang, 'step_axis')} {step}")
            for step, frames in walk.x0
        ]
        channels = views.grid([(views.still(look.channel_map(walk.latents)), f"{say(lang, 'channels')} × {say(lang, 'frame_axis')}")])
        token_frame = gr.update(value=0, maximum=max(1, len(walk.frames) - 1))  # frame of the displayed picture
        yield "", schedule, channels, views.grid(rows), _enlarged(walk.frames[0]), "", token_frame

    def show_frame(self, request: gr.Request, frame: float) -> Any:
        walk = self._walks.get(request.session_hash)
        place = int(check_number("latent_frame", frame, 0, self.studio.pipe.config.max_frames, 0))
        return None if walk is None else _enlarged(walk.frames[min(place, len(walk.frames) - 1)])

    @guarded
    def attend(self, request: gr.Request, event: gr.EventData, layer: float, sigma: float, frame: float) -> Generator:
        """The attention of the clicked token."""
        walk, clicked = self._walks.get(request.session_hash), (event._data or {}).get("index")  # SelectData fails without a click
        if walk is None or not isinstance(clicked, list) or len(clicked) != 2:
            raise UserError(say(language(request), "look_again"))
        pipe, lang = self.studio.pipe, language(request)
        side = pipe.vae.spatial_factor * pipe.transformer.config.patch_size[1]  # pixels along a token
        H, W = walk.frames.shape[1:3]
        pixels = (check_number("click", v, 0, 10_000, 0) for v in clicked)
        x, y = (min(int(v / _zoom(W)), most - 1) for v, most in zip(pixels, (W, H), strict=True))
        place = int(check_number("latent_frame", frame, 0, pipe.config.max_frames, 0))
        token = latent_of_frame(min(place, pixel_frames(walk.latents.shape[1]) - 1)), y // side, x // side
        sigma, blocks = check_number("noise_level", sigma, 0, 1, 0.5), len(pipe.transformer.blocks)
        block = min(int(check_number("layer", layer, 0, max(1, blocks), 0)), blocks - 1)
        work: Work = lambda tell: look.attention_of(pipe, walk, block, sigma, token)  # noqa: E731
        weight = yield from self._run(request, work, 1)
        most = float(weight.flatten().topk(max(1, weight.numel() // 100)).values[-1])
        cells = []
        for j, plane in enumerate(weight):
            last = pixel_frames(j + 1) - 1  # of the pixel frames in latent frame j
            shown = look.heat(walk.frames[last], plane, most)
            if j == token[0]:  # the token itself, framed
                cv2.rectangle(shown, (token[2] * side, token[1] * side), ((token[2] + 1) * side - 1, (token[1] + 1) * side - 1), (255,) * 3)
            cells.append((views.still(shown), f"{say(lang, 'frame_axis')} {last} · {100 * float(plane.sum()):.0f} %"))
        yield "", views.grid(cells)

    @guarded
    def sweep(self, request: gr.Request, scales: Any, *values: Any) -> Generator:
        asked, wanted = self._asked(values), look.read_scales(scales)
        yield from self._cells(request, lambda tell: look.sweep(self.studio.pipe, asked, wanted, tell))

    def _cells(self, request: gr.Request, work: Work) -> Generator:
        """Animated pictures that appear in a grid one by one, as the job emits them."""
        cells: list[tuple[str, str]] = []
        try:
            for event in self._run(request, work, 1):
                if isinstance(event, look.Cell):
                    cells.append((views.moving(event.frames, self.studio.pipe.config.fps), event.name))
                    yield gr.skip(), views.grid(cells)
                else:
                    yield event
            yield "", gr.skip()
        except Stopped:
            yield views.told(say(language(request), "stopped")), gr.skip()

    @guarded
    def reconstruct(self, request: gr.Request, payload: Any) -> Generator:
        lang, path = language(request), self.studio.uploads.accept(payload, "video")
        if path is None:
            raise UserError("upload a clip first", code="no_clip")
        found = yield from self._run(request, lambda tell: look.reconstruct(self.studio.pipe, path), 2)
        fps = self.studio.pipe.config.fps
        both = f"PSNR {sum(found.psnr) / len(found.psnr):.2f} dB · SSIM {sum(found.ssim) / len(found.ssim):.3f}"
        cells = [
            (views.moving(found.original, fps), say(lang, "original")),
            (views.moving(found.again, fps), f"{say(lang, 'reconstruction')} · {both}"),
            (views.moving(found.error, fps), say(lang, "error_map")),
        ]
        yield "", views.grid(cells), pd.DataFrame({"frame": range(len(found.psnr)), "PSNR": found.psnr})

    # ---- a training run ----

    def training_tab(self, page: gr.Blocks, run: Path) -> None:
        from kling_programs.sample.studio import runs

        with gr.Row(elem_classes="halves"):
            plot = {"x": "step", "y": "value", "color": "curve", "height": 340, "min_width": 300, "elem_classes": "plot"}
            loss = gr.LinePlot(label=t("curves"), elem_id="curves", **plot)
            by_sigma = gr.LinePlot(label="loss / σ", **plot)
        refresh = gr.Button(t("refresh"), size="sm")
        names = runs.checkpoints(run)
        picked = gr.CheckboxGroup(names, value=names[-2:], label=t("checkpoints"), elem_id="checkpoints")
        go = self._go("compare_checkpoints", "compare-checkpoints", hint=False)
        status = gr.HTML(padding=False, elem_id="training-status")
        grid = gr.HTML(padding=False, elem_id="by-checkpoint")

        @guarded
        def draw() -> Generator:
            yield *runs.curves(run), gr.update(choices=runs.checkpoints(run))

        @guarded
        def compare(request: gr.Request, chosen: Any, *values: Any) -> Generator:
            asked, names = self._asked(values), runs.choice(chosen)

            def work(tell: Tell) -> None:
                for name in names:
                    pipe = runs.pipeline_of(run, name, self.studio.pipe.device)
                    tell(look.Cell(name, sample(pipe, asked, tell, previews=False)[0]))

            yield from self._cells(request, work)

        shown = [loss, by_sigma, picked]
        refresh.click(draw, None, shown, **RAW)
        gr.Timer(30).tick(draw, None, shown, **RAW)
        page.load(draw, None, shown, **RAW)
        go.click(compare, [picked, *self.form.inputs], [status, grid], js=_shifted(1), **RAW)


def _zoom(W: int) -> int:
    """Screen pixels per pixel of a picture W wide."""
    return max(1, round(CLICKED / W))


def _enlarged(frame: Any) -> Any:
    zoom = _zoom(frame.shape[1])
    return cv2.resize(frame, None, fx=zoom, fy=zoom, interpolation=cv2.INTER_CUBIC)


def _shifted(by: int) -> str:
    """The script that fills in the drawn mask, for events with `by` inputs before the form's."""
    return f"(...v) => window.studio.withMask(v, {', '.join(str(by + FIELDS.index(name)) for name in DRAWN)})"

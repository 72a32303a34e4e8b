"""The whole page: its tabs, its appearance, its API."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
from kling_programs.sample.studio import views
from kling_programs.sample.studio.create import Form, Stage
from kling_programs.sample.studio.events import Events
from kling_programs.sample.studio.form import apart, check_used, request_of
from kling_programs.sample.studio.guard import Guard
from kling_programs.sample.studio.jobs import Waiting
from kling_programs.sample.studio.mistakes import without_folders
from kling_programs.sample.studio.research import Research
from kling_programs.sample.studio.studio import Step, Studio, coded, visitor
from kling_programs.sample.studio.words import I18N, WORDS, t
from starlette.middleware import Middleware

from kling.cameras.axes import UNITS
from kling.errors import UserError, unknown
from kling.sampling.pipeline import ASSETS

HERE = Path(__file__).parent
FONTS = ["system-ui", "-apple-system", "Segoe UI", "PingFang SC", "Microsoft YaHei", "Noto Sans CJK SC", "Noto Sans SC", "sans-serif"]
MANY = 64  # requests in Gradio's own queue, including small ones; jobs wait in `ModelQueue`
SESSIONS = 32  # visitors for whom Gradio keeps a copy of the page, 0.35 MB each; its default is 10 000, and every API call counts


class Page(gr.Blocks):
    """A page to which anybody may send any values: those that Gradio itself cannot read give one line, and no traceback in the log."""

    async def preprocess_data(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return await super().preprocess_data(*args, **kwargs)
        except Exception as error:  # of many classes, all caused by what was sent
            line = without_folders(" ".join(str(error).split()))[:200] or type(error).__name__
            raise gr.Error(escape(f"these values cannot be used ({line}): reload the page"), print_exception=False) from None


def build(studio: Studio) -> gr.Blocks:
    """The page of a studio."""
    gr.set_static_paths([studio.shelf.folder])  # served in place: otherwise Gradio would copy every result
    with Page(title=WORDS["title"][0], fill_width=True, analytics_enabled=False, delete_cache=(600, 3600)) as page:
        gr.api(api_of(studio), api_name="generate", concurrency_limit=None)  # first: otherwise an event could take this name
        gr.HTML(
            views.header(studio.pipe, "shipped" if Path(studio.model["path"]) == ASSETS else Path(studio.model["path"]).name), padding=False
        )
        with gr.Tabs():
            with gr.Tab(t("create"), id="create"), gr.Row(equal_height=False, elem_classes="halves"):
                with gr.Column(scale=5, min_width=320):
                    form = Form(studio)
                with gr.Column(scale=6, min_width=320, elem_classes="right"):
                    stage = Stage()
            research = Research(studio, form)
            with gr.Tab(t("inspect"), id="inspect", visible=studio.remote is None):  # needs the weights here
                research.tab()
            if studio.run is not None:
                with gr.Tab(t("training"), id="training"):
                    research.training_tab(page, studio.run)
        events = Events(studio, form, stage)
        events.wire_load(page)
    if studio.door is not None:
        studio.door.session_of = lambda event: _session_of(page, event)
        studio.door.convert = studio.shelf.convert
    return page.queue(default_concurrency_limit=None, max_size=MANY)


def launch_settings(studio: Studio) -> dict[str, Any]:
    """The arguments of `launch` other than the address."""
    mono = ["ui-monospace", "SFMono-Regular", "DejaVu Sans Mono", "monospace"]
    sizes = {"radius_size": "md", "spacing_size": "sm", "text_size": "sm"}
    theme = gr.themes.Base(primary_hue="indigo", neutral_hue="slate", font=FONTS, font_mono=mono, **sizes).set(
        block_label_text_size="*text_xs",
        block_border_width="1px",
        button_border_width="1px",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_500",
        button_primary_text_color="white",
        button_secondary_background_fill="*background_fill_primary",
        button_secondary_border_color="*border_color_primary",
    )
    return {
        "theme": theme,
        "css_paths": HERE / "page.css",
        "head": f"<script>{_read('page.js')}</script><style>{_read('phone.css')}</style>",
        "i18n": I18N,
        "allowed_paths": [str(studio.shelf.folder)],
        "share": False,
        "quiet": True,
        "show_error": False,
        "footer_links": ["api", "settings"],
        "enable_monitoring": False,
        "state_session_capacity": SESSIONS,
        "ssr_mode": False,
        "_frontend": False,  # does not request the page itself, which fails on a busy machine or behind a proxy
        "app_kwargs": {"middleware": [Middleware(Guard, studio.door)]} if studio.door is not None else {},
    }


def api_of(studio: Studio) -> Any:
    """The function behind `/generate`."""

    def generate(
        request: gr.Request,
        prompt: str = "",
        negative_prompt: str = "",
        image: dict | None = None,
        last_image: dict | None = None,
        keyframes: list[dict] | None = None,
        references: list[dict] | None = None,
        loop: bool = False,
        video: dict | None = None,
        use: str = "continue",
        strength: float | None = None,
        mask: dict | None = None,
        outpaint: str | None = None,
        tracks: list[dict] | None = None,
        shots: list[dict] | None = None,
        camera: dict | None = None,
        camera_file: dict | None = None,
        camera_scale: float = 1.0,
        camera_guidance_scale: float | None = None,
        brush_guidance_scale: float | None = None,
        reference_guidance_scale: float | None = None,
        aspect: str | None = None,
        duration: float = 5.0,
        extend_to: float | None = None,
        still: bool = False,
        mode: str = "std",
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        shift: float | None = None,
        sigma_c: float = 0.0,
        seed: int = 0,
        num_videos: int = 1,
        model: str | None = None,
        lora: str | None = None,
        lora_scale: float = 1.0,
    ) -> Iterator[dict]:
        """Make videos. Files are given with `handle_file`; the fields are those of the page, `camera` has its axes. Seed -1 is random.
        `tracks` are {"points": [[x, y], …], "mask": file}, in shares of the first frame's width and height; either may be missing.
        `shots` are {"prompt", "seconds", "camera": axes or a shot as text}, instead of a prompt, a duration and a camera.

        Yields {"note": …} if a clip was reduced, {"waiting": place}, {"step", "of"}; the last is {"video": file, "record": file}, the
        mp4 and its replay JSON, and {"videos": [the same for each]}. A mistake has its code as the error's title.
        """
        fields = {name: value for name, value in locals().items() if name not in ("request", "camera", "studio")}
        try:
            if camera is not None and not isinstance(camera, dict):
                raise UserError('camera: give its axes by name, such as {"pan": 5}')
            if unknown_axes := [name for name in camera or {} if name not in UNITS]:
                raise unknown("camera axis", unknown_axes[0][:40], UNITS)
            check_used(fields)
            asked, weights = request_of(fields | (camera or {}), studio.uploads), studio.weights_of(fields)
            if note := studio.uploads.note(video):
                yield {"note": note}
            work = studio.make(visitor(request), apart(asked), request.session_hash, weights, listening=studio.heard(request))
            while True:
                event = next(work)
                if isinstance(event, Waiting):
                    yield {"waiting": event.place}
                elif isinstance(event, Step):
                    yield {"step": event.step, "of": event.total}
        except StopIteration as done:
            made = [{"video": _file(one.path), "record": _file(one.record_path)} for one in done.value]
            yield made[0] | {"videos": made}
        except Exception as error:  # `coded` logs what is no mistake of the sender
            raise coded(error, request) from None

    return generate


def _read(name: str) -> str:
    return (HERE / name).read_text(encoding="utf-8")


def _session_of(page: gr.Blocks, event: str) -> str:
    """The session of an event, found as in Gradio's own route for its stream."""
    queue = page._queue
    if (found := queue.event_ids_to_events.get(event)) is not None:
        return found.session_hash
    return next((session for session, ids in queue.pending_event_ids_session.items() if event in ids), event)


def _file(path: Path) -> dict[str, Any]:
    """A file in the form that a client downloads."""
    return {"path": str(path), "url": views.url(path), "meta": {"_type": "gradio.FileData"}}

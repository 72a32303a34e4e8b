"""The Create tab: the fields of a request on the left; on the right the stage, which shows progress and results."""

from __future__ import annotations

from typing import Any

import gradio as gr
from kling_programs.sample.studio import views
from kling_programs.sample.studio.form import FIELDS, MAX_SECONDS, USES, missing
from kling_programs.sample.studio.studio import Studio
from kling_programs.sample.studio.words import t

from kling.cameras.axes import LIMIT, MOVES, UNITS
from kling.condition.state import MOST_REFERENCES
from kling.data.world.captions import vocabulary_summary
from kling.sampling.request import MODES
from kling.shapes import clip_frames

EXAMPLES = [
    "a red ball rolls left on grass",  # held out, as the page says where the model is one of the small world
    "a red cube moves right on grass",
    "一个绿色的球在沙地上绕圈移动",
]


def _example(index: Any) -> Any:
    """The prompt of a clicked example; nothing happens for what is no index of one, which a page never sends."""
    return EXAMPLES[index] if isinstance(index, int) and 0 <= index < len(EXAMPLES) else gr.skip()


def examples_label(world: bool) -> str:
    """The words above the examples. world: for a model of the small world, whose training left the first of them out."""
    return "world_examples" if world else "examples"


class Form:
    """The fields. `inputs` are their components in the order of `FIELDS`; the other attributes are used by the page's events."""

    def __init__(self, studio: Studio) -> None:
        self.studio = studio
        self.fields: dict[str, Any] = {}
        self._text()
        self._go()
        self.checked = gr.Button("", elem_id="checked", elem_classes="unseen")  # page.js presses it after painting on the mask
        self.draft = gr.Button("", elem_id="draft", elem_classes="unseen")  # page.js presses it when the form has been still for a moment
        with gr.Tabs(elem_id="inputs", overflow_behavior="wrap") as self.tabs:
            with gr.Tab(t("pictures"), id="pictures"):
                self._pictures()
            with gr.Tab(t("video"), id="video"):
                self._video()
            with gr.Tab(t("camera"), id="camera"):
                self._camera()
            with gr.Tab(t("tracks"), id="tracks"):
                self._tracks()
            with gr.Tab(t("shots"), id="shots"):
                self._shots()
            with gr.Tab(t("size"), id="size"):
                self._size()
            with gr.Tab(t("advanced"), id="advanced"):
                self._advanced()

    @property
    def inputs(self) -> list[Any]:
        return [self.fields[name] for name in FIELDS]

    @property
    def first_seconds(self) -> float:
        """The initial length of the clip."""
        config = self.studio.pipe.config
        return min(5.0, (config.max_frames - 1) / config.fps)

    def last_frame(self, seconds: float) -> int:
        """The last frame of a clip of so many seconds: the limit for keyframes."""
        return max(1, clip_frames(seconds, self.studio.pipe.config.fps) - 1)

    def _able(self, name: str, info: Any = None) -> dict[str, Any]:
        """Grey a component out, with the reason, if the model was not trained for it."""
        if need := missing(self.studio.pipe, name):
            return {"interactive": False, "info": t(f"unable_{need}")}
        return {"interactive": True} | ({"info": info} if info is not None else {})

    def _picture(self, label: str, name: str, **kwargs: Any) -> gr.Image:
        able = not missing(self.studio.pipe, name)
        text = t(label) if able else t(f"{label}_unable")
        sources = ["upload", "clipboard"]
        return gr.Image(label=text, type="filepath", image_mode=None, sources=sources, height=150, buttons=[], interactive=able, **kwargs)

    def _guidance(self, name: str, able: bool) -> None:
        """A guidance scale; 0 is the checkpoint's own."""
        own = f"{t('own')} ({self.studio.pipe.setting(name):g})"
        self.fields[name] = gr.Number(0, label=t(name), info=own, step=0.5, min_width=170, interactive=able, elem_id=name)

    def _text(self) -> None:
        self.fields["prompt"] = prompt = gr.Textbox(label=t("prompt"), placeholder=t("prompt_hint"), lines=3, elem_id="prompt")
        self.enhance = gr.Button(t("enhance"), size="sm", visible=self.studio.enhancer is not None, elem_id="enhance")
        world = self.studio.pipe.config.get("vocabulary") == "world"
        examples = gr.Dataset(
            label=t(examples_label(world)),
            components=[gr.Textbox(visible=False)],
            samples=[[e] for e in EXAMPLES],
            type="index",
            elem_id="examples",
        )
        if world:
            with gr.Accordion(t("understands"), open=False, elem_id="understands"):
                gr.Markdown(vocabulary_summary())
        examples.click(_example, examples, prompt, queue=False, api_visibility="private", show_progress="hidden")
        own = self.studio.pipe.setting("negative_prompt") or t("negative_hint")
        self.fields["negative_prompt"] = gr.Textbox(label=t("negative_prompt"), placeholder=own)
        self.restore = gr.UploadButton(
            t("restore"), size="sm", file_types=[".json", ".mp4", ".png", ".webm", ".gif"], elem_id="restore", elem_classes="quiet"
        )

    def _pictures(self) -> None:
        with gr.Row():
            self.fields["image"] = self._picture("first", "image", elem_id="first", min_width=140)
            self.fields["last_image"] = self._picture("last", "last_image", elem_id="last", min_width=140)
        self.fields["loop"] = gr.Checkbox(label=t("loop"), **self._able("loop"))
        with gr.Row(equal_height=True):
            self.key_image = self._picture("keyframe", "keyframes", elem_id="key", min_width=140)
            with gr.Column(min_width=140):
                able = self._able("keyframes")["interactive"]
                last = self.last_frame(self.first_seconds)
                self.key_frame = gr.Slider(0, last, min(20, last), step=1, label=t("at"), buttons=[], interactive=able, elem_id="key-frame")
                self.key_strength = gr.Slider(0.05, 1, 1, step=0.05, label=t("holds"), buttons=[], interactive=able)
                with gr.Row():
                    self.add_key = gr.Button(t("add_keyframe"), size="sm", interactive=able, elem_id="add-key", min_width=80)
                    self.clear_keys = gr.Button(t("clear_keyframes"), size="sm", interactive=able, min_width=60)
        self.timeline = gr.HTML(padding=False, elem_id="timeline")
        self.fields["keyframes"] = gr.JSON([], visible=False)
        able = self._able("references")["interactive"]
        tray = {"type": "filepath", "file_types": ["image"], "columns": MOST_REFERENCES, "height": 150, "object_fit": "contain"}
        self.fields["references"] = gr.Gallery(
            label=t("references" if able else "references_unable"),
            interactive=able,
            buttons=[],
            fit_columns=False,
            elem_id="references",
            **tray,
        )
        self._guidance("reference_guidance_scale", able)

    def _video(self) -> None:
        self.fields["video"] = gr.Video(label=t("clip"), sources=["upload"], height=220, buttons=[], elem_id="clip")
        needs = {use: missing(self.studio.pipe, use) for use in USES}
        choices = [(t(f"{use}_unable") if needs[use] else t(use), use) for use in USES]
        grey = [f"without-{number}" for number, use in enumerate(USES, 1) if needs[use]]  # page.css greys these choices out
        self.fields["use"] = gr.Radio(choices, value="continue", label=t("use"), elem_id="use", elem_classes=grey)
        self.fields["strength"] = gr.Slider(0, 1, 0.4, step=0.05, label=t("strength"), visible=False)
        with gr.Column(visible=False) as self.painting:
            gr.Markdown(t("paint"))
            self.painted = gr.JSON({}, visible=False)  # {"video", "mask"}: a mask and its clip, to restore it
            self.fields["mask"] = gr.HTML(padding=False, elem_id="mask", html_template="${value}")
        aspects = list(self.studio.sizes)
        self.fields["outpaint"] = gr.Radio(aspects, value=aspects[-1], label=t("outpaint_to"), visible=False)

    def _camera(self) -> None:
        able = not missing(self.studio.pipe, "camera")
        shots = [(t("static"), "static"), *((t(move), move) for move in MOVES)]
        self.shot = gr.Radio(shots, value="static", label=t("shot"), elem_id="shot", **self._able("camera"))
        self.drawing = gr.HTML(padding=False, elem_id="camera-drawing")
        with gr.Row(elem_classes="sliders"):
            for name in UNITS:
                self.fields[name] = gr.Slider(
                    -LIMIT, LIMIT, 0, step=0.5, label=t(name), info=t(f"{name}_is"), min_width=195, buttons=[], interactive=able,
                    elem_id=f"axis-{name}",
                )  # fmt: skip
        with gr.Row(elem_classes="sliders"):
            self.fields["camera_scale"] = gr.Slider(0, 3, 1, step=0.1, label=t("camera_scale"), min_width=170, buttons=[], interactive=able)
            self._guidance("camera_guidance_scale", able)
        self.fields["camera_file"] = gr.File(label=t("trajectory"), height=130, interactive=able, elem_id="camera-file")

    def _tracks(self) -> None:
        need = missing(self.studio.pipe, "tracks")
        gr.Markdown(t(f"unable_{need}") if need else t("draw_tracks"))
        self.fields["tracks"] = gr.HTML(padding=False, elem_id="board", html_template="${value}", visible=not need)
        self._guidance("brush_guidance_scale", not need)

    def _shots(self) -> None:
        need = missing(self.studio.pipe, "shots")
        gr.Markdown(t(f"unable_{need}") if need else t("write_shots"))
        self.fields["shots"] = gr.HTML(padding=False, elem_id="story", html_template="${value}", visible=not need)

    def _size(self) -> None:
        aspects = [(t("auto"), "auto"), *((a, a) for a in self.studio.sizes)]
        self.fields["aspect"] = gr.Radio(aspects, value="auto", label=t("aspect"), elem_id="aspect")
        self.fields["duration"] = gr.Slider(
            0.5, MAX_SECONDS, self.first_seconds, step=0.5, label=t("duration"), info=t("duration_is"), elem_id="duration"
        )
        self.fields["extend_to"] = gr.Number(0, label=t("extend_to"), **self._able("extend_to"))
        self.fields["still"] = gr.Checkbox(label=t("still"), elem_id="still", **self._able("still"))

    def _advanced(self) -> None:
        with gr.Row():
            for name in ("num_inference_steps", "guidance_scale", "shift"):
                own = self.studio.pipe.setting(name)
                own = " / ".join(f"{g:g}" for g in dict.fromkeys(own)) if isinstance(own, list | tuple) else f"{own:g}"
                info = f"{t('own')} ({own})"
                self.fields[name] = gr.Number(0, label=t(name), info=info, min_width=120, elem_id=name)
            self.fields["sigma_c"] = gr.Number(0, label=t("sigma_c"), info=t("sigma_c_is"), step=0.01, min_width=120)
        models, loras = self.studio.models, self.studio.loras
        with gr.Row(visible=bool(models or loras)):
            choices = [(t("own_model"), ""), *((name, name) for name in models)]
            self.fields["model"] = gr.Dropdown(choices, value="", label=t("model"), visible=bool(models), elem_id="model")
            choices = [(t("none"), ""), *((name, name) for name in loras)]
            self.fields["lora"] = gr.Dropdown(choices, value="", label=t("lora"), visible=bool(loras), elem_id="lora")
            self.fields["lora_scale"] = gr.Slider(-2, 2, 1, step=0.05, label=t("lora_scale"), buttons=[], visible=bool(loras))

    def _go(self) -> None:
        self.plan = gr.HTML(elem_id="plan", padding=False)
        fast = self.studio.pipe.transformer_fast is not None
        self.live = gr.Checkbox(fast, label=t("live"), info=t("live_is"), visible=fast, elem_id="live")
        self.rough = gr.HTML(padding=False, visible=fast, elem_id="rough")
        with gr.Row(elem_classes="seed-row"):
            modes = [(t(mode), mode) for mode in MODES if mode != "fast" or self.studio.pipe.transformer_fast is not None]
            self.fields["mode"] = gr.Radio(modes, value="std", label=t("mode"), min_width=140, scale=2)
            self.fields["seed"] = gr.Number(-1, label=t("seed"), precision=0, min_width=110, elem_id="seed")
            with gr.Column(min_width=90, scale=1, elem_classes="seed-tools"):
                self.dice = gr.Button(t("dice"), size="sm", min_width=50, elem_id="dice")
                self.reuse = gr.Button(t("reuse"), size="sm", min_width=50, elem_id="reuse")
            self.fields["num_videos"] = gr.Number(1, label=t("num_videos"), precision=0, min_width=70, elem_id="num-videos")
        with gr.Row():
            self.generate = gr.Button(t("generate"), variant="primary", size="lg", scale=3, elem_id="generate", min_width=160)
            self.stop = gr.Button(t("stop"), variant="stop", size="lg", scale=1, elem_id="stop", interactive=False, min_width=80)


class Stage:
    """Shows progress and the result, with its actions; below it all results of this browser."""

    def __init__(self) -> None:
        self.screen = gr.HTML(views.empty(0), padding=False, elem_id="stage")
        with gr.Row(elem_classes="tools"):  # hidden by page.css until a video is on the stage
            self.use_last = gr.Button(t("use_last"), size="sm", min_width=120, elem_id="use-last")
            self.extend = gr.Button(t("extend"), size="sm", min_width=70, elem_id="extend")
            self.vary = gr.Button(t("vary"), size="sm", min_width=90, elem_id="vary")
            self.compare = gr.Button(t("compare"), size="sm", min_width=70, elem_id="compare")
            self.remove = gr.Button(t("remove"), size="sm", min_width=70, elem_id="remove")
        gr.Markdown(t("results"))
        self.refresh = gr.Button("", elem_id="refresh", elem_classes="unseen")  # page.js presses it when another tab has a new result
        choose = """element.addEventListener('click', (event) => {
            const card = event.target.closest('[data-id]');
            if (card) trigger('select', { value: card.dataset.id });
        })"""
        self.cards = gr.HTML(padding=False, elem_id="cards", js_on_load=choose)
        self.mine = gr.JSON({}, visible=False)  # {"chosen", "comparing"}; page.js adds the browser's list, "ids", and its "tab"
        self.saved = gr.JSON({}, visible=False)  # the form's values saved by page.js

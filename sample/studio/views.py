"""HTML of the changing parts of the page. All text from visitors is escaped."""

from __future__ import annotations

import base64
import io
from html import escape
from itertools import pairwise
from typing import Any

import numpy as np
from kling_programs.sample.studio.shelf import OTHER_KINDS, Result
from kling_programs.sample.studio.words import say
from PIL import Image

from kling.cameras.axes import MOVES, UNITS
from kling.data.strip import strip
from kling.data.video import read_video
from kling.data.world.captions import camera_said
from kling.errors import UserError
from kling.runtime.log import duration
from kling.sampling.memory import size as size_of
from kling.sampling.pipeline import KlingPipeline
from kling.sampling.plan import Plan
from kling.sampling.request import Request
from kling.sampling.shots import MOST, Shot, as_shots
from kling.sampling.shots import timeline as timeline_of

STRIP = 5  # frames in the strip of a shot
LONG = 2000  # characters of a setting


def moving(frames: np.ndarray, fps: float) -> str:
    """uint8 (T, H, W, 3) as an endlessly playing `<img>`, small enough to be inside the page."""
    pictures = [Image.fromarray(frame) for frame in np.asarray(frames)]
    data = io.BytesIO()
    pictures[0].save(data, "WEBP", save_all=True, append_images=pictures[1:], duration=round(1000 / fps), loop=0, quality=80, method=0)
    return _img(data.getvalue(), "webp")


def still(picture: np.ndarray) -> str:
    """uint8 (H, W, 3) as an `<img>`."""
    data = io.BytesIO()
    Image.fromarray(np.asarray(picture)).save(data, "PNG")
    return _img(data.getvalue(), "png")


def _img(data: bytes, kind: str) -> str:
    return f'<img class="frames" alt="" src="data:image/{kind};base64,{base64.b64encode(data).decode()}">'


def header(pipe: KlingPipeline, name: str) -> str:
    """The model in one line: name, size, and length of its clips."""
    parts = [part for part in (pipe.vae, *pipe.experts, pipe.text_encoder) if hasattr(part, "parameters")]  # without umT5
    size = sum(p.numel() for part in parts for p in part.parameters())
    seconds = pipe.config.max_frames / pipe.config.fps
    facts = [name, f"{size / 1e6:.1f} M", f"{pipe.config.max_frames} × {pipe.config.fps:g} fps ≈ {seconds:.1f} s", str(pipe.device)]
    chips = "".join(f"<span>{escape(fact)}</span>" for fact in facts)
    return f'<header class="top"><h1>kling <em>studio</em></h1><div class="chips">{chips}</div></header>'


# ------------------------------------------------------------------------------------------------------------------- the stage


FILM = (  # three frames of a film, the middle one to be played
    '<svg class="film" viewBox="0 0 120 56" aria-hidden="true">'
    '<rect x="1" y="8" width="34" height="40" rx="5"/><rect x="85" y="8" width="34" height="40" rx="5"/>'
    '<rect class="now" x="27" y="2" width="66" height="52" rx="7"/><path d="M53 18l17 10l-17 10z"/></svg>'
)


def empty(lang: int) -> str:
    return f'<div class="stage">{FILM}<p class="hint">{say(lang, "empty")}<br><small>{say(lang, "empty_hint")}</small></p></div>'


def waiting(lang: int, place: int) -> str:
    text = say(lang, "waiting", place=place) if place else say(lang, "starting")
    return f'<div class="stage busy"><p class="hint">{text}</p><progress></progress></div>'


def progress(lang: int, step: int, total: int, left: float | None, preview: str) -> str:
    """preview: an `<img>`, or "" before the first."""
    text = steps_told(lang, step, total, left)
    bar = f'<progress max="{total}" value="{step}"></progress>'
    body = preview or f'<p class="hint">{say(lang, "starting")}</p>'
    return f'<div class="stage busy">{body}<p class="line">{text}</p>{bar}</div>'


def steps_told(lang: int, step: int, total: int, left: float | None) -> str:
    """The progress of sampling, and the remaining time (left: seconds, if known)."""
    if step == total:
        return say(lang, "finishing")
    text = say(lang, "step", step=step, total=total)
    return text if left is None else f"{text} · {say(lang, 'left', left=duration(left))}"


def ended(lang: int, key: str) -> str:
    return f'<div class="stage"><p class="hint">{say(lang, key)}</p></div>'


def failed(message: str) -> str:
    return f'<div class="stage"><p class="hint bad" role="alert">{escape(message)}</p></div>'


def result(lang: int, one: Result, other: Result | None = None) -> str:
    """A finished video with its settings; with `other`, both side by side, playing in step."""
    if other is not None:
        sides = "".join(f"<figure>{_player(r)}{_caption(r)}</figure>" for r in (one, other))
        return f'<div class="stage done compare">{sides}</div>'
    record = one.record
    rows = {**record["request"], **record["settings"], "seconds": record["output"]["seconds"]}
    rows = {name: value for name, value in rows.items() if value not in (None, "", [], False)}
    table = "".join(f"<tr><th>{escape(name)}</th><td>{escape(_short(value))}</td></tr>" for name, value in rows.items())
    links = f'<a download="{one.id}{one.path.suffix}" href="{url(one.path)}">{say(lang, "mp4")}</a>'
    if one.path.suffix == ".mp4":
        for kind in OTHER_KINDS:
            links += f'<a download="{one.id}.{kind}" href="{url(one.path.with_suffix(f".{kind}"))}">{say(lang, kind)}</a>'
    links += f'<a download="{one.record_path.name}" href="{url(one.record_path)}">{say(lang, "replay")}</a>'
    details = f"<details><summary>{say(lang, 'settings')}</summary><table>{table}</table></details>"
    line = f'<p class="line">{say(lang, "done", seconds=duration(record["output"]["seconds"]))} <span class="links">{links}</span></p>'
    return f'<div class="stage done">{_player(one)}{_strips(one)}{line}{details}</div>'


def cards(lang: int, results: list[Result], chosen: str | None) -> str:
    """All results of this browser, the newest first."""
    if not results:
        return f'<p class="hint">{say(lang, "no_results")}</p>'

    def card(one: Result) -> str:
        mark = ' aria-current="true"' if one.id == chosen else ""
        picture = f'<video src="{url(one.path)}#t=0.1" muted loop playsinline preload="metadata"></video>'
        picture = picture if one.path.suffix == ".mp4" else f'<img alt="" src="{url(one.path)}">'
        return f'<button class="card" data-id="{one.id}"{mark}>{picture}{_caption(one)}</button>'

    return f'<div class="cards">{"".join(map(card, results))}</div>'


def _player(one: Result) -> str:
    if one.path.suffix == ".png":
        return f'<img class="frames" alt="" src="{url(one.path)}">'
    return f'<video class="frames" src="{url(one.path)}" controls autoplay muted loop playsinline></video>'


def _strips(one: Result) -> str:
    """A strip of every shot of a video of several, with its words; empty for others."""
    shots = _shots(one)
    if len(shots) < 2 or one.path.suffix != ".mp4":
        return ""
    frames = read_video(one.path).frames  # (T, H, W, 3)
    ranges = timeline_of(shots, float(one.record["output"]["fps"])).ranges
    rows = (
        (shot, still(strip([frames[start:end]], min(STRIP, end - start), gap=0).numpy()))
        for shot, (start, end) in zip(shots, ranges, strict=True)
    )
    told = "".join(f"<li>{picture}<span>{escape(shot.prompt)}</span></li>" for shot, picture in rows)
    return f'<ol class="strips">{told}</ol>'


def _shots(one: Result) -> list[Shot]:
    try:
        shots = as_shots(one.record["request"].get("shots"))
    except UserError:  # such as a camera file that is gone
        return []
    return shots if isinstance(shots, list) else []


def _caption(one: Result) -> str:
    request, shots = one.record["request"], _shots(one)
    words = " / ".join(shot.prompt for shot in shots) or request["prompt"]
    return f"<span>{escape(words[:80] or '—')}</span><small>{request['seed']}</small>"


def _short(value: Any) -> str:
    """A setting as text of at most `LONG` characters; for a file only its name."""
    if isinstance(value, list | tuple):
        text = ", ".join(map(_short, value))
    elif isinstance(value, dict):
        text = " · ".join(f"{name} {_short(part)}" for name, part in value.items() if part is not None)
    else:
        text = f"{value:.6g}" if isinstance(value, float) else str(value)
        text = text.rsplit("/", 1)[1] if text.startswith("/") else text
    return text if len(text) <= LONG else f"{text[:LONG]} …"


def url(path: Any) -> str:
    return f"gradio_api/file={path}"


# -------------------------------------------------------------------------------------------------------- what looks inside, below


def working(text: str, step: int | None = None, total: int = 1) -> str:
    """One line for a running job."""
    bar = "<progress></progress>" if step is None else f'<progress max="{total}" value="{step}"></progress>'
    return f'<div class="working"><span>{escape(text)}</span>{bar}</div>'


def told(text: str) -> str:
    return f'<div class="working"><span>{escape(text)}</span></div>'


# ------------------------------------------------------------------------------------------------------------------ the inputs


def timeline(frames: int, rows: list[dict[str, Any]]) -> str:
    """Keyframes on a line from the first frame to the last. rows: {"frame", "strength", "thumb"}."""

    def mark(row: dict[str, Any]) -> str:
        left = 100 * min(1, row["frame"] / max(1, frames - 1))
        held = "" if row["strength"] == 1 else f" · {row['strength']:g}"
        return f'<div class="key" style="left:{left:.1f}%">{row["thumb"]}<small>{row["frame"]}{held}</small></div>'

    ends = f'<small class="begin">0</small><small class="end">{frames - 1}</small>'
    return f'<div class="timeline"><div class="bar"></div>{"".join(map(mark, rows))}{ends}</div>'


def drawings(lang: int, path: str, motion: str, file: str) -> str:
    """Both drawings of a camera, and its trajectory as a JSON file to download, contained in the link."""
    href = f"data:application/json;base64,{base64.b64encode(file.encode()).decode()}"
    save = f'<a download="camera-path.json" href="{href}">{say(lang, "save_trajectory")}</a>'
    figures = [(path, f"{say(lang, 'path')} · {save}"), (motion, say(lang, "motion"))]
    return '<div class="drawings">' + "".join(f"<figure>{svg}<figcaption>{text}</figcaption></figure>" for svg, text in figures) + "</div>"


def storyboard(lang: int) -> str:
    """The place for the rows of a storyboard; page.js draws them, with these words."""
    words = {name: say(lang, f"shot_{name}") for name in ("words", "seconds", "unit", "camera", "up", "down", "remove", "drag")}
    words["short"] = say(lang, "camera")
    data = "".join(f' data-{name}="{escape(text)}"' for name, text in words.items())
    cameras = "".join(f'<option value="{name}">' for name in ("static", *MOVES, *(f"{axis}=5" for axis in UNITS)))
    add = f'<button type="button" data-do="add-shot">{say(lang, "shot_add")}</button>'
    return f'<div class="story" data-most="{MOST}"{data}><ol></ol>{add}<datalist id="story-cameras">{cameras}</datalist></div>'


def painter(lang: int, picture: np.ndarray, before: str | None = None) -> str:
    """A picture to paint on, and the tools; page.js does the painting. before: an earlier mask, a file of the store."""
    H, W = picture.shape[:2]
    tools = (
        f'<label>{say(lang, "brush_size")} <input type="range" name="brush-size" min="2" max="40" value="11"></label>'
        f'<label><input type="checkbox" name="eraser"> {say(lang, "eraser")}</label>'
        f'<button type="button" data-do="undo">{say(lang, "undo")}</button>'
        f'<button type="button" data-do="clear">{say(lang, "clear")}</button>'
    )
    mask = f' data-before="{escape(url(before))}"' if before else ""
    canvas = f'<div class="painter">{still(picture)}<canvas width="{W}" height="{H}"{mask}></canvas></div>'
    return f'<div class="painting"><div class="painting-tools">{tools}</div>{canvas}</div>'


def board(size: tuple[int, int], picture: np.ndarray | None) -> str:
    """A picture of `size` (H, W) to draw tracks on, empty without one; page.js draws the arrows."""
    H, W = size
    ground = '<rect class="blank" width="100%" height="100%"/>' if picture is None else ""
    svg = f'<svg viewBox="0 0 {W} {H}" data-w="{W}" data-h="{H}">{ground}<g class="arrows"></g></svg>'
    return f'<div class="board" style="aspect-ratio:{W}/{H}">{still(picture) if picture is not None else ""}{svg}</div>'


def understood(lang: int, plan: Plan, request: Request, clip: float | None = None, needs: tuple[float | None, int] | None = None) -> str:
    """The recognised task and the result to expect, in one line.

    clip: seconds of a given clip of which only the beginning is used. needs: (seconds, bytes) that it will take.
    """
    task = [say(lang, f"task_{plan.task}")]
    if len(plan.hops) > 1 and not plan.hops[0].overlap:
        task.append(say(lang, "then", count=len(plan.hops) - 1))
    if request.loop:
        task.append(say(lang, "with_loop"))
    if isinstance(request.camera, str):
        from_file = request.camera.endswith((".json", ".txt"))
        task.append(say(lang, "camera_from_file") if from_file else f"{say(lang, 'task_camera')} {request.camera.replace(',', ' ')}")
    elif plan.has_camera and request.camera is None and request.shots is None:
        task.append(say(lang, "camera_read", camera=camera_said(request.prompt).replace(",", " ")))
    if request.tracks is not None:
        task.append(say(lang, "task_brush"))
    if plan.cuts:
        lengths = [end - start for start, end in pairwise([0, *plan.cuts, plan.frames])]
        task.append(say(lang, "task_of_shots", count=len(lengths), seconds=" + ".join(f"{n / plan.fps:.3g}" for n in lengths)))
    if request.references:
        task.append(f"{say(lang, 'task_reference')} × {len(request.references)}")
    size = f"{plan.width}×{plan.height}"
    seconds, steps = f"{plan.frames / plan.fps:.1f}", plan.num_inference_steps
    facts = say(lang, "facts", frames=plan.frames, seconds=seconds, size=size, fps=f"{plan.fps:g}", steps=steps)
    if clip is not None:
        task.append(say(lang, "first_part", seconds=seconds, of=f"{clip:.1f}"))
    if request.num_videos > 1:
        facts = f"{request.num_videos} × {facts}"
    if needs is not None:
        took, memory = needs[0], size_of(needs[1])
        key, took = ("needs_memory", "") if took is None else ("needs", duration(took))
        facts += " · " + say(lang, key, seconds=took, memory=memory)
    return f'<p class="plan"><b>{escape(" · ".join(task))}</b> {escape(facts)}</p>'


def mistake(text: str) -> str:
    return f'<p class="plan bad">{escape(text)}</p>'


def grid(cells: list[tuple[str, str]]) -> str:
    """Pictures with a caption each: [(html, caption)]."""
    return (
        '<div class="grid">' + "".join(f"<figure>{body}<figcaption>{escape(text)}</figcaption></figure>" for body, text in cells) + "</div>"
    )

"""A web page about a data set: histograms of the measurements, contact sheets of kept and dropped clips, and the reasons for dropping."""

from __future__ import annotations

import base64
import html
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import cv2
import numpy as np

from kling.data.image import read_image
from kling.data.manifest import Bad, Manifest, Shot, shot_from
from kling.data.reader import open_reader
from kling.data.strip import strip
from kling.data.transforms import cover_size, fit
from kling.errors import UserError
from kling.runtime.files import written

BINS = 24
STRIP = 4  # frames of a clip on a contact sheet
THUMB = 84  # height of these frames in pixels
STYLE = """
:root { color-scheme: light dark; --line: color-mix(in srgb, currentColor 18%, transparent); --bar: #4c7bd9; --bad: #c8503c; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 74rem; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin: 0; } h2 { font-size: 1.1rem; margin: 2.2rem 0 .6rem; border-bottom: 1px solid var(--line); }
.facts { display: flex; flex-wrap: wrap; gap: .4rem 2.2rem; margin: .8rem 0; } .facts b { font-size: 1.35rem; display: block; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); gap: 1.2rem; }
svg { width: 100%; height: 5rem; } rect { fill: var(--bar); } .grid p, figcaption { margin: 0; font-size: .82rem; }
.axis { display: flex; justify-content: space-between; opacity: .65; font-variant-numeric: tabular-nums; }
.sheet { display: grid; grid-template-columns: repeat(auto-fill, minmax(21rem, 1fr)); gap: 1rem; } figure { margin: 0; min-width: 0; }
figure img { width: 100%; display: block; border-radius: 4px; } figcaption { overflow-wrap: anywhere; }
.name { opacity: .65; } .why { color: var(--bad); font-weight: 600; } table { border-collapse: collapse; }
td { padding: .15rem 1.2rem .15rem 0; vertical-align: top; overflow-wrap: anywhere; }
"""
FIGURES: tuple[tuple[str, Callable[[Shot], float | None]], ...] = (
    ("seconds", lambda s: None if s.is_image else s.seconds),
    ("frames a second", lambda s: None if s.is_image else s.video.fps),
    ("short side, pixels", lambda s: min(s.video.width, s.video.height)),
    ("width / height", lambda s: s.video.width / s.video.height),
    ("motion, % of the long side a second", lambda s: s.measures.get("motion")),
    ("shake, % of the long side", lambda s: s.measures.get("shake")),
    ("sharpness", lambda s: s.measures.get("sharpness")),
    ("near black, share of the time", lambda s: s.measures.get("dark")),
    ("letterbox, share of the picture", lambda s: s.measures.get("letterbox")),
    ("writing, share of the picture", lambda s: s.measures.get("text")),
    ("words in a caption", lambda s: len(s.captions[0].text.split()) if s.captions else 0),
)


def write_report(path: str | Path, manifest: Manifest, refused: Sequence[Bad], sheet: int = 24) -> None:
    """Write the page. refused: the quarantine. sheet: number of clips shown of those kept, and for each reason of those dropped."""
    shots = manifest.shots
    unusable = [bad for bad in refused if bad.shot is None]
    dropped = [(bad, shot_from(bad.shot, "quarantine")) for bad in refused if bad.shot is not None]
    hours = sum(shot.seconds for shot in shots) / 3600
    facts = {
        "clips kept": len(shots),
        "hours": f"{hours:.2f}",
        "pictures": sum(s.is_image for s in shots),
        "without a caption": sum(not s.captions for s in shots),
        "with a camera": sum(s.camera is not None for s in shots),
        "dropped by filters": len(dropped),
        "unusable files": len(unusable),
    }
    parts = [f"<h1>{_text(manifest.folder.absolute().name)}</h1>", '<div class="facts">']
    parts += [f"<span><b>{value}</b>{name}</span>" for name, value in facts.items()]
    parts += ["</div>", "<h2>What was kept</h2>", '<div class="grid">']
    parts += [histogram(name, [v for s in shots if (v := figure(s)) is not None]) for name, figure in FIGURES]
    parts += ["</div>", f"<h2>Kept: {min(sheet, len(shots))} of {len(shots)}</h2>"]
    parts += [_sheet(manifest, [(shot, "") for shot in _spread(shots, sheet)])]
    for reason, count in Counter(bad.reason for bad, _ in dropped).most_common():
        some = [(shot, f"{bad.reason}: {bad.detail}") for bad, shot in dropped if bad.reason == reason]
        parts += [f"<h2>Dropped, {_text(reason)}: {min(sheet, count)} of {count}</h2>", _sheet(manifest, _spread(some, sheet))]
    if unusable:
        parts += ["<h2>Unusable files</h2>", "<table>"]
        parts += [f'<tr><td class="why">{_text(b.reason)}<td>{_text(b.path)}<td>{_text(b.detail)}' for b in unusable]
        parts += ["</table>"]
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    title = f"<title>{_text(manifest.folder.absolute().name)}</title><style>{STYLE}</style>"
    page = f'<!doctype html><html lang="en">{head}{title}<body>{"".join(parts)}</body></html>\n'
    with written(path) as temporary:
        temporary.write_text(page, encoding="utf-8", errors="backslashreplace")  # names that are not UTF-8


def histogram(name: str, values: list[float]) -> str:
    """An SVG histogram of a measurement, with its range below."""
    if not values:
        return f"<div><p>{_text(name)}</p><p class=axis>none</p></div>"
    low, high = min(values), max(values)
    counts, _ = np.histogram(values, bins=BINS, range=(low, high if high > low else low + 1))
    bars = [
        f'<rect x="{i}" y="{1 - count / counts.max():.3f}" width=".9" height="{count / counts.max():.3f}"><title>{count}</title></rect>'
        for i, count in enumerate(counts)
    ]
    axis = f"<span>{low:.3g}</span><span>median {float(np.median(values)):.3g}</span><span>{high:.3g}</span>"
    return (
        f'<div><p>{_text(name)}</p><svg viewBox="0 0 {BINS} 1" preserveAspectRatio="none">{"".join(bars)}</svg>'
        f'<p class="axis">{axis}</p></div>'
    )


def _sheet(manifest: Manifest, clips: Iterable[tuple[Shot, str]]) -> str:
    figures = []
    for shot, why in clips:
        try:
            picture = base64.b64encode(thumbnails(manifest, shot)).decode()
            image = f'<img src="data:image/jpeg;base64,{picture}" alt="">'
        except UserError as error:
            image, why = "", f"{why} {error}"
        words = _text(" · ".join(caption.text for caption in shot.captions)[:200])
        about = f'<span class="name">{_text(shot.name)} · {shot.seconds:.1f} s · {shot.video.width}x{shot.video.height}</span>'
        why = f'<span class="why">{_text(why)}</span><br>' if why else ""
        figures.append(f"<figure>{image}<figcaption>{why}{about}<br>{words}</figcaption></figure>")
    return f'<div class="sheet">{"".join(figures)}</div>'


def thumbnails(manifest: Manifest, shot: Shot) -> bytes:
    """A JPEG of `STRIP` frames of a clip, first to last, side by side."""
    source = manifest.check(shot)
    size = cover_size(shot.video.height, shot.video.width, THUMB, 1)
    if shot.is_image:
        frames = fit(read_image(source), *size)[None]
    else:
        step = max(0.0, shot.seconds - 1 / shot.video.fps) / (STRIP - 1)
        frames = open_reader(source, info=shot.video).at([shot.start + i * step for i in range(STRIP)], size)
    row = strip([frames], len(frames), gap=0).numpy()
    return cv2.imencode(".jpg", np.ascontiguousarray(row[..., ::-1]), [cv2.IMWRITE_JPEG_QUALITY, 80])[1].tobytes()


def _spread(items: Sequence, n: int) -> list:
    """n of the items, evenly spaced over all of them."""
    return [items[i * len(items) // n] for i in range(n)] if len(items) > n else list(items)


def _text(value: object) -> str:
    return html.escape(str(value))

"""What a careless or hostile visitor hands in: names, values, pictures and records of any kind, each answered with one line."""

# ruff: noqa: F811 - arguments are fixtures

from __future__ import annotations

import json
import re
import struct
import zlib
from pathlib import Path
from types import SimpleNamespace

import gradio as gr
import numpy as np
import pytest
from kling_programs.sample.studio import studio, views
from kling_programs.sample.studio.events import Events
from kling_programs.sample.studio.form import request_of
from kling_programs.sample.studio.mistakes import LINES, told_to
from kling_programs.sample.studio.restore import fields_of
from kling_programs.sample.studio.studio import guarded, in_place
from kling_programs.sample.studio.uploads import Uploads
from PIL import Image
from test_demo import clip, pipe, png, uploads  # noqa: F401 - fixtures

from kling import Request
from kling.data.image import read_image
from kling.errors import UserError

POINTS = [[0.1, 0.1], [0.5, 0.5]]


@pytest.mark.parametrize("tail", ["a" * 300, "\ud800.png", "b/" * 1500 + "x", "..", "."])
def test_a_name_that_no_file_can_have_was_not_uploaded(uploads: Uploads, tail: str) -> None:
    for folder in (uploads.arrivals, uploads.store):
        for payload in (f"{folder}/{tail}", {"path": f"{folder}/{tail}"}, {"video": {"path": f"{folder}/{tail}"}}):
            for ask in (lambda p: uploads.accept(p, "image"), lambda p: uploads.note(p), uploads.place):
                with pytest.raises(UserError) as error:
                    ask(payload)
                assert error.value.code == "not_uploaded"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": []}, "prompt is not text"),
        ({"prompt": False}, "prompt is not text"),
        ({"prompt": "a \ud800 ball"}, "prompt holds half a character .* at place 3"),
        ({"negative_prompt": "\udfff"}, "half a character"),
        ({"loop": 0}, "loop: give true or false"),
        ({"loop": ""}, None),
        ({"shift": 1e-300}, "shift 1e-300: give a number from 0.001 to 50"),
        ({"mode": []}, "unknown mode"),
        ({"aspect": 0}, "unknown aspect"),
        ({"keyframes": {}}, "give a list"),
        ({"keyframes": [{"file": {"path": "/x"}, "frame": 1, "weight": 0.5}]}, "unknown key of keyframes 'weight'"),
        ({"keyframes": [{"file": {"path": "/x"}, "frame": 1.5}]}, "frame 1.5: give a whole number"),
        ({"references": {}}, "give a list"),
        ({"references": [None]}, "give a list"),
        ({"references": [{"path": "/x"}] * 5}, "5 references were given: give at most 4"),  # before a file is opened
        ({"tracks": {"points": POINTS}}, "give a list"),
        ({"tracks": [{"points": POINTS, "speed": 3}]}, "unknown key of tracks 'speed'"),
        ({"tracks": [{"points": [[None, 0.5], [0.2, 0.2]]}]}, "each needs a mask, or 1 to"),  # not silently 0
        ({"tracks": [{"points": [["", 0.5]]}]}, "each needs a mask, or 1 to"),
        ({"tracks": [{"points": [[1e308, 0]]}]}, "number from -2 to 3"),
        ({"tracks": [{"points": [[True, 0]]}]}, "not a number"),
        ({"shots": {"shots": []}}, "give a list"),
        ({"shots": [{"prompt": "a", "secs": 3}]}, "unknown key of shots 'secs'"),
        ({"shots": [{"prompt": 0}]}, "prompt is not text"),
        ({"shots": [{"prompt": "\ud800"}]}, "half a character"),
        ({"shots": [{"prompt": "x" * 3000}]}, "3000 characters"),
        ({"shots": [{"prompt": "a", "camera": 0}]}, "shot 1: unknown camera move '0'"),
        ({"shots": [{"prompt": "a", "camera": {"pan": 5}}]}, "shot 1: unknown camera move"),
        ({"shots": [{"prompt": "a"}, {"prompt": "b", "camera": "pan=nan"}]}, "shot 2: camera axis pan=nan is outside"),
        ({"shots": [{"prompt": "a", "camera": "pan=1,pan=2"}]}, "given twice"),
        ({"shots": [{"prompt": "a", "seconds": True}]}, "not a number"),
        ({"shots": [{"prompt": "a", "seconds": 25}] * 3}, "shots of 75 s in all: give at most 60 s"),
    ],
)
def test_odd_values_are_refused_by_name_and_never_ignored(uploads: Uploads, fields: dict, message: str | None) -> None:
    if message is None:
        assert request_of(fields, uploads) == request_of({}, uploads)
        return
    with pytest.raises(UserError, match=message) as error:
        request_of(fields, uploads)
    told = [told_to(lang, error.value) for lang in (0, 1)]
    assert all("\n" not in line and len(line) < 600 and line.isprintable() for line in told)


def test_what_is_given_beside_a_clip_is_refused_and_extend_clears_it(uploads: Uploads) -> None:
    video, image = ({"path": str(make)} for make in (clip(uploads.arrivals / "v.mp4"), png(uploads.arrivals / "a.png")))
    for fields, name in (({"image": image}, "First frame"), ({"loop": True}, "loop")):
        with pytest.raises(UserError) as error:
            request_of({"video": video, **fields}, uploads)
        assert error.value.code == "beside_video" and name in told_to(0, error.value)
    with pytest.raises(UserError) as error:
        request_of({"video": video, "use": "restyle", "strength": 0.4, "tracks": [{"points": POINTS}]}, uploads)
    assert error.value.code == "tracks_on_edit"
    one = SimpleNamespace(path=uploads.arrivals / "v.mp4")
    page = SimpleNamespace(_chosen=lambda mine, lang: one, studio=SimpleNamespace(uploads=uploads))
    (kept, use, first, loop, _), *_ = Events.extend.__wrapped__(page, None, None)
    assert (use, first, loop) == ("continue", None, False) and request_of(
        {"video": kept, "use": use, "image": first}, uploads
    ).video == kept


def test_words_that_the_text_encoder_cannot_read_are_refused_before_the_queue(pipe) -> None:
    for request in (Request("球" * 40), Request("a", negative_prompt="x" * 300), Request(shots=[("a", 1), ("球" * 40, 1)])):
        with pytest.raises(UserError, match="63") as error:
            pipe.plan(request)
        assert error.value.code == "prompt_too_long" and "最多读 63" in told_to(1, error.value)


@pytest.mark.parametrize(("name", "shape"), [("a.tif", (20, 30)), ("a.bmp", (20, 30)), ("a.gif", (20, 30))])
def test_a_picture_that_no_browser_shows_is_kept_as_a_copy(uploads: Uploads, name: str, shape: tuple[int, int]) -> None:
    pixels = np.full((*shape, 3), (200, 40, 60), np.uint8)
    Image.fromarray(pixels).save(uploads.arrivals / name)
    payload = {"path": str(uploads.arrivals / name)}
    kept = uploads.accept(payload, "image")
    assert kept.endswith(".png") and np.array_equal(read_image(kept).numpy(), pixels) and uploads.note(payload, "image") == {"name": name}
    plain = {"path": str(png(uploads.arrivals / "b.png"))}
    assert uploads.accept(plain, "image").endswith(".png") and uploads.note(plain, "image") is None


@pytest.mark.parametrize("side", [6000, 10_000, 60_000])
def test_a_picture_of_many_pixels_is_refused_by_its_header(uploads: Uploads, side: int) -> None:
    """A kilobyte of PNG may claim gigabytes: Pillow refuses some of them before it tells their size."""
    parts = [(b"IHDR", struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b"")]
    chunks = [struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts]
    (uploads.arrivals / "b.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))
    with pytest.raises(UserError, match="b.png has .* pixels: give at most 25 megapixels") as error:
        uploads.accept({"path": str(uploads.arrivals / "b.png")}, "image")
    assert error.value.code == "image_too_large" and "最多 25 百万像素" in told_to(1, error.value)


def test_a_tray_keeps_the_pictures_that_can_be_used_in_their_order(uploads: Uploads, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sideways, in print colours, of 16 bits, half transparent; an animation and a lie are taken out, each with its reason."""
    sideways = Image.new("RGB", (40, 20), "red")
    exif = sideways.getexif()
    exif[0x0112] = 6
    sideways.save(uploads.arrivals / "turned.jpg", exif=exif, quality=95)
    Image.new("CMYK", (20, 20), (0, 255, 255, 0)).save(uploads.arrivals / "print.jpg", quality=95)
    Image.fromarray(np.full((20, 20), 40_000, np.uint16)).save(uploads.arrivals / "deep.png")
    Image.new("RGBA", (20, 20), (255, 0, 0, 0)).save(uploads.arrivals / "clear.png")
    moving = [Image.new("RGB", (20, 20), colour) for colour in ("red", "blue")]
    moving[0].save(uploads.arrivals / "moving.webp", save_all=True, append_images=moving[1:])
    (uploads.arrivals / "lie.png").write_bytes(b"<svg onload=alert(1)>")
    warned: list[str] = []
    monkeypatch.setattr(studio.gr, "Warning", lambda line, **_: warned.append(line))
    page = SimpleNamespace(studio=SimpleNamespace(uploads=uploads))

    def tray(*names: str) -> list[str]:
        rows = [{"image": {"path": str(uploads.arrivals / name)}, "caption": None} for name in names]
        return Events.check_tray.__wrapped__(page, None, rows)

    kept = tray("moving.webp", "turned.jpg", "print.jpg")
    assert np.allclose([read_image(file).float().mean((0, 1)) for file in kept], [255, 0, 0], atol=2)
    assert read_image(kept[0]).shape == (40, 20, 3) and len(warned) == 1 and "animation of 2 frames" in warned[0]
    kept = tray("deep.png", "lie.png", "clear.png")
    assert [read_image(file).float().mean().round().item() for file in kept] == [156, 255]
    assert len(warned) == 2 and "lie.png is not an image" in warned[1]
    assert isinstance(tray(*["deep.png"] * 5), type(gr.skip())) and "At most 4" in warned[2]
    assert Events.check_tray.__wrapped__(page, None, "x").keys() == gr.skip().keys() and len(warned) == 4


def test_a_toast_shows_text_and_not_markup(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names of files and keys of records are a stranger's; Gradio's toasts take HTML."""
    shown: list[str] = []
    monkeypatch.setattr(studio.gr, "Warning", lambda line, **_: shown.append(line))
    monkeypatch.setattr(studio.gr, "Info", lambda line, **_: shown.append(line))
    bad = UserError("<img src=//evil.example/x> is odd")

    def fails(*_: object) -> None:
        raise bad

    def fails_later(*_: object):
        yield from fails()

    studio.warn(bad, None)
    studio.inform(str(bad))
    for fn in (guarded(fails), guarded(fails_later)):
        with pytest.raises(gr.Error) as error:
            list(fn() or ())
        shown.append(error.value.message)
    shown.append(in_place(fails)())
    assert len(shown) == 5 and all("<img" not in line and "&lt;img" in line for line in shown)
    assert studio.coded(bad).message == str(bad)  # a program wants the text itself


def test_a_record_restores_every_guidance_scale(uploads: Uploads, pipe) -> None:
    page = SimpleNamespace(uploads=uploads, pipe=pipe, sizes={}, weights_from=lambda record: None)
    scales = {"guidance_scale": 3.0, "camera_guidance_scale": 2.0, "brush_guidance_scale": 4.0, "reference_guidance_scale": 1.5}
    tracks = [{"mask": None, "points": [[5, 5], [9, 9]]}]
    asked = {"prompt": "a ball", "keyframes": [], "tracks": tracks} | scales
    fields, remarks = fields_of({"request": asked, "inputs": {}}, page)
    assert {name: fields[name] for name in scales} == scales and not any(key == "elsewhere" for key, _ in remarks)
    fields, _ = fields_of({"request": {"prompt": "a", "keyframes": []}, "inputs": {}}, page)
    assert [fields[name] for name in scales] == [0] * 4, "the model's own"
    fields, remarks = fields_of({"request": asked | {"tracks": "/x/tracks.json"}, "inputs": {}}, page)
    assert fields["brush_guidance_scale"] == 0 and ("elsewhere", {"names": "tracks"}) in remarks, "no arrows, nothing to guide"


def test_a_record_that_leaves_its_camera_to_the_words_is_said_to_be_made_elsewhere(uploads: Uploads, pipe) -> None:
    page = SimpleNamespace(uploads=uploads, pipe=pipe, sizes={}, weights_from=lambda record: None)
    for camera, other in (("words", True), ("pan=3", False), (None, False)):
        asked = {"prompt": "a ball, the camera pans left", "keyframes": [], "camera": camera}
        _, remarks = fields_of({"request": asked, "inputs": {}}, page)
        assert (("elsewhere", {"names": "camera"}) in remarks) is other, camera


def test_a_record_with_any_contents_fills_what_it_can_or_is_refused(uploads: Uploads, pipe, monkeypatch: pytest.MonkeyPatch) -> None:
    base = {"prompt": "a ball", "keyframes": []}
    page = SimpleNamespace(uploads=uploads, pipe=pipe, sizes={}, weights_from=lambda record: None)
    many = {f"<b>{i}</b>" + "k" * 1000: 1 for i in range(1000)}
    _, remarks = fields_of({"request": base | many, "inputs": {}}, page)
    assert len(dict(remarks)["elsewhere"]["names"]) < 300
    long = f"{uploads.store}/" + "a" * 300
    fields, remarks = fields_of({"request": base | {"image": long, "references": [long, "/x/\ud800"]}, "inputs": {}}, page)
    assert fields["image"] is None and fields["references"] == [] and "again" in dict(remarks)
    told: list[str] = []
    monkeypatch.setattr(studio.gr, "Warning", lambda line, **_: told.append(line))
    events = SimpleNamespace(studio=page, filled=[1, 2])
    page.shelf = SimpleNamespace(results=lambda: [])
    for number, odd in enumerate(
        [
            {"tracks": [{"mask": None, "points": [[10**400, 0]]}]},
            {"tracks": [{"points": 5}]},
            {"num_frames": 10**400},
            {"keyframes": [[1, 2]]},
            {"keyframes": 5},
            {"shots": [{"prompt": "a"}]},
            {"shots": [5]},
            {"camera": {"pan": []}, "references": 5},
        ]
    ):
        file = uploads.arrivals / f"{number}.json"
        text = json.dumps({"request": base | odd, "inputs": {}, "settings": {}, "model": {}})
        file.write_text(text)
        filled = Events.restore.__wrapped__(events, None, {"path": str(file)})
        assert len(told) == number + 1 and "says nothing about how it was made" in told[-1] and len(filled) == 2, odd


def test_a_form_is_never_filled_with_what_the_model_was_not_trained_for(uploads: Uploads, pipe) -> None:
    """Its control is greyed out, so it could not be taken out again."""
    page = SimpleNamespace(studio=SimpleNamespace(uploads=uploads, pipe=pipe), _timeline=lambda *_: "")
    page._able = lambda name: Events._able(page, name)
    fields = {"prompt": "x", "tracks": [{"points": POINTS}], "shots": [{"prompt": "a", "seconds": 1}], "pan": 3, "still": True}
    assert [name for name in fields if not page._able(name)] == ["tracks", "shots", "still"]
    *shown, painted = Events._fill(page, fields)
    assert painted == {"tracks": [], "shots": []} and "x" in shown and 3 in shown and True not in [v for v in shown if isinstance(v, bool)]


def test_exact_settings_name_files_without_their_folders() -> None:
    assert views._short([["/srv/out/inputs/a.png", 3, 1.0], ["/srv/b.png", 5, 0.5]]) == "a.png, 3, 1, b.png, 5, 0.5"
    assert views._short([{"mask": None, "points": [[0.5, 1]]}]) == "points 0.5, 1"
    assert len(views._short([[0.123456, 0.5]] * 1000)) < 2100


def test_every_code_of_the_library_that_a_page_can_meet_has_its_line() -> None:
    """Codes in the source, other than those of the server's own, are in the table."""
    root = Path(__file__).parents[1]
    files = [*root.glob("kling/**/*.py"), *root.glob("sample/studio/*.py")]
    codes = {code for file in files for code in re.findall(r'\bcode="(\w+)"', file.read_text(encoding="utf-8"))}
    assert codes <= set(LINES), codes - set(LINES)

"""The motion brush, the tray of things, the storyboard, the live preview, mode fast and the written-out prompt in a real browser.

Needs chromium (apt install chromium).
"""

# ruff: noqa: F811 - arguments are fixtures

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_demo import png
from test_demo_browser import browser, fill, leave, new_page, open_for_short_clips, tab, understood, upload  # noqa: F401
from test_demo_browser import generate as generate_and_play
from test_demo_browser import pytestmark as needs_chromium
from test_demo_page import Site
from test_enhance import chat_model
from test_generate import save_tiny

from kling import KlingPipeline, KlingTransformer3DModel
from kling.data.image import read_image

pytestmark = [*needs_chromium, pytest.mark.slow]
ARROWS = "window.studio.withMask([0, 0], 0, 1)[1].map(({ points }) => points)"  # what the form sends
W, H = 112, 64


def save_able(folder: Path, capabilities: list[str]) -> None:
    """The tiny model of `save_tiny` with an input for tracks, references and shots, and with few-step weights."""
    save_tiny(folder, capabilities)
    pipe = KlingPipeline.from_pretrained(folder)
    config = {name: value for name, value in pipe.transformer.config.items() if not name.startswith("_")} | {"track_channels": 5}
    std, fast = KlingTransformer3DModel(**config), KlingTransformer3DModel(**config | {"gate_value": 0.25})
    for parameter in (*std.parameters(), *fast.parameters()):
        torch.nn.init.normal_(parameter, std=0.1)
    able = [*capabilities, "brush", "reference", "shots"]
    few = {"transformer_fast": fast, "fast": {"num_inference_steps": 4, "brush": True}}
    whole = KlingPipeline(pipe.vae, std, pipe.text_encoder, pipe.scheduler, able, max_frames=41, **few)
    whole.save_pretrained(folder)


@pytest.fixture(scope="module")
def able(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A page with everything that is new."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", "")  # `Site` sets it; put back afterwards
        chat = chat_model(tmp_path_factory.mktemp("chat"), "big fox.")
        site = Site(tmp_path_factory.mktemp("able"), more=("--enhance", str(chat)), save=save_able)
        yield site
        site.close()


def drag(page, *places: tuple[float, float]) -> None:
    """With the mouse over the board; places are shares of its width and height."""
    page.locator(".board svg").scroll_into_view_if_needed()
    box = page.locator(".board svg").bounding_box()
    at = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in places]
    page.mouse.move(*at[0])
    page.mouse.down()
    for place in at[1:]:
        page.mouse.move(*place, steps=6)
    page.mouse.up()


def ends(page) -> list[list[float]]:
    """[x, y, x, y] of the first and the last point of each arrow, in shares."""
    return [[*points[0], *points[-1]] for points in page.evaluate(ARROWS)]


def made(page, site: Site) -> dict:
    """The record of the newest result."""
    return site.studio.shelf.get(page.get_attribute(".card", "data-id")).record


def close(a: object, b: object, atol: float) -> bool:
    return np.shape(a) == np.shape(b) and np.allclose(a, b, atol=atol)


def test_arrows_are_drawn_changed_removed_sent_and_found_again(browser, able, tmp_path):
    page = new_page(browser)
    open_for_short_clips(page, able)
    page.uncheck("#live input")
    tab(page, "Pictures")
    upload(page, "#first", png(tmp_path / "a.png", (W, H)))
    understood(page, "image to video")
    tab(page, "Motion")
    page.wait_for_selector(".board img")
    drag(page, (0.2, 0.3), (0.4, 0.3))
    understood(page, "image to video · motion brush")  # without another touch
    drag(page, (0.6, 0.7), (0.8, 0.5))
    drag(page, (0.5, 0.9))
    assert close(ends(page), [[0.2, 0.3, 0.4, 0.3], [0.6, 0.7, 0.8, 0.5], [0.5, 0.9, 0.5, 0.9]], 0.01)
    drag(page, (0.995, 0.01), (0.7, 0.1))  # from a corner: its × is inside the picture all the same
    page.locator(".board .gone").nth(3).click()
    assert len(ends(page)) == 3
    drag(page, (0.4, 0.3), (0.3, 0.6))  # the first one's end
    drag(page, (0.6, 0.7), (0.65, 0.8))  # the second one's start: it moves as a whole
    page.locator(".board .gone").nth(2).click()
    drawn = ends(page)
    assert close(drawn, [[0.2, 0.3, 0.3, 0.6], [0.65, 0.8, 0.85, 0.6]], 0.01)
    generate_and_play(page)
    record = made(page, able)
    sent = [[value for point in (track["points"][0], track["points"][-1]) for value in point] for track in record["request"]["tracks"]]
    assert close(sent, np.array(drawn) * [W, H, W, H] - 0.5, 1e-3)
    everything = page.evaluate(ARROWS)
    page.reload()
    understood(page, "image to video · motion brush")
    tab(page, "Motion")
    page.wait_for_selector(".board img")
    page.wait_for_function("document.querySelectorAll('.board .arrow').length == 2")
    assert page.evaluate(ARROWS) == everything
    drag(page, (0.5, 0.2), (0.9, 0.2))  # and can be changed further
    page.wait_for_function("document.querySelectorAll('.board .arrow').length == 3")
    page.context.close()
    other = new_page(browser)  # and with the record, in another browser
    other.goto(able.url)
    other.wait_for_selector("#plan p")
    path = next(one.record_path for one in able.studio.shelf.results() if one.record == record)
    other.set_input_files("input[type=file]:has(+ #restore)", str(path))
    understood(other, "image to video · motion brush")
    assert close(ends(other), drawn, 1e-3)
    other.context.close()


def test_a_rough_clip_follows_the_words_and_generate_stops_it(browser, able, monkeypatch):
    """Typing asks for one once it pauses: no request waits on the server meanwhile."""
    page, rough, asked = new_page(browser), able.studio.rough, []
    monkeypatch.setattr(able.studio, "rough", lambda visitor, request: asked.append(request.prompt) or rough(visitor, request))
    open_for_short_clips(page, able)
    fast, queue, passes = able.studio.pipe.transformer_fast, able.studio.queue, []
    counted = fast.register_forward_pre_hook(lambda *_: passes.append("fast"))
    page.fill("#prompt textarea", "a red ball")
    page.wait_for_selector("#rough img")
    first = page.get_attribute("#rough img", "src")
    before, already = len(passes), len(asked)
    page.locator("#prompt textarea").press_sequentially(" rolls left over grass", delay=40)
    page.wait_for_function("(old) => document.querySelector('#rough img')?.src !== old", arg=first)
    page.wait_for_timeout(1500)
    second = page.get_attribute("#rough img", "src")
    assert second != first and len(passes) - before <= 4  # of 22 changes: of the last, and perhaps of one after which typing was slow
    assert len(asked) - already <= 2 and asked[-1] == "a red ball rolls left over grass"
    counted.remove()

    began, release, seen = threading.Event(), threading.Event(), []

    def hold(*_: object) -> None:
        seen.append("fast")
        began.set()
        assert release.wait(60)

    held = fast.register_forward_pre_hook(hold)
    page.fill("#prompt textarea", "a blue cube")
    while not began.wait(0.05):
        page.wait_for_timeout(50)
    page.click("#generate")
    for _ in range(600):
        if any(not job.rough for job in queue._waiting):
            break
        page.wait_for_timeout(50)
    release.set()
    page.wait_for_selector(".card")
    page.wait_for_selector("#generate:not([disabled])")
    held.remove()
    assert seen == ["fast"]  # the second step was not made
    assert page.get_attribute("#rough img", "src") == second and made(page, able)["request"]["prompt"] == "a blue cube"
    page.uncheck("#live input")
    page.wait_for_selector("#rough img", state="detached")
    page.context.close()


def test_mode_fast_with_a_camera(browser, able):
    page = new_page(browser)
    open_for_short_clips(page, able)
    page.uncheck("#live input")
    page.fill("#prompt textarea", "a red ball")
    page.get_by_label("fast", exact=True).check()
    tab(page, "Camera")
    fill(page, "#axis-pan input[type=number]", "6")
    understood(page, "text to video · camera pan=6")
    generate_and_play(page)
    request = made(page, able)["request"]
    assert request["mode"] == "fast" and request["camera"] == "pan=6"
    page.context.close()


def test_a_chat_model_fills_the_prompt(browser, able):
    page = new_page(browser)
    open_for_short_clips(page, able)
    page.click("#enhance")
    page.wait_for_selector(":text('write a few words first')")
    page.fill("#prompt textarea", "fox")
    page.click("#enhance")
    page.wait_for_function("document.querySelector('#prompt textarea').value == 'big fox.'")
    page.fill("#prompt textarea", "big fox. red")  # changed like any other
    page.wait_for_selector("#rough img")
    page.context.close()


def flat(path: Path, colour: str, size: tuple[int, int] = (40, 30)) -> Path:
    Image.new("RGB", size, colour).save(path)
    return path


def put_in_tray(page, *files: Path) -> None:
    page.set_input_files("#references input[type=file]", [str(file) for file in files])


def in_tray(page, count: int) -> None:
    page.wait_for_function(f"document.querySelectorAll('#references .gallery-item img').length == {count}")


def test_a_tray_is_filled_emptied_sent_and_found_again(browser, able, tmp_path):
    page = new_page(browser)
    open_for_short_clips(page, able)
    page.uncheck("#live input")
    page.fill("#prompt textarea", "the first thing rolls left on snow")
    tab(page, "Pictures")
    put_in_tray(page, flat(tmp_path / "red.png", "red"), flat(tmp_path / "blue.tif", "blue"))
    in_tray(page, 2)
    understood(page, "text to video · references × 2")
    page.wait_for_function("[...document.querySelectorAll('#references img')].every((image) => image.naturalWidth > 0)")  # a TIFF, too
    page.click("#references .gallery-item >> nth=0 >> .delete-button")
    in_tray(page, 1)
    understood(page, "text to video · references × 1")  # without another touch
    put_in_tray(page, flat(tmp_path / "green.png", "lime"))
    in_tray(page, 2)
    (tmp_path / "<b>lie.png").write_bytes(b"words")
    put_in_tray(page, tmp_path / "<b>lie.png")
    page.wait_for_selector("[data-testid=toast-body] :text('lie.png is not an image')")
    in_tray(page, 2)
    understood(page, "text to video · references × 2")
    generate_and_play(page)
    record = made(page, able)
    things = [read_image(file).float().mean((0, 1)).tolist() for file in record["request"]["references"]]
    assert things == [[0, 0, 255], [0, 255, 0]] and record["settings"]["task"] == "text"
    assert set(record["inputs"]) == set(record["request"]["references"])
    page.reload()
    in_tray(page, 2)
    understood(page, "text to video · references × 2")
    put_in_tray(page, *(flat(tmp_path / f"{i}.png", "red", (40 + i, 30)) for i in range(3)))
    page.wait_for_selector("#plan .bad:text('At most 4 pictures of things')")
    page.context.close()
    other = new_page(browser)  # and with the record, in another browser
    other.goto(able.url)
    other.wait_for_selector("#plan p")
    path = next(one.record_path for one in able.studio.shelf.results() if one.record == record)
    other.set_input_files("input[type=file]:has(+ #restore)", str(path))
    understood(other, "text to video · references × 2")
    other.context.close()


STORY = "window.studio.withMask([0, 0, 0], 0, 1, 2)[2]"  # what the form sends


def write_shot(page, n: int, words: str, seconds: str = "0.5", camera: str = "") -> None:
    """A row of the storyboard, added if it is the next."""
    if page.locator(".story li").count() == n:
        page.click("[data-do=add-shot]")
    for name, value in (("prompt", words), ("seconds", seconds), ("camera", camera)):
        page.fill(f".story li >> nth={n} >> [name={name}]", value)


def words_of(page) -> list[str]:
    shown = page.evaluate("[...document.querySelectorAll('.story [name=prompt]')].map((field) => field.value)")
    assert shown == page.evaluate(f"{STORY}.map((shot) => shot.prompt)")
    return shown


def test_a_storyboard_is_written_sorted_sent_and_found_again(browser, able):
    page = new_page(browser)
    open_for_short_clips(page, able)
    page.uncheck("#live input")
    tab(page, "Storyboard")
    page.click("[data-do=add-shot]")
    assert page.evaluate("document.activeElement.name") == "prompt"  # ready to be written on
    page.wait_for_selector("#plan .bad:text('A shot of the storyboard has no words')")
    for n, (words, camera) in enumerate([("a red ball", "pan=5"), ("<b>二</b>", ""), ("a green cone", "forward_up"), ("gone", "")]):
        write_shot(page, n, words, camera=camera)
    page.wait_for_selector("#plan b:has-text('4 shots: 0.625 + 0.5 + 0.5 + 0.5 s')")
    assert words_of(page) == ["a red ball", "<b>二</b>", "a green cone", "gone"]
    page.drag_and_drop(".story li >> nth=2 >> .grip", ".story li >> nth=0")
    assert words_of(page) == ["a green cone", "a red ball", "<b>二</b>", "gone"]
    page.click(".story li >> nth=1 >> [name=down]")
    page.click(".story li >> nth=3 >> [name=remove]")
    assert words_of(page) == ["a green cone", "<b>二</b>", "a red ball"]
    write_shot(page, 0, "a green cone", "0.5", "sideways")
    page.wait_for_selector("#plan .bad:has-text(\"shot 1: unknown camera move 'sideways'\")")
    write_shot(page, 0, "a green cone", "0", "forward_up")
    page.wait_for_selector("#plan .bad:text('Seconds 0: give a number from 0.1 to 60')")
    write_shot(page, 0, "a green cone", "1", "forward_up")
    page.fill("#prompt textarea", "words of all")
    page.wait_for_selector("#plan .bad:text('The storyboard has no place for “Prompt”')")
    page.fill("#prompt textarea", "")
    page.wait_for_selector("#plan b:has-text('3 shots: 1.12 + 0.5 + 0.5 s')")
    generate_and_play(page)
    assert page.locator(".strips li span").all_inner_texts() == ["a green cone", "<b>二</b>", "a red ball"]
    assert page.evaluate("[...document.querySelectorAll('.strips img')].every((image) => image.naturalWidth > image.naturalHeight)")
    record = made(page, able)
    shots = [{"prompt": "a green cone", "seconds": 1.0, "camera": "forward_up"}, {"prompt": "<b>二</b>", "seconds": 0.5, "camera": None}]
    shots += [{"prompt": "a red ball", "seconds": 0.5, "camera": "pan=5"}]
    assert record["request"]["shots"] == shots and record["request"]["duration"] is None and record["frames"]["shape"][0] == 17
    page.reload()
    page.wait_for_selector("#plan b:has-text('3 shots')")
    tab(page, "Storyboard")
    page.wait_for_function("document.querySelectorAll('.story li').length == 3")
    assert words_of(page) == ["a green cone", "<b>二</b>", "a red ball"]
    for _ in range(3):
        page.click(".story li >> nth=0 >> [name=remove]")
    page.wait_for_selector("#plan b:text-is('text to video')")
    page.context.close()
    other = new_page(browser)  # and with the record, in another browser
    other.goto(able.url)
    other.wait_for_selector("#plan p")
    path = next(one.record_path for one in able.studio.shelf.results() if one.record == record)
    other.set_input_files("input[type=file]:has(+ #restore)", str(path))
    other.wait_for_selector("#plan b:has-text('3 shots')")
    other.context.close()


@pytest.mark.parametrize(("width", "locale"), [(1440, "en-US"), (390, "zh-CN")])
def test_the_tray_and_the_storyboard_have_room(browser, able, width, locale, tmp_path):
    page = new_page(browser, width, locale=locale, has_touch=width < 1000)
    page.goto(able.url)
    page.wait_for_selector("#plan p")
    put_in_tray(page, *(flat(tmp_path / f"{i}.png", "red", (40 + i, 30)) for i in range(4)))
    in_tray(page, 4)
    tray = page.locator("#references").bounding_box()
    for button in page.locator("#references .delete-button").all():
        box = button.bounding_box()
        assert box["y"] + box["height"] <= tray["y"] + tray["height"] and box["x"] + box["width"] <= tray["x"] + tray["width"]  # not cut
        assert min(box["width"], box["height"]) > 18 and button.evaluate("b => getComputedStyle(b).opacity") == "1"
    tab(page, {"en-US": "Storyboard", "zh-CN": "分镜"}[locale])
    for n in range(6):
        write_shot(page, n, "a red ball rolls left on grass, then jumps up and down", "2.5", "right_turn_forward")
    assert page.is_disabled("[data-do=add-shot]")
    page.wait_for_function(f"document.documentElement.scrollWidth <= {width}")
    rows = page.locator(".story li")
    for row in rows.all():
        outer = row.bounding_box()
        boxes = [part.bounding_box() for part in row.locator(".grip, textarea, input, button").all()]
        assert outer["x"] >= 0 and outer["x"] + outer["width"] <= width
        for i, a in enumerate(boxes):
            assert a["x"] >= outer["x"] and a["x"] + a["width"] <= outer["x"] + outer["width"] and a["height"] > 18
            for b in boxes[:i]:
                across = min(a["x"] + a["width"], b["x"] + b["width"]) - max(a["x"], b["x"])
                assert across <= 1 or min(a["y"] + a["height"], b["y"] + b["height"]) - max(a["y"], b["y"]) <= 1
    page.context.close()


@pytest.mark.parametrize(("width", "locale"), [(1440, "en-US"), (390, "en-US"), (390, "zh-CN")])
def test_the_new_parts_have_room(browser, able, width, locale, tmp_path):
    page = new_page(browser, width, locale=locale)
    page.goto(able.url)
    page.wait_for_selector("#plan p")
    upload(page, "#first", png(tmp_path / "a.png", (W, H)))
    page.fill("#prompt textarea", "a red ball")
    page.wait_for_selector("#rough img")
    tab(page, {"en-US": "Motion", "zh-CN": "运动笔刷"}[locale])
    page.wait_for_selector(".board img")
    drag(page, (0.2, 0.3), (0.4, 0.3))
    drag(page, (0.6, 0.7), (0.8, 0.5))
    page.wait_for_function("document.querySelectorAll('.board .arrow').length == 2")
    for handle in page.locator(".board :is(.start, .gone)").all():
        assert min(handle.bounding_box()[side] for side in ("width", "height")) > 12  # pixels: for a finger
    page.wait_for_function(f"document.documentElement.scrollWidth <= {width}")
    parts = ["#prompt", "#enhance", "#examples", "#live", "#rough", "#seed", "#generate", "#stage", ".board"]
    boxes = [page.locator(part).first.bounding_box() for part in parts]
    for i, a in enumerate(boxes):
        assert a["x"] >= 0 and a["x"] + a["width"] <= width, parts[i]
        for j, b in enumerate(boxes[:i]):
            across = min(a["x"] + a["width"], b["x"] + b["width"]) - max(a["x"], b["x"])
            down = min(a["y"] + a["height"], b["y"] + b["height"]) - max(a["y"], b["y"])
            assert across <= 1 or down <= 1, f"{parts[i]} is over {parts[j]}"
    page.context.close()

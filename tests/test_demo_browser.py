"""The studio in a real browser: from an empty page to a played video, for every task. Needs chromium (apt install chromium)."""

# ruff: noqa: F811 - arguments are fixtures

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from test_demo import clip, png
from test_demo_page import Site, site  # noqa: F401 - a fixture

from kling import KlingPipeline
from kling.cameras.axes import axes_trajectory
from kling.cameras.files import load_trajectory

playwright = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install 'kling[dev]'")

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine: apt install chromium")
WAIT = 300_000  # ms
ASKED = ["image", "last", "first_last", "keyframes", "loop", "continuation", "restyle", "inpaint", "outpaint", "camera"]
PLAYING = "(() => { const v = document.querySelector('#stage video'); return v && v.videoWidth > 0 && v.currentTime > 0 })()"


@pytest.fixture(scope="module")
def browser() -> Iterator[playwright.Browser]:
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


def new_page(browser: playwright.Browser, width: int = 1440, **context: object) -> playwright.Page:
    """A new visitor, who waits long: the machine may be busy."""
    visitor = browser.new_context(viewport={"width": width, "height": 1000}, **{"locale": "en-US", **context})
    visitor.set_default_timeout(WAIT)
    return visitor.new_page()


@pytest.fixture
def page(browser, site) -> Iterator[playwright.Page]:
    """An empty page of a new visitor. At the end: no error on the console, and nothing was asked of any other host."""
    page = new_page(browser)
    wrong: list[str] = []
    page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda r: None if r.url.startswith((site.url, "data:", "blob:")) else wrong.append(f"asked for {r.url}"))
    open_for_short_clips(page, site)
    tab(page, "Pictures")
    yield page
    page.context.close()
    assert not wrong


def open_for_short_clips(page: playwright.Page, site: Site) -> None:
    """Half a second in two steps, so that a test waits for the page and not for the model."""
    page.goto(site.url)
    page.wait_for_selector("#plan p")
    tab(page, "Size")
    fill(page, "#duration input[type=number]", "0.5")
    tab(page, "Advanced")
    fill(page, "#num_inference_steps input", "2")


def tab(page: playwright.Page, name: str) -> None:
    page.click(f"button[role=tab]:has-text('{name}')")


def fill(page: playwright.Page, selector: str, value: str) -> None:
    page.fill(selector, value)
    page.press(selector, "Tab")


def understood(page: playwright.Page, task: str) -> None:
    page.wait_for_selector(f"#plan b:text-is('{task}')")


def upload(page: playwright.Page, selector: str, file: Path) -> None:
    page.set_input_files(f"{selector} input[type=file]", str(file))


def generate(page: playwright.Page) -> None:
    """Press Generate and see the video play."""
    before = page.evaluate("document.querySelectorAll('.card').length")
    page.click("#generate")
    page.wait_for_function(f"document.querySelectorAll('.card').length > {before}")
    page.locator("#stage video").scroll_into_view_if_needed()  # a browser plays by itself only what is on the screen
    page.wait_for_function(PLAYING)


def test_a_visitor_makes_a_video_and_goes_on_with_it(page, site):
    """The smoke test: text to video, its last frame as a first frame, its extension."""
    assert page.is_hidden("#extend")  # nothing to go on with yet
    page.fill("#prompt textarea", "<b>a red ball</b>")
    understood(page, "text to video")
    generate(page)
    assert "<b>a red ball</b>" in page.inner_text(".card span")  # shown as written, not as markup
    page.click("#extend")
    understood(page, "continuation of a video")
    generate(page)
    newest = site.studio.shelf.get(page.get_attribute(".card", "data-id"))
    assert newest.record["frames"]["shape"][0] == 9


@pytest.mark.slow
@pytest.mark.parametrize("task", ASKED)
def test_each_task_from_an_empty_page_to_a_played_video(page, site, task, tmp_path):
    page.fill("#prompt textarea", "a red ball")
    if task in ("image", "last", "first_last"):
        if task != "last":
            upload(page, "#first", png(tmp_path / "a.png", (112, 64)))
        if task != "image":
            upload(page, "#last", png(tmp_path / "b.png", (100, 64)))
        title = {"image": "image to video", "last": "last frame to video", "first_last": "first + last frame to video"}
        understood(page, title[task])
    elif task == "keyframes":
        for count, frame in enumerate(("1", "3"), 1):
            upload(page, "#key", png(tmp_path / f"{frame}.png", (112, 64)))
            page.wait_for_selector("#key img")
            fill(page, "#key-frame input[type=number]", frame)
            page.click("#add-key")
            page.wait_for_function(f"document.querySelectorAll('#timeline .key').length == {count}")
        understood(page, "keyframes to video")
    elif task == "loop":
        upload(page, "#first", png(tmp_path / "a.png", (112, 64)))  # without one the model must make pictures
        page.get_by_label("Loop: the end").check()
        understood(page, "first + last frame to video · loop")
    elif task == "camera":
        tab(page, "Camera")
        fill(page, "#axis-pan input[type=number]", "6")
        understood(page, "text to video · camera pan=6")
    else:
        tab(page, "Video")
        upload(page, "#clip", clip(tmp_path / "clip.mp4", 9))
        understood(page, "continuation of a video")
        choice = {"restyle": "restyle", "inpaint": "repaint a part", "outpaint": "show more around it"}.get(task)
        if choice:
            page.click(f"#use label:has-text('{choice}')")
        if task == "inpaint":
            box = page.locator(".painter canvas")
            box.scroll_into_view_if_needed()
            box = box.bounding_box()
            page.mouse.move(box["x"] + box["width"] / 4, box["y"] + box["height"] / 2)
            page.mouse.down()
            page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2, steps=4)
            page.mouse.up()
    generate(page)
    made = site.studio.shelf.get(page.get_attribute(".card", "data-id")).record
    assert made["settings"]["task"] == {"loop": "first_last", "outpaint": "inpaint", "camera": "text"}.get(task, task)
    assert [frame for _, frame, _ in made["request"]["keyframes"] or []] == ([1, 3] if task == "keyframes" else [])


@pytest.mark.slow
def test_stop_stops_and_the_page_can_go_on(page, site):
    tab(page, "Size")
    fill(page, "#duration input[type=number]", "20")
    tab(page, "Advanced")
    fill(page, "#num_inference_steps input", "100")
    page.click("#generate")
    page.wait_for_selector("#stage progress[value]")
    page.click("#stop")
    page.wait_for_selector("#stage :text('Stopped')")
    page.wait_for_selector("#generate:not([disabled])")
    assert not site.studio.queue.running
    tab(page, "Size")
    fill(page, "#duration input[type=number]", "0.5")
    tab(page, "Advanced")
    fill(page, "#num_inference_steps input", "2")
    generate(page)


@pytest.mark.slow
def test_a_closed_tab_stops_its_job(browser, site):
    page = new_page(browser)
    page.goto(site.url)
    page.wait_for_selector("#plan p")
    tab(page, "Advanced")
    fill(page, "#num_inference_steps input", "100")
    page.click("#generate")
    page.wait_for_selector("#stage progress[value]")
    page.context.close()
    other = browser.new_page()
    for _ in range(300):
        if not site.studio.queue.running:
            break
        other.wait_for_timeout(100)
    other.close()
    assert not site.studio.queue.running


@pytest.mark.slow
def test_a_refused_upload_says_why_and_is_gone(page, site, tmp_path):
    (tmp_path / "fake.png").write_bytes(b"GIF89a" + os.urandom(300))
    upload(page, "#first", tmp_path / "fake.png")
    page.wait_for_selector(":text('fake.png')")
    page.wait_for_selector("#first input[type=file]", state="attached")  # empty again
    assert not list(site.arrivals.rglob("fake.png"))


@pytest.mark.slow
def test_the_camera_s_drawing_follows_a_slider(page):
    tab(page, "Camera")
    page.wait_for_selector("#camera-drawing svg")
    seen = {page.inner_html("#camera-drawing")}
    for axis in ("pan", "dolly", "zoom"):
        before = page.inner_html("#camera-drawing")
        fill(page, f"#axis-{axis} input[type=number]", "7")
        page.wait_for_function("(old) => document.querySelector('#camera-drawing').innerHTML !== old", arg=before)
        seen.add(page.inner_html("#camera-drawing"))
    assert len(seen) == 4
    page.click("#shot label:has-text('forward and up')")
    page.wait_for_function("document.querySelector('#axis-vertical input[type=number]').value == '7'")


@pytest.mark.slow
def test_a_path_that_was_downloaded_draws_the_same_when_uploaded(page, tmp_path):
    tab(page, "Camera")
    page.wait_for_selector("#camera-drawing svg")
    before = page.inner_html("#camera-drawing svg >> nth=1")
    fill(page, "#axis-pan input[type=number]", "6")
    page.wait_for_function("(old) => document.querySelectorAll('#camera-drawing svg')[1].innerHTML !== old", arg=before)
    drawn = page.inner_html("#camera-drawing svg >> nth=1")
    with page.expect_download() as download:
        page.click("#camera-drawing a[download]")
    download.value.save_as(tmp_path / "path.json")
    asked = axes_trajectory({"pan": 6}, 5, 64, 112)
    assert torch.allclose(load_trajectory(tmp_path / "path.json", 5).c2w, asked.c2w, atol=1e-5)
    fill(page, "#axis-pan input[type=number]", "0")
    page.wait_for_function("(old) => document.querySelectorAll('#camera-drawing svg')[1].innerHTML === old", arg=before)
    upload(page, "#camera-file", tmp_path / "path.json")
    page.wait_for_function("(old) => document.querySelectorAll('#camera-drawing svg')[1].innerHTML === old", arg=drawn)
    understood(page, "text to video · camera from a file")


@pytest.mark.slow
def test_two_videos_play_as_one(page):
    for seed in ("1", "2"):
        fill(page, "#seed input", seed)
        generate(page)
    page.click("#compare")
    page.click(".card >> nth=1")
    page.wait_for_function("document.querySelectorAll('.compare video').length == 2")
    page.evaluate("document.querySelectorAll('.compare video').forEach(v => v.pause())")
    page.evaluate("document.querySelectorAll('.compare video')[0].currentTime = 0.3")
    page.wait_for_function("Math.abs(document.querySelectorAll('.compare video')[1].currentTime - 0.3) < 0.1")


@pytest.mark.slow
def test_the_inside_of_a_request(page, tmp_path):
    page.fill("#prompt textarea", "a red ball")
    tab(page, "Inspect")
    page.click("button#look")
    page.wait_for_selector("#steps img >> nth=1")
    page.wait_for_selector("#channels img")
    page.click("#click-me img", position={"x": 60, "y": 40})
    page.wait_for_selector("#attention img")
    tab(page, "Guidance sweep")
    page.fill("#scales textarea, #scales input", "1, 3")
    page.click("#run-sweep")
    page.wait_for_selector("#swept figure >> nth=1")
    page.click("button[role=tab]:text-is('VAE')")
    upload(page, "#vae-clip", clip(tmp_path / "clip.mp4", 9))
    page.wait_for_selector("#vae-clip video")
    page.click("#reconstruct")
    page.wait_for_selector("#reconstruction :text('PSNR')")


@pytest.mark.slow
def test_the_checkpoints_of_a_run_side_by_side(browser, tmp_path, monkeypatch):
    """A run of kling-train: its curves are drawn, and two of its checkpoints make their own videos from one seed."""
    from kling_programs.sample.studio import runs
    from workers import ROOT, debug_words, train_dit

    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("GRADIO_TEMP_DIR", "")  # `Site` sets it; put back afterwards
    run = tmp_path / "run"
    train_dit.main(debug_words(tmp_path, f"out={run}", "steps=4", "save_every=2", "lr=0.1", "warmup=0", "ema=0.1"))
    site = Site(tmp_path, run)
    page = new_page(browser)
    open_for_short_clips(page, site)
    tab(page, "Training")
    page.wait_for_selector("#curves canvas, #curves svg")
    page.click("#compare-checkpoints")
    page.wait_for_function("document.querySelectorAll('#by-checkpoint figure').length == 2")
    assert page.locator("#by-checkpoint figcaption").all_inner_texts() == ["step-00000002", "step-00000004"]
    first, second = (page.get_attribute(f"#by-checkpoint img >> nth={i}", "src") for i in (0, 1))
    assert first != second
    page.context.close()
    site.close()
    shown, exported = runs.pipeline_of(run, "step-00000004", "cpu"), KlingPipeline.from_pretrained(run / "export")
    for part in ("transformer", "text_encoder"):  # exported in bf16
        weights = getattr(shown, part).state_dict()
        assert all(torch.equal(weights[name].bfloat16(), w.bfloat16()) for name, w in getattr(exported, part).state_dict().items())


@pytest.mark.slow
def test_what_a_model_cannot_do_is_greyed_out_with_the_reason(browser, tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", "")
    site = Site(tmp_path, unable=("text_to_image", "camera", "restyle", "keyframes", "last"))
    page = new_page(browser)
    page.goto(site.url)
    page.wait_for_selector("#plan p")
    for name, selector, reason in (
        ("Pictures", "#key-frame input[type=number]", "Keyframe (not trained into this model)"),
        ("Pictures", "#add-key", "Last frame (not trained into this model)"),
        ("Camera", "#axis-pan input[type=number]", "not trained into this model: camera"),
        ("Size", "#still input", "not trained into this model: text to image"),
    ):
        tab(page, name)
        page.wait_for_selector(f"[role=tabpanel] :text('{reason}') >> visible=true")
        assert page.is_disabled(selector)
    assert not page.locator("#last input[type=file]").count() and page.locator("#first input[type=file]").count()
    tab(page, "Video")
    able = [label.evaluate("l => getComputedStyle(l).pointerEvents !== 'none'") for label in page.locator("#use label").all()]
    assert able == [True, False, True, True]
    assert "not trained" in page.inner_text("#use label >> nth=1")
    page.context.close()
    site.close()


@pytest.mark.slow
@pytest.mark.parametrize(("width", "locale"), [(1440, "zh-CN"), (390, "zh-CN"), (390, "en-US")])
def test_nothing_is_wider_than_the_screen_and_chinese_is_chinese(browser, site, width, locale, tmp_path):
    page = new_page(browser, width, locale=locale, color_scheme="dark")
    page.goto(site.url)
    page.wait_for_selector("#plan p")
    page.wait_for_selector(f"#generate:text-is('{'生成' if locale == 'zh-CN' else 'Generate'}')")  # Gradio translates after it has drawn
    page.wait_for_function(f"document.documentElement.scrollWidth <= {width}")
    if locale == "zh-CN":
        understood(page, "文生视频")
        (tmp_path / "fake.png").write_bytes(b"GIF89a" + os.urandom(300))
        upload(page, "#first", tmp_path / "fake.png")
        page.wait_for_selector(":text('fake.png 不是可读取的图片')")
    page.context.close()

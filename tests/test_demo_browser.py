"""The studio in a real browser: from an empty page to a played video, for every task. Needs chromium (apt install chromium)."""

# ruff: noqa: F811 - arguments are fixtures

from __future__ import annotations

import base64
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from test_demo import Gate, clip, png
from test_demo_page import Site, site  # noqa: F401 - a fixture
from test_video import make

from kling import KlingPipeline
from kling.cameras.axes import axes_trajectory
from kling.cameras.files import load_trajectory
from kling.data.video import write_gif

playwright = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install 'kling[dev]'")

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine: apt install chromium"),
    pytest.mark.timeout(1800),  # a minute or two on an idle core
]
WAIT = 600_000  # ms
ASKED = ["image", "last", "first_last", "keyframes", "loop", "continuation", "restyle", "inpaint", "outpaint", "camera"]
PLAYING = "(() => { const v = document.querySelector('#stage video'); return v && v.videoWidth > 0 && v.currentTime > 0 })()"


@pytest.fixture(scope="module")
def browser() -> Iterator[playwright.Browser]:
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture(autouse=True)
def leave(request: pytest.FixtureRequest) -> Iterator[None]:
    """Close what a test that failed left open: pages that go on drawing take the time of the next one."""
    yield
    if "browser" in request.fixturenames:
        for visitor in request.getfixturevalue("browser").contexts:
            visitor.close()


def new_page(browser: playwright.Browser, width: int = 1440, **context: object) -> playwright.Page:
    """A new visitor, with a long timeout: the machine may be busy."""
    visitor = browser.new_context(viewport={"width": width, "height": 1000}, **{"locale": "en-US", **context})
    visitor.set_default_timeout(WAIT)
    return visitor.new_page()


@pytest.fixture
def page(browser, site) -> Iterator[playwright.Page]:
    """An empty page of a new visitor. At the end: no error on the console, and no request to any other host."""
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
    """Clips of half a second in two steps, so that tests do not wait for the model."""
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
    page.evaluate("document.querySelector('#stage').scrollIntoView()")  # a browser plays by itself only what is on the screen
    page.wait_for_function(PLAYING)


def test_a_visitor_makes_a_video_and_continues_it(page, site):
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
def test_a_closed_tab_stops_its_job(browser, site, monkeypatch):
    monkeypatch.setattr("kling_programs.sample.studio.jobs.ALONE", 2.0)
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
def test_two_tabs_of_a_browser_share_one_list(browser, site):
    visitor = browser.new_context(viewport={"width": 1440, "height": 1000}, locale="en-US")
    visitor.set_default_timeout(WAIT)
    first, second = visitor.new_page(), visitor.new_page()
    for page in (first, second):
        open_for_short_clips(page, site)
    for page in (first, second, first):  # each knew of nothing when it was opened
        page.bring_to_front()
        generate(page)
    for page in (first, second):
        page.wait_for_function("document.querySelectorAll('.card').length == 3")
    shown = [second.get_attribute(f".card >> nth={i}", "data-id") for i in range(3)]
    second.click(".card >> nth=1")
    second.wait_for_selector(".card[aria-current] >> nth=0")
    second.click("#remove")
    for page in (first, second):
        page.wait_for_function("document.querySelectorAll('.card').length == 2")
    third = visitor.new_page()
    third.goto(site.url)
    third.wait_for_function("document.querySelectorAll('.card').length == 2")
    assert [third.get_attribute(f".card >> nth={i}", "data-id") for i in range(2)] == [shown[0], shown[2]]
    visitor.close()


@pytest.mark.slow
def test_a_reloaded_tab_finds_its_job_and_its_form(browser, site, tmp_path):
    page = new_page(browser)  # not `page`: streams that are cut off are errors on its console
    open_for_short_clips(page, site)
    tab(page, "Pictures")
    page.fill("#prompt textarea", "a blue cube")
    upload(page, "#first", png(tmp_path / "a.png", (112, 64)))
    tab(page, "Camera")
    fill(page, "#axis-pan input[type=number]", "6")
    fill(page, "#seed input", "77")
    tab(page, "Advanced")
    fill(page, "#num_inference_steps input", "3")
    understood(page, "image to video · camera pan=6")
    gate = Gate(site.studio.queue)
    page.click("#generate")
    page.wait_for_selector("#stage :text('Waiting: 1 before you')")
    page.reload()
    page.wait_for_selector("#stage :text('Waiting: 1 before you')")  # the job goes on
    page.wait_for_selector("#stop:not([disabled])")
    gate.open.set()
    page.wait_for_function("document.querySelectorAll('.card').length == 1")
    page.wait_for_function(PLAYING)
    understood(page, "image to video · camera pan=6")
    assert page.input_value("#prompt textarea") == "a blue cube" and page.input_value("#seed input") == "77"
    made = site.studio.shelf.get(page.get_attribute(".card", "data-id")).record["request"]
    assert made["seed"] == 77 and made["camera"] == "pan=6" and made["image"]
    page.reload()  # and once more, when it is done
    page.wait_for_function("document.querySelectorAll('.card').length == 1")
    understood(page, "image to video · camera pan=6")
    page.wait_for_selector("#generate:not([disabled])")
    page.context.close()


@pytest.mark.slow
def test_a_mask_can_be_undone_erased_and_cleared_and_the_line_follows(browser, site, tmp_path):
    page = new_page(browser)
    open_for_short_clips(page, site)
    tab(page, "Video")
    upload(page, "#clip", clip(tmp_path / "clip.mp4", 9))
    understood(page, "continuation of a video")
    page.click("#use label:has-text('repaint a part')")
    page.wait_for_selector("#plan .bad")  # nothing is marked
    box = page.locator(".painter canvas")
    box.scroll_into_view_if_needed()
    box = box.bounding_box()

    def stroke(y: float) -> None:
        page.mouse.move(box["x"] + box["width"] * 0.2, box["y"] + box["height"] * y)
        page.mouse.down()
        page.mouse.move(box["x"] + box["width"] * 0.8, box["y"] + box["height"] * y, steps=6)
        page.mouse.up()

    def marked() -> float:
        """Percent of the mask that is white."""
        return page.evaluate("""async () => {
            const url = window.studio.withMask([0], 0)[0];
            if (!url) return 0;
            const image = new Image(); image.src = url; await image.decode();
            const canvas = document.createElement('canvas'); [canvas.width, canvas.height] = [image.width, image.height];
            const pen = canvas.getContext('2d'); pen.drawImage(image, 0, 0);
            const data = pen.getImageData(0, 0, image.width, image.height).data;
            return 100 * data.filter((v, i) => i % 4 == 0 && v > 127).length / (image.width * image.height); }""")

    stroke(0.3)
    understood(page, "filling of a video")  # the red line is gone without another touch
    one = marked()
    stroke(0.7)
    two = marked()
    assert two > 1.7 * one > 0
    page.click("[data-do=undo]")
    assert abs(marked() - one) < 0.01
    page.check("[name=eraser]")
    page.evaluate("document.querySelector('[name=brush-size]').value = 40")
    stroke(0.3)
    assert marked() == 0
    page.wait_for_selector("#plan .bad")
    page.click("[data-do=undo]")
    understood(page, "filling of a video")
    page.click("[data-do=clear]")
    page.wait_for_selector("#plan .bad")
    page.uncheck("[name=eraser]")
    stroke(0.5)
    assert marked() > 2 * one  # the brush is larger
    understood(page, "filling of a video")
    before = marked()
    page.wait_for_function("JSON.parse(sessionStorage.getItem('kling-studio-form')).some((v) => `${v}`.startsWith('data:image/png'))")
    page.reload()  # what was painted comes back with the form
    page.wait_for_selector("#plan :text('filling of a video')")
    tab(page, "Video")
    page.wait_for_selector(".painter canvas")
    page.wait_for_function("window.studio.withMask([0], 0)[0]?.startsWith('data:')")
    assert abs(marked() - before) < 0.5
    generate(page)
    record = site.studio.shelf.get(page.get_attribute(".card", "data-id")).record_path
    other = new_page(browser)  # and with a record, in another browser
    other.goto(site.url)
    other.wait_for_selector("#plan p")
    other.set_input_files("input[type=file]:has(+ #restore)", str(record))
    understood(other, "filling of a video")
    other.context.close()
    page.context.close()


@pytest.mark.slow
def test_the_settings_of_a_video_come_back_from_its_file(page, site, tmp_path):
    """From the replay JSON, from the video, chosen or dropped anywhere on the page; several videos from one press."""
    page.fill("#prompt textarea", "a green ball")
    fill(page, "#seed input", "41")
    fill(page, "#num-videos input", "2")
    tab(page, "Camera")
    fill(page, "#axis-tilt input[type=number]", "-4")
    understood(page, "text to video · camera tilt=-4")
    page.click("#generate")
    page.wait_for_function("document.querySelectorAll('.card').length == 2")
    page.wait_for_selector("#stage .done")
    made = [site.studio.shelf.get(page.get_attribute(f".card >> nth={i}", "data-id")) for i in range(2)]
    assert [one.record["request"]["seed"] for one in made] == [42, 41]
    record, video = (tmp_path / "any name.json", tmp_path / "any name.mp4")
    record.write_bytes(made[0].record_path.read_bytes())
    video.write_bytes(made[1].path.read_bytes())

    page.fill("#prompt textarea", "a green balloon")
    page.wait_for_selector("#plan p:text-matches('about [0-9hms]+, [0-9.]+ MiB of memory')")  # known once something was made
    for file, seed, dropped in ((record, "42", False), (video, "41", True)):
        page.fill("#prompt textarea", "something else")
        tab(page, "Camera")
        fill(page, "#axis-tilt input[type=number]", "0")
        understood(page, "text to video")
        if dropped:
            page.evaluate(
                """([name, text]) => {
                const dataTransfer = new DataTransfer();
                dataTransfer.items.add(new File([Uint8Array.from(atob(text), (c) => c.charCodeAt(0))], name));
                const drop = new DragEvent('drop', { dataTransfer, bubbles: true, cancelable: true });
                document.querySelector('.top').dispatchEvent(drop); }""",
                [file.name, base64.b64encode(file.read_bytes()).decode()],
            )
        else:
            page.set_input_files("input[type=file]:has(+ #restore)", str(file))
        understood(page, "text to video · camera tilt=-4")
        page.wait_for_function(f"document.querySelector('#seed input').value == '{seed}'")
        assert page.input_value("#prompt textarea") == "a green ball"
    (tmp_path / "other.json").write_text("{}")
    page.set_input_files("input[type=file]:has(+ #restore)", str(tmp_path / "other.json"))
    page.wait_for_selector(":text('says nothing about how it was made')")


@pytest.mark.slow
def test_typed_values_are_used_unchanged(page, site, tmp_path):
    page.fill("#prompt textarea", "x" * 2500)  # not cut: refused, by its label
    page.wait_for_selector("#plan .bad:text('Prompt has 2500 characters: give at most 2000')")
    page.fill("#prompt textarea", "a ball")
    understood(page, "text to video")  # the line above has gone
    fill(page, "#seed input", "123")
    generate(page)
    assert site.studio.shelf.get(page.get_attribute(".card", "data-id")).record["request"]["seed"] == 123
    page.click("#dice")
    page.wait_for_function("document.querySelector('#seed input').value == '-1'")
    generate(page)
    drawn = site.studio.shelf.get(page.get_attribute(".card", "data-id")).record["request"]["seed"]
    page.wait_for_function("document.querySelector('#seed input').value == '-1'")
    assert drawn != 123
    page.click("#reuse")
    page.wait_for_function(f"document.querySelector('#seed input').value == '{drawn}'")
    tab(page, "Pictures")
    page.wait_for_function("document.querySelector('#key-frame input[type=number]').max == '4'")  # half a second: five frames
    tab(page, "Size")
    fill(page, "#duration input[type=number]", "2")
    tab(page, "Pictures")
    page.wait_for_function("document.querySelector('#key-frame input[type=number]').max == '16'")
    tab(page, "Advanced")
    fill(page, "#num_inference_steps input", "1e9")
    page.wait_for_selector("#plan .bad:text('Steps 1e+09: give a number from 0 to 100')")
    fill(page, "#num_inference_steps input", "2")
    tab(page, "Video")
    write_gif(tmp_path / "a.gif", np.stack([np.full((64, 112, 3), 30 * i, np.uint8) for i in range(9)]), 8)
    upload(page, "#clip", tmp_path / "a.gif")
    understood(page, "continuation of a video")


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["gif", "avi"])
def test_a_clip_that_no_browser_plays_is_played_all_the_same(page, site, tmp_path, ending):
    """Its copy is, and nothing says in between that it cannot be."""
    page.evaluate(
        "new MutationObserver(() => { if (document.body.innerText.includes('not playable')) window.complained = true })"
        ".observe(document.body, {childList: true, subtree: true})"
    )
    file = tmp_path / f"a.{ending}"
    if ending == "gif":
        write_gif(file, np.stack([np.full((64, 112, 3), 30 * i, np.uint8) for i in range(9)]), 8)
    else:
        make(file, codec="mpeg4")
    tab(page, "Video")
    upload(page, "#clip", file)
    page.wait_for_function("document.querySelector('#clip video')?.videoWidth > 0")
    assert ".mp4" in page.evaluate("document.querySelector('#clip video').currentSrc") and not page.evaluate("window.complained")


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1000])
def test_every_control_has_room(browser, site, width):
    page = new_page(browser, width)
    page.goto(site.url)
    page.wait_for_selector("#plan p")
    for name in ("Pictures", "Video", "Camera", "Motion", "Size", "Advanced"):  # none behind "…"
        assert page.locator(f"#inputs button[role=tab]:text-is('{name}')").is_visible()
    cut = "[...document.querySelectorAll('#inputs .prompt')].filter((e) => e.offsetWidth && e.scrollWidth > e.clientWidth + 1).length"
    assert page.locator("#inputs .prompt").count() >= 3 and page.evaluate(cut) == 0
    tab(page, "Camera")
    page.wait_for_selector("#axis-pan input[type=range]")
    for axis in ("pan", "tilt", "dolly", "zoom"):
        assert page.locator(f"#axis-{axis} input[type=range]").bounding_box()["width"] > 120
    page.context.close()


@pytest.mark.slow
def test_a_refused_upload_is_explained_and_removed(page, site, tmp_path):
    (tmp_path / "fake.png").write_bytes(b"GIF89a" + os.urandom(300))
    upload(page, "#first", tmp_path / "fake.png")
    page.wait_for_selector(":text('fake.png is a damaged image'), :text('fake.png is not an image')")
    page.wait_for_selector("#first input[type=file]", state="attached")  # empty again
    page.wait_for_timeout(1000)
    assert "no longer here" not in page.inner_text("body") and "not uploaded" not in page.inner_text("body")  # of whoever looked second
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
    """A run of kling-train: its curves are drawn, and two of its checkpoints make a video each from one seed."""
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

"""The pictures of docs/studio.md: the studio in a real browser, with the shipped model, or another one.

python docs/shots.py                                # minutes on two cores; needs: apt install chromium fonts-noto-cjk
python docs/shots.py --model runs/dit/export --run runs/dit    # any options of kling-demo; with a run, its Training tab too
"""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

from playwright.sync_api import Browser, Page, sync_playwright

HERE = Path(__file__).parent
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PATIENCE = 1_800_000  # ms; sampling on a busy machine


def main(options: list[str]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as out, sync_playwright() as p:
        command = [sys.executable, "-m", "kling_programs.sample.demo", "--port", str(port), "--out", out, *options]
        server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            server.stdout.readline()  # "kling studio: http://…", once it is up
            browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
            shots(browser, f"http://127.0.0.1:{port}", "--run" in options)
            browser.close()
        finally:
            server.terminate()
            server.wait()


def shots(browser: Browser, url: str, run: bool) -> None:
    page = visit(browser, url, 1440, 1120)
    make(page, "a red ball rolls left on grass", 1)  # a held-out sentence
    tab(page, "Camera")
    axis(page, "pan", 6)
    axis(page, "dolly", 4)
    page.wait_for_selector("#plan b:has-text('pan=6 dolly=4')")
    make(page, "一个绿色的球在沙地上绕圈移动", 3)
    save(page, "studio")
    seen = page.context.storage_state()  # the results of this visitor

    save(visit(browser, url, 390, 844, storage_state=seen), "studio-phone", whole=True)
    dark = visit(browser, url, 1440, 1120, storage_state=seen, locale="zh-CN", color_scheme="dark")
    tab(dark, "镜头")
    axis(dark, "pan", 6)
    dark.wait_for_selector("#plan b:has-text('pan=6')")
    save(dark, "studio-dark")

    tab(page, "Inspect")
    page.click("button#look")
    page.wait_for_selector("#steps img >> nth=5")
    box = page.locator("#click-me img").bounding_box()
    page.click("#click-me img", position={"x": box["width"] / 2, "y": box["height"] * 0.6})
    page.wait_for_selector("#attention img")
    save(page, "studio-inspect", whole=True)
    if run:
        tab(page, "Training")
        page.wait_for_selector("#curves canvas, #curves svg")
        page.click("#compare-checkpoints")
        page.wait_for_selector("#by-checkpoint figure >> nth=1")
        save(page, "studio-training", whole=True)


def visit(browser: Browser, url: str, width: int, height: int, **context: object) -> Page:
    """A new visitor's page, after it is drawn."""
    visitor = browser.new_context(viewport={"width": width, "height": height}, **{"locale": "en-US", **context})
    visitor.set_default_timeout(PATIENCE)
    page = visitor.new_page()
    page.goto(url)
    page.wait_for_selector("#plan p")
    return page


def make(page: Page, prompt: str, seed: int) -> None:
    """A video with a known seed, so that the pictures are reproducible."""
    before = page.locator(".card").count()
    page.fill("#seed input", str(seed))
    page.fill("#prompt textarea", prompt)
    page.press("#prompt textarea", "Tab")
    page.click("#generate")
    page.wait_for_selector(f".card >> nth={before}")


def axis(page: Page, name: str, value: float) -> None:
    page.fill(f"#axis-{name} input[type=number]", str(value))
    page.press(f"#axis-{name} input[type=number]", "Tab")


def tab(page: Page, name: str) -> None:
    page.click(f"button[role=tab]:has-text('{name}')")


def save(page: Page, name: str, whole: bool = False) -> None:
    page.wait_for_timeout(2000)  # until fonts, videos and plots are drawn
    page.screenshot(path=HERE / f"{name}.png", full_page=whole)
    print(HERE / f"{name}.png", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])

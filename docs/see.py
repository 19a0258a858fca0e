"""The pictures of the page in README and docs: python docs/see.py (chromium, pip install 'attngraph[browser]')."""

from __future__ import annotations

import io
import shutil
import threading
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

from attngraph import parse
from attngraph.draw.pages import data_of
from attngraph.draw.server import Server

PICTURES = Path(__file__).parent / "pictures"
LOCAL = "Causal() & (Window(6, 0) | Prefix(2))"
SIZE, MOVING = {"width": 1200, "height": 640}, 760  # pixels of the still picture, and across the moving one


def until(tab: Page, expression: str) -> None:
    while not tab.evaluate(expression):
        tab.wait_for_timeout(20)


def seen(tab: Page) -> Image.Image:
    return Image.open(io.BytesIO(tab.screenshot())).convert("RGB")


def frames(tab: Page) -> list[tuple[Image.Image, int]]:
    """What a person does, and for how many milliseconds each is shown: plays the spread, changes a number, looks."""
    found = []
    tab.mouse.move(0, 0)
    for shown in range(7):
        tab.evaluate(f"page.state.shown = {shown}; page.select(6, 63)")
        found.append((seen(tab), 450))
    tab.evaluate("page.state.shown = Infinity; page.select(6, 63)")
    for width in (8, 12, 16):
        for _ in range(4 if width > 8 else 2):
            count = tab.evaluate("page.edits.length")
            tab.locator(".integer").nth(0).press("ArrowUp")
            until(tab, f"page.edits.length > {count}")
        found.append((seen(tab), 500))
    tab.click("#tab-mask")
    tab.wait_for_timeout(200)
    found.append((seen(tab), 1800))
    return found


def main() -> None:
    with Server(data_of([parse(LOCAL)] * 6, 64)) as server, sync_playwright() as playwright:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        server.evaluator.start()
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        tab = browser.new_page(viewport=SIZE, color_scheme="light")
        tab.goto(server.url)
        until(tab, "window.page && page.ready > 0")
        seen(tab).quantize(64).save(PICTURES / "see.png", optimize=True)
        pictures, durations = zip(*frames(tab), strict=True)
        small = [
            each.resize((MOVING, MOVING * SIZE["height"] // SIZE["width"]), Image.Resampling.LANCZOS)
            for each in pictures
        ]
        first, *others = [each.quantize(48) for each in small]
        first.save(PICTURES / "see.gif", save_all=True, append_images=others, duration=durations, loop=0, optimize=True)
        browser.close()
        server.shutdown()


if __name__ == "__main__":
    main()

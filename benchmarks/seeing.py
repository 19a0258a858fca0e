"""The page of a stack of graphs in a browser, and the questions that it asks: how soon they are answered.

Sections of `benchmarks.goals`: python -m benchmarks.goals --section page --section questions

The page needs chromium, and playwright (pip install 'attngraph[browser]').
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
import threading
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from attngraph import Graph, analysis, draw, parse
from attngraph.draw.pages import data_of
from attngraph.draw.server import Server
from benchmarks.experiment import Goal
from benchmarks.measure import Progress, isolated, now

LOCAL, SCATTERED = "Causal() & (Window(64, 0) | Prefix(4))", "Window(256, 0) | Prefix(4) | Random(8)"
LAYERS, MOVES, EDITS, RUNS = 6, 200, 40, 5
OPTIONS = ("--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-sync")
WATCH = """() => {
  window.busy = []; window.between = []; let last = performance.now();
  const noted = list => busy.push(...list.getEntries().map(each => each.duration));
  new PerformanceObserver(noted).observe({entryTypes: ["longtask"]});
  const frame = now => { between.push(now - last); last = now; requestAnimationFrame(frame); };
  requestAnimationFrame(frame);
}"""


def p95(values: list[float]) -> float:
    return statistics.quantiles(values, n=20)[-1]


def browser(playwright: Any) -> Any:
    return playwright.chromium.launch(executable_path=shutil.which("chromium"), args=OPTIONS)


def until(tab: Any, expression: str, seconds: float = 60.0) -> None:
    """Wait until an expression holds in a tab."""
    end = now() + seconds
    while not tab.evaluate(expression):
        if now() > end:
            raise TimeoutError(f"{expression} does not hold after {seconds:g} s")


def saved_alone(progress: Progress, text: str, n: int) -> dict[str, float]:
    """A saved page: its size, when it is ready, and how it follows a pointer."""
    from playwright.sync_api import sync_playwright

    progress({}, 300.0)
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        file = draw.page([parse(text)] * LAYERS, n).save(Path(folder) / "see.html")
        chromium, ready = browser(playwright), []
        for _ in range(RUNS):
            tab = chromium.new_context(offline=True, viewport={"width": 1280, "height": 800}).new_page()
            tab.goto(f"file://{file}")
            until(tab, "window.page && page.ready > 0")
            ready.append(tab.evaluate("page.ready"))
        tab.evaluate(WATCH)
        box = tab.locator("#messages-canvas").bounding_box()
        for step in range(MOVES):
            tab.mouse.move(box["x"] + 70 + step * (box["width"] - 140) / MOVES, box["y"] + box["height"] - 20)
        tab.wait_for_timeout(500)
        times, between, busy = tab.evaluate("[page.times, between.slice(5), busy]")
        chromium.close()
        return {
            "bytes": file.stat().st_size, "ready": statistics.median(ready), "hover": p95(times),
            "frame": statistics.median(between), "busy": max(busy, default=0.0),
        }  # fmt: skip


def edits_alone(progress: Progress, n: int) -> dict[str, float]:
    """An integer of a live page, changed by the arrow key: until its picture is there, in ms."""
    from playwright.sync_api import sync_playwright

    progress({}, 300.0)
    with Server(data_of([parse(LOCAL)] * LAYERS, n)) as server, sync_playwright() as playwright:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        server.evaluator.start()
        chromium = browser(playwright)
        tab = chromium.new_page()
        tab.goto(server.url)
        until(tab, "window.page && page.ready > 0")
        tab.focus(".integer >> nth=0")
        for edit in range(EDITS):
            tab.keyboard.press("ArrowUp")
            until(tab, f"page.edits.length > {edit}")
        found = tab.evaluate("page.edits")
        chromium.close()
        server.shutdown()
        return {"p95": p95(found), "median": statistics.median(found)}


def page_goals(options: Namespace) -> Iterator[Goal]:
    """What a person waits for."""
    limits = {4096: (300e3, 1000, 16.7), 100_000: (6e6, 2000, 16.7)}
    for text in (LOCAL, SCATTERED):
        for n, (size, ready, frame) in limits.items():
            found = isolated(saved_alone, text, n, seconds=options.limit, gib=options.memory)
            wanted = {"bytes": ("bytes of the file", size), "ready": ("ms until it is ready", ready)}
            wanted |= {"frame": ("ms from frame to frame, median", frame)}
            wanted |= (
                {"hover": ("ms in the handler of a pointer, p95", 8)}
                if n == 4096
                else {"busy": ("ms of the longest task of the page", 50)}
            )
            for name, (told, least) in wanted.items():
                reached = found.get("failure") or found[name]
                yield Goal(f"page of {LAYERS} layers of {text}, N = {n:,}: {told}", least, reached, at_most=True)
    found = isolated(edits_alone, 4096, seconds=options.limit, gib=options.memory)
    reached = found.get("failure") or found["p95"]
    yield Goal("live page, N = 4,096: ms from an edit to its picture, p95", 150, reached, at_most=True)


def questions_alone(progress: Progress, n: int) -> dict[str, float]:
    """Questions about graphs that nobody has asked before, in seconds: the least of a few."""
    progress({}, 300.0)
    found: dict[str, list[float]] = {"leaks": [], "last_reader": [], "receptive_field": []}
    for _ in range(RUNS):
        for name, times in found.items():
            graph: Graph = parse(SCATTERED)
            begun = now()
            if name == "leaks":
                analysis.leaks([graph] * 4, n)
            elif name == "last_reader":
                analysis.last_reader(graph, n)
            else:
                analysis.receptive_field([graph] * 24, n - 1, n)
            times.append(now() - begun)
    return {name: statistics.median(times) for name, times in found.items()}


def question_goals(options: Namespace) -> Iterator[Goal]:
    """What the page and `show` ask of a large graph."""
    found = isolated(questions_alone, 65_536, seconds=options.limit, gib=options.memory)
    for name, wanted in {"leaks": 1.0, "last_reader": 1.0, "receptive_field": 0.5}.items():
        layers = {"leaks": 4, "last_reader": 1, "receptive_field": 24}[name]
        text = f"analysis.{name} of {layers} layers of {SCATTERED}, N = 65,536: seconds"
        yield Goal(text, wanted, found.get("failure") or found[name], at_most=True)


SECTIONS = {"page": page_goals, "questions": question_goals}

"""The page in a browser, Debian's chromium by playwright: `make test-browser`. What asks the network fails a test."""

import base64
import html
import json
import shutil
import statistics
import threading
import time

import pytest
import torch

pytest.importorskip("playwright", reason="pip install 'attngraph[browser]'")
pytest.importorskip("axe_playwright_python", reason="pip install 'attngraph[browser]'")
from axe_playwright_python.sync_playwright import Axe
from graphs import GRAPHS
from playwright import sync_api

from attngraph import Causal, PerHead, Prefix, Random, Strided, Window, analysis, draw, record
from attngraph.draw.encoding import encoded
from attngraph.draw.pages import Page, asset, data_of
from attngraph.draw.server import Server
from attngraph.draw.tour import tour
from attngraph.models import GPT
from attngraph.nn import TransformerConfig

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed: apt-get install chromium"),
]

LOCAL, SCATTERED = Causal() & (Window(64, 0) | Prefix(4)), Window(256, 0) | Prefix(4) | Random(8)
WORDS = ["the", "cat", "sat", "on", "the", "mat", "and", "</script><b id=bad>"]
ROOMY = 4  # times what an idle machine is held to (benchmarks/seeing.py), as this one may do other things


@pytest.fixture(scope="module")
def browser():
    options = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    options += ["--disable-component-update", "--disable-sync"]
    with sync_api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=options)
        yield found
        found.close()


def until(tab, expression, seconds=60):
    """Wait until it holds: asked from here, as the page's policy lets nobody evaluate text in it."""
    end = time.monotonic() + seconds
    while not tab.evaluate(expression):
        assert time.monotonic() < end, expression
        time.sleep(0.01)


def refused(told):
    """Whether the browser notes that a server has refused an expression: the page says why."""
    return any(f"status of {status}" in told.text for status in (409, 422))


@pytest.fixture
def opened(browser, tmp_path):
    """Opens a page from a file without a network, or from an address of this machine; and notes what goes wrong."""
    contexts, wrong = [], []

    def opened(page, **options):
        local = isinstance(page, str)
        context = browser.new_context(offline=not local, viewport={"width": 1280, "height": 800}, **options)
        contexts.append(context)
        tab = context.new_page()
        tab.on("pageerror", lambda error: wrong.append(str(error)))
        tab.on(
            "console",
            lambda told: (
                wrong.append(told.text)
                if told.type == "error" and not {" 422 ", " 409 "} & {told.text[i : i + 5] for i in range(200)}
                else None
            ),
        )
        address = page if local else f"file://{page.save(tmp_path / 'see.html')}"
        own = page.split("#")[0] if local else address
        tab.on("request", lambda asked: None if asked.url.startswith((own, "blob:")) else wrong.append(asked.url))
        tab.goto(address)
        until(tab, "window.page && window.page.ready > 0")
        return tab

    yield opened
    for context in contexts:
        context.close()
    assert not wrong


@pytest.fixture(scope="module")
def server():
    with Server(data_of([LOCAL] * 11 + [Causal()], 4096)) as made:
        threading.Thread(target=made.serve_forever, daemon=True).start()
        made.evaluator.start()
        yield made
        made.shutdown()


@pytest.fixture(scope="module")
def engine(browser):
    """A tab that has the engine alone."""
    tab = browser.new_page()
    tab.add_script_tag(content=asset("engine.js"))
    yield tab
    tab.close()


TELL = """({part, n, m}) => {
  const graph = Engine.rows(part, n, m), keys = [];
  for (let q = 0; q < n; q++) {
    keys.push([]); Engine.eachKey(graph, q, k => keys[q].push(k)); keys[q].sort((a, b) => a - b);
  }
  const square = n === m, fields = [], readers = [];
  if (square) for (let depth = 1; depth <= 3; depth++) {
    fields.push([]); readers.push([]);
    for (let q = 0; q < n; q++) {
      const layers = Array(depth).fill(graph);
      fields[depth - 1].push(Engine.members(Engine.spread(layers, depth, q)[0]));
      readers[depth - 1].push(Engine.members(Engine.spread(layers, 0, q)[depth]));
    }
  }
  const mask = n && m ? [...Engine.coverage([graph], {top: 0, bottom: n, left: 0, right: m}, m, n)] : [];
  return {keys, fields, readers, mask, edges: Engine.edges(graph), leak: square ? Engine.leak(graph) : null,
          last: square ? [...Engine.lastReader(graph)] : []};
}"""


@pytest.mark.parametrize("case", GRAPHS, ids=lambda case: f"{str(case.graph)[:60]}-{case.n}x{case.m}")
def test_the_engine_says_what_analysis_says(engine, case):
    n, m = case.n, case.m
    heads = [case.graph.of_head(h) for h in range(case.graph.heads)] if case.graph.heads else [case.graph]
    masks = case.mask if case.graph.heads else case.mask[None]
    for graph, mask in zip(heads, masks, strict=True):
        told = engine.evaluate(TELL, {"part": encoded(graph, n, m), "n": n, "m": m})
        assert told["keys"] == [row.nonzero()[:, 0].tolist() for row in mask]
        assert told["edges"] == graph.num_edges(n, m)
        torch.testing.assert_close(
            torch.tensor(told["mask"], dtype=torch.float32), mask.flatten().float(), atol=1e-5, rtol=0
        )
        if n != m or not n:
            continue
        found = analysis.leaks(graph, n)
        assert told["leak"] == ({"query": found[0].query, "key": found[0].key} if found else None)
        assert told["last"] == analysis.last_reader(graph, n).tolist()
        for depth in (1, 2, 3):
            fields = [analysis.receptive_field([graph] * depth, node, n).tolist() for node in range(n)]
            assert told["fields"][depth - 1] == fields
            heard_by = [[q for q in range(n) if node in fields[q]] for node in range(n)]
            assert told["readers"][depth - 1] == heard_by


def test_keys_are_counted_once_and_drawn_evenly(opened):
    graph = PerHead([Causal(), LOCAL, Strided(3), Causal()])
    tab = opened(draw.page(graph, 4096))
    found = tab.evaluate("page.answers.spread({row: 1, node: 4095, head: null, across: 8})")
    assert found["degree"] == 4096
    tab = opened(draw.page([Causal()] * 2, 20_000))
    until(tab, "page.state.spread !== null")
    found = tab.evaluate("page.state.spread")
    assert found["degree"] == 20_000
    assert max(found["keys"]) > 19_900
    assert "evenly chosen" in tab.inner_text("#said")


@pytest.mark.parametrize("graph", [LOCAL, SCATTERED, Causal() & Strided(7), PerHead([LOCAL, Strided(5)])], ids=str)
def test_a_large_stack_spreads_as_analysis_says(opened, graph):
    layers = [graph] * 3 + [Causal()]
    tab = opened(draw.page(layers, 4096))
    for node in (0, 2000, 4095):
        sizes = tab.evaluate(f"page.answers.spread({{row: 4, node: {node}, head: null, across: 8}}).sizes")
        assert sizes[0] == len(analysis.receptive_field(layers, node, 4096))
        assert sizes[:4][::-1] == [len(analysis.receptive_field(layers[4 - d :], node, 4096)) for d in (1, 2, 3, 4)]
    leaks = tab.evaluate("page.answers.leaks()")
    assert [(each["layer"], each["key"], each["query"]) for each in leaks] == analysis.leaks(layers, 4096)


def test_weights_are_those_that_were_recorded(opened):
    torch.manual_seed(0)
    model = GPT(TransformerConfig(embed_dim=32, num_layers=2, num_heads=4, position="rotary"), 65, LOCAL).eval()
    with torch.no_grad(), record(model) as found:
        model(torch.randint(65, (1, 24)))
    tab = opened(draw.page(recorded=found, labels=[chr(97 + i) for i in range(24)]))
    told = tab.evaluate(
        """page.data.recorded.map(({top, heads}) => heads.map(({keys, weights, rest}) =>
             ({top, keys: Engine.unpack(keys), weights: [...atob(weights)].map(c => c.charCodeAt(0) / 255)})))"""
    )
    for layer, heads in enumerate(told):
        for head, each in enumerate(heads):
            (key, query), weights = found[layer].of(head)
            whole = torch.zeros(24, 24)
            whole[query, key] = weights
            at, shown = torch.tensor(each["keys"]).view(24, -1), torch.tensor(each["weights"]).view(24, -1)
            there = at >= 0
            expected = whole.gather(1, at.clamp(min=0))
            assert ((shown - expected)[there].abs() <= 1 / 255 + 1e-6).all()
    tab.evaluate("page.state.head = 1; page.select(2, 23)")
    assert "most from" in tab.inner_text("#said")


# --------------------------------------------------------------------------------------------------------- how fast


def hovered(tab, steps=120):
    """How long each answer took, how long frames were, and what kept the page busy."""
    tab.evaluate(
        """() => { window.busy = []; window.frames_ = []; let last = performance.now();
             const noted = list => busy.push(...list.getEntries().map(each => each.duration));
             new PerformanceObserver(noted).observe({entryTypes: ["longtask"]});
             const frame = now => { frames_.push(now - last); last = now; requestAnimationFrame(frame); };
             requestAnimationFrame(frame); }"""
    )
    box = tab.locator("#messages-canvas").bounding_box()
    for step in range(steps):
        tab.mouse.move(box["x"] + 70 + step * (box["width"] - 140) / steps, box["y"] + box["height"] - 20)
    tab.wait_for_timeout(500)
    return tab.evaluate("[page.times, frames_.slice(5), busy]")


@pytest.mark.parametrize(
    ("n", "graph", "ready", "size"),
    [
        (4096, LOCAL, 1000, 3e5),
        (4096, SCATTERED, 1000, 3e5),
        (100_000, LOCAL, 2000, 6e6),
        (100_000, SCATTERED, 2000, 6e6),
    ],
    ids=["local", "scattered", "many-local", "many-scattered"],
)
def test_it_is_ready_soon_and_follows_the_pointer(opened, n, graph, ready, size):
    page = draw.page([graph] * 6, n)
    assert len(page.html.encode()) <= size
    tab = opened(page)
    assert tab.evaluate("page.ready") < ROOMY * ready
    times, frames, busy = hovered(tab)
    assert statistics.median(times) <= ROOMY * 8
    assert statistics.median(frames) <= ROOMY * 16.8
    if n > 10_000:
        until(tab, "page.state.spread !== null")
        assert max(busy, default=0) <= ROOMY * 50


def test_an_edit_becomes_a_picture_soon(opened, server):
    tab = opened(server.url)
    tab.focus(".integer >> nth=0")
    for _ in range(20):
        count = tab.evaluate("page.edits.length")
        tab.keyboard.press("ArrowUp")
        until(tab, f"page.edits.length > {count}")
    assert statistics.median(tab.evaluate("page.edits")) <= ROOMY * 150
    assert "Window(84, 0)" in tab.inner_text("#layers")
    assert tab.evaluate("document.activeElement.textContent") == "84"


def test_an_integer_is_dragged(opened, server):
    tab = opened(server.url)
    box = tab.locator(".integer >> nth=0").bounding_box()
    tab.mouse.move(box["x"] + 5, box["y"] + 5)
    tab.mouse.down()
    for step in range(10):
        tab.mouse.move(box["x"] + 5 + 9 * step, box["y"] + 5)
        tab.wait_for_timeout(30)
    shown = tab.inner_text(".integer >> nth=0")
    tab.mouse.up()
    assert int(shown) > 80
    until(tab, f"page.data.graphs[0].text.includes('Window({shown}, 0)')")
    until(tab, "!document.querySelector('main').hasAttribute('aria-busy')")
    assert tab.inner_text(".integer >> nth=0") == shown


# --------------------------------------------------------------------------------------------------- how it is used


def test_it_works_in_a_sandboxed_frame(browser):
    tab, wrong = browser.new_page(), []
    tab.on("pageerror", lambda error: wrong.append(str(error)))
    tab.set_content(draw.page([LOCAL] * 3, 256)._repr_html_())
    tab.wait_for_timeout(200)
    frame = tab.frames[1]
    until(frame, "window.page && window.page.ready > 0")
    assert "Causal()" in frame.inner_text("#layers")
    tab.set_content((Causal() & Window(5, 0))._repr_html_())
    tab.wait_for_timeout(200)
    until(tab.frames[1], "window.page && window.page.ready > 0")
    assert not wrong
    tab.close()


def test_many_nodes_work_in_a_frame_too(browser):
    tab = browser.new_page()
    frame = html.escape(draw.page([LOCAL] * 3, 50_000).html)
    tab.set_content(f'<iframe sandbox="allow-scripts" width="1200" height="700" srcdoc="{frame}"></iframe>')
    tab.wait_for_timeout(300)
    until(tab.frames[1], "page.state.spread !== null")
    assert tab.frames[1].evaluate("page.state.spread.sizes[0]") == 4 + 3 * 64 + 1
    tab.close()


def test_text_stays_text(opened):
    tab = opened(draw.page([Causal()] * 2, 8, labels=WORDS))
    tab.evaluate("page.select(2, 7)")
    assert "</script><b id=bad>" in tab.inner_text("#said")
    assert tab.query_selector("#bad") is None


def test_everything_by_the_keyboard(opened):
    tab = opened(draw.page([Causal(), Causal() | Prefix(3), Causal()], 8, labels=WORDS))
    tab.focus("#messages-canvas")
    tab.keyboard.press("Home")
    assert tab.get_attribute("#messages-canvas", "aria-valuenow") == "0"
    tab.keyboard.press("ArrowRight")
    tab.keyboard.press("ArrowUp")
    assert "Node 1 “cat”, layer 1; hears 3 keys directly" in tab.inner_text("#said")
    tab.keyboard.press("Shift")
    assert tab.get_attribute("#turn", "aria-pressed") == "true"
    assert "is heard by 8 of 8 outputs" in tab.inner_text("#said")
    tab.focus("#tab-messages")
    tab.keyboard.press("ArrowRight")
    assert tab.get_attribute("#tab-mask", "aria-selected") == "true"
    tab.focus("#mask-canvas")
    tab.keyboard.press("ArrowRight")
    assert "Layer 0: query 0 “the” does not hear key 1 “cat”." in tab.inner_text("#said")
    tab.keyboard.press("ArrowDown")
    assert "query 1 “cat” hears key 1 “cat”" in tab.inner_text("#said")
    assert "The future is heard" in tab.inner_text("#facts")
    assert "layer 1 query 0 hears the later key 1" in tab.inner_text("#facts")
    assert "1 → 1 → 0 → 0" in tab.inner_text("#facts")


def test_the_spread_is_played(opened):
    tab = opened(draw.page([Window(1, 0)] * 3, 8))
    tab.focus("#messages-canvas")
    tab.keyboard.press(" ")
    assert tab.evaluate("page.state.shown") < 3
    until(tab, "page.state.shown === Infinity")
    still = opened(draw.page([Window(1, 0)] * 3, 8), reduced_motion="reduce")
    still.focus("#messages-canvas")
    still.keyboard.press(" ")
    assert still.evaluate("page.state.shown") == float("inf")  # nothing moves


def test_an_edge_is_added_and_errors_leave_the_picture(opened, server):
    tab = opened(server.url)
    tab.fill("input[aria-label=nodes]", "8")
    tab.press("input[aria-label=nodes]", "Enter")
    until(tab, "page.data.n === 8")
    tab.click("#layers button >> text=layer 11")
    tab.click("#tab-mask")
    tab.focus("#mask-canvas")
    tab.keyboard.press("ArrowRight")
    tab.keyboard.press("Enter")
    until(tab, "page.data.graphs.length === 2 && page.data.graphs[1].text.includes('EdgeList')")
    assert "The future is heard" in tab.inner_text("#facts")
    tab.keyboard.press("Enter")
    until(tab, "!page.data.graphs[1].text.includes('EdgeList')")
    field = "textarea[aria-label='expression of layer 11']"
    tab.fill(field, "Causl()")
    tab.wait_for_selector(".error:visible")
    assert "not part of a graph expression" in tab.inner_text(".error:visible")
    assert tab.evaluate("page.data.graphs[1].text") == "Causal()"
    tab.fill(field, "Window(2, 0)")
    until(tab, "page.data.graphs[1].text === 'Window(2, 0)'")
    assert tab.input_value(field) == "Window(2, 0)"


def test_the_tour(opened):
    tab = opened(Page({"title": "attngraph: a tour", "tour": tour()}))
    for number in range(1, 9):
        assert tab.inner_text("#tour-title").startswith(f"{number}. ")
        if number == 3:
            tab.fill("input[aria-label='key of node 0, number 1']", "9")
            assert float(tab.inner_text("#numbers tbody tr >> nth=0 >> td >> nth=3")) > 0.98
        if number == 6:
            tab.click("#show-leak")
            assert tab.get_attribute("#show-leak", "aria-pressed") == "true"
        if number < 8:
            tab.click("#tour-on")
    assert tab.is_disabled("#tour-on")


def test_what_the_data_choose_leaves_no_other_picture(opened, server):
    tab = opened(server.url)
    tab.fill("textarea >> nth=0", "TopK(2)")
    until(tab, "page.data.graphs.some(graph => graph.chosen_by_data)")
    tab.wait_for_timeout(300)
    assert "Queries and keys choose these edges" in tab.inner_text("#said")
    assert tab.inner_text("#fields") == ""
    tab.click("#tab-mask")
    assert "Queries and keys choose these edges" in tab.inner_text("#said")
    tab.fill("textarea >> nth=0", "PerHead([Causal(), Window(3, 0)])")
    until(tab, "page.data.heads === 2")


def test_keys_that_are_held_down_lose_no_step(opened, server):
    tab = opened(server.url)
    tab.focus(".integer >> nth=0")
    for _ in range(30):
        tab.keyboard.press("ArrowUp")
    until(tab, "page.data.graphs[0].text.includes('Window(94, 0)')")
    until(tab, "!document.querySelector('main').hasAttribute('aria-busy')")
    assert tab.inner_text(".integer >> nth=0") == "94"


def test_two_tabs_both_get_what_they_ask(opened, server):
    tabs = [opened(server.url), opened(server.url)]
    for step in range(6):
        for number, tab in enumerate(tabs):
            tab.fill("textarea >> nth=0", f"Causal() & Window({10 * number + step}, 0)")
    for number, tab in enumerate(tabs):
        until(tab, f"page.data.graphs[0].text === 'Causal() & Window({10 * number + 5}, 0)'")
        assert not tab.is_visible(".error")


def test_nodes_change_below_edges_that_were_added(opened, server):
    tab = opened(server.url)
    tab.fill("input[aria-label=nodes]", "16")
    tab.press("input[aria-label=nodes]", "Enter")
    until(tab, "page.data.n === 16")
    tab.fill("textarea >> nth=0", "Causal() ^ EdgeList([[9, 3], [2, 1]], size=16)")
    until(tab, "page.data.graphs[0].text.includes('EdgeList')")
    tab.fill("input[aria-label=nodes]", "8")
    tab.press("input[aria-label=nodes]", "Enter")
    until(tab, "page.data.n === 8")
    assert tab.evaluate("page.data.graphs[0].text") == "Causal() ^ EdgeList([[3], [1]], size=(8, 8))"


def test_shift_that_leads_back_turns_nothing(opened):
    tab = opened(draw.page([Causal()] * 3, 8))
    tab.focus("#messages-canvas")
    tab.keyboard.press("Shift+Tab")
    assert tab.evaluate("page.state.row") == 3


PAGES = {
    "messages": lambda: draw.page([Causal(), Causal() | Prefix(3)], 8, labels=WORDS),
    "mask": lambda: draw.page([LOCAL] * 3, 512),
    "heads": lambda: draw.page([PerHead([LOCAL, Causal()])] * 2, 64),
    "tour": lambda: Page({"title": "attngraph: a tour", "tour": tour()}),
}


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", PAGES)
def test_everybody_can_use_it(opened, name, scheme):
    tab = opened(PAGES[name](), color_scheme=scheme)
    if name != "tour":
        tab.evaluate(f"page.show('{name}')")
    violations = Axe().run(tab).response["violations"]
    assert not violations, json.dumps([(each["id"], [node["html"] for node in each["nodes"]]) for each in violations])


def test_a_live_page_can_be_used_by_everybody(opened, server):
    tab = opened(server.url)
    assert not Axe().run(tab).response["violations"]


def test_shares_are_shown_where_edges_are_too_many(opened):
    data = data_of(Causal() & Random(8), 5000, most=10_000)
    tab = opened(Page(data))
    tab.evaluate("page.show('mask')")
    assert "share of each cell" in tab.inner_text("#mask-hint")
    assert base64.b64decode(data["parts"][0]["shares"])

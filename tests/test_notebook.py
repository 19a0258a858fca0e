"""A notebook shows graphs, plans, weights and pictures as the last line of a cell; nothing prints without end."""

import base64
import json
import re
import time
from html import unescape

import nbformat
import pytest
import torch
from nbclient import NotebookClient

import attngraph
from attngraph import (
    Alibi,
    Causal,
    Documents,
    EdgeBias,
    EdgeList,
    Full,
    Global,
    PerHead,
    Prefix,
    Random,
    RelativeBias,
    Strided,
    Tree,
    Window,
    from_dense,
    from_function,
    parse,
    plan,
    record,
)
from attngraph.bias import DenseBias
from attngraph.graph.text import written
from attngraph.models import GPT
from attngraph.nn import TransformerConfig

SETUP = """
import sys
import torch
from attngraph import Causal, PerHead, Window, draw, plan, record
from attngraph.models import GPT
from attngraph.nn import TransformerConfig

graph = Causal() & Window(3, 0)
model = GPT(TransformerConfig(embed_dim=16, num_layers=2, num_heads=2, position="rotary"), 11, graph)
with record(model) as recorded:
    logits = model(torch.randint(11, (1, 6)))
"""
PAGES = {
    "graph": ["Causal() & Window(3, 0)", "any", "32 × 32", "122"],
    "PerHead([Causal(), Window(1, 1)]).sized(8, 8)": ["8 queries × 8 keys", "58 (36, 22)", "45.3% of all pairs"],
    "plan(graph, 64, 64)": ["Plan(Causal() & Window(3, 0), 64 × 64", "64 queries, 64 keys", "asked:"],
    "recorded": ["transformer.layers.0.attention", "transformer.layers.1.attention", "(1, 2, 18)"],
    "recorded[1]": ["1, transformer.layers.1.attention", "6 queries × 6 keys"],
}
PICTURES = [
    "draw.connectivity(graph, 16)",
    "draw.connectivity([graph, Causal()], 16)",
    "draw.messages(graph, 8, node=2)",
    "draw.attention(recorded[0].weights[0, 1], graph, 6, labels=list('abcdef'))",
    "draw.receptive_field([graph] * 2, 8, 16)",
    "recorded[1].draw(head=1)",
    "recorded.draw()",
]


@pytest.fixture(scope="module")
def outputs():
    """What a kernel displays for the last line of each cell."""
    cells = [SETUP, *PAGES, *PICTURES, "'matplotlib.pyplot' in sys.modules"]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    NotebookClient(notebook, kernel_name="python3", timeout=300).execute()
    return {cell.source: cell.outputs[-1].data for cell in notebook.cells[1:]}


def text_of(page):
    return " ".join(unescape(re.sub("<[^>]*>", " ", page)).split())


@pytest.mark.parametrize("cell", PAGES)
def test_a_cell_shows_picture_and_facts(outputs, cell):
    page = outputs[cell]["text/html"]
    if cell.startswith("recorded"):
        picture = re.search(r'<img [^>]*src="data:image/png;base64,([^"]+)"', page)
        assert base64.b64decode(picture[1]).startswith(b"\x89PNG")
        told = text_of(page)
    else:
        told = unescape(re.search("<pre>(.*?)</pre></iframe>", page, re.DOTALL)[1])  # where frames are not shown
        assert data_in(page)["parts"][0]["cells"]
    for fact in PAGES[cell]:
        assert fact in told
    assert "text/plain" in outputs[cell]


@pytest.mark.parametrize("cell", PICTURES)
def test_a_cell_shows_a_figure(outputs, cell):
    assert base64.b64decode(outputs[cell]["image/png"]).startswith(b"\x89PNG")


def test_a_cell_needs_no_pyplot(outputs):
    assert outputs["'matplotlib.pyplot' in sys.modules"]["text/plain"] == "False"


def data_in(page):
    """What the page in a frame is told."""
    document = unescape(re.search('srcdoc="([^"]*)"', page)[1])
    return json.loads(re.search('<script type="application/json" id="data">(.*?)</script>', document)[1])


def facts(graph):
    return dict(data_in(graph._repr_html_())["facts"])


def test_facts_are_true():
    found = facts((Causal() & (Window(4, 0) | Prefix(2))).sized(100, 100))
    edges = (Causal() & (Window(4, 0) | Prefix(2))).num_edges(100, 100)
    assert found["edges"] == f"{edges:,}"
    assert found["density"] == f"{edges / 100:.3g}% of all pairs"
    assert found["causal"] == "yes"
    assert found["Prefix"].startswith("Everyone hears the first")
    assert facts(Causal() | Global([5000]))["causal"] == "no"  # though not among the nodes that are shown
    assert facts(from_function(lambda q, k: q >= k))["causal"] == "yes, among the nodes shown"
    assert facts(Causal() & Random(3))["causal"].startswith("yes")
    assert facts(Causal() | Random(3))["causal"].startswith("no")
    assert facts(EdgeList([[1], [0]], 3))["causal"] == "no"
    assert "shown at" not in facts(Documents([3, 4]))
    assert facts(Full().sized(None, 8))["shown at"] == "32 × 8"
    assert "<script>" not in attngraph.draw.notebook.page("<script>", {"<script>": "<script>"}, None, "<script>")


def long_ones():
    numbers = torch.randint(0, 1_000_000, (2, 1_000_000), generator=torch.Generator().manual_seed(0))
    listed = EdgeList(numbers, 1_000_000)
    return [
        listed,
        listed | Causal(),
        listed.T @ Causal(),
        Documents([10] * 100_000),
        PerHead([Documents([10] * 100_000), Full()]),
        Tree([(node + 1) // 2 - 1 for node in range(100_000)]),
        Global(range(0, 100_000, 2)),
        Causal() & Global(range(0, 100_000, 2)),
        Random(8).sized(100_000, 100_000),
        from_function(lambda q, k: (q * k) % 7 == 0, (10**6, 10**6)),
        (Causal() & (Window(64, 0) | Strided(64))).sized(10**9, 10**9),
        from_dense(torch.ones(1000, 1000, dtype=torch.bool)),
    ]


def test_what_is_large_is_shown_at_once_and_in_few_words():
    for graph in long_ones():
        began = time.process_time()
        page = graph._repr_html_()
        assert time.process_time() - began < 5, str(graph)[:80]  # a fraction of a second, on a machine that is idle
        assert len(page) < 300_000
        assert len(str(graph)) <= 1000
        assert len(repr(graph)) <= 10_000
    values = torch.zeros(4, 1_000_000)
    made = plan(Documents([10] * 10_000), heads=2)
    for each in (EdgeBias.sorted(values), RelativeBias(values[:, 1:]), Alibi(values[0]), DenseBias(values), made):
        assert len(repr(each)) <= 10_000
        assert len(str(each)) <= 10_000
    assert len(made._repr_html_()) < 300_000


def test_what_was_recorded_of_a_large_model_is_shown_without_a_picture():
    config = TransformerConfig(embed_dim=32, num_layers=8, num_heads=8, position="rotary")
    model = GPT(config, 7)
    with torch.no_grad(), record(model) as recorded:
        model(torch.zeros(1, 8, dtype=torch.int64))
    assert "<img" not in recorded._repr_html_()
    assert "<img" in recorded[7]._repr_html_()
    assert "(1, 8, 36) on Causal()" in text_of(recorded._repr_html_())
    assert len(recorded.draw().axes) == 64


def test_a_long_expression_is_cut_for_people_alone():
    graph = Documents([1, 2] * 10_000) & Causal()
    assert " … " in repr(graph)
    assert str(graph).endswith("& Causal()")
    with pytest.raises(ValueError, match=r"…"):
        parse(repr(graph))
    assert parse(written(graph)) == graph
    listed = EdgeList(torch.randint(0, 5000, (2, 3000), generator=torch.Generator().manual_seed(0)), 5000)
    assert parse(written(listed | Causal())) == listed | Causal()
    short = Documents([1, 2] * 100)
    assert parse(repr(short)) == short

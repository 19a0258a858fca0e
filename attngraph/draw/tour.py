"""The tour of the page: what attention on graphs is, in eight steps, from one node to a stack of one's own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from attngraph.draw.pages import data_of
from attngraph.graph.algebra import Full
from attngraph.graph.base import Graph
from attngraph.graph.edge_list import EdgeList
from attngraph.graph.patterns import Causal, Prefix, Window

WORDS = ["the", "cat", "sat", "on", "the", "mat", "and", "slept"]
SOURCE = ["le", "chat", "s’assit", "…"]
NUMBERS: dict[str, Any] = {
    "query": [1.0, 0.5],
    "keys": [[1.0, 0.0], [0.0, 1.0], [1.5, 1.0], [-1.0, 0.5]],
    "values": [[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [0.0, -1.0]],
}


def tour() -> list[dict[str, Any]]:
    """The steps, as the page reads them."""
    n = len(WORDS)
    one = EdgeList([[0, 1, 2, 3], [3, 3, 3, 3]], size=4)
    return [
        _step(
            "1. One node",
            "A node is a vector. Here are four; the last one wants to know what the others have to say. An edge "
            "from a node to it means: it may hear that node.\n\n"
            "This is all that attention needs: nodes, and a graph of who may hear whom.",
            one, 4, labels=WORDS[:4], focus={"row": 1, "node": 3},
        ),
        _step(
            "2. Query, key, value",
            "The node asks a query; each node that it hears answers by its key, and the dot product of both is "
            "the score of that edge. What is then sent along the edge is the value.\n\n"
            "Change a number, and see the scores change.",
            one, 4, labels=WORDS[:4], focus={"row": 1, "node": 3}, numbers={**NUMBERS, "shows": ["score"]},
        ),
        _step(
            "3. Softmax",
            "Scores become weights that sum up to 1: exp(score), over the sum of all of them. The node hears the "
            "mean of the values by these weights: Σ weight · value.\n\n"
            "Make a key point where the query does, and its value wins.",
            one, 4, labels=WORDS[:4], focus={"row": 1, "node": 3}, numbers={**NUMBERS, "shows": ["score", "weight"]},
        ),
        _step(
            "4. Many nodes",
            "Every node asks at once, and hears all: the graph is full. Afterwards each node thinks for itself, "
            "by a small network that is the same for all; then they talk again, in the next layer. This is BERT, "
            "and a ViT when the nodes are patches of an image.\n\n"
            "Point at a node below: blue is whom it hears, through all layers.",
            [Full()] * 3, n, labels=WORDS,
        ),
        _step(
            "5. Causal",
            "To guess the next word, no node may hear the future: an edge leads only from earlier nodes, and "
            "itself. In code this is the line that masks the scores, and in the mask it is the triangle.\n\n"
            "This one change of the graph makes it a GPT.",
            [Causal()] * 3, n, labels=WORDS, focus={"view": "mask"},
        ),
        _step(
            "6. Delete the mask in one layer",
            "What if one layer lacks that line? Then some query hears a later key there, and through the layers "
            "around it the answer leaks into what should guess it: training looks wonderful, and means nothing.\n\n"
            "The facts show by which edge and which way. Press “Show the way”.",
            [Causal(), Causal() | Prefix(6), Causal()], n, labels=WORDS,
        ),
        _step(
            "7. Cross",
            "Queries may be other nodes than keys: eight words of a translation hear the four nodes of what is "
            "translated. An encoder–decoder is three graphs: the source hears itself, the target hears its past, "
            "and the target hears the source, which is this one.",
            Full().sized(n, 4), n, labels=WORDS, key_labels=SOURCE,
        ),
        _step(
            "8. Local, and yours",
            "If nodes hear only their neighbours, a layer costs the edges it has, not all pairs, and what is far "
            "away arrives after some layers. A few nodes that all hear make it arrive sooner.\n\n"
            "Space plays how it spreads. Where python -m attngraph show serves this page, the numbers can be "
            "changed, and a graph of your own be written.",
            [Causal() & (Window(8, 0) | Prefix(2))] * 6, 256, own=True,
        ),
    ]  # fmt: skip


def _step(
    title: str,
    text: str,
    graphs: Graph | Sequence[Graph],
    n: int,
    *,
    labels: list[str] | None = None,
    key_labels: list[str] | None = None,
    focus: dict[str, Any] | None = None,
    numbers: dict[str, Any] | None = None,
    own: bool = False,
) -> dict[str, Any]:
    data = data_of(graphs, n, heads=1, labels=labels, key_labels=key_labels)
    return {"title": title, "text": text, "data": data, "focus": focus, "numbers": numbers, "own": own}

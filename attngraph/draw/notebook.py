"""What a notebook shows of a graph or a plan as the last line of a cell: a picture, and facts that are found at once.

They know of no pictures: Jupyter asks them for `_repr_html_`, which is given to them here.
"""

from __future__ import annotations

import base64
import html
import inspect
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from attngraph import analysis
from attngraph.analysis.layers import FAR
from attngraph.draw.cells import listed
from attngraph.draw.encoding import encoded
from attngraph.draw.pages import Page, told_of_plan
from attngraph.graph import algebra, listing
from attngraph.graph.base import Graph, at_size, defines
from attngraph.graph.patterns import Causal
from attngraph.planning.planner import Plan

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NODES = 32  # of a graph of any size
PARTS = 12  # of an expression that are told apart
PAIRS, LISTED, LINES = 1 << 20, 1 << 18, 1 << 12  # pairs looked at, edges listed, breakpoints: tenths of a second
RUNS = 1 << 14  # of keys, in what a notebook keeps
STYLE = "text-align:left;vertical-align:top"


def page(heading: str, facts: Mapping[str, str], picture: Figure | None = None, text: str = "") -> str:
    """HTML of a heading, a picture, facts and preformatted text, all in itself."""
    parts = [f'<div style="overflow-wrap:anywhere"><code>{html.escape(heading)}</code></div>']
    if picture is not None:
        from attngraph.draw.figure import png

        data = base64.b64encode(png(picture)).decode()
        parts.append(f'<img alt="{html.escape(heading[:200])}" src="data:image/png;base64,{data}">')
    rows = [
        f'<tr><th style="{STYLE}">{html.escape(name)}</th><td style="{STYLE}">{html.escape(value)}</td></tr>'
        for name, value in facts.items()
    ]
    parts.append(f"<table>{''.join(rows)}</table>" if rows else "")
    parts.append(f"<pre>{html.escape(text)}</pre>" if text else "")
    return f"<div>{''.join(parts)}</div>"


def graph_page(graph: Graph) -> str:
    """A graph: at its own size, or of a graph of any size, at a small one."""
    if graph._unresolved:
        return page(str(graph), {"edges": "chosen by queries and keys: graph.resolve(q, k)"}, None)
    n = NODES if graph.size[0] is None else graph.size[0]
    m = n if graph.size[1] is None else graph.size[1]
    return Page(quick_data(graph, n, m, graph_facts(graph, n, m)))._repr_html_()


def plan_page(plan: Plan) -> str:
    """A plan: its graph's picture, the facts, and how it runs."""
    n, m = plan.call.num_queries, plan.call.num_keys
    data = quick_data(plan.graph, n, m, graph_facts(plan.graph, n, m))
    data["graphs"][0] |= told_of_plan(plan)
    data |= {"title": repr(plan), "heads": plan.call.heads, "text": plan.explain()}
    return Page(data)._repr_html_()


def quick_data(graph: Graph, n: int, m: int, facts: dict[str, str]) -> dict[str, Any]:
    """What a page is told of a graph, where that is found at once; without its edges where it is not."""
    parts = [graph.of_head(head) for head in range(graph.heads)] if graph.heads else [graph]
    is_quick = sum(listed(each, n, m) for each in parts) <= LISTED and len(parts) <= PARTS
    kinds = list(dict.fromkeys(parts)) if is_quick else []
    told: dict[str, Any] = {"text": str(graph), "parts": [kinds.index(each) for each in parts] if is_quick else []}
    if is_quick and graph.heads and _is_quick(graph, n, m):
        told["edges"] = [each.num_edges(n, m) for each in parts]
    return {
        "title": str(graph), "n": n, "m": m, "heads": graph.heads or 1, "head_dim": 0, "labels": None,
        "key_labels": None, "parts": [encoded(each, n, m, RUNS, PAIRS) for each in kinds], "graphs": [told],
        "layers": [0], "facts": [*facts.items()], "recorded": None,
    }  # fmt: skip


def graph_facts(graph: Graph, n: int, m: int) -> dict[str, str]:
    """What it is and its size; and edges, density and causality, where these are found at once."""
    facts = _meanings(graph)
    of_any = graph.size == (None, None)
    facts["size"] = "any" if of_any else f"{_number(graph.size[0])} queries × {_number(graph.size[1])} keys"
    if None in graph.size:
        facts["shown at"] = f"{n} × {m}"
    if graph.heads:
        facts["heads"] = f"{graph.heads}, each with a graph of its own"
    if _is_quick(graph, n, m):
        per_head = [graph._head(h).num_edges(n, m) for h in range(graph.heads)] if graph.heads else []
        edges = sum(per_head) if per_head else graph.num_edges(n, m)
        pairs = n * m * (graph.heads or 1)
        facts["edges"] = f"{edges:,}" + (f" ({', '.join(f'{each:,}' for each in per_head[:16])})" if per_head else "")
        facts["density"] = f"{100 * edges / pairs:.3g}% of all pairs" if pairs else "no pairs"
    if (causal := _causal(graph, n, m)) is not None:
        facts["causal"] = causal
    return facts


def _causal(graph: Graph, n: int, m: int) -> str | None:
    """Whether no query hears a later key: among many nodes if it fits any number, else, or if that takes long, n."""
    far = graph.size[0] is None and _is_quick(graph - Causal(), FAR, graph.size[1] or FAR, LISTED // 4)
    if not (far or _is_quick(graph - Causal(), n, m, LISTED // 4)):
        return None
    answer = "yes" if analysis.is_causal(graph, FAR if far else n) else "no"
    return answer if far or graph.size[0] is not None else f"{answer}, among the nodes shown"


def _meanings(graph: Graph) -> dict[str, str]:
    """What the graphs are of which an expression is made: the first sentence of each class, of a few."""
    found: dict[str, str] = {}
    waiting = [graph]
    for part in waiting:
        if type(part).__module__ != algebra.__name__:
            told = (inspect.getdoc(type(part)) or "").split("\n\n")[0].replace("\n", " ")
            found.setdefault(type(part).__name__, re.split(r"(?<!al)\. ", told)[0].removesuffix("."))
        waiting += part._children[: max(PARTS - len(waiting), 0)]
    return found


def _number(count: int | None) -> str:
    return "any number of" if count is None else f"{count:,}"


def _is_quick(graph: Graph, n: int, m: int, most: int = LISTED) -> bool:
    """Whether its edges are counted at once: they are few, or known, or a formula."""
    if graph.heads:
        return all(_is_quick(graph._head(head), n, m, most) for head in range(graph.heads))
    if n * m <= PAIRS:
        return True
    bound = at_size(graph, n, m)[0]
    if bound._found_by_listing() and defines(bound, "_count"):
        return True
    rest, lists = bound._split(n, m, listing.has_lists_alone)
    found = rest._breakpoints(n, m)
    if found is None or sum(each.cost for each in lists) > most:
        return False
    return len(found.rows) + len(found.columns) + len(found.diagonals) <= LINES


setattr(Graph, "_repr_html_", graph_page)  # noqa: B010  a graph itself knows of no pictures
setattr(Plan, "_repr_html_", plan_page)  # noqa: B010  nor does a plan

"""Which of some given edges each edge of a graph is: how values that came with an `edge_index` find their places.

`torch.compile` sees one opaque operator that takes both graphs by their handles.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
from torch import Tensor

from attngraph import cache
from attngraph.graph.base import Graph, at_size
from attngraph.graph.edge_list import EdgeList
from attngraph.graph.listing import count_edges, list_edges
from attngraph.graph.text import pack, tensors_are_fake, unpack


class Columns(NamedTuple):
    """What is kept for a graph and given edges."""

    place: Tensor
    """See `columns`; int64, one for each edge of the graph."""
    missing: int
    missing_loops: int

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return self.place.nbytes


def columns(
    graph: Graph, n: int, m: int, given: EdgeList, like: Tensor, fill: bool, self_loops: bool, owner: str
) -> Tensor:
    """For each edge of a graph which of the E given edges, sorted, it is: E for none, E + 1 for none of a self loop.

    `like` is a tensor on the device where it is wanted, and another one in each call: of two calls that are alike, a
    compiler keeps one, and then lacks the size of the other's result (torch 2.14). `owner` is whose they are.

    Raises ValueError for such as are none, where they are not to be filled.
    """
    if torch.compiler.is_compiling():
        return _operator(*pack(graph), *pack(given), n, m, like.detach(), fill, self_loops, owner)
    device = like.device
    if device.type == "meta" or tensors_are_fake():
        with torch._C._DisableTorchDispatch(), torch.device("cpu"):
            count = count_edges(*at_size(graph, n, m))
        return torch.empty(count, dtype=torch.int64, device=device)
    return _checked(graph, n, m, given, device, fill, self_loops, owner)


def _checked(
    graph: Graph, n: int, m: int, given: EdgeList, device: torch.device, fill: bool, self_loops: bool, owner: str
) -> Tensor:
    key = graph, graph._state(), n, m, device, given
    place, missing, missing_loops = cache.COLUMNS.get_or_make(key, lambda: _columns(graph, n, m, given, device, owner))
    lacking = (0, "fill") if missing and not fill else (1, "self_loops") if missing_loops and not self_loops else None
    if lacking is not None:
        wrong = (place == len(given.code) + lacking[0]).nonzero()[:, 0]
        first = graph.edge_index(n, m)[:, int(wrong[0])].tolist()
        remedy = f"give it, or {lacking[1]}=0.0" if owner == "EdgeBias" else "give it"
        raise ValueError(
            f"an {owner} must have a value for each edge of the graph, and has none for {len(wrong)} of "
            f"{len(place)}, first for key {first[0]} → query {first[1]}: {remedy}"
        )
    if len(given.code) and len(place) == missing + missing_loops > 0:
        raise ValueError(
            f"an {owner} must be of edges of the graph (none of those given is): row 0 of its edge_index holds the "
            "sources = keys, row 1 the targets = queries, in the node numbers of this graph"
        )
    return place


def _columns(graph: Graph, n: int, m: int, given: EdgeList, device: torch.device, owner: str) -> Columns:
    across = cast(int, given.size[1])
    for side, named, count in (("query", given.query, n), ("key", given.key, m)):
        if len(named) and int(named.max()) >= count:
            raise ValueError(
                f"an {owner} must be of nodes of the graph, whose {side} nodes are below {count} (got "
                f"{int(named.max())})"
            )
    query, key = (side.to(device) for side in list_edges(*at_size(graph, n, m)))
    code, count = given.code.to(device), len(given.code)
    wanted = torch.where(key < across, query * across + key, -1)
    place = torch.searchsorted(code, wanted.contiguous())
    found = torch.cat([code, code.new_full((1,), -2)])[place] == wanted
    is_loop = (query == key) & (n == m)
    place = torch.where(found, place, count + is_loop.long())
    missing = int((~found & ~is_loop).sum())
    return Columns(place, missing, int((~found).sum()) - missing)


@torch.library.custom_op("attngraph::edge_columns", mutates_args=())
def _operator(
    graph: str, tensors: list[Tensor], given: str, given_tensors: list[Tensor],
    n: int, m: int, like: Tensor, fill: bool, self_loops: bool, owner: str,
) -> Tensor:  # fmt: skip
    edges = unpack(given, given_tensors)
    return _checked(unpack(graph, tensors), n, m, edges, like.device, fill, self_loops, owner).clone()


@_operator.register_fake
def _(graph, tensors, given, given_tensors, n, m, like, fill, self_loops, owner):
    return like.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.int64)

"""Masks and lists of edges of a graph, made once for a size and a device; also inside compiled programs.

`torch.compile` sees one opaque operator that takes the graph by its handle, so that one program serves every graph and
every size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attngraph import cache
from attngraph.graph.base import Graph, at_size
from attngraph.graph.edge_list import EdgeList
from attngraph.graph.listing import count_edges, list_edges, of_each_head
from attngraph.graph.text import pack, tensors_are_fake, unpack
from attngraph.planning.layouts.csr import CSR

MAX_MASK_BYTES = 1 << 26  # of a mask that is kept; larger ones cost less to build than to keep


class EdgesOfHeads(NamedTuple):
    """All edges that any head has, sorted by query, then key; and which head has which."""

    query: Tensor
    """int64 (E,)"""
    key: Tensor
    """int64 (E,)"""
    member: Tensor
    """bool (H, E); (0, E) where all heads have one graph"""

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        return sum(part.nbytes for part in self)


def mask(graph: Graph, n: int, m: int, device: torch.device) -> Tensor:
    """The edges as a bool tensor (n, m) or (H, n, m), not to be changed; kept if it is small."""
    if torch.compiler.is_compiling():
        return _mask_operator(*pack(graph), graph.heads or 0, n, m, device)
    if device.type == "meta" or tensors_are_fake():
        return torch.empty((graph.heads, n, m) if graph.heads else (n, m), dtype=torch.bool, device=device)
    if n * m > MAX_MASK_BYTES:
        return graph.mask(n, m, device)
    return _kept(cache.MASKS, graph, (n, m, device), lambda: graph.mask(n, m, device))


def edges_of_heads(graph: Graph, n: int, m: int, device: torch.device) -> EdgesOfHeads:
    """The edges as a list, not to be changed; kept."""
    if torch.compiler.is_compiling():
        return EdgesOfHeads(*_edges_operator(*pack(graph), graph.heads or 0, n, m, device))
    if device.type == "meta" or tensors_are_fake():
        with torch._C._DisableTorchDispatch(), torch.device("cpu"):
            count = count_edges(*at_size(graph, n, m))
        query, key = (torch.empty(count, dtype=torch.int64, device=device) for _ in range(2))
        return EdgesOfHeads(query, key, torch.empty(graph.heads or 0, count, dtype=torch.bool, device=device))
    return _kept(cache.EDGES, graph, (n, m, device), lambda: _listed(graph, n, m, device))


def csr_of_heads(graph: Graph, n: int, m: int, device: torch.device) -> CSR:
    """The same edges by query and by key, as kernels of rows read them; kept."""

    def make() -> CSR:
        edges = edges_of_heads(graph, n, m, device)
        return CSR.from_edges(edges.query, edges.key, n, m)

    return _kept(cache.EDGES, graph, (n, m, device, CSR), make)


def _kept(kept: cache.Cache, graph: Graph, key: tuple, make: Callable[[], Any]) -> Any:
    """In a cache; of a graph that is made for some calls alone, with the graph, so that it ends with it."""
    if not isinstance(graph, EdgeList) or graph.plans is None:
        return kept.get_or_make((graph, graph._state(), *key), make)
    own = kept, *key
    if own not in graph.plans:
        graph.plans[own] = make()
    return graph.plans[own]


def _listed(graph: Graph, n: int, m: int, device: torch.device) -> EdgesOfHeads:
    bound, n, m = at_size(graph, n, m)
    query, key = list_edges(bound, n, m)
    member = torch.empty(0, len(query), dtype=torch.bool)
    if graph.heads:
        member = torch.stack(of_each_head(bound, n, m, lambda head, *_: head.contains(query, key)))
    return EdgesOfHeads(query.to(device), key.to(device), member.to(device))


@torch.library.custom_op("attngraph::mask", mutates_args=())
def _mask_operator(graph: str, tensors: list[Tensor], heads: int, n: int, m: int, device: torch.device) -> Tensor:
    found = mask(unpack(graph, tensors), n, m, device)
    return found if n * m > MAX_MASK_BYTES else found.clone()  # an operator's result belongs to its caller


@_mask_operator.register_fake
def _(graph: str, tensors: list[Tensor], heads: int, n: int, m: int, device: torch.device) -> Tensor:
    return torch.empty((heads, n, m) if heads else (n, m), dtype=torch.bool, device=device)


@torch.library.custom_op("attngraph::edges", mutates_args=())
def _edges_operator(
    graph: str, tensors: list[Tensor], heads: int, n: int, m: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    query, key, member = edges_of_heads(unpack(graph, tensors), n, m, device)
    return query.clone(), key.clone(), member.clone()


@_edges_operator.register_fake
def _(graph: str, tensors: list[Tensor], heads: int, n: int, m: int, device: torch.device):
    count = torch.library.get_ctx().new_dynamic_size()
    query, key = (torch.empty(count, dtype=torch.int64, device=device) for _ in range(2))
    return query, key, torch.empty(heads, count, dtype=torch.bool, device=device)

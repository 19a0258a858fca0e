"""Vectors gathered along the edges, and reduced at the queries: what any score and normaliser run on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attngraph.bias import Bias, over_edges
from attngraph.edge_features import check_edge_terms
from attngraph.graph.base import Graph
from attngraph.kernels.contract import Modifiers
from attngraph.kernels.edge import edges as gathered
from attngraph.planning.backends.base import Backend, Results, width_factor
from attngraph.planning.call import Call, Request
from attngraph.planning.costs import Costs
from attngraph.planning.edge_set import EdgeSet
from attngraph.planning.layouts.materialized import EdgesOfHeads, edges_of_heads


class Edges(Backend):
    """See `kernels.edge`. Every score, normaliser, dropout and transform; memory for E · H · D numbers."""

    name = "edges"
    takes_edge_features = True

    def supports(self, call: Call) -> str | None:
        return "it runs all edges at once" if call.part else None

    def overhead(self, edges: EdgeSet, call: Call, costs: Costs) -> float:
        return costs.gather_s_per_call

    def estimate(self, edges: EdgeSet, call: Call, costs: Costs) -> float:
        numbers = 2 * (call.head_dim + call.key_features) + call.value_dim + call.value_features
        per_edge = costs.gather_s_per_edge + costs.gather_s_per_edge_dim * numbers * width_factor(call)
        return edges.count * call.heads * per_edge + costs.gather_s_per_call

    def build(self, edges: EdgeSet, call: Call) -> EdgesOfHeads:
        return edges_of_heads(edges.graph, edges.n, edges.m, call.device)

    def traced_layout(self, graph: Graph, n: int, m: int, device: torch.device) -> EdgesOfHeads:
        return edges_of_heads(graph, n, m, device)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, layout: EdgesOfHeads, modifiers: Modifiers
    ) -> tuple[Tensor, Tensor]:
        raise NotImplementedError("edges run by attend")

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, layout: EdgesOfHeads, bias: Bias | None, request: Request
    ) -> Results:
        of_edges = None if bias is None else over_edges(bias, q, k, layout.query, layout.key)
        if request.edge_features is not None:
            check_edge_terms(request.edge_features, len(layout.query))
        return gathered(q, k, v, layout.query, layout.key, layout.member, bias=of_edges, **request.generic)

    def describe(self, edges: EdgeSet, layout: Any, call: Call) -> str:
        return "vectors gathered along the edges"

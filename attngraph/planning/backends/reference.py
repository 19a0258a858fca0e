"""The definition: a loop over nodes, in float64. It is run when it is named, and tests every other backend."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attngraph.bias import Bias, DenseBias, EdgeBias, check_edge_bias, over_pairs
from attngraph.edge_features import check_edge_terms
from attngraph.graph.base import Graph, at_size
from attngraph.graph.listing import count_edges
from attngraph.kernels.contract import Modifiers
from attngraph.kernels.reference import reference
from attngraph.planning.backends.base import Backend, Results
from attngraph.planning.call import Call, Request
from attngraph.planning.costs import Costs
from attngraph.planning.edge_set import EdgeSet

S_PER_STEP = 3e-5  # seconds of one head and query in a Python loop, measured on a server's CPU; the order of magnitude


class Reference(Backend):
    """See `kernels.reference`. Every score, normaliser and bias; all derivatives; memory for all pairs."""

    name = "reference"
    takes_edge_features = True

    def supports(self, call: Call) -> str | None:
        if call.part:
            return "it runs all edges at once"
        return "compiled programs and tensors without numbers have no loop over nodes" if call.compiled else None

    def only_by_name(self, call: Call) -> str | None:
        return "only by name: it is the definition"

    def estimate(self, edges: EdgeSet, call: Call, costs: Costs) -> float:
        return S_PER_STEP * call.heads * call.num_queries

    def build(self, edges: EdgeSet, call: Call) -> Graph:
        return edges.graph

    def forward(self, q: Tensor, k: Tensor, v: Tensor, layout: Graph, modifiers: Modifiers) -> tuple[Tensor, Tensor]:
        raise NotImplementedError("the reference runs by attend")

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layout: Graph, bias: Bias | None, request: Request) -> Results:
        n, m = q.shape[2], k.shape[2]
        if request.edge_features is not None:
            check_edge_terms(request.edge_features, count_edges(*at_size(layout, n, m)))
        if isinstance(bias, EdgeBias):
            check_edge_bias(bias, count_edges(*at_size(layout, n, m)), q)
        elif bias is not None:
            bias = DenseBias(over_pairs(bias, q, k, None).double())
        out, lse, weights = reference(q, k, v, layout, bias=bias, **request.generic)
        if request.return_weights:
            key, query = layout.edge_index(n, m).to(q.device)
            weights = weights[:, :, query, key].to(q.dtype)
        return out.to(q.dtype), lse.to(torch.promote_types(q.dtype, torch.float32)), weights

    def describe(self, edges: EdgeSet, layout: Any, call: Call) -> str:
        return "the definition, a loop over nodes in float64"

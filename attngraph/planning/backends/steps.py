"""Scores of the edges first, then attention by them: for scores and weights that no kernel fuses."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from attngraph.kernels.contract import Modifiers
from attngraph.kernels.scoring import ANY_FUNCTION, FUSED_SCORES, NORMALIZER_NAMES
from attngraph.planning.backends.base import Backend, width_factor
from attngraph.planning.backends.rows import rows_seconds
from attngraph.planning.call import Call
from attngraph.planning.costs import Costs
from attngraph.planning.edge_set import EdgeSet

ACTIVATION_FACTOR = 12  # of an additive score: how much longer an activation takes than a product with a number
FEATURE_FACTOR = 0.25  # and of each feature of an edge, whose products with K share what they read


class Steps(Backend):
    """See `planning.steps`. Every score and normaliser; memory for E · H numbers."""

    name = "steps"
    takes_edge_features = True

    def supports(self, call: Call) -> str | None:
        if call.part:
            return "it runs all edges at once"
        if call.transform is not None:
            return f"{call.transform} can't transform its backward pass"
        if call.score in FUSED_SCORES and call.normalize in NORMALIZER_NAMES:
            return "one kernel makes these scores and weights at once"
        return None

    def overhead(self, edges: EdgeSet, call: Call, costs: Costs) -> float:
        return costs.row_s_per_call

    def estimate(self, edges: EdgeSet, call: Call, costs: Costs) -> float:
        if _by_kernel(call):  # half of what rows do
            per_number = ACTIVATION_FACTOR + FEATURE_FACTOR * call.key_features if call.score == "additive" else 0.0
            more = per_number * costs.row_s_per_edge_dim * edges.count * call.heads * call.head_dim
            return rows_seconds(edges, call._replace(value_dim=0, value_features=0), costs) + more * width_factor(call)
        per_edge = costs.gather_s_per_edge + costs.gather_s_per_edge_dim * 2 * call.head_dim
        return edges.count * call.heads * per_edge * width_factor(call)

    def rest(self, call: Call) -> Call:
        return call.after_scores

    def build(self, edges: EdgeSet, call: Call) -> None:
        return None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, layout: None, modifiers: Modifiers) -> tuple[Tensor, Tensor]:
        raise NotImplementedError("steps run by planning.steps.in_steps")

    def runs_whole(self, layout: Any, call: Call) -> bool:
        return True

    def describe(self, edges: EdgeSet, layout: Any, call: Call) -> str:
        scores = "by a kernel" if _by_kernel(call) else "a part of the edges at a time"
        return f"scores of the edges first, {scores}; then attention by them"


def _by_kernel(call: Call) -> bool:
    """Whether scores are made by a kernel."""
    if call.score == ANY_FUNCTION:
        return False
    return not call.key_features or (call.score == "additive" and call.device.type == "cpu")

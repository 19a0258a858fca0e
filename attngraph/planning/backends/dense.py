"""All pairs by PyTorch's scaled_dot_product_attention: its flash kernels for Causal() and Full(), else with a mask."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor

from attngraph.bias import Bias, over_pairs
from attngraph.graph.base import Graph
from attngraph.graph.patterns import Causal
from attngraph.kernels import dense as kernels
from attngraph.kernels.contract import Gradients, Modifiers
from attngraph.planning.backends.base import NO_EDGE_FEATURES, Backend, Results, width_factor
from attngraph.planning.call import Call, Request
from attngraph.planning.costs import Costs
from attngraph.planning.edge_set import EdgeSet, closed_form
from attngraph.planning.layouts.dense import Dense as DenseLayout
from attngraph.planning.layouts.materialized import edges_of_heads
from attngraph.planning.layouts.materialized import mask as all_pairs_mask

FLASH_KEYS = 512  # keys that the flash kernel of a CPU takes at once, also where only one of them is an edge
DROPOUT_FACTOR = 20  # all weights are held, and which of them are dropped
HALF_PRECISION_FACTOR = 0.5  # PyTorch's kernel multiplies half precision as it is; ours widen it first


class Dense(Backend):
    """See `kernels.dense`. Dropout and every bias; no other score or normaliser."""

    name = "dense"

    def supports(self, call: Call) -> str | None:
        if call.score != "dot":
            return f"it has no score={call.score!r}"
        if call.normalize != "softmax":
            return f"it has no normalize={call.normalize!r}"
        if call.transform == "forward-mode":
            return "PyTorch's kernels have no forward-mode derivatives"
        if call.edge_features:
            return NO_EDGE_FEATURES
        if call.part and call.bias is not None:
            return "it has no bias as one of several parts"
        if call.part and call.padding:
            return "it has no padding as one of several parts"
        if call.part and call.transform is not None:
            return f"{call.transform} can't transform its backward pass as one of several parts"
        return "it has no dropout as one of several parts" if call.part and call.dropout else None

    def estimate(self, edges: EdgeSet, call: Call, costs: Costs) -> float:
        plain = self._is_plain(call)
        if plain and edges.closed_form is not None:
            return self._flash_seconds(edges.closed_form, edges.n, edges.m, call, costs)
        if plain and edges.documents is not None and call.transform is None:
            closed, lengths = edges.documents
            counts = Counter(lengths)
            flash = sum(many * self._flash_seconds(closed, n, n, call, costs) for n, many in counts.items())
            moved = 4 * costs.merge_s_per_result_dim * call.mean_dim * edges.n * call.heads  # q, k, v and out
            return flash + len(counts) * costs.tile_s_per_call + moved
        pairs = costs.masked_s_per_pair_dim * call.mean_dim * edges.n * edges.m * width_factor(call)
        pairs *= DROPOUT_FACTOR if call.dropout else 1
        return pairs * call.heads + costs.masked_s_per_call

    def _flash_seconds(self, closed: Graph, n: int, m: int, call: Call, costs: Costs) -> float:
        pairs = min(n * m, n * (m + FLASH_KEYS) // 2) if type(closed) is Causal else n * m
        half = HALF_PRECISION_FACTOR if call.device.type == "cpu" and call.number_bytes < 4 else 1.0
        return costs.flash_s_per_pair_dim * call.mean_dim * pairs * call.heads * width_factor(call) * half

    def build(self, edges: EdgeSet, call: Call) -> DenseLayout:
        if edges.closed_form is not None:
            return DenseLayout(edges.closed_form, edges.n, edges.m, type(edges.closed_form).__name__.lower())
        if self._is_plain(call) and edges.documents is not None and call.transform is None:
            closed, lengths = edges.documents
            return DenseLayout(closed, edges.n, edges.m, type(closed).__name__.lower(), lengths)
        return DenseLayout(edges.graph, edges.n, edges.m, None)

    def traced_layout(self, graph: Graph, n: int, m: int, device: torch.device) -> DenseLayout:
        closed = closed_form(graph)
        return DenseLayout(graph, n, m, None if closed is None else type(closed).__name__.lower())

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, layout: DenseLayout, modifiers: Modifiers
    ) -> tuple[Tensor, Tensor]:
        assert modifiers.is_plain  # as one of several parts: see supports
        return kernels.forward(q, k, v, layout, modifiers)

    def backward(self, q, k, v, out, lse, dout, dlse, layout, modifiers, bias_grad) -> Gradients:
        return Gradients(*kernels.backward(q, k, v, out, lse, dout, dlse, layout, modifiers, bias_grad))

    @staticmethod
    def _is_plain(call: Call) -> bool:
        """Whether a flash kernel runs a closed form of it: all but a mask is in the way."""
        return call.bias is None and not call.padding and not call.dropout

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, layout: DenseLayout, bias: Bias | None, request: Request
    ) -> Results:
        n, m, causal = q.shape[2], k.shape[2], layout.closed == "causal"
        mask, padding = layout.mask(q.device), request.attention_mask
        if causal and (bias is not None or padding is not None):
            mask, causal = all_pairs_mask(layout.graph, n, m, q.device), False
        if padding is not None:
            real = padding[:, None, None, :]
            mask = real if mask is None else mask & real
        values = None
        if bias is not None:
            values = over_pairs(bias, q, k, lambda: edges_of_heads(layout.graph, n, m, q.device))
        options = {"causal": causal, "bias": values, "scale": request.scale}
        out = kernels.dense(q, k, v, mask, dropout=request.dropout, **options)
        return out, kernels.logsumexp(q, k, mask, **options) if request.return_lse else None, None

    def runs_whole(self, layout: DenseLayout, call: Call) -> bool:
        if layout.lengths:
            return False
        # On a GPU, PyTorch's own operator keeps the lse to itself; its kernels do not.
        plain = self._is_plain(call) and call.transform is None
        return not (call.return_lse and call.device.type == "cuda" and layout.closed and plain and not call.compiled)

    def pairs(self, edges: EdgeSet, layout: DenseLayout) -> int:
        return layout.pairs

    def describe(self, edges: EdgeSet, layout: DenseLayout, call: Call) -> str:
        if layout.lengths:
            kinds = len({*layout.lengths})
            return f"{len(layout.lengths):,} documents of {kinds:,} lengths, each length a call of the flash kernel"
        masked = layout.closed is None or (layout.closed == "causal" and (call.bias is not None or call.padding))
        return "all pairs, with a mask" if masked else f"{layout.graph} is what the flash kernel does"

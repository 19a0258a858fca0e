"""Part after part of a plan: each by its backend, the results merged exactly; forward and backward."""

from __future__ import annotations

import torch
from torch import Tensor

from attngraph.kernels.contract import BiasKind, EdgeTerms, Gradients, Modifiers, ScoreBias
from attngraph.kernels.merge import merge
from attngraph.planning.candidates import Part

Parts = tuple[Part, ...]
Terms = tuple[Tensor | None, Tensor | None, Tensor | None]  # those of `EdgeTerms`, e, K and V, or nothing


def forward(parts: Parts, q: Tensor, k: Tensor, v: Tensor, modifiers: Modifiers) -> tuple[Tensor, Tensor]:
    """q (B, H, N, D), k and v (B, Hkv, M, ·) → out (B, H, N, Dv), lse (B, H, N)."""
    parts = _with_work(parts, q, k)
    if len(parts) == 1 and parts[0].is_all:
        return parts[0].backend.forward(q, k, v, parts[0].layout, modifiers)
    exact = torch.promote_types(q.dtype, torch.float32)
    out = lse = None
    if not parts or parts[0].heads:  # else the first part's results are the first sums
        out = q.new_zeros(*q.shape[:3], v.shape[3], dtype=exact)
        lse = q.new_full(q.shape[:3], -torch.inf, dtype=exact)
    for part in parts:
        view = _View(part, q, k)
        sides = view.queries(q), view.keys(k), view.keys(v)
        part_out, part_lse = part.backend.forward(*sides, part.layout, view.modifiers(modifiers))
        part_out, part_lse = view.in_own_order(part_out).to(exact), view.in_own_order(part_lse).to(exact)
        if out is None or lse is None:
            out, lse = part_out, part_lse
        elif modifiers.normalize != "softmax":  # each weight by itself: sums add up
            out.index_add_(1, view.heads, part_out)
        elif part.heads is None:
            merge(out, lse, part_out, part_lse)
        else:
            heads_out, heads_lse = out[:, view.heads], lse[:, view.heads]
            merge(heads_out, heads_lse, part_out, part_lse)
            out[:, view.heads], lse[:, view.heads] = heads_out, heads_lse
    assert out is not None
    assert lse is not None
    return out, lse


def backward(
    parts: Parts, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None,
    modifiers: Modifiers, bias_grad: bool,
) -> Gradients:  # fmt: skip
    """The gradients, from the results of `forward`; of the values of a bias where `bias_grad` asks for them."""
    parts, bias = _with_work(parts, q, k), modifiers.bias
    if len(parts) == 1 and parts[0].is_all:
        return parts[0].backend.backward(q, k, v, out, lse, dout, dlse, parts[0].layout, modifiers, bias_grad)
    exact, totals, dbias = torch.promote_types(q.dtype, torch.float32), None, None
    if not parts or parts[0].heads:
        totals = [torch.zeros_like(side, dtype=exact) for side in (q, k, v)]
    if bias_grad and bias is not None:
        dbias = torch.zeros_like(bias.values, dtype=torch.promote_types(bias.values.dtype, torch.float32))
    terms = (None, None, None) if modifiers.edges is None else modifiers.edges[:3]
    de, dto_key, dto_value = (x if x is None else torch.zeros_like(x) for x in terms)
    for part in parts:
        view = _View(part, q, k)
        part_out, part_lse, part_dout = (view.queries(side) for side in (out, lse, dout))
        part_dlse = None if dlse is None else view.queries(dlse)
        *gradients, part_dbias, part_dedges = part.backend.backward(
            view.queries(q), view.keys(k), view.keys(v), part_out, part_lse, part_dout, part_dlse,
            part.layout, view.modifiers(modifiers), bias_grad,
        )  # fmt: skip
        gradients = [view.in_own_order(side).to(exact) for side in gradients]
        if totals is None:
            totals = gradients
        else:
            heads = view.heads, view.key_heads, view.key_heads
            for total, own, side in zip(totals, heads, gradients, strict=True):
                total.index_add_(1, own, side) if part.heads else total.add_(side)
        if dbias is not None and bias is not None and part_dbias is not None:
            view.add_bias_gradient(dbias, bias.kind, part_dbias)
        view.add_edge_gradients((de, dto_key, dto_value), part_dedges)
    assert totals is not None
    dq, dk, dv = totals
    return Gradients(dq, dk, dv, dbias, (de, dto_key, dto_value))


def _with_work(parts: Parts, q: Tensor, k: Tensor) -> Parts:
    """Those that have anything to compute."""
    return parts if q.shape[:3].numel() and k.shape[2] else ()


class _View:
    """What one part of a plan sees: its heads, its nodes in its order, its edges."""

    def __init__(self, part: Part, q: Tensor, k: Tensor):
        group = q.shape[1] // k.shape[1]
        self.part = part
        self.heads = torch.tensor(part.heads or range(q.shape[1]), device=q.device)
        # With heads of its own, each query head has its key head beside it; else the groups stay together.
        self.key_heads = self.heads // group if part.heads else torch.arange(k.shape[1], device=q.device)
        self.order = None if part.order is None else part.order.to(q.device)
        self.edges = None if part.edge_numbers is None else part.edge_numbers.to(q.device)

    def queries(self, x: Tensor) -> Tensor:
        """Of x (B, H, N, …), the heads and nodes of this part."""
        x = x.index_select(1, self.heads) if self.part.heads else x
        return x if self.order is None else x.index_select(2, self.order)

    def keys(self, x: Tensor) -> Tensor:
        """Of x (B, Hkv, M, …), the same."""
        x = x.index_select(1, self.key_heads) if self.part.heads else x
        return x if self.order is None else x.index_select(2, self.order)

    def in_own_order(self, x: Tensor) -> Tensor:
        """Results of this part, (B, H, N, …), the nodes in the order of the graph again."""
        if self.order is None:
            return x
        place = torch.empty_like(self.order).scatter_(0, self.order, torch.arange(x.shape[2], device=x.device))
        return x.index_select(2, place)

    def modifiers(self, modifiers: Modifiers) -> Modifiers:
        """Those of this part's heads, nodes and edges."""
        mask = modifiers.attention_mask
        if mask is not None and self.order is not None:
            mask = mask.index_select(1, self.order)
        dropout = modifiers.dropout
        if dropout is not None and self.part.heads:
            dropout = dropout._replace(heads=self.heads)
        bias, edges = self._bias(modifiers.bias), self._terms(modifiers.edges)
        return modifiers._replace(bias=bias, attention_mask=mask, dropout=dropout, edges=edges)

    def _terms(self, terms: EdgeTerms | None) -> EdgeTerms | None:
        """Those of this part's heads and edges."""
        if terms is None or not self.part.heads:
            return terms
        to_key, to_value = (x if x is None else x[self.key_heads] for x in (terms.to_key, terms.to_value))
        values = terms.values if self.edges is None else terms.values.index_select(1, self.edges)
        return terms._replace(values=values, to_key=to_key, to_value=to_value)

    def _bias(self, bias: ScoreBias | None) -> ScoreBias | None:
        """The values of this part's heads and edges."""
        if bias is None or not self.part.heads:
            return bias
        axis = 0 if bias.kind == "offset" else 1
        values = bias.values.index_select(axis, self.heads) if bias.values.shape[axis] > 1 else bias.values
        return ScoreBias(bias.kind, values if self.edges is None or bias.kind != "edge" else values[..., self.edges])

    def add_bias_gradient(self, total: Tensor, kind: BiasKind, gradient: Tensor) -> None:
        """Add the gradient of `bias` to that of all heads and edges."""
        gradient = gradient.to(total.dtype)
        if self.edges is not None and kind == "edge":  # the features of edges need their numbers too
            of_all_edges = gradient.new_zeros(*gradient.shape[:-1], total.shape[-1])
            gradient = of_all_edges.index_copy_(-1, self.edges, gradient)
        axis = 0 if kind == "offset" else 1
        if self.part.heads and total.shape[axis] > 1:
            total.index_add_(axis, self.heads, gradient)
        else:
            total += gradient

    def add_edge_gradients(self, totals: Terms, gradients: Terms) -> None:
        """Add the gradients of `EdgeTerms` to those of all heads and edges."""
        places = (1, self.edges), (0, self.key_heads), (0, self.key_heads)
        for total, gradient, (axis, own) in zip(totals, gradients, places, strict=True):
            if total is not None and gradient is not None:
                total.add_(gradient) if own is None else total.index_add_(axis, own, gradient)

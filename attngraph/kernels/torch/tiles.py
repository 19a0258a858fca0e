"""Attention over tiles by PyTorch's own kernels, on a CPU, and right on every device: layout and tensors in and out.

All heads and rows of a strip of tiles (see `attngraph.strips`) are one call forward, their keys views of one tensor;
backward is batched matrix products. Nothing of size N² is ever held. All pairs of a tile are multiplied: a NaN or an
infinity in a key or a value reaches the queries of its tiles that do not hear it.
"""

from __future__ import annotations

from functools import cached_property
from itertools import product

import torch
from torch import Tensor
from torch.nn.functional import pad

from attngraph.kernels.merge import merge

NUMBERS_AT_ONCE = 1 << 20  # of the keys of some rows of a strip, forward: few enough to stay in the cache
HIDDEN = -1e30  # added to the score of a pair that is no edge: finite, so that a query that hears nobody is no NaN

Bias = tuple[str, Tensor] | None  # see `forward`


def forward(q: Tensor, k: Tensor, v: Tensor, layout, bias: Bias, scale: float) -> tuple[Tensor, Tensor]:
    """q (B, H, N, D), k and v (B, Hkv, M, ·) → out (B, H, N, ·), lse (B, H, N).

    The bias is ("offset", (H | 1, N + M - 1)), whose entry j - i + N - 1 is added to the score of i and j, or ("edge",
    (B | 1, H | 1, E)), or ("dense", (B | 1, H | 1, N | 1, M)).
    """
    (batch, heads, n, dim), value_dim, group = q.shape, v.shape[3], q.shape[1] // k.shape[1]
    width, layout = max(dim, value_dim), layout.on(torch.device("cpu"))
    q, k, v = (_tiled(side, layout, place, width) for side, place in ((q, 0), (k, 1), (v, 1)))
    out, lse = _like(q, torch.empty_like), q.new_empty(*q.shape[:4], 1)
    alone = layout.rows_alone.to(q.device)
    out.index_fill_(2, alone, 0)
    lse.index_fill_(2, alone, -torch.inf)
    shared: list = []
    for strip in pieces(layout, heads * width, NUMBERS_AT_ONCE):
        terms = _Terms(layout, strip, bias, q, n, shared)
        for b, g in product(range(batch), range(group)):
            own = slice(g, None, group)  # the g-th query head of each key head
            query, key, value = _tiles(q[b, own], strip.rows), _tiles(k[b], strip.keys), _tiles(v[b], strip.keys)
            more_out, more_lse = _attention(query, key, value, terms.of(b, range(g, heads, group)), scale)
            if strip.deaf or bias is not None:
                nobody = more_lse <= HIDDEN / 2
                more_out.masked_fill_(nobody, 0)
                more_lse.masked_fill_(nobody, -torch.inf)
            _put(out[b, own], lse[b, own], strip, more_out, more_lse)
    return out.flatten(2, 3)[:, :, :n, :value_dim], lse.flatten(2)[:, :, :n]


def _attention(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """All pairs: q (rows, H, queries, D), k and v (rows, H, keys, D) → out, lse (rows, H, queries, 1)."""
    if q.device.type == "cpu":
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, lse = flash(q, k, v, 0.0, False, attn_mask=hidden, scale=scale)
        return out, lse[..., None]
    scores = q @ k.mT * scale + hidden
    lse = scores.logsumexp(3, keepdim=True)
    return (scores - lse).exp() @ v, lse


def backward(
    q, k, v, out, lse, dout, dlse, layout, bias: Bias, scale: float, bias_grad: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """What these tiles add to (dq, dk, dv, dbias), from the final out and lse of each query; dlse may be None.

    With Δ = Σ dout · out - dlse and p = exp(s - lse): dv = pᵀ dout, ds = p ∘ (dout vᵀ - Δ), dq = scale · ds k,
    dk = scale · dsᵀ q, dbias = ds.
    """
    (batch, heads, n, dim), m, value_dim, group = q.shape, k.shape[2], v.shape[3], q.shape[1] // k.shape[1]
    lse = lse.masked_fill(lse == -torch.inf, torch.inf)  # of nobody, p = exp(-inf)
    width, layout = max(dim, value_dim) + (dlse is not None), layout.on(torch.device("cpu"))
    q, out, dout = (_tiled(side, layout, 0, width) for side in (q, out, dout))
    lse = _tiled(lse[..., None], layout, 0)
    k, v = _tiled(k, layout, 1, width), _tiled(v, layout, 1, width)
    if dlse is not None:  # in one more dimension, where v is 0
        out[..., -1] = 1
        dout[..., -1:] = -_tiled(dlse[..., None], layout, 0)
    dq, dk, dv = (_like(side, torch.zeros_like) for side in (q, k, v))
    dbias, shared = _zeros_like(bias) if bias_grad else None, []
    for strip in pieces(layout, heads * max(width, layout.tile[0]), NUMBERS_AT_ONCE):
        terms = _Terms(layout, strip, bias, q, n, shared)
        for b, g in product(range(batch), range(group)):
            own = slice(g, None, group)  # the g-th query head of each key head
            of_queries = (_tiles(side[b, own], strip.rows) for side in (q, out, lse, dout))
            of_keys = (_tiles(side[b], strip.keys) for side in (k, v))
            hidden = terms.of(b, range(g, heads, group))
            more_q, more_k, more_v, ds = _attention_backward(*of_queries, *of_keys, hidden, scale, bias_grad)
            _add(dq[b, own], strip.rows, more_q)
            _add(dk[b], strip.keys, more_k)
            _add(dv[b], strip.keys, more_v)
            if bias_grad:
                for place, h in enumerate(range(g, heads, group)):
                    terms.add_gradient(dbias, b, h, ds[:, place])
    dq, dk, dv = (side.flatten(2, 3) for side in (dq, dk, dv))
    dbias = dbias.view_as(bias[1]) if bias_grad else None
    return dq[:, :, :n, :dim], dk[:, :, :m, :dim], dv[:, :, :m, :value_dim], dbias


def _attention_backward(q, out, lse, dout, k, v, hidden, scale: float, want_ds: bool):
    """All pairs, as `_attention`, with lse (rows, H, queries, 1) → dq, dk, dv, and ds (rows, H, queries, keys)."""
    if q.device.type == "cpu" and not want_ds:
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        return *flash(dout, q, k, v, out, lse[..., 0], 0.0, False, attn_mask=hidden, scale=scale), None
    p = (q @ k.mT * scale + hidden - lse).exp()
    ds = p * (dout @ v.mT - (dout * out).sum(3, keepdim=True))
    return ds @ k * scale, ds.mT @ q * scale, p.mT @ dout, ds


# -------------------------------------------------------------------------------------------- strips and tiles


def pieces(layout, factor: int, most: int):
    """Each strip, so many rows at a time that rows · keys · factor is about `most`."""
    for strip in layout.strips:
        rows = strip.rows.rows
        at_once = max(1, most // (factor * strip.keys.width * layout.tile[1]))
        step = -(-rows // -(-rows // at_once))  # pieces of equal length
        for start in range(0, rows, step):
            yield strip.cut(start, min(start + step, rows))


def _tiled(x: Tensor, layout, side: int, width: int = 0) -> Tensor:
    """x (B, H, nodes, D) as tiles (B, H, tiles, nodes of a tile, D), filled up with zeros, D to `width`."""
    tiles, size = layout.grid[side], layout.tile[side]
    missing, wide = tiles * size - x.shape[2], max(width - x.shape[3], 0)
    x = pad(x, (0, wide, 0, missing)) if missing or wide else x if x.stride(3) == 1 else x.contiguous()
    return x.unflatten(2, (tiles, size))


def _like(x: Tensor, make) -> Tensor:
    """A tensor like x (B, H, tiles, size, D), in memory with the nodes before the heads."""
    return make(x.permute(0, 2, 3, 1, 4), memory_format=torch.contiguous_format).permute(0, 3, 1, 2, 4)


def _view(x: Tensor, span) -> Tensor:
    """The tiles of a span that is a progression, without a copy: x (H, tiles, size, D) → (rows, H, width · size, D)."""
    (heads, _, size, dim), (of_head, of_tile, of_node, _) = x.shape, x.stride()
    shape, strides = (span.rows, heads, span.width * size, dim), (span.step * of_tile, of_head, of_node, 1)
    return x.as_strided(shape, strides, x.storage_offset() + span.first * of_tile)


def _tiles(x: Tensor, span) -> Tensor:
    """The tiles of a span, as `_view`; gathered where they are no progression."""
    if span.index is None:
        return _view(x, span)
    found = x.index_select(1, span.index.flatten().to(x.device))
    return found.reshape(x.shape[0], span.rows, -1, x.shape[3]).transpose(0, 1)


def _put(out: Tensor, lse: Tensor, strip, more_out: Tensor, more_lse: Tensor) -> None:
    """A strip's result to its rows, merged with those of earlier turns: out (H, tiles, size, D), lse (…, 1)."""
    if strip.turn:
        so_far, so_far_lse = _tiles(out, strip.rows).clone(), _tiles(lse, strip.rows).clone()
        merge(so_far, so_far_lse[..., 0], more_out, more_lse[..., 0])
        more_out, more_lse = so_far, so_far_lse
    for whole, part in ((out, more_out), (lse, more_lse)):
        if strip.rows.index is None:
            _view(whole, strip.rows).copy_(part)
        else:
            whole.index_copy_(1, strip.rows.index.flatten().to(whole.device), part.transpose(0, 1))


def _add(total: Tensor, span, part: Tensor) -> None:
    """Add (rows, H, width · size, D) to the tiles of a span, in a fixed order, as they may overlap."""
    part = part.unflatten(2, (span.width, -1))  # (rows, H, width, size, D)
    if span.index is not None:
        total.index_add_(1, span.index.flatten().to(total.device), part.transpose(1, 2).flatten(0, 1).transpose(0, 1))
    elif span.step == 0:
        _view(total, span._replace(rows=1)).unflatten(2, (span.width, -1)).add_(part.sum(0, keepdim=True))
    else:
        for place in range(span.width):
            _view(total, span._replace(width=1, first=span.first + place)).add_(part[:, :, place])


# ---------------------------------------------------------------------------------------------- masks and biases


class _Terms:
    """What is added to the scores of a strip's piece: its mask, and the bias of some heads."""

    def __init__(self, layout, strip, bias: Bias, q: Tensor, n: int, shared: list):
        self.layout, self.strip, self.n, self.q = layout, strip, n, q
        self.shared = shared  # the masks of the latest piece, and what they add
        self.kind, self.values = (None, None) if bias is None else (bias[0], _table(bias))
        self.known = ((), None)

    def of(self, b: int, heads) -> Tensor:
        """(rows | 1, heads | 1, tile rows, columns)."""
        if self.kind is None:
            return self.hidden
        places = tuple(dict.fromkeys(self._place(self.values, b, h) for h in heads))
        if self.known[0] != places:
            # The least is HIDDEN: a bias of -inf hides too.
            terms = [(self.hidden[:, 0] + self.values[place][self.at]).clamp_(min=HIDDEN) for place in places]
            self.known = (places, torch.stack(terms, 1))
        return self.known[1]

    def add_gradient(self, total: Tensor, b: int, h: int, ds: Tensor) -> None:
        """Add the gradient of the scores, ds (rows, tile rows, columns), to the values that they came from."""
        mask = self.mask.expand_as(ds)
        if all(len(index) == 1 for index in self.at):  # all rows look at the same values
            ds, mask = torch.where(mask, ds, 0).sum(0, keepdim=True), mask.any(0, keepdim=True)
        at = tuple(index.expand_as(ds)[mask] for index in self.at)
        total[self._place(total, b, h)].index_put_(at, ds[mask].to(total.dtype), accumulate=True)

    @staticmethod
    def _place(values: Tensor, b: int, h: int) -> tuple[int, int]:
        """Of values for one or each of a batch and of its heads, those of this head."""
        return (b if values.shape[0] > 1 else 0, h if values.shape[1] > 1 else 0)

    @cached_property
    def inside(self) -> Tensor:
        """The masks of the tiles: bool (rows | 1, width, tile rows, tile columns)."""
        return self.layout.masks[self.strip.masks.view(-1, self.strip.keys.width)]

    @cached_property
    def mask(self) -> Tensor:
        """Who is heard: bool (rows | 1, tile rows, columns)."""
        return self.inside.transpose(1, 2).flatten(2).to(self.q.device)

    @cached_property
    def hidden(self) -> Tensor:
        """0 where somebody is heard, else HIDDEN: (rows | 1, 1, tile rows, columns)."""
        if self.strip.masks.ndim == 1 and self.shared and self.shared[0] is self.strip.masks:
            return self.shared[1]
        hidden = torch.zeros_like(self.mask, dtype=self.q.dtype).masked_fill_(~self.mask, HIDDEN)[:, None]
        self.shared[:] = self.strip.masks, hidden
        return hidden

    @cached_property
    def at(self) -> tuple[Tensor, ...]:
        """Where the values of each pair stand: indices, each (rows | 1, tile rows | 1, columns | 1)."""
        (high, wide), rows, keys = self.layout.tile, self.strip.rows.tiles, self.strip.keys.tiles
        query = rows[:, :, None] * high + torch.arange(high)[:, None]
        key = (keys[:, :, None] * wide + torch.arange(wide)).flatten(1)[:, None]
        if self.kind == "dense":
            n, m = self.values.shape[2:]
            found = query.clamp(max=n - 1), key.clamp(max=m - 1)
        elif self.kind == "offset":
            number = (key - query + self.n - 1).clamp(0, self.values.shape[2] - 1)
            ahead = keys - rows
            found = (number[:1] if bool((ahead == ahead[0]).all()) else number,)
        else:
            number = self.layout.first_edge[self.strip.at][..., None] + self.inside.cumsum(3) - 1
            found = (number.transpose(1, 2).flatten(2).clamp(0, self.values.shape[2] - 1),)
        return tuple(index.to(self.q.device) for index in found)


def _table(bias: tuple[str, Tensor]) -> Tensor:
    """The values of a bias with dimensions for batch and heads."""
    return bias[1][None] if bias[0] == "offset" else bias[1]


def _zeros_like(bias: tuple[str, Tensor]) -> Tensor:
    """Where the gradient of a bias is summed up; in float64 where many edges share one value."""
    values = _table(bias)
    summed = bias[0] == "offset" or (bias[0] == "dense" and values.shape[2] == 1)
    return torch.zeros_like(values, dtype=torch.float64 if summed else values.dtype)

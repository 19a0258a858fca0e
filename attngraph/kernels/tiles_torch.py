"""Attention over tiles by PyTorch's batched matrix products: on a CPU, and right on every device.

A strip of tiles (see `attngraph.strips`) runs head by head, some rows at a time, so that its scores stay in the cache:
scores = q kᵀ + mask, softmax, out = p v. Nothing of size N² is ever held. All pairs of a tile are multiplied: a NaN or
an infinity in a key or a value reaches the queries of its tiles that do not hear it.
"""

from __future__ import annotations

from functools import cached_property
from itertools import product

import torch
from torch import Tensor
from torch.nn.functional import pad

from attngraph.kernels.merge import merge

SCORES_AT_ONCE = 1 << 20  # of one head: 4 MB of float32
HIDDEN = -1e30  # added to the score of a pair that is no edge: finite, so that a query that hears nobody is no NaN

Bias = tuple[str, Tensor] | None  # see `forward`


def forward(q: Tensor, k: Tensor, v: Tensor, layout, bias: Bias, scale: float) -> tuple[Tensor, Tensor]:
    """q (B, H, N, D), k and v (B, Hkv, M, ·) → out (B, H, N, ·), lse (B, H, N).

    The bias is ("offset", (H | 1, N + M - 1)), whose entry j - i + N - 1 is added to the score of i and j, or ("edge",
    (B | 1, H | 1, E)), or ("dense", (B | 1, H | 1, N | 1, M)).
    """
    (batch, heads, n, _), group = q.shape, q.shape[1] // k.shape[1]
    q, k, v = _tiled(q * scale, layout, 0), _tiled(k, layout, 1), _tiled(v, layout, 1)
    out, lse = q.new_zeros(*q.shape[:4], v.shape[4]), q.new_full((*q.shape[:4], 1), -torch.inf)
    for strip, scores in pieces(layout, q):
        terms = _Terms(layout, strip, bias, q, n)
        for b, h in product(range(batch), range(heads)):
            keys, values = ([_tiles(side[b, h // group], span) for span in strip.spans] for side in (k, v))
            _multiply(_tiles(q[b, h], strip.rows), keys, scores).add_(terms.of(b, h))
            top = scores.amax(2, keepdim=True)
            p = torch.softmax(scores, 2, out=scores)
            # The largest weight is 1 / Σ exp(s - top), at least 1 / columns: its logarithm is exact.
            part_out, part_lse = _product(p, values), top - p.amax(2, keepdim=True).log_()
            if strip.deaf or bias is not None:
                nobody = top <= HIDDEN / 2
                part_out.masked_fill_(nobody, 0)
                part_lse.masked_fill_(nobody, -torch.inf)
            _put(out[b, h], lse[b, h], strip, part_out, part_lse)
    return out.flatten(2, 3)[:, :, :n], lse.flatten(2)[:, :, :n]


def backward(
    q, k, v, dout, lse, delta, layout, bias: Bias, scale: float, bias_grad: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """What these tiles add to (dq, dk, dv, dbias), from the final lse of each query and Δ = Σ dout · out - dlse.

    With p = exp(s - lse): dv = pᵀ dout, ds = p ∘ (dout vᵀ - Δ), dq = scale · ds k, dk = scale · dsᵀ q, dbias = ds.
    """
    (batch, heads, n, _), m, group = q.shape, k.shape[2], q.shape[1] // k.shape[1]
    q, dout = _tiled(q * scale, layout, 0), _tiled(dout, layout, 0)
    k, v = _tiled(k, layout, 1), _tiled(v, layout, 1)
    lse = _tiled(lse.masked_fill(lse == -torch.inf, torch.inf)[..., None], layout, 0)  # of nobody, p = exp(-inf)
    delta = _tiled(delta[..., None], layout, 0)
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    dbias = _zeros_like(bias) if bias_grad else None
    for strip, p in pieces(layout, q):
        terms, ds = _Terms(layout, strip, bias, q, n), torch.empty_like(p)
        for b, h in product(range(batch), range(heads)):
            query, up = _tiles(q[b, h], strip.rows), _tiles(dout[b, h], strip.rows)
            keys, values = ([_tiles(side[b, h // group], span) for span in strip.spans] for side in (k, v))
            _multiply(query, keys, p).add_(terms.of(b, h)).sub_(_tiles(lse[b, h], strip.rows)).exp_()
            _multiply(up, values, ds).sub_(_tiles(delta[b, h], strip.rows)).mul_(p)
            _add(dq[b, h], strip.rows, _product(ds, keys))
            start = 0
            for span, key in zip(strip.spans, keys, strict=True):
                stop = start + key.shape[1]
                _add_transposed(dk[b, h // group], span, ds[:, :, start:stop], query)
                _add_transposed(dv[b, h // group], span, p[:, :, start:stop], up)
                start = stop
            if bias_grad:
                terms.add_gradient(dbias, b, h, ds)
    dq, dk, dv = dq.flatten(2, 3)[:, :, :n] * scale, dk.flatten(2, 3)[:, :, :m], dv.flatten(2, 3)[:, :, :m]
    return dq, dk, dv, dbias if dbias is None else dbias.view_as(bias[1])


# -------------------------------------------------------------------------------------------- strips and tiles


def pieces(layout, q: Tensor):
    """Each strip, some rows at a time, with a buffer for its scores (rows, tile rows, columns)."""
    high, wide = layout.tile
    for strip in layout.strips:
        rows = strip.rows.rows
        at_once = max(1, SCORES_AT_ONCE // (high * strip.width * wide))
        step = -(-rows // -(-rows // at_once))  # pieces of equal length
        for start in range(0, rows, step):
            piece = strip.cut(start, min(start + step, rows))
            yield piece, q.new_empty(piece.rows.rows, high, strip.width * wide)


def _tiled(x: Tensor, layout, side: int) -> Tensor:
    """x (B, H, nodes, D) as tiles (B, H, tiles, nodes of a tile, D), contiguous, the last filled up with zeros."""
    tiles, size = layout.grid[side], layout.tile[side]
    missing = tiles * size - x.shape[2]
    return (pad(x, (0, 0, 0, missing)) if missing else x).contiguous().view(*x.shape[:2], tiles, size, x.shape[3])


def _view(x: Tensor, span) -> Tensor:
    """The tiles of a span that is a progression, without a copy: x (tiles, size, D) → (rows, width · size, D)."""
    _, size, dim = x.shape
    shape, strides = (span.rows, span.width * size, dim), (span.step * size * dim, dim, 1)
    return x.as_strided(shape, strides, x.storage_offset() + span.first * size * dim)


def _tiles(x: Tensor, span) -> Tensor:
    """The tiles of a span: x (tiles, size, D) → (rows, width · size, D)."""
    if span.index is None:
        return _view(x, span)
    return x.index_select(0, span.index.flatten().to(x.device)).view(span.rows, -1, x.shape[2])


def _multiply(left: Tensor, rights: list[Tensor], out: Tensor) -> Tensor:
    """left @ [right; right; …]ᵀ, into `out`."""
    start = 0
    for right in rights:
        torch.bmm(left, right.mT, out=out[:, :, start : start + right.shape[1]])
        start += right.shape[1]
    return out


def _product(left: Tensor, rights: list[Tensor]) -> Tensor:
    """left @ [right; right; …]."""
    found, start = None, 0
    for right in rights:
        part = left[:, :, start : start + right.shape[1]]
        found = torch.bmm(part, right) if found is None else found.baddbmm_(part, right)
        start += right.shape[1]
    return found


def _put(out: Tensor, lse: Tensor, strip, more_out: Tensor, more_lse: Tensor) -> None:
    """A strip's result to its rows, merged with those of earlier turns: out (tiles, size, Dv), lse (tiles, size, 1)."""
    if strip.turn:
        so_far, so_far_lse = _tiles(out, strip.rows).clone(), _tiles(lse, strip.rows).clone()
        merge(so_far, so_far_lse[..., 0], more_out, more_lse[..., 0])
        more_out, more_lse = so_far, so_far_lse
    for whole, part in ((out, more_out), (lse, more_lse)):
        if strip.rows.index is None:
            _view(whole, strip.rows).copy_(part)
        else:
            whole.index_copy_(0, strip.rows.index.flatten().to(whole.device), part)


def _add(total: Tensor, span, part: Tensor) -> None:
    """Add (rows, width · size, D) to the tiles of a span, in a fixed order; they may overlap."""
    part = part.unflatten(1, (span.width, -1))
    if span.index is not None:
        total.index_add_(0, span.index.flatten().to(total.device), part.flatten(0, 1))
        return
    for place in range(span.width):
        _view(total, span._replace(width=1, first=span.first + place)).add_(part[:, place])


def _add_transposed(total: Tensor, span, left: Tensor, right: Tensor) -> None:
    """Add leftᵀ right, row by row of a strip, to the tiles of a span: what its keys receive."""
    if span.index is None and span.step == 0:  # all rows hear the same keys: one product
        _view(total, span._replace(rows=1))[0].addmm_(left.flatten(0, 1).mT, right.flatten(0, 1))
    else:
        _add(total, span, torch.bmm(left.mT, right))


# ---------------------------------------------------------------------------------------------- masks and biases


class _Terms:
    """What is added to the scores of a strip's piece: its mask, and the bias of a head."""

    def __init__(self, layout, strip, bias: Bias, q: Tensor, n: int):
        self.layout, self.strip, self.n, self.q = layout, strip, n, q
        self.kind, self.values = (None, None) if bias is None else (bias[0], _table(bias))
        self.latest = (None, None)

    def of(self, b: int, h: int) -> Tensor:
        """(rows | 1, tile rows, columns)."""
        if self.kind is None:
            return self.hidden
        place = self._place(self.values, b, h)
        if self.latest[0] != place:
            # The least is HIDDEN: a bias of -inf hides too.
            self.latest = (place, (self.hidden + self.values[place][self.at]).clamp_(min=HIDDEN))
        return self.latest[1]

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
    def mask(self) -> Tensor:
        """Who is heard: bool (rows | 1, tile rows, columns)."""
        masks = self.layout.masks[self.strip.masks.view(-1, self.strip.width)]
        return masks.transpose(1, 2).flatten(2).to(self.q.device)

    @cached_property
    def hidden(self) -> Tensor:
        """0 where somebody is heard, else HIDDEN."""
        return torch.zeros_like(self.mask, dtype=self.q.dtype).masked_fill_(~self.mask, HIDDEN)

    @cached_property
    def at(self) -> tuple[Tensor, ...]:
        """Where the values of each pair stand: indices, each (rows | 1, tile rows | 1, columns | 1)."""
        high, wide = self.layout.tile
        query = self.strip.rows.tiles[:, :, None] * high + torch.arange(high)[:, None]
        tiles = torch.cat([span.tiles for span in self.strip.spans], 1)
        key = (tiles[:, :, None] * wide + torch.arange(wide)).flatten(1)[:, None]
        if self.kind == "dense":
            n, m = self.values.shape[2:]
            found = query.clamp(max=n - 1), key.clamp(max=m - 1)
        elif self.kind == "offset":
            number = (key - query + self.n - 1).clamp(0, self.values.shape[2] - 1)
            ahead = tiles - self.strip.rows.tiles
            found = (number[:1] if bool((ahead == ahead[0]).all()) else number,)
        else:
            inside = self.layout.masks[self.strip.masks.view(-1, self.strip.width)]
            number = self.layout.first_edge[self.strip.at][..., None] + inside.cumsum(3) - 1
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

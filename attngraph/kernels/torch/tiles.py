"""Attention over tiles by PyTorch's own kernels, on a CPU, and right on every device: layout and tensors in and out.

All heads and rows of a strip of tiles (see `Strip`) are one call forward, their keys views of one tensor; backward, and
what PyTorch's kernels have not (transforms, dropout, other normalisers) is batched matrix products over a piece of a
strip at a time. Nothing of size N² is ever held. All pairs of a tile are multiplied: a NaN or an infinity in a
key or a value reaches the queries of its tiles without an edge to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from attngraph.kernels.contract import Dropout, Modifiers, ScoreBias, Span, Strip, TilesLayout
from attngraph.kernels.dropout import keep_factor, kept, philox, threshold
from attngraph.kernels.merge import merge
from attngraph.kernels.scoring import transform_slope, transformed, weights_and_slopes

# Numbers of the keys of those rows of a strip that one call takes: 4 MB in float32, which stay in the cache.
CALL_NUMBERS = 1 << 20
MASKED_SCORE = -1e30  # added to the score of a pair without an edge: finite, so that a query without edges has no NaN


def forward(q: Tensor, k: Tensor, v: Tensor, layout: TilesLayout, modifiers: Modifiers) -> tuple[Tensor, Tensor]:
    """q (B, H, N, D), k and v (B, Hkv, M, ·) → out (B, H, N, ·), lse (B, H, N), 0 unless softmax makes the weights."""
    (batch, heads, n, dim), value_dim, group = q.shape, v.shape[3], q.shape[1] // k.shape[1]
    width, layout = max(dim, value_dim), layout.on(torch.device("cpu"))
    q, k, v = _tiled(q, layout, 0, width), _tiled(k, layout, 1, width), _tiled(v, layout, 1, width)
    out, lse = _like(q, torch.empty_like), q.new_empty(*q.shape[:4], 1)
    empty_rows = layout.empty_rows.to(q.device)
    out.index_fill_(2, empty_rows, 0)
    lse.index_fill_(2, empty_rows, -torch.inf if modifiers.normalize == "softmax" else 0)
    cache, explicit = _MaskCache(), not _has_flash(modifiers)
    for strip in _pieces(layout, heads * (max(width, layout.tile[0]) if explicit else width), CALL_NUMBERS):
        score_bias = _StripBias(layout, strip, modifiers, q, n, cache)
        for b, g in product(range(batch), range(group)):
            q_heads = slice(g, None, group)  # the g-th query head of each key head
            q_tiles = _gather(q[b, q_heads], strip.rows)
            k_tiles, v_tiles = _gather(k[b], strip.keys), _gather(v[b], strip.keys)
            if explicit:
                pairs = score_bias.pairs(b, range(g, heads, group))
                part_out, part_lse = _explicit_attention(q_tiles, k_tiles, v_tiles, pairs, modifiers)
            else:
                added = score_bias.of(b, range(g, heads, group))
                part_out, part_lse = _attention(q_tiles, k_tiles, v_tiles, added, modifiers.scale)
            if strip.has_empty_rows or modifiers.bias is not None or modifiers.attention_mask is not None:
                no_edge = part_lse <= MASKED_SCORE / 2
                part_out.masked_fill_(no_edge, 0)
                part_lse.masked_fill_(no_edge, -torch.inf)
            by_lse = modifiers.normalize == "softmax"
            _store(out[b, q_heads], lse[b, q_heads], strip, part_out, part_lse, by_lse=by_lse)
    return out.flatten(2, 3)[:, :, :n, :value_dim], lse.flatten(2)[:, :, :n]


def _has_flash(modifiers: Modifiers) -> bool:
    """Whether PyTorch's own kernels do all that is asked for."""
    return modifiers.transform is None and modifiers.normalize == "softmax" and modifiers.dropout is None


def _attention(q: Tensor, k: Tensor, v: Tensor, score_bias: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """All pairs: q (rows, H, queries, D), k and v (rows, H, keys, D) → out, lse (rows, H, queries, 1)."""
    if q.device.type == "cpu":
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, lse = flash(q, k, v, 0.0, False, attn_mask=score_bias, scale=scale)
        return out, lse[..., None]
    scores = q @ k.mT * scale + score_bias
    lse = scores.logsumexp(3, keepdim=True)
    return (scores - lse).exp() @ v, lse


class _Pairs(NamedTuple):
    """Of all pairs of a piece: which are edges to real keys, their bias, and what dropout makes of a weight of 1."""

    heard: Tensor  # bool (rows | 1, 1, tile rows, columns)
    bias: Tensor | None  # (rows | 1, heads | 1, tile rows, columns), any value without an edge
    keep: Tensor | None  # (rows, heads, tile rows, columns): 0 or 1 / (1 - p)


def _raw_scores(q: Tensor, k: Tensor, pairs: _Pairs, scale: float) -> Tensor:
    """Scores before the transform: (rows, H, queries, keys)."""
    scores = q @ k.mT * scale
    return scores if pairs.bias is None else scores + pairs.bias


def _masked(scores: Tensor, pairs: _Pairs) -> Tensor:
    """Scores for softmax; the least is MASKED_SCORE, as a bias of -inf masks too."""
    return scores.masked_fill(~pairs.heard, MASKED_SCORE).clamp_(min=MASKED_SCORE)


def _explicit_attention(q: Tensor, k: Tensor, v: Tensor, pairs: _Pairs, modifiers: Modifiers) -> tuple[Tensor, Tensor]:
    """All pairs under any modifiers, as `_attention`."""
    scores = transformed(_raw_scores(q, k, pairs, modifiers.scale), modifiers.transform)
    if modifiers.normalize == "softmax":
        scores = _masked(scores, pairs)
        lse = scores.logsumexp(3, keepdim=True)
        weights = (scores - lse).exp()
    else:
        weights, lse = weights_and_slopes(scores, modifiers.normalize)[0], scores.new_zeros(*scores.shape[:3], 1)
        weights = weights.masked_fill(~pairs.heard, 0)
    return (weights if pairs.keep is None else weights * pairs.keep) @ v, lse


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    layout: TilesLayout,
    modifiers: Modifiers,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """What these tiles add to (dq, dk, dv, dbias), from the final out and lse of each query; dlse may be None.

    With Δ = Σ dout · out - dlse and p = exp(s - lse): dv = pᵀ dout, ds = p ∘ (dout vᵀ - Δ), dq = scale · ds k,
    dk = scale · dsᵀ q, dbias = ds. See `_explicit_backward` for other modifiers.
    """
    (batch, heads, n, dim), m, value_dim, group = q.shape, k.shape[2], v.shape[3], q.shape[1] // k.shape[1]
    bias = modifiers.bias
    lse = lse.masked_fill(lse == -torch.inf, torch.inf)  # without edges, p = exp(-inf)
    width, layout = max(dim, value_dim) + (dlse is not None), layout.on(torch.device("cpu"))
    q, out, dout = _tiled(q, layout, 0, width), _tiled(out, layout, 0, width), _tiled(dout, layout, 0, width)
    lse = _tiled(lse[..., None], layout, 0)
    k, v = _tiled(k, layout, 1, width), _tiled(v, layout, 1, width)
    if dlse is not None:  # in one more dimension, where v is 0: there, dout · out is -dlse
        out[..., -1] = 1
        dout[..., -1:] = -_tiled(dlse[..., None], layout, 0)
    dq, dk, dv = _like(q, torch.zeros_like), _like(k, torch.zeros_like), _like(v, torch.zeros_like)
    dvalues, cache = None if bias is None or not bias_grad else _zeros_like(bias), _MaskCache()
    for strip in _pieces(layout, heads * max(width, layout.tile[0]), CALL_NUMBERS):
        score_bias = _StripBias(layout, strip, modifiers, q, n, cache)
        for b, g in product(range(batch), range(group)):
            q_heads = slice(g, None, group)  # the g-th query head of each key head
            sides = (
                _gather(q[b, q_heads], strip.rows),
                _gather(k[b], strip.keys),
                _gather(v[b], strip.keys),
                _gather(out[b, q_heads], strip.rows),
                _gather(lse[b, q_heads], strip.rows),
                _gather(dout[b, q_heads], strip.rows),
            )
            if _has_flash(modifiers):
                added = score_bias.of(b, range(g, heads, group))
                parts = _attention_backward(*sides, added, modifiers.scale, needs_ds=dvalues is not None)
            else:
                parts = _explicit_backward(*sides, score_bias.pairs(b, range(g, heads, group)), modifiers)
            dq_part, dk_part, dv_part, ds = parts
            _add(dq[b, q_heads], strip.rows, dq_part)
            _add(dk[b], strip.keys, dk_part)
            _add(dv[b], strip.keys, dv_part)
            if dvalues is not None and ds is not None:
                for place, h in enumerate(range(g, heads, group)):
                    score_bias.add_gradient(dvalues, b, h, ds[:, place])
    dq, dk, dv = dq.flatten(2, 3), dk.flatten(2, 3), dv.flatten(2, 3)
    dbias = None if dvalues is None or bias is None else dvalues.view_as(bias.values)
    return dq[:, :, :n, :dim], dk[:, :, :m, :dim], dv[:, :, :m, :value_dim], dbias


def _attention_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    score_bias: Tensor,
    scale: float,
    *,
    needs_ds: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """All pairs, as `_attention`, with lse (rows, H, queries, 1) → dq, dk, dv, and ds (rows, H, queries, keys)."""
    if q.device.type == "cpu" and not needs_ds:
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        dq, dk, dv = flash(dout, q, k, v, out, lse[..., 0], 0.0, False, attn_mask=score_bias, scale=scale)
        return dq, dk, dv, None
    delta = (dout * out).sum(3, keepdim=True)
    p = (q @ k.mT * scale + score_bias - lse).exp()
    ds = p * (dout @ v.mT - delta)
    return ds @ k * scale, ds.mT @ q * scale, p.mT @ dout, ds


def _explicit_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    pairs: _Pairs,
    modifiers: Modifiers,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """All pairs under any modifiers, as `_attention_backward`.

    With w the weights and dw = (dout vᵀ) ∘ keep: dv = (w ∘ keep)ᵀ dout, and the gradients of the scores are
    w ∘ (dw - Δ) for softmax, else normalize'(s) ∘ dw; ds is what the slopes of the transform make of them.
    """
    raw = _raw_scores(q, k, pairs, modifiers.scale)
    scores, dweights = transformed(raw, modifiers.transform), dout @ v.mT
    if pairs.keep is not None:
        dweights = dweights * pairs.keep
    if modifiers.normalize == "softmax":
        weights = (_masked(scores, pairs) - lse).exp()
        ds = weights * (dweights - (dout * out).sum(3, keepdim=True))
    else:
        weights, slopes = weights_and_slopes(scores, modifiers.normalize)
        weights, ds = weights.masked_fill(~pairs.heard, 0), slopes * dweights
    if modifiers.transform is not None:
        ds = ds * transform_slope(raw, modifiers.transform)
    ds = ds.masked_fill(~pairs.heard, 0)
    used = weights if pairs.keep is None else weights * pairs.keep
    return ds @ k * modifiers.scale, ds.mT @ q * modifiers.scale, used.mT @ dout, ds


# -------------------------------------------------------------------------------------------- strips and tiles


def _pieces(layout: TilesLayout, numbers_per_key: int, call_numbers: int) -> Iterator[Strip]:
    """Each strip, so many rows at a time that rows · keys · numbers_per_key is about `call_numbers`."""
    for strip in layout.strips:
        num_rows = strip.rows.num_rows
        most = max(1, call_numbers // (numbers_per_key * strip.keys.width * layout.tile[1]))
        step = -(-num_rows // -(-num_rows // most))  # pieces of equal length
        for start in range(0, num_rows, step):
            yield strip.cut(start, min(start + step, num_rows))


def _tiled(x: Tensor, layout: TilesLayout, axis: int, width: int = 0) -> Tensor:
    """x (B, H, nodes, D) as tiles (B, H, tiles, nodes of a tile, D), filled up with zeros, D to `width`.

    The nodes are queries (axis 0 of the adjacency matrix) or keys (axis 1).
    """
    tiles, size = layout.grid[axis], layout.tile[axis]
    missing_nodes, missing_dims = tiles * size - x.shape[2], max(width - x.shape[3], 0)
    if missing_nodes or missing_dims:
        x = pad(x, (0, missing_dims, 0, missing_nodes))
    elif x.stride(3) != 1:
        x = x.contiguous()
    return x.unflatten(2, (tiles, size))


def _like(x: Tensor, allocate: Callable[..., Tensor]) -> Tensor:
    """A tensor like x (B, H, tiles, size, D), in memory with the nodes before the heads."""
    whole = allocate(x.permute(0, 2, 3, 1, 4), memory_format=torch.contiguous_format)
    return whole.permute(0, 3, 1, 2, 4)


def _view(x: Tensor, span: Span) -> Tensor:
    """The tiles of a span that is a progression, without a copy: x (H, tiles, size, D) → (rows, H, width · size, D)."""
    heads, _, size, dim = x.shape
    head_stride, tile_stride, node_stride, _ = x.stride()
    shape = span.num_rows, heads, span.width * size, dim
    strides = span.step * tile_stride, head_stride, node_stride, 1
    return x.as_strided(shape, strides, x.storage_offset() + span.first * tile_stride)


def _gather(x: Tensor, span: Span) -> Tensor:
    """The tiles of a span, as `_view`; copied where they are no progression."""
    if span.ids is None:
        return _view(x, span)
    found = x.index_select(1, span.ids.flatten().to(x.device))
    return found.reshape(x.shape[0], span.num_rows, -1, x.shape[3]).transpose(0, 1)


def _store(out: Tensor, lse: Tensor, strip: Strip, part_out: Tensor, part_lse: Tensor, *, by_lse: bool) -> None:
    """A strip's result to its rows, merged with earlier parts of them by their lse, or added to them.

    out (H, tiles, size, D), lse (…, 1).
    """
    if strip.part and not by_lse:
        part_out = _gather(out, strip.rows) + part_out
    elif strip.part:
        earlier_out, earlier_lse = _gather(out, strip.rows).clone(), _gather(lse, strip.rows).clone()
        merge(earlier_out, earlier_lse[..., 0], part_out, part_lse[..., 0])
        part_out, part_lse = earlier_out, earlier_lse
    for whole, part in ((out, part_out), (lse, part_lse)):
        if strip.rows.ids is None:
            _view(whole, strip.rows).copy_(part)
        else:
            whole.index_copy_(1, strip.rows.ids.flatten().to(whole.device), part.transpose(0, 1))


def _add(target: Tensor, span: Span, part: Tensor) -> None:
    """Add (rows, H, width · size, D) to the tiles of a span, in a fixed order, as they may overlap."""
    part = part.unflatten(2, (span.width, -1))  # (rows, H, width, size, D)
    if span.ids is not None:
        tiles = part.transpose(1, 2).flatten(0, 1).transpose(0, 1)  # (H, rows · width, size, D)
        target.index_add_(1, span.ids.flatten().to(target.device), tiles)
    elif span.step == 0:
        _view(target, span._replace(num_rows=1)).unflatten(2, (span.width, -1)).add_(part.sum(0, keepdim=True))
    else:
        for place in range(span.width):
            _view(target, span._replace(width=1, first=span.first + place)).add_(part[:, :, place])


# ---------------------------------------------------------------------------------------------- masks and biases


class _MaskCache:
    """The mask bias of the latest piece, which all pieces of a strip whose rows share masks have in common."""

    mask: Tensor | None = None  # of the strip
    mask_bias: Tensor


class _StripBias:
    """What is added to the scores of a strip's piece: its mask, and the bias and the padding of some heads."""

    def __init__(self, layout: TilesLayout, strip: Strip, modifiers: Modifiers, q: Tensor, n: int, cache: _MaskCache):
        self.layout, self.strip, self.q, self.n, self.cache = layout, strip, q, n, cache
        self.bias, self.attention_mask, self.dropout = modifiers.bias, modifiers.attention_mask, modifiers.dropout
        self.latest_places: tuple[tuple[int, int], ...] = ()
        self.latest: Tensor | None = None

    def of(self, b: int, heads: range) -> Tensor:
        """(rows | 1, heads | 1, tile rows, columns)."""
        added = self.mask_bias if self.bias is None else self._with_bias(_with_batch(self.bias), b, heads)
        return added if self.attention_mask is None else added.masked_fill(~self._real(b), MASKED_SCORE)

    def pairs(self, b: int, heads: range) -> _Pairs:
        """The same apart, and what dropout keeps."""
        heard, bias, keep = self.mask[:, None], None, None
        if self.attention_mask is not None:
            heard = heard & self._real(b)
        if self.bias is not None:
            values = _with_batch(self.bias)
            places = dict.fromkeys(self._place(values, b, h) for h in heads)
            bias = torch.stack([values[x][self.index] for x in places], 1)
        if self.dropout is not None:
            keep = self._kept(self.dropout, b, heads).to(self.q.dtype) * keep_factor(self.dropout.p)
        return _Pairs(heard, bias, keep)

    def _real(self, b: int) -> Tensor:
        """Which keys are no padding: bool (rows, 1, 1, columns)."""
        assert self.attention_mask is not None
        real = _padded(self.attention_mask[b], self.layout)[self.strip.keys.tiles.to(self.attention_mask.device)]
        return real.flatten(1)[:, None, None]

    def _kept(self, dropout: Dropout, b: int, heads: range) -> Tensor:
        """Which weights dropout keeps, as `kernels.dropout.kept`: bool (rows, heads, tile rows, columns).

        A tile has some 64 keys, one after the other: sixteen counters make their four words each.
        """
        (tile_m, tile_n), device = self.layout.tile, self.q.device
        query = self.strip.rows.tiles[:, :, None] * tile_m + torch.arange(tile_m)[:, None]
        counter = (self.strip.keys.tiles[..., None] * (tile_n // 4) + torch.arange(tile_n // 4)).flatten(1)
        head = torch.tensor(heads, device=device)[:, None, None]
        head = head if dropout.heads is None else dropout.heads[head]
        if dropout.nodes is not None:
            key = (self.strip.keys.tiles[..., None] * tile_n + torch.arange(tile_n)).flatten(1)
            sides = zip((query, key), dropout.nodes, strict=True)
            query, key = (node.clamp(max=len(numbers) - 1).to(device) for node, numbers in sides)
            return kept(dropout, head.new_full((), b), head, query[:, None], key[:, None, None])
        counters = counter[:, None, None].to(device), query[:, None].to(device), head.new_full((), b), head
        words = torch.stack([word.unflatten(3, (-1, 16)) for word in philox(dropout.seed, counters)], 4)
        return words.flatten(3) >= threshold(dropout.p)

    def _with_bias(self, values: Tensor, b: int, heads: range) -> Tensor:
        """The values of the bias where there are edges; the least is MASKED_SCORE, as a bias of -inf masks too."""
        places = tuple(dict.fromkeys(self._place(values, b, h) for h in heads))
        if self.latest is None or self.latest_places != places:
            terms = [torch.where(self.mask, values[x][self.index], MASKED_SCORE) for x in places]
            self.latest_places, self.latest = places, torch.stack(terms, 1).clamp_(min=MASKED_SCORE)
        return self.latest

    def add_gradient(self, dvalues: Tensor, b: int, h: int, ds: Tensor) -> None:
        """Add the gradient of the scores, ds (rows, tile rows, columns), to the values that they came from."""
        mask = self.mask.expand_as(ds)
        if all(len(index) == 1 for index in self.index):  # all rows have the same values
            ds, mask = torch.where(mask, ds, 0).sum(0, keepdim=True), mask.any(0, keepdim=True)
        index = tuple(part.expand_as(ds)[mask] for part in self.index)
        dvalues[self._place(dvalues, b, h)].index_put_(index, ds[mask].to(dvalues.dtype), accumulate=True)

    @staticmethod
    def _place(values: Tensor, b: int, h: int) -> tuple[int, int]:
        """Of values for one or each of a batch and of its heads, those of this head."""
        return (b if values.shape[0] > 1 else 0, h if values.shape[1] > 1 else 0)

    @cached_property
    def tile_masks(self) -> Tensor:
        """The masks of the tiles: bool (rows | 1, width, tile rows, tile columns)."""
        return self.layout.masks[self.strip.mask.view(-1, self.strip.keys.width)]

    @cached_property
    def mask(self) -> Tensor:
        """Which pairs are edges: bool (rows | 1, tile rows, columns)."""
        return self.tile_masks.transpose(1, 2).flatten(2).to(self.q.device)

    @cached_property
    def mask_bias(self) -> Tensor:
        """0 for an edge, else MASKED_SCORE: (rows | 1, 1, tile rows, columns)."""
        if self.strip.mask.ndim == 1 and self.cache.mask is self.strip.mask:
            return self.cache.mask_bias
        mask_bias = torch.zeros_like(self.mask, dtype=self.q.dtype).masked_fill_(~self.mask, MASKED_SCORE)[:, None]
        self.cache.mask, self.cache.mask_bias = self.strip.mask, mask_bias
        return mask_bias

    @cached_property
    def index(self) -> tuple[Tensor, ...]:
        """Where the values of each pair stand: indices, each (rows | 1, tile rows | 1, columns | 1)."""
        assert self.bias is not None
        (tile_m, tile_n), rows, columns = self.layout.tile, self.strip.rows.tiles, self.strip.keys.tiles
        shape = self.bias.values.shape
        query = rows[:, :, None] * tile_m + torch.arange(tile_m)[:, None]
        key = (columns[:, :, None] * tile_n + torch.arange(tile_n)).flatten(1)[:, None]
        if self.bias.kind == "dense":
            index = query.clamp(max=shape[2] - 1), key.clamp(max=shape[3] - 1)
        elif self.bias.kind == "offset":
            offset = (key - query + self.n - 1).clamp(0, shape[1] - 1)
            ahead = columns - rows
            index = (offset[:1] if bool((ahead == ahead[0]).all()) else offset,)
        else:
            edge = self.layout.first_edge[self.strip.tile][..., None] + self.tile_masks.cumsum(3) - 1
            index = (edge.transpose(1, 2).flatten(2).clamp(0, shape[2] - 1),)
        return tuple(part.to(self.q.device) for part in index)


def _padded(attention_mask: Tensor, layout: TilesLayout) -> Tensor:
    """The mask of the keys (M,) by tiles: (tiles, tile columns)."""
    tiles, size = layout.grid[1], layout.tile[1]
    return pad(attention_mask, (0, tiles * size - len(attention_mask))).view(tiles, size)


def _with_batch(bias: ScoreBias) -> Tensor:
    """The values of a bias with dimensions for batch and heads."""
    return bias.values[None] if bias.kind == "offset" else bias.values


def _zeros_like(bias: ScoreBias) -> Tensor:
    """Where the gradient of a bias is summed up; in float64 where many edges share one value."""
    values = _with_batch(bias)
    summed = bias.kind == "offset" or (bias.kind == "dense" and values.shape[2] == 1)
    return torch.zeros_like(values, dtype=torch.float64 if summed else values.dtype)

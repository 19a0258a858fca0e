"""Flash attention over tiles on a CPU, in machine code by Numba: products, softmax and gradients in one pass.

A tile's scores never leave the cache. No two threads add to one number, and every sum has a fixed order: any number of
threads gives the same bits. All pairs of a tile are multiplied: a NaN or an infinity in a key or a value may reach
queries of its tiles without an edge to it.

The names are those of flash attention (Dao 2024, algorithms 1 and 2). Scores are exponents of 2, as exp2 is cheaper.

Here are tensors made arrays, and work cut into jobs; the kernels are in `tiles_forward` and `tiles_backward`.
"""

# pyright: reportCallIssue=false, reportArgumentType=false
# (Numba's decorators and intrinsics have no types that a checker understands)

from __future__ import annotations

from collections.abc import Hashable
from functools import lru_cache, partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from attngraph.kernels.contract import Grid, Modifiers, ScoreBias, TilesLayout
from attngraph.kernels.cpu.half import BITS
from attngraph.kernels.cpu.simd import LANES, LOG2_E, TILE
from attngraph.kernels.cpu.tiles_backward import BackwardTensors, backward_dkdv, backward_dq, start_backward
from attngraph.kernels.cpu.tiles_forward import ForwardTensors, forward_rows
from attngraph.kernels.cpu.tiles_scores import (
    BIAS_KINDS,
    NO_BIAS,
    NO_TRANSFORM,
    NORMALIZERS,
    TRANSFORMS,
    Bias,
    BiasGradient,
    Dropout,
    Scoring,
)
from attngraph.kernels.cpu.tiles_steps import ALL_BITS, Tiles
from attngraph.kernels.dropout import LOW, ROUNDS, WEYL_A, WEYL_B, keep_factor, threshold
from attngraph.kernels.memory import DTYPES, zeros

Side = Literal["by_query", "by_key"]  # the rows of tiles, or the columns
MAX_JOB_TILES = 128  # tiles of one head that a job has at most: about a millisecond of work
SMALL = 1 << 17  # numbers that one thread sums up before another one wakes
# What most calls do without, made once.
NO_NUMBERS = {dtype: np.empty(0, number) for dtype, number in DTYPES.items()}
NO_BIAS_GRADIENT = {dtype: BiasGradient(none, np.empty(0), (0, 0)) for dtype, none in NO_NUMBERS.items()}
NO_DROPOUT = {
    dtype: Dropout(False, np.uint64(0), number(1), np.zeros(2 * ROUNDS, np.uint64), np.empty(0, np.int64))
    for dtype, number in DTYPES.items()
}


# ------------------------------------------------------------------------------------------------- forward


def forward(q: Tensor, k: Tensor, v: Tensor, layout: TilesLayout, modifiers: Modifiers) -> tuple[Tensor, Tensor]:
    """q (B, H, N, D), k and v (B, Hkv, M, ·) → out (B, H, N, Dv), and lse (B, H, N) in float32, or float64 as they.

    layout: tiles of 64 × 64. A query without edges has out 0 and lse -inf; lse is 0 unless softmax makes the weights.
    bfloat16 and float16 are widened tile by tile, and sums are in float32.
    """
    (B, H, N, D), (M, Dv) = q.shape, v.shape[2:]
    (nodes, key_nodes), dims, number = filled_grid(layout), (filled(D), filled(Dv)), number_of(q.dtype)
    out = np.empty((B * H, nodes * dims[1]), BITS.get(q.dtype, number))
    lse = np.empty((B, H, nodes), number)
    sides = flat_heads(q, nodes), flat_heads(k, key_nodes), flat_heads(v, key_nodes)
    tensors = ForwardTensors(*sides, out, lse.reshape(B * H, nodes), _real_keys(modifiers, layout, B), *dims)
    pieces, tiles = pieces_of(layout, "by_query", B * H), tiles_of(layout, "by_query", _reads_edges(modifiers))
    scoring = _scoring(modifiers, q, M)
    forward_rows(B * H * (len(pieces) - 1), pieces, tensors, tiles, scoring, kind=_kind(modifiers, q))
    return as_nodes(out, B, N, Dv, nodes, q.dtype), torch.from_numpy(lse if nodes == N else lse[:, :, :N])


# ------------------------------------------------------------------------------------------------- backward


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

    With Δ = Σ dout · out - dlse, p = exp(s - lse), and kept the factors of dropout: dv = (p ∘ kept)ᵀ dout,
    ds = p ∘ ((dout vᵀ) ∘ kept - Δ) times the slopes of the transform, dq = scale · ds k, dk = scale · dsᵀ q,
    dbias = ds. Other normalisers have ds = normalize'(s) ∘ (dout vᵀ) ∘ kept.
    """
    (B, _, N, D), (_, key_heads, M, Dv), (nodes, key_nodes) = q.shape, v.shape, filled_grid(layout)
    scoring, dbias = _scoring(modifiers, q, M), _DBias(modifiers.bias if bias_grad else None, q, M)
    kind = _kind(modifiers, q)
    tensors = backward_tensors(q, k, v, out, lse, dout, dlse, layout, _real_keys(modifiers, layout, B))
    if dbias.by_head or (in_one_pass(B * key_heads) and not dbias.by_column):
        pieces = np.array([0, layout.grid[1]])
    else:
        pieces = pieces_of(layout, "by_key", 1 if dbias.by_column else B * key_heads)
    if len(pieces) > 2:
        _dq(tensors, layout, modifiers, scoring, kind)
    _dkdv(tensors, layout, modifiers, scoring, pieces, dbias, kind)
    dq = as_nodes(tensors.dq, B, N, D, nodes, exact(q.dtype))  # sums over all columns of tiles, so never half
    dk, dv = (as_nodes(x, B, M, dim, key_nodes, q.dtype) for x, dim in ((tensors.dk, D), (tensors.dv, Dv)))
    return dq, dk, dv, dbias.total()


def backward_tensors(q, k, v, out, lse, dout, dlse, layout: Grid, real: np.ndarray) -> BackwardTensors:
    """What `backward` takes, (B, heads, nodes, ·), as kernels read it; dq is 0, dk and dv anything."""
    (B, H, N, D), (_, key_heads, _, Dv) = q.shape, v.shape
    (nodes, key_nodes), dims, number = filled_grid(layout), (filled(D), filled(Dv)), number_of(q.dtype)
    of_queries, of_keys = partial(flat_heads, nodes=nodes), partial(flat_heads, nodes=key_nodes)
    dout_heads, exponent, delta = of_queries(dout), *(np.empty((B * H, nodes), number) for _ in range(2))
    of_rows = [np.empty((0, 0), number) if x is None else flat_heads(x[..., None], N, 1) for x in (lse, dlse)]
    start = start_backward if out.numel() > SMALL else start_backward.serially
    start(B * H, *of_rows, of_queries(out), dout_heads, exponent, delta, number(LOG2_E))
    return BackwardTensors(
        of_queries(q), of_keys(k), of_keys(v), dout_heads, exponent, delta,
        np.zeros((B * H, nodes * dims[0]), number),
        *(np.empty((B * key_heads, key_nodes * dim), BITS.get(q.dtype, number)) for dim in dims),
        real, *dims,
    )  # fmt: skip


class _DBias:
    """Where the gradient of a bias is summed up, and what jobs may so share: no two threads add to one number.

    An offset's values are those of all tiles of a head: each has a sum of its own, and one job (`by_head`). Those of an
    edge or a pair belong to one tile, and those of a key to one column of tiles; where heads share them, a job takes
    its columns of all heads (`by_column`).
    """

    def __init__(self, bias: ScoreBias | None, q: Tensor, M: int):
        self.bias, self.by_head, self.by_column, (B, H, N, _) = bias, False, False, q.shape
        if bias is None:
            self.arrays = NO_BIAS_GRADIENT[exact(q.dtype)]
            return
        shape = (B, H, N + M - 1 + 2 * TILE) if bias.kind == "offset" else bias.values.shape
        self.by_head, self.by_column = bias.kind == "offset", shape[:2] != (B, H)
        is_shared = self.by_head or (bias.kind == "dense" and shape[2] == 1)  # by many pairs
        self.sum = zeros(*shape, like=q.new_empty(0, dtype=torch.float64 if is_shared else exact(q.dtype)))
        flat, strides = self.sum.flatten().numpy(), _shared_strides(self.sum)[:2]
        ends = (NO_NUMBERS[exact(q.dtype)], flat) if is_shared else (flat, np.empty(0))
        self.arrays = BiasGradient(*ends, strides)

    def total(self) -> Tensor | None:
        """The gradient of the values."""
        if self.bias is None:
            return None
        total, shape, dtype = self.sum, self.bias.values.shape, self.bias.values.dtype
        if self.by_head:
            total = total[..., TILE:-TILE].sum((0, 1) if len(self.bias.values) == 1 else 0).view(shape)
        return total.to(dtype)


def in_one_pass(key_heads: int) -> bool:
    """Whether a job takes all keys of a key head, and may so add to its dq: 5 products, not 7, but fewer jobs.

    The bits are the same.
    """
    threads = torch.get_num_threads()
    rounds = -(-key_heads // threads)
    return threads == 1 or (key_heads >= 2 * threads and 5 * rounds * threads <= 7 * key_heads)


def _dq(tensors: BackwardTensors, layout: TilesLayout, modifiers: Modifiers, scoring: Scoring, kind: Hashable) -> None:
    """Fill dq."""
    heads = len(tensors.q)
    pieces, tiles = pieces_of(layout, "by_query", heads), tiles_of(layout, "by_query", _reads_edges(modifiers))
    backward_dq(heads * (len(pieces) - 1), pieces, tensors, tiles, scoring, kind=kind)


def _dkdv(
    tensors: BackwardTensors,
    layout: TilesLayout,
    modifiers: Modifiers,
    scoring: Scoring,
    pieces: np.ndarray,
    dbias: _DBias,
    kind: Hashable,
) -> None:
    """Fill dk and dv, and add to dbias; fill dq, if there is but one piece of each key head."""
    heads = len(tensors.k)
    group, per_job = len(tensors.q) // max(heads, 1), heads if dbias.by_column else 1
    dq = tensors.dq if len(pieces) == 2 else tensors.dq[:, :0]
    of_queries = {"q": tensors.q, "dout": tensors.dout, "lse": tensors.lse, "delta": tensors.delta, "dq": dq}
    tensors = tensors._replace(**{name: regrouped(x, heads) for name, x in of_queries.items()})
    tiles = tiles_of(layout, "by_key", _reads_edges(modifiers))
    num_jobs = heads // max(per_job, 1) * (len(pieces) - 1)
    backward_dkdv(num_jobs, pieces, per_job, group, tensors, tiles, scoring, dbias.arrays, kind=kind)


# ------------------------------------------------------------------------------------------- tensors to arrays


def filled(dim: int, multiple: int = LANES) -> int:
    """The next multiple."""
    return -(-dim // multiple) * multiple


def filled_grid(layout: Grid) -> tuple[int, int]:
    """How many nodes the rows of tiles have, and the columns."""
    rows, columns = layout.grid
    return rows * TILE, columns * TILE


def flat_heads(x: Tensor, nodes: int, multiple: int = LANES) -> np.ndarray:
    """x (B, H, n, D) as (B · H, nodes · D'), filled up with zeros to so many nodes, and D to a multiple D'."""
    (B, H, n, D), dim = x.shape, filled(x.shape[3], multiple)
    x = x.detach() if x.requires_grad else x
    x = pad(x, (0, dim - D, 0, nodes - n)) if (n, D) != (nodes, dim) else x.contiguous()
    array = x.view(torch.int16).numpy().view(BITS[x.dtype]) if x.dtype in BITS else x.numpy()
    return array.reshape(B * H, nodes * dim)


def regrouped(x: np.ndarray, heads: int) -> np.ndarray:
    """(·, flat) → (heads, flat), each several of x's, or a part of one."""
    return x.reshape(heads, x.size // max(heads, 1))


def as_nodes(x: np.ndarray, B: int, n: int, D: int, nodes: int, dtype: torch.dtype) -> Tensor:
    """The way back: (B · H, nodes · D') → (B, H, n, D)."""
    x = x.reshape(B, len(x) // max(B, 1), nodes, filled(D))
    whole = torch.from_numpy(x.view(np.int16)).view(dtype) if dtype in BITS else torch.from_numpy(x)
    return whole if (nodes, filled(D)) == (n, D) else whole[:, :, :n, :D]


def exact(dtype: torch.dtype) -> torch.dtype:
    """In which sums are taken."""
    return torch.promote_types(dtype, torch.float32)


def number_of(dtype: torch.dtype) -> Any:
    """NumPy's numbers of this kind."""
    return DTYPES[exact(dtype)]


def log2_e(dtype: torch.dtype) -> float:
    """log2 e, rounded alike wherever scores of a dtype become exponents of 2, so that the rounding cancels."""
    return float(number_of(dtype)(LOG2_E))


def _kind(modifiers: Modifiers, q: Tensor) -> Hashable:
    """What decides the types of the arguments of kernels, where it is so little; None: Numba looks at them."""
    return q.dtype if modifiers.is_plain else None


def _scoring(modifiers: Modifiers, q: Tensor, m: int) -> Scoring:
    """What the kernels are told of the modifiers, but for the padding; `m` keys."""
    if modifiers.is_plain:
        return _plain_scoring(modifiers.scale, q.dtype, q.shape[2], m)
    return _any_scoring(modifiers, q, m)


def _any_scoring(modifiers: Modifiers, q: Tensor, m: int) -> Scoring:
    transform, scale, number = modifiers.transform, modifiers.scale, number_of(q.dtype)
    makes_scores = modifiers.bias is not None or transform is not None
    unit = log2_e(q.dtype) if modifiers.normalize == "softmax" else 1.0
    bias_unit = unit if transform is None else 1.0  # scores are made as exponents at once: rounded once less
    factor = unit / bias_unit if makes_scores else scale * unit
    return Scoring(
        not makes_scores and modifiers.normalize == "softmax" and modifiers.dropout is None,
        number(scale),
        number(scale * bias_unit),
        number(factor),
        NO_TRANSFORM if transform is None else TRANSFORMS[transform.kind],
        number(1 if transform is None else transform.value),
        NORMALIZERS[modifiers.normalize],
        _bias(modifiers.bias, q, m, bias_unit),
        _dropout(modifiers, q),
    )


@lru_cache(maxsize=64)
def _plain_scoring(scale: float, dtype: torch.dtype, n: int, m: int) -> Scoring:
    """The same of a scale alone."""
    return _any_scoring(Modifiers(scale), torch.empty(1, 1, n, 0, dtype=dtype), m)


def _bias(bias: ScoreBias | None, q: Tensor, m: int, unit: float) -> Bias:
    """The values of a bias, times a unit."""
    none, n = NO_NUMBERS[exact(q.dtype)], q.shape[2]
    if bias is None:
        return Bias(NO_BIAS, none, none, (0, 0, 0), n, m)
    values = bias.values.detach().to(exact(q.dtype))
    if bias.kind == "offset":
        values = pad(values * unit, (TILE, TILE))
        ends = values.flatten().numpy(), values.flip(1).flatten().numpy()
        return Bias(BIAS_KINDS[bias.kind], *ends, (0, *_shared_strides(values)[:1], 0), n, m)
    values = _collapsed(values).contiguous()
    values = values if unit == 1 else values * unit
    strides = (*_shared_strides(values)[:2], _shared_strides(values)[2] if bias.kind == "dense" else 0)
    return Bias(BIAS_KINDS[bias.kind], values.flatten().numpy(), none, strides, n, m)


def _collapsed(x: Tensor) -> Tensor:
    """The same numbers with size 1 in the dimensions that were expanded, but for the last."""
    return x[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in x.stride()[:-1])]


def _shared_strides(x: Tensor) -> tuple[int, ...]:
    """The strides of a tensor, 0 over a dimension of one number."""
    return tuple(stride if size > 1 else 0 for size, stride in zip(x.shape, x.stride(), strict=True))


def _dropout(modifiers: Modifiers, q: Tensor) -> Dropout:
    dropout, number = modifiers.dropout, number_of(q.dtype)
    if dropout is None:
        return NO_DROPOUT[exact(q.dtype)]
    seed = int(dropout.seed)
    keys = [((seed >> shift) + r * weyl) & LOW for r in range(ROUNDS) for shift, weyl in ((0, WEYL_A), (32, WEYL_B))]
    numbers = torch.arange(q.shape[1]) if dropout.heads is None else dropout.heads
    limit, factor = np.uint64(threshold(dropout.p)), number(keep_factor(dropout.p))
    return Dropout(True, limit, factor, np.array(keys, np.uint64), numbers.numpy())


def _reads_edges(modifiers: Modifiers) -> bool:
    return modifiers.bias is not None and modifiers.bias.kind == "edge"


def _real_keys(modifiers: Modifiers, layout: TilesLayout, batch: int) -> np.ndarray:
    """A bit for each key that is no padding: uint64 (B, tiles of keys)."""
    tiles, mask, key = layout.grid[1], modifiers.attention_mask, ("real", batch)
    if mask is not None:
        return real_keys(mask, tiles)
    if key not in layout.kept:
        layout.kept[key] = np.full((batch, tiles), ALL_BITS)
    return layout.kept[key]


def real_keys(mask: Tensor, tiles: int) -> np.ndarray:
    """bool (B, M) as a bit for each key, 0 beyond: uint64 (B, tiles of keys)."""
    bits = np.packbits(pad(mask, (0, tiles * TILE - mask.shape[1])).numpy(), axis=1, bitorder="little")
    return bits.view(np.dtype(np.uint64).newbyteorder("<")).astype(np.uint64)


def tiles_of(layout: TilesLayout, side: Side, of_edges: bool) -> Tiles:
    """The tiles of rows, or of columns, as the kernels read them; with the numbers of their edges or without."""
    key = "tiles", side, of_edges
    if key not in layout.kept:
        rows, words = getattr(layout, side), layout.table.words.contiguous().numpy().view(np.uint64).reshape(-1, TILE)
        first_edge = layout.first_edge.numpy() if of_edges else np.empty((0, TILE), np.int64)
        arrays = (x.numpy() for x in (rows.start, rows.full, rows.column, rows.mask))
        layout.kept[key] = Tiles(*arrays, words, rows.tile.numpy(), first_edge)
    return layout.kept[key]


def pieces_of(layout: TilesLayout, side: Side, heads: int) -> np.ndarray:
    """All rows of tiles, or columns, in pieces, as where each begins, and the end: int64 (pieces + 1,).

    They are cut where they have about as many tiles; at least 8 pieces a thread, if so.
    """
    key = "pieces", side, heads, torch.get_num_threads()
    if key not in layout.kept:
        start = getattr(layout, side).start.numpy()
        tiles, end = int(start[-1]), len(start) - 1
        job_tiles = min(MAX_JOB_TILES, max(4, tiles * heads // (8 * torch.get_num_threads())))
        cuts = np.searchsorted(start, np.arange(0, tiles, job_tiles))
        layout.kept[key] = np.array(sorted({0, end, *cuts.tolist()}))
    return layout.kept[key]

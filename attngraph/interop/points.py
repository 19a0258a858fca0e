"""Graphs of points: who is nearest, and who is near. Exact, and never a number for each pair of points in memory.

What may be near is found by products of matrices or by a tree; what of it is, by the distances themselves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from attngraph.arguments import checked
from attngraph.graph.base import require_ints
from attngraph.graph.edge_list import EdgeList, of_neighbors, of_sorted
from attngraph.planning.backends.base import INSTALLED

BLOCK = 1 << 20  # numbers that are held at once, 8 MiB
TREE_POINTS = 64  # · 2^D: from so many points on, a tree is faster on a CPU than products
LARGEST = 1e150
ROUNDING = 1e-12  # relative, of a distance that a tree has found


@checked
def knn_graph(x: Tensor, k: int, *, loop: bool = False, queries: Tensor | None = None) -> EdgeList:
    """Each point hears the k nearest others, by Euclidean distance; all of them where there are fewer.

    As `knn_graph` of PyG: a query is the centre, a key its neighbour. Of equally distant ones, those with the smaller
    numbers are taken. For the cosine, give points of length 1: `torch.nn.functional.normalize(x, dim=-1)`; for sets of
    several sizes, which PyG's `batch` tells apart, `Disjoint([knn_graph(each, k) for each in x.split(sizes)])`.

    Args:
        x: (N, D); or (B, N, D): each entry of a batch then has a graph of its own, as of `from_neighbors`.
        k: how many.
        loop: whether a point is one of its own neighbours, the nearest.
        queries: the points that hear those of x, (M, D) or (B, M, D), as in `knn` of torch_cluster; by default x.

    >>> knn_graph(torch.tensor([[0.0], [1.0], [5.0]]), 1).edge_index()
    tensor([[1, 0, 1],
            [0, 1, 2]])

    Distances are those of the numbers of x in float64, far from the origin too. It takes time in proportion to N²; on a
    CPU with SciPy, and in few dimensions, N log N. No gradient flows through the choice.

    Raises ValueError for points that are not finite, and for shapes that do not fit.
    """
    require_ints(1, k=k)
    return _of_nearest(x, _points(x, queries, loop), k)


@checked
def radius_graph(
    x: Tensor,
    r: float,
    *,
    loop: bool = False,
    max_num_neighbors: int | None = None,
    queries: Tensor | None = None,
) -> EdgeList:
    """Each point hears all others at a Euclidean distance of at most r.

    Args:
        x: (N, D) or (B, N, D), and how it is read, as in `knn_graph`.
        r: the radius.
        loop: whether a point hears itself.
        max_num_neighbors: the nearest only, so many; by default all.
        queries: the points that hear those of x, by default x.

    >>> radius_graph(torch.tensor([[0.0], [1.0], [5.0]]), 1.5).edge_index()
    tensor([[1, 0],
            [0, 1]])

    Raises ValueError for points that are not finite, a radius that is none, and for shapes that do not fit.
    """
    r = float(r)
    if not r >= 0:
        raise ValueError(f"r must be a distance, at least 0 (got {r})")
    points = _points(x, queries, loop)
    if max_num_neighbors is not None:
        require_ints(1, max_num_neighbors=max_num_neighbors)
        return _of_nearest(x, points, max_num_neighbors, r)
    entry, query, key = torch.cat(list(_within(points, r)), 1)
    (entries, m, _), n = points.keys.shape, points.queries.shape[1]
    code = ((entry * n + query) * entries + entry) * m + key
    graph = of_sorted(code.sort().values, (entries * n, entries * m), entries if x.ndim == 3 else None)
    return graph.without_plans()


def _of_nearest(x: Tensor, points: Points, k: int, r: float = math.inf) -> EdgeList:
    index = _nearest(points, k, r)
    return of_neighbors(index if x.ndim == 3 else index[0], points.keys.shape[1])


class Points(NamedTuple):
    """Those that hear and those that are heard, of each entry of a batch, in float64."""

    queries: Tensor
    """(B, N, D)."""
    keys: Tensor
    """(B, M, D)."""
    others: bool
    """They are the same points, none of which hears itself."""

    def distances(self, entry: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """Of query[p] to each of key[p, :], of which they are: (P,), (P,), (P, c) → (P, c); infinite to itself."""
        at, to = self.queries[entry, query], self.keys[entry[:, None], key]
        found = torch.cdist(at[:, None], to, compute_mode="donot_use_mm_for_euclid_dist")[:, 0]  # by x - y
        return found.masked_fill_(key == query[:, None], math.inf) if self.others else found

    def slices(self, width: int) -> Iterator[slice]:
        """The queries, so many at a time that `width` numbers of each can be held."""
        step = max(1, BLOCK // max(1, len(self.keys) * width))
        for start in range(0, self.queries.shape[1], step):
            yield slice(start, min(start + step, self.queries.shape[1]))


def _points(x: Tensor, queries: Tensor | None, loop: bool) -> Points:
    """What was given, looked at."""
    given = {"x": x} if queries is None else {"x": x, "queries": queries}
    for name, each in given.items():
        if each.is_complex() or each.dtype == torch.bool:
            raise TypeError(f"{name} must hold real numbers (got {each.dtype})")
        if each.ndim not in (2, 3) or (each.ndim == 3 and not len(each)):
            raise ValueError(f"{name} must have shape (N, D), or (B, N, D) with B > 0 (got {tuple(each.shape)})")
        if not bool(each.isfinite().all()):
            raise ValueError(f"{name} must be finite (got NaN or infinity)")
        if each.numel() and float(each.detach().abs().amax()) > LARGEST:
            raise ValueError(f"{name} must be at most {LARGEST:g} in size, as distances are squared (scale the points)")
    if queries is not None and (queries.shape[:-2], queries.shape[-1]) != (x.shape[:-2], x.shape[-1]):
        shapes = f"{tuple(queries.shape)} and {tuple(x.shape)}"
        raise ValueError(f"queries must have the batch and the dimensions of x (got {shapes})")
    if queries is not None and queries.device != x.device:
        raise ValueError(f"queries must be on the device of x, {x.device} (got {queries.device})")
    if queries is not None and loop:
        raise ValueError("loop=True says that points hear themselves, but queries are other points")
    batches = [(each if x.ndim == 3 else each[None]).detach().to(torch.float64) for each in given.values()]
    return Points(batches[-1], batches[0], others=queries is None and not loop)


def _smallest(values: Tensor, k: int) -> Tensor:
    """The places of the k smallest numbers of each row, ascending; of equal numbers the first: (P, c) → (P, k)."""
    kth = values.topk(k, largest=False).values[:, -1:]
    below, equal = values < kth, values == kth
    taken = below | (equal & (equal.cumsum(1) <= k - below.sum(1, keepdim=True)))
    return taken.nonzero()[:, 1].view(-1, k)


# -------------------------------------------------------------------------------------------------------- the nearest


class Candidates(NamedTuple):
    """Of P queries, c keys that may be nearest, by rounded squares of distances."""

    keys: Tensor
    """(P, c)."""
    squares: Tensor
    """(P, c), ascending."""
    error: Tensor
    """By how much they may be wrong: (P,)."""
    least: Tensor
    """What the squares of all other keys are at least: (P,)."""


def _nearest(points: Points, k: int, r: float) -> Tensor:
    """The k nearest keys of each query within r, -1 for none: (B, N, ≤ k)."""
    (entries, m, dim), n = points.keys.shape, points.queries.shape[1]
    k = min(k, m - points.others)
    if k <= 0 or not n:
        return points.keys.new_empty(entries, n, 0, dtype=torch.int64)
    count = min(2 * k + 8, m)
    by_tree = _tree_is_faster(points)
    find = (_candidates_by_tree if by_tree else _candidates_by_products)(points, count)
    found = []
    for rows in points.slices(count if by_tree else m):
        entry = torch.arange(entries, device=points.keys.device).repeat_interleave(rows.stop - rows.start)
        query = torch.arange(rows.start, rows.stop, device=points.keys.device).repeat(entries)
        candidates = find(rows)
        chosen, squares, error = candidates.keys[:, :k].clone(), candidates.squares, candidates.error
        if count > k:
            unsure = (~(squares[:, k - 1] + error < squares[:, k] - error)).nonzero()[:, 0]
            for some in unsure.split(max(1, BLOCK // max(1, count * dim))) if len(unsure) else ():
                index, least = candidates.keys[some], candidates.least[some]
                chosen[some] = _nearest_of(points, entry[some], query[some], index, least, k)
        if r < math.inf:
            chosen.masked_fill_(points.distances(entry, query, chosen) > r, -1)
        found.append(chosen.view(entries, -1, k))
    return torch.cat(found, 1)


def _nearest_of(points: Points, entry: Tensor, query: Tensor, index: Tensor, least: Tensor, k: int) -> Tensor:
    """By the distances themselves: (P, k) of candidates (P, c), or where these do not suffice, of all keys."""
    chosen, farthest = _chosen(points, entry, query, index.sort(1).values, k)
    unsure = (~(farthest.square() < least)).nonzero()[:, 0]
    (_, m, dim), every = points.keys.shape, torch.arange(points.keys.shape[1], device=index.device)
    for some in unsure.split(max(1, BLOCK // max(m, m * dim))):
        chosen[some], _ = _chosen(points, entry[some], query[some], every.expand(len(some), m), k)
    return chosen


def _chosen(points: Points, entry: Tensor, query: Tensor, index: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Of candidates (P, c), ascending, the k nearest (P, k), and how far the last of them is (P,)."""
    distance = points.distances(entry, query, index)
    places = _smallest(distance, k)
    return index.gather(1, places), distance.gather(1, places).amax(1)


def _candidates_by_products(points: Points, count: int) -> Callable[[slice], Candidates]:
    products, m = _Products(points), points.keys.shape[1]

    def candidates(rows: slice) -> Candidates:
        squares, error = products.squares(rows)
        if points.others:
            squares.diagonal(rows.start, 1, 2).fill_(math.inf)
        nearest, index = (each.flatten(0, 1) for each in squares.topk(count, largest=False))
        error = error.flatten()
        return Candidates(index, nearest, error, _least(nearest, error, count < m))

    return candidates


def _candidates_by_tree(points: Points, count: int) -> Callable[[slice], Candidates]:
    trees, m = _trees(points.keys), points.keys.shape[1]

    def candidates(rows: slice) -> Candidates:
        found = [
            tree.query(queries.numpy(), range(1, count + 1), workers=torch.get_num_threads())
            for tree, queries in zip(trees, points.queries[:, rows], strict=True)
        ]
        distance, index = (torch.cat([torch.from_numpy(each) for each in side]) for side in zip(*found, strict=True))
        squares = distance.square()
        error = 4 * ROUNDING * squares[:, -1]
        least = _least(squares, error, count < m)
        if points.others:
            itself = torch.arange(rows.start, rows.stop).repeat(len(trees))[:, None]
            squares, order = squares.masked_fill_(index == itself, math.inf).sort(dim=1, stable=True)
            index = index.gather(1, order)
        return Candidates(index, squares, error, least)

    return candidates


def _least(squares: Tensor, error: Tensor, are_there_others: bool) -> Tensor:
    """Of all that come after candidates."""
    return squares[:, -1] - error if are_there_others else torch.full_like(error, math.inf)


# -------------------------------------------------------------------------------------------------------------- a ball


def _within(points: Points, r: float) -> Iterator[Tensor]:
    """All pairs at most r apart, some at a time: entry, query and key, (3, E)."""
    yield points.keys.new_empty(3, 0, dtype=torch.int64)
    if not points.keys.shape[1]:
        return
    by_tree = _tree_is_faster(points) and math.isfinite(r)
    for pairs, is_close in (_close_by_tree if by_tree else _close_by_products)(points, r):
        entry, query, key = pairs
        is_pair = torch.ones_like(is_close) if not points.others else query != key
        for some in is_close.nonzero()[:, 0].split(max(1, BLOCK // max(1, points.keys.shape[2]))):
            is_pair[some] &= points.distances(entry[some], query[some], key[some, None])[:, 0] <= r
        yield pairs[:, is_pair]


def _close_by_products(points: Points, r: float) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs that may be within r, (3, E), and of which of them only the distance itself tells."""
    products = _Products(points)
    for rows in points.slices(points.keys.shape[1]):
        squares, error = products.squares(rows)
        pairs = (squares <= r * r + error).nonzero().T
        is_close = (squares >= r * r - error)[tuple(pairs)]
        pairs[1] += rows.start
        yield pairs, is_close


def _close_by_tree(points: Points, r: float) -> Iterator[tuple[Tensor, Tensor]]:
    """The same."""
    trees = _trees(points.keys)
    others = trees if points.queries is points.keys else _trees(points.queries)
    for entry, (tree, other) in enumerate(zip(trees, others, strict=True)):
        found = other.sparse_distance_matrix(tree, r * (1 + ROUNDING), output_type="ndarray")
        query, key = (torch.from_numpy(found[name].astype("int64")) for name in "ij")
        is_close = torch.from_numpy(found["v"] >= r * (1 - ROUNDING))
        yield torch.stack([torch.full_like(query, entry), query, key]), is_close


# ---------------------------------------------------------------------------------------------------------- what finds


class _Products:
    """Squared distances by |x|² - 2 x·y + |y|², of points around their middle."""

    def __init__(self, points: Points):
        middle = points.keys.mean(1, keepdim=True)
        self.queries, self.keys = points.queries - middle, points.keys - middle
        self.of_queries, self.of_keys = (each.square().sum(2) for each in (self.queries, self.keys))
        self.farthest = self.of_keys.amax(1)[:, None, None].sqrt()
        self.found = self.keys.new_empty(0)  # one for all blocks: others would lie between what is kept of each

    def squares(self, rows: slice) -> tuple[Tensor, Tensor]:
        """(B, rows, M), until the next call, and how much they may be wrong by, (B, rows, 1)."""
        own, of_keys = self.of_queries[:, rows, None], self.of_keys[:, None]
        torch.baddbmm(of_keys, self.queries[:, rows], self.keys.mT, alpha=-2, out=self.found.resize_(0)).add_(own)
        digits = 4 * (self.keys.shape[2] + 8) * torch.finfo(torch.float64).eps
        return self.found, digits * (own.sqrt() + self.farthest).square()


def _tree_is_faster(points: Points) -> bool:
    _, m, dim = points.keys.shape
    return points.keys.device.type == "cpu" and INSTALLED["scipy"] and 0 < dim < 32 and m >= TREE_POINTS << dim


def _trees(points: Tensor) -> list:
    """One for each entry (Bentley 1975)."""
    from scipy.spatial import KDTree

    return [KDTree(each.numpy()) for each in points]

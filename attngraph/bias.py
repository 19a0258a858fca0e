"""Additive terms of the scores, one number per edge and head, all differentiable; and their forms for kernels.

A bias answers `at(q_idx, kv_idx, edge)` with a tensor that broadcasts to (B, H, *edges) for any edges it is asked for;
`edge` is their number in `edge_index` order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from attngraph.arguments import checked, shown
from attngraph.graph.base import Graph, require_ints
from attngraph.graph.columns import columns
from attngraph.graph.edge_list import EdgeList, of_edge_index
from attngraph.graph.positions import distance_offset
from attngraph.kernels.contract import BiasKind, ScoreBias


@dataclass(frozen=True, eq=False)
class Alibi:
    """-slope · |i - j| (Press et al. 2022), with one slope for each head: (H,).

    >>> Alibi.geometric(4).slopes
    tensor([0.2500, 0.0625, 0.0156, 0.0039])
    """

    slopes: Tensor
    of_offset: ClassVar[bool] = True
    """Whether it depends on j - i alone: then it is asked for once for each offset, not for each pair."""

    def __post_init__(self):
        if not isinstance(self.slopes, Tensor):
            got = type(self.slopes).__name__
            raise TypeError(
                f"Alibi takes a tensor of slopes, one for each head (got {got}): Alibi.geometric(num_heads)"
            )
        if self.slopes.ndim != 1:
            raise ValueError(f"Alibi takes slopes of shape (H,) (got {tuple(self.slopes.shape)})")

    @staticmethod
    @checked
    def geometric(num_heads: int, device: torch.device | None = None) -> Alibi:
        """The slopes of the paper, 2^(-8h/H) for h = 1 … H, in float32."""
        require_ints(1, num_heads=num_heads)
        heads = torch.arange(1, num_heads + 1, dtype=torch.float32, device=device)
        return Alibi(2.0 ** (-8.0 * heads / num_heads))

    def at(self, q_idx: Tensor, kv_idx: Tensor, edge: Tensor | None = None) -> Tensor:
        """(H, *edges)."""
        distance = (q_idx - kv_idx).abs()
        return -self.slopes.view(-1, *[1] * distance.ndim) * distance


@dataclass(frozen=True, eq=False)
class RelativeBias:
    """table[h, bucket(j - i)]: a learned number for each head and relative position. table: (H, buckets).

    Without `max_distance`, offsets are clipped to the table's width: its middle column is j = i, and buckets must be
    odd (Shaw et al. 2018). With it, the buckets are T5's (Raffel et al. 2020): half of them exact, the rest logarithmic
    up to `max_distance`; `bidirectional` spends half of the buckets on the future, otherwise the future is bucket 0.

    >>> RelativeBias(torch.tensor([[1.0, 0.0, 2.0]])).at(torch.tensor([5]), torch.tensor([9]))
    tensor([[2.]])
    """

    table: Tensor
    max_distance: int | None = None
    bidirectional: bool = True
    of_offset: ClassVar[bool] = True

    def __post_init__(self):
        if not isinstance(self.table, Tensor):
            raise TypeError(f"RelativeBias takes a tensor, table (H, buckets) (got {shown(self.table)})")
        if not (self.max_distance is None or (isinstance(self.max_distance, int) and self.max_distance is not True)):
            raise TypeError(f"max_distance must be an int or None (got {shown(self.max_distance)})")
        if not isinstance(self.bidirectional, bool):
            raise TypeError(f"bidirectional must be True or False (got {shown(self.bidirectional)})")
        if self.table.ndim != 2:
            raise ValueError(f"RelativeBias takes a table of shape (H, buckets) (got {tuple(self.table.shape)})")
        buckets = self.table.shape[1]
        if self.max_distance is None and buckets % 2 == 0:
            raise ValueError(
                f"clipped offsets -r … r need an odd number of buckets (got {buckets}); or give max_distance"
            )
        exact = buckets // (4 if self.bidirectional else 2)
        if self.max_distance is not None and not 0 < exact < self.max_distance:
            raise ValueError(
                f"max_distance must be above the {exact} exact distances, of which there is at least 1 (got "
                f"max_distance={self.max_distance} for {buckets} buckets)"
            )

    def bucket(self, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        """The column of the table for each pair."""
        ahead, buckets = kv_idx - q_idx, self.table.shape[1]
        if self.max_distance is None:
            radius = buckets // 2
            return ahead.clamp(-radius, radius) + radius
        first = torch.zeros_like(ahead)
        if self.bidirectional:
            buckets //= 2
            first, distance = (ahead > 0) * buckets, ahead.abs()
        else:
            distance = (-ahead).clamp(min=0)
        exact = buckets // 2
        # float32, as T5 computes it: the bucket's border depends on the rounding.
        ratio = torch.log(distance.clamp(min=1).float() / exact) / math.log(self.max_distance / exact)
        far = (exact + (ratio * (buckets - exact)).long()).clamp(max=buckets - 1)
        return first + torch.where(distance < exact, distance, far)

    def at(self, q_idx: Tensor, kv_idx: Tensor, edge: Tensor | None = None) -> Tensor:
        """(H, *edges)."""
        return self.table[:, self.bucket(q_idx, kv_idx)]


@dataclass(frozen=True, eq=False)
class EdgeBias:
    """One number per edge, and per head or batch entry: values (E,), (H, E) or (B, H, E).

    `EdgeBias.of(edge_index, values)` has them in the order of an `edge_index`, as of any graph that they meet;
    `EdgeBias.sorted(values)` has them in that of the graph's own ``edge_index(n, m)``, which is sorted.
    """

    values: Tensor
    edges: EdgeList | Literal["sorted"] | None = None
    """Whose the values are: of the columns that an EdgeList was given, or of the graph's edges, "sorted"."""
    self_loops: float | Tensor | None = None
    fill: float | Tensor | None = None

    def __post_init__(self):
        if not isinstance(self.values, Tensor):
            raise TypeError(f"EdgeBias takes a tensor of values, one for each edge (got {shown(self.values)})")
        if not 1 <= self.values.ndim <= 4:
            raise ValueError(f"EdgeBias takes values (E,), (H, E) or (B, H, E) (got shape {tuple(self.values.shape)})")
        if self.edges is None:
            raise TypeError(
                "EdgeBias must know which edges the values are of: EdgeBias.of(edge_index, values), or "
                "EdgeBias.sorted(values) for values in the order of graph.edge_index()"
            )

    @staticmethod
    @checked
    def of(
        edges: Tensor | Sequence[Sequence[int]] | EdgeList,
        values: Tensor,
        *,
        self_loops: float | Tensor | None = None,
        fill: float | Tensor | None = None,
    ) -> EdgeBias:
        """One number for each column of an `edge_index`, whatever order that has, and on whatever graph.

        `attend` looks up each edge of its graph. An edge without a value is an error, unless `fill` says which it has.
        A value without an edge is not used, as those of a dense bias are not; that none is used is an error.

        Args:
            edges: (2, E) as in PyG, row 0 the source = key, row 1 the target = query, in the node numbers of the graph;
                or an `EdgeList`, for values in the order in which its edges were given. Each edge once.
            values: (E,), (H, E) or (B, H, E).
            self_loops: what edges i → i have that are not among these: a number, or a tensor () or (H,), which may be
                learned; by default `fill`.
            fill: the same for all other edges.

        >>> from attngraph import Identity, attend, from_edge_index
        >>> edge_index, values = torch.tensor([[2, 0], [1, 1]]), torch.tensor([5.0, 0.0])
        >>> graph, (q, k, v) = from_edge_index(edge_index, 3) | Identity(), torch.zeros(3, 1, 3, 4)
        >>> bias = EdgeBias.of(edge_index, values, self_loops=0.0)
        >>> attend(q, k, v, graph, bias=bias, return_weights=True)[1]  # 0 → 0; 0 → 1, 1 → 1, 2 → 1; 2 → 2
        tensor([[1.0000, 0.0066, 0.0066, 0.9867, 1.0000]])

        Raises ValueError for an edge that is given twice, and for values that are not one for each edge.
        """
        given = given_once(edges)
        count = given.position.shape[0]
        if not values.is_floating_point():
            raise TypeError(f"values must be floating-point numbers (got {values.dtype})")
        if not 1 <= values.ndim <= 3 or values.shape[-1] != count:
            turned = ": values.T" if values.ndim == 2 and values.shape[0] == count else ""
            raise ValueError(
                f"values must be (E,), (H, E) or (B, H, E) for the E = {count} edges that are given (got shape "
                f"{tuple(values.shape)}){turned}"
            )
        for name, each in (("self_loops", self_loops), ("fill", fill)):
            if isinstance(each, Tensor) and each.ndim > 1:
                raise ValueError(f"{name} must be a number, or a tensor () or (H,) (got shape {tuple(each.shape)})")
        return EdgeBias(values, given, self_loops, fill)

    @staticmethod
    @checked
    def sorted(values: Tensor) -> EdgeBias:
        """One number for each edge of the graph at hand, in the order of its ``edge_index(n, m)``, which is sorted."""
        return EdgeBias(values, "sorted")

    def at(self, q_idx: Tensor, kv_idx: Tensor, edge: Tensor | None = None) -> Tensor:
        """(..., *edges)."""
        if edge is None or self.edges != "sorted":
            raise TypeError("EdgeBias must know the numbers of the edges it is asked for, in edge_index order")
        return self.values[..., edge]


def given_once(edges: Tensor | Sequence[Sequence[int]] | EdgeList) -> EdgeList:
    """The edges of which values are given, if each is there once."""
    given = edges if isinstance(edges, EdgeList) else of_edge_index(edges, None)
    if given.position.shape[0] != given.code.shape[0]:
        raise ValueError(
            f"values must be of edges that are each given once (got {given.position.shape[0]} columns for "
            f"{given.code.shape[0]} edges): torch_geometric.utils.coalesce(edge_index, values, reduce='sum') makes "
            f"them one"
        )
    return given


@dataclass(frozen=True, eq=False)
class DenseBias:
    """One number for each pair of nodes, edge or not: values that broadcast to (B, H, N, M)."""

    values: Tensor

    def __post_init__(self):
        if self.values.ndim < 2:
            raise ValueError(
                f"a dense bias has shape (N, M), (H, N, M) or (B, H, N, M) (got {tuple(self.values.shape)})"
            )

    def at(self, q_idx: Tensor, kv_idx: Tensor, edge: Tensor | None = None) -> Tensor:
        """(..., *edges)."""
        return self.values[..., q_idx, kv_idx]


@dataclass(frozen=True, eq=False)
class Shifted:
    """A bias of distances, of queries that stand `query_offset` keys further on than their numbers say."""

    bias: Alibi | RelativeBias
    query_offset: int
    of_offset: ClassVar[bool] = True

    def at(self, q_idx: Tensor, kv_idx: Tensor, edge: Tensor | None = None) -> Tensor:
        """(H, *edges)."""
        return self.bias.at(q_idx + self.query_offset, kv_idx, edge)


Bias = Alibi | RelativeBias | EdgeBias | DenseBias | Shifted


# -------------------------------------------------------------------------------------------- as kernels take them


def kind_of(bias: Bias | None) -> BiasKind | None:
    """What a `ScoreBias` of it would be: by the offset j - i, by the edge, or by the pair of nodes."""
    match bias:
        case None:
            return None
        case EdgeBias():
            return "edge"
    return "offset" if getattr(bias, "of_offset", False) else "dense"


def placed(bias: Bias, graph: Graph, n: int, m: int, q: Tensor) -> Bias:
    """A bias for a graph at n × m: of distances between where its nodes stand, in the precision of the scores of q."""
    exact = torch.promote_types(q.dtype, torch.float32)
    kept = (exact, q.dtype) if isinstance(bias, EdgeBias | DenseBias) else (exact,)  # distances are multiplied first
    tensors = {field.name: value for field in fields(bias) if isinstance(value := getattr(bias, field.name), Tensor)}
    cast = {name: value.to(exact) for name, value in tensors.items() if value.dtype not in kept}
    bias = replace(bias, **cast) if cast else bias
    if isinstance(bias, EdgeBias):
        return aligned(bias, graph, n, m, q)
    if isinstance(bias, Alibi | RelativeBias) and (offset := distance_offset(graph, n, m)):
        return Shifted(bias, offset)
    return bias


def score_bias(bias: Bias | None, q: Tensor, k: Tensor) -> tuple[ScoreBias | None, Tensor | None]:
    """A bias as kernels take it; and apart, (B | 1, H | 1, N, 1), what is the same for all keys of a query."""
    if bias is None:
        return None, None
    n, m, kind = q.shape[2], k.shape[2], kind_of(bias)
    if kind == "offset":
        ahead = torch.arange(1 - n, m, device=q.device) if n and m else torch.arange(0, device=q.device)
        return ScoreBias(kind, fits_heads(bias.at((-ahead).clamp(min=0), ahead.clamp(min=0)), q, edge_dims=1)), None
    if not isinstance(bias, EdgeBias | DenseBias):
        bias = DenseBias(over_pairs(bias, q, k, None))
    edge_dims = 1 if kind == "edge" else 2
    values = fits_heads(bias.values, q, edge_dims)
    values = values.view(*[1] * (2 + edge_dims - values.ndim), *values.shape)
    if kind == "edge":
        return ScoreBias(kind, values), None
    if values.shape[2] not in (1, n) or values.shape[3] not in (1, m):
        raise ValueError(f"a bias tensor must broadcast to (B, H, {n}, {m}) (got {tuple(bias.values.shape)})")
    return (None, values) if values.shape[3] == 1 != m else (ScoreBias("dense", values), None)


def over_edges(bias: Bias, q: Tensor, k: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """A bias for each edge: a tensor that broadcasts to (B, H, E)."""
    if isinstance(bias, EdgeBias):
        check_edge_bias(bias, query.shape[0], q)
    elif isinstance(bias, DenseBias):
        bias = _all_pairs(bias, q, k)
    edge = torch.arange(query.shape[0], device=q.device)
    return fits_heads(bias.at(query, key, edge), q, edge_dims=1)


def over_pairs(bias: Bias, q: Tensor, k: Tensor, edges: Callable[[], tuple[Tensor, ...]] | None) -> Tensor:
    """A bias for all pairs: a tensor that broadcasts to (B, H, N, M); `edges` gives (query, key, …) for an EdgeBias."""
    n, m = q.shape[2], k.shape[2]
    if isinstance(bias, DenseBias):
        return _all_pairs(bias, q, k).values
    if isinstance(bias, EdgeBias):
        assert edges is not None
        query, key = edges()[:2]
        check_edge_bias(bias, query.shape[0], q)
        values = bias.values.new_zeros(*bias.values.shape[:-1], n * m).index_copy(-1, query * m + key, bias.values)
        return fits_heads(values.unflatten(-1, (n, m)), q, edge_dims=2)
    query, key = torch.arange(n, device=q.device)[:, None], torch.arange(m, device=q.device)[None]
    return fits_heads(bias.at(query, key), q, edge_dims=2)


def aligned(bias: EdgeBias, graph: Graph, n: int, m: int, q: Tensor) -> EdgeBias:
    """The same values in the order of the edges of a graph at n × m, on the device of q."""
    if not isinstance(given := bias.edges, EdgeList):
        return bias
    values, fill = bias.values, bias.fill
    self_loops = fill if bias.self_loops is None else bias.self_loops
    order = given.order.to(values.device)
    place = columns(graph, n, m, given, q, fill is not None, self_loops is not None, "EdgeBias")
    if self_loops is not None:  # two columns more, for what has no value
        count = values.shape[-1]
        order, values = torch.cat([order, order.new_tensor([count, count + 1])]), pad(values, (0, 2))
    values = values.index_select(-1, order.index_select(0, place))
    for number, filled in enumerate((fill, self_loops)):
        if filled is not None:
            filled = filled[..., None].to(values.dtype) if isinstance(filled, Tensor) else filled
            values = torch.where(place == given.code.shape[0] + number, filled, values)
    return EdgeBias.sorted(values)


def _all_pairs(bias: DenseBias, q: Tensor, k: Tensor) -> DenseBias:
    """A dense bias with its last two dimensions written out."""
    values, n, m = bias.values, q.shape[2], k.shape[2]
    if values.shape[-2] not in (1, n) or values.shape[-1] not in (1, m):
        raise ValueError(f"a bias tensor must broadcast to (B, H, {n}, {m}) (got {tuple(values.shape)})")
    return DenseBias(fits_heads(values.expand(*values.shape[:-2], n, m), q, edge_dims=2))


def fits_heads(values: Tensor, q: Tensor, edge_dims: int) -> Tensor:
    """The same values, if their dimensions before the last `edge_dims` fit (B, H); else an error."""
    lead = values.shape[: values.ndim - edge_dims]
    fits = all(given in (1, own) for given, own in zip(reversed(lead), (q.shape[1], q.shape[0]), strict=False))
    if len(lead) > 2 or not fits:
        raise ValueError(f"a bias must fit {q.shape[1]} heads and a batch of {q.shape[0]} (got one for {tuple(lead)})")
    return values


def check_edge_bias(bias: EdgeBias, count: int, q: Tensor) -> None:
    """Raise unless there is one value for each of so many edges."""
    if torch.compiler.is_compiling():
        torch._check(bias.values.shape[-1] == count)
    else:
        require_edge_count(bias.values, count)
    fits_heads(bias.values, q, edge_dims=1)


def require_edge_count(values: Tensor, count: int) -> None:
    """Raise unless the values of an EdgeBias are as many as the edges."""
    if values.shape[-1] != count:
        raise ValueError(
            f"EdgeBias needs one value for each of the graph's {count} edges, in edge_index order (got "
            f"{values.shape[-1]}); EdgeBias.of(edge_index, values) takes them in another order"
        )

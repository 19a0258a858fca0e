"""Features of the edges, which linear maps add to their keys and values: bonds, relations, distances."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from attngraph.arguments import checked, shown
from attngraph.bias import given_once
from attngraph.graph.base import Graph
from attngraph.graph.columns import columns
from attngraph.graph.edge_list import EdgeList
from attngraph.kernels.contract import EdgeTerms


@dataclass(frozen=True, eq=False)
class EdgeFeatures:
    """Features of each edge that linear maps add to its key and its value: k_ij = k_j + K e_ij, v_ij = v_j + V e_ij.

    `EdgeFeatures.of(edge_index, values, …)` has them in the order of an `edge_index`, as of any graph that they meet;
    `EdgeFeatures.sorted(values, …)` has them in that of the graph's own ``edge_index(n, m)``, which is sorted.

    Shaw et al. 2018, equations 3 and 4, of relative positions; Shi et al. 2021, equation 3, of the edges of any graph.
    """

    values: Tensor
    """(E, F), or (B, E, F)."""
    to_key: Tensor | None = None
    """K, (Hkv, D, F); None leaves the keys as they are."""
    to_value: Tensor | None = None
    """V, (Hkv, Dv, F); None leaves the values as they are."""
    edges: EdgeList | Literal["sorted"] | None = None
    """Whose the features are: of the columns that an EdgeList was given, or of the graph's edges, "sorted"."""

    def __post_init__(self):
        for name in ("values", "to_key", "to_value"):
            given = getattr(self, name)
            if given is None and name != "values":
                continue
            if not (isinstance(given, Tensor) and given.is_floating_point()):
                got = given.dtype if isinstance(given, Tensor) else shown(given)
                raise TypeError(f"{name} of EdgeFeatures must be a tensor of floating-point numbers (got {got})")
        if self.values.ndim not in (2, 3):
            raise ValueError(f"values of EdgeFeatures must be (E, F) or (B, E, F) (got {tuple(self.values.shape)})")
        F = self.values.shape[-1]
        for name, given in (("to_key", self.to_key), ("to_value", self.to_value)):
            if given is not None and (given.ndim != 3 or given.shape[2] != F):
                raise ValueError(
                    f"{name} of EdgeFeatures must be (Hkv, dim, F) for values of F = {F} (got {tuple(given.shape)})"
                )
        if self.to_key is self.to_value is None:
            raise TypeError("EdgeFeatures must be added to something: give to_key, to_value, or both")
        if self.edges is None:
            raise TypeError(
                "EdgeFeatures must know which edges the values are of: EdgeFeatures.of(edge_index, values, …), or "
                "EdgeFeatures.sorted(values, …) for values in the order of graph.edge_index()"
            )

    @staticmethod
    @checked
    def of(
        edges: Tensor | Sequence[Sequence[int]] | EdgeList,
        values: Tensor,
        *,
        to_key: Tensor | None = None,
        to_value: Tensor | None = None,
    ) -> EdgeFeatures:
        """The features of each column of an `edge_index`, whatever order that has, and on whatever graph.

        `attend` looks up each edge of its graph; one without features is an error.

        Args:
            edges: (2, E) as in PyG, row 0 the source = key, row 1 the target = query, in the node numbers of the graph;
                or an `EdgeList`, for values in the order in which its edges were given. Each edge once.
            values: (E, F), or (B, E, F).
            to_key: K, (Hkv, D, F); None leaves the keys as they are.
            to_value: V, (Hkv, Dv, F); None leaves the values as they are.

        >>> from attngraph import attend, from_edge_index
        >>> edge_index, values = torch.tensor([[2, 0], [1, 1]]), torch.tensor([[5.0], [7.0]])
        >>> features = EdgeFeatures.of(edge_index, values, to_value=torch.ones(1, 4, 1))
        >>> attend(*torch.zeros(3, 1, 3, 4), from_edge_index(edge_index, 3), edge_features=features)[0]
        tensor([[0., 0., 0., 0.],
                [6., 6., 6., 6.],
                [0., 0., 0., 0.]])

        Raises ValueError for an edge that is given twice, and for values that are not a vector for each edge.
        """
        given = given_once(edges)
        count = given.position.shape[0]
        if values.ndim not in (2, 3) or values.shape[-2] != count:
            raise ValueError(
                f"values must be (E, F) or (B, E, F) for the E = {count} edges that are given (got shape "
                f"{tuple(values.shape)})"
            )
        return EdgeFeatures(values, to_key, to_value, given)

    @staticmethod
    @checked
    def sorted(values: Tensor, *, to_key: Tensor | None = None, to_value: Tensor | None = None) -> EdgeFeatures:
        """Those of each edge of the graph at hand, in the order of its ``edge_index(n, m)``, which is sorted."""
        return EdgeFeatures(values, to_key, to_value, "sorted")


def check_features(features: EdgeFeatures, q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise unless features fit the heads, the dimensions and the device of a call."""
    if not isinstance(features, EdgeFeatures):
        raise TypeError(f"edge_features must be EdgeFeatures or None (got {shown(features)})")
    (B, _, _, D), Hkv, Dv = q.shape, k.shape[1], v.shape[3]
    F = features.values.shape[-1]
    for name, given, dim in (("to_key", features.to_key, D), ("to_value", features.to_value, Dv)):
        if given is not None and given.shape != (Hkv, dim, F):
            raise ValueError(f"{name} of edge_features must be {(Hkv, dim, F)} (got {tuple(given.shape)})")
    for given in (features.values, features.to_key, features.to_value):
        if given is not None and given.device != q.device:
            raise ValueError(f"edge_features must be on q's device, {q.device} (got {given.device})")
    if features.values.ndim == 3 and len(features.values) not in (1, B):
        raise ValueError(f"values of edge_features must fit a batch of {B} (got {tuple(features.values.shape)})")


def edge_terms(features: EdgeFeatures, graph: Graph, n: int, m: int, q: Tensor) -> EdgeTerms | None:
    """The features of the edges of a graph at n × m, in its order, in the precision of the scores of q."""
    exact = torch.promote_types(q.dtype, torch.float32)
    values, to_key, to_value = (
        side if side is None else side.to(exact) for side in (features.values, features.to_key, features.to_value)
    )
    assert values is not None
    if not values.shape[-1]:
        return None
    if isinstance(given := features.edges, EdgeList):
        place = columns(graph, n, m, given, q, False, False, "EdgeFeatures")
        values = values.index_select(-2, given.order.to(values.device).index_select(0, place))
    return EdgeTerms(values if values.ndim == 3 else values[None], to_key, to_value)


def check_edge_terms(terms: EdgeTerms, count: int) -> None:
    """Raise unless there are features for each of so many edges."""
    if torch.compiler.is_compiling():
        torch._check(terms.values.shape[1] == count)
    else:
        require_edges(terms.values, count)


def require_edges(values: Tensor, count: int) -> None:
    """Raise unless features (B or 1, E, F) are those of so many edges."""
    if values.shape[1] != count:
        raise ValueError(
            f"EdgeFeatures must have values for each of the graph's {count} edges, in edge_index order (got "
            f"{values.shape[1]}); EdgeFeatures.of(edge_index, values, …) takes them in another order"
        )

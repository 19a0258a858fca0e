"""Sparse matrices of SciPy in and out."""

from __future__ import annotations

from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from attngraph.arguments import checked
from attngraph.graph.base import Graph, at_size
from attngraph.graph.edge_list import EdgeList
from attngraph.interop.weights import averaged


class SparseMatrix(Protocol):
    """Any sparse matrix or array of SciPy."""

    def tocoo(self) -> Any:
        """The same as coordinates: `row`, `col`, `shape`."""


def from_scipy_sparse_matrix(matrix: SparseMatrix) -> EdgeList:
    """A graph from a sparse matrix or array A of SciPy, of sources and targets: A[k, q] is an edge k → q.

    This is networkx's and PyG's reading. For a mask, with queries as rows, pass its transpose. Stored zeros are edges,
    and one that is stored twice is one edge. The numbers themselves, in the order in which COO has them, become a bias.

    >>> from attngraph import EdgeBias
    >>> from scipy.sparse import coo_array
    >>> matrix = coo_array(([2.0, 5.0], ([1, 0], [0, 2])), shape=(3, 3))
    >>> graph = from_scipy_sparse_matrix(matrix)
    >>> bias = EdgeBias.of(graph, torch.from_numpy(matrix.tocoo().data))
    >>> graph
    EdgeList([[1, 0], [0, 2]], size=(3, 3))

    Raises TypeError for what is no sparse matrix, and ValueError for an array that has not two dimensions.
    """
    if not hasattr(matrix, "tocoo"):
        raise TypeError(
            f"from_scipy_sparse_matrix takes a sparse matrix of SciPy (got a {type(matrix).__name__}); a dense one: "
            f"from_dense(matrix.T)"
        )
    coo = matrix.tocoo()
    if len(coo.shape) != 2:
        raise ValueError(f"matrix must have two dimensions, sources and targets (got shape {tuple(coo.shape)})")
    key = torch.as_tensor(coo.row.astype("int64"))
    query = torch.as_tensor(coo.col.astype("int64"))
    return EdgeList(torch.stack([key, query]), (coo.shape[1], coo.shape[0]))


@checked
def to_scipy_sparse_matrix(
    graph: Graph,
    n: int | None = None,
    m: int | None = None,
    *,
    weights: Tensor | None = None,
    format: Literal["coo", "csr", "csc"] = "coo",
    array: bool = False,
) -> Any:
    """The edges as a SciPy matrix with A[k, q] = 1 for each edge k → q: the inverse of `from_scipy_sparse_matrix`.

    Args:
        weights: what stands there instead: numbers of the edges, (E,), in the order of ``graph.edge_index(n, m)``; of
            (H, E) or (B, H, E), such as the weights of `attend`, the mean of all heads and entries of the batch.
        format: how SciPy keeps it.
        array: whether it is one of SciPy's arrays, whose ``*`` is elementwise, rather than a matrix.

    >>> to_scipy_sparse_matrix(EdgeList([[0, 1], [1, 1]], 2), format="csr", array=True).toarray()
    array([[0, 1],
           [0, 1]])
    """
    from scipy.sparse import coo_array, coo_matrix

    bound, n, m = at_size(graph, n, m)
    edge_index = bound.edge_index(n, m).cpu()
    data = torch.ones(edge_index.shape[1], dtype=torch.int64)
    if weights is not None:
        data = averaged(weights, edge_index.shape[1]).cpu()
        if data.is_floating_point():
            data = data.to(torch.promote_types(data.dtype, torch.float32))  # SciPy has no half precision
    entries = data.numpy(), tuple(edge_index.numpy())
    made = coo_array(entries, shape=(m, n)) if array else coo_matrix(entries, shape=(m, n))
    return made.asformat(format)

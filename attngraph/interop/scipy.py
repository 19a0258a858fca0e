"""Sparse matrices of SciPy in and out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from attngraph.arguments import checked
from attngraph.graph.base import Graph, at_size
from attngraph.graph.edge_list import EdgeList

if TYPE_CHECKING:
    import scipy.sparse


class SparseMatrix(Protocol):
    """Any sparse matrix or array of SciPy."""

    def tocoo(self) -> Any:
        """The same as coordinates: `row`, `col`, `shape`."""


def from_scipy_sparse_matrix(matrix: SparseMatrix) -> EdgeList:
    """A graph from a SciPy sparse matrix A of sources and targets: A[k, q] is an edge k → q.

    This is networkx's and PyG's reading. For a mask, with queries as rows, pass its transpose. Stored zeros are edges.
    """
    if not hasattr(matrix, "tocoo"):
        raise TypeError(
            f"from_scipy_sparse_matrix takes a sparse matrix of SciPy (got a {type(matrix).__name__}); a dense one: "
            f"from_dense(matrix.T)"
        )
    coo = matrix.tocoo()
    key = torch.as_tensor(coo.row.astype("int64"))
    query = torch.as_tensor(coo.col.astype("int64"))
    return EdgeList(torch.stack([key, query]), (coo.shape[1], coo.shape[0]))


@checked
def to_scipy_sparse_matrix(graph: Graph, n: int | None = None, m: int | None = None) -> scipy.sparse.coo_matrix:
    """The edges as a SciPy matrix with A[k, q] = 1 for each edge k → q: the inverse of `from_scipy_sparse_matrix`."""
    from scipy.sparse import coo_matrix

    bound, n, m = at_size(graph, n, m)
    key, query = bound.edge_index(n, m).numpy()
    return coo_matrix((np.ones(len(key), dtype=np.int64), (key, query)), shape=(m, n))

"""Graphs of other libraries in and out: PyG, networkx, SciPy, dense masks, FlexAttention; batches of a DataLoader; and
graphs that are computed from the data.

Everything is a conversion; nothing here keeps a reference to the other library's object.
"""

from attngraph.interop.batches import collate
from attngraph.interop.dense import from_dense, from_function
from attngraph.interop.edge_index import from_edge_index
from attngraph.interop.flex import to_block_mask
from attngraph.interop.neighbors import from_neighbors
from attngraph.interop.networkx import NamedGraph, from_networkx, to_networkx
from attngraph.interop.points import knn_graph, radius_graph
from attngraph.interop.scipy import from_scipy_sparse_matrix, to_scipy_sparse_matrix

__all__ = [
    "NamedGraph",
    "collate",
    "from_dense",
    "from_edge_index",
    "from_function",
    "from_neighbors",
    "from_networkx",
    "from_scipy_sparse_matrix",
    "knn_graph",
    "radius_graph",
    "to_block_mask",
    "to_networkx",
    "to_scipy_sparse_matrix",
]

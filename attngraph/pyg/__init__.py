"""PyTorch Geometric's attention layers, on the kernels of `attend`: change the import, and nothing else.

>>> from attngraph.pyg import TransformerConv  # instead of torch_geometric.nn

A layer is a `MessagePassing` with PyG's constructor, parameters and results. It attends, and no vector of each edge and
head is held; ``layer.falls_back()`` tells why it sends messages as PyG wrote them, and is None where it attends.
`accelerate` changes the layers of a model that exists.
"""

from attngraph.pyg.accelerate import Accelerated, accelerate
from attngraph.pyg.layers import (
    AGNNConv,
    GATConv,
    GATv2Conv,
    GraphAttention,
    HGTConv,
    SuperGATConv,
    TransformerConv,
)
from attngraph.pyg.sets import GPSConv, SetTransformerAggregation, from_batch

__all__ = [
    "AGNNConv",
    "Accelerated",
    "GATConv",
    "GATv2Conv",
    "GPSConv",
    "GraphAttention",
    "HGTConv",
    "SetTransformerAggregation",
    "SuperGATConv",
    "TransformerConv",
    "accelerate",
    "from_batch",
]

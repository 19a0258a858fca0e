"""attngraph: attention as message passing between the nodes of an explicit directed graph.

Every node holds a vector. Along each edge a key answers a query and a value flows (`attend`); then every node computes
alone. GPT, BERT, the encoder–decoder and ViT are one Transformer that differs in its `Graph`: who may hear whom.

>>> from attngraph import Causal, Prefix, Window, attend
>>> graph = Causal() & (Window(256, 0) | Prefix(4))
>>> q, k, v = torch.randn(3, 1, 8, 1024, 64)
>>> attend(q, k, v, graph).shape
torch.Size([1, 8, 1024, 64])

Graphs      Full Empty Identity Causal Window Prefix Global Strided Chunks ChunkEnds Random
            Expander, of any size
            Documents Tree Neighborhood Axial ShiftedWindows EdgeList, which know theirs
            TopK BlockTopK, whose edges queries and keys choose
            | & - ^ ~ .T @ of them; Disjoint, Batched, Beside, Blocks, PerHead of them; `Graph` has the views, and
            how to add one
In and out  from_ and to_: edge_index, networkx, scipy_sparse_matrix, dense, function, block_mask; parse, parse_list
            knn_graph, radius_graph: of points; collate: samples with graphs of their own as a batch of a DataLoader
Attention   attend, with the biases Alibi, RelativeBias, EdgeBias, with EdgeFeatures,
            and the scores Additive, SoftCap, LeakyReLU, Temperature
Plans       plan, Plan, Costs, calibrate: how it runs; compare: beside others; cache: what is kept
Modules     nn (Attention, Transformer), models (GPT, Encoder, EncoderDecoder, ViT, DecisionTransformer);
            save and load of each model; record: its attention weights; attngraph.hf: checkpoints of Hugging Face;
            attngraph.pyg: PyG's attention layers, and accelerate, for a model that has them
Decoding    generate, stream, speculate; KVCache: what a model keeps of its text; unmask: of masked tokens
Questions   analysis (causality, leaks, receptive fields, cost and what a cache holds), draw (pictures)
"""

from attngraph import analysis as analysis
from attngraph import cache as cache
from attngraph import draw as draw
from attngraph import models as models
from attngraph import nn as nn
from attngraph.attention import attend
from attngraph.bias import Alibi, EdgeBias, RelativeBias
from attngraph.comparison import Comparison, compare
from attngraph.edge_features import EdgeFeatures
from attngraph.generation.decoding import generate, stream
from attngraph.generation.kv_cache import KVCache
from attngraph.generation.masked import unmask
from attngraph.generation.speculative import speculate
from attngraph.graph.algebra import Empty, Full
from attngraph.graph.base import Graph
from attngraph.graph.compose import Batched, Beside, Blocks, Disjoint, PerHead, above
from attngraph.graph.dynamic import BlockTopK, TopK
from attngraph.graph.edge_list import EdgeList
from attngraph.graph.expander import Expander
from attngraph.graph.grids import Axial, Neighborhood, ShiftedWindows
from attngraph.graph.patterns import (
    Causal,
    ChunkEnds,
    Chunks,
    Documents,
    Global,
    Identity,
    Prefix,
    Random,
    Strided,
    Tree,
    Window,
)
from attngraph.graph.text import parse, parse_list
from attngraph.interop import (
    NamedGraph,
    collate,
    from_dense,
    from_edge_index,
    from_function,
    from_neighbors,
    from_networkx,
    from_scipy_sparse_matrix,
    knn_graph,
    radius_graph,
    to_block_mask,
    to_networkx,
    to_scipy_sparse_matrix,
)
from attngraph.kernels.scoring import Additive, LeakyReLU, SoftCap, Temperature
from attngraph.nn.recording import record
from attngraph.planning.calibrate import calibrate
from attngraph.planning.costs import Costs
from attngraph.planning.planner import Plan, plan

__version__ = "0.12.0"

__all__ = [
    "Additive",
    "Alibi",
    "Axial",
    "Batched",
    "Beside",
    "BlockTopK",
    "Blocks",
    "Causal",
    "ChunkEnds",
    "Chunks",
    "Comparison",
    "Costs",
    "Disjoint",
    "Documents",
    "EdgeBias",
    "EdgeFeatures",
    "EdgeList",
    "Empty",
    "Expander",
    "Full",
    "Global",
    "Graph",
    "Identity",
    "KVCache",
    "LeakyReLU",
    "NamedGraph",
    "Neighborhood",
    "PerHead",
    "Plan",
    "Prefix",
    "Random",
    "RelativeBias",
    "ShiftedWindows",
    "SoftCap",
    "Strided",
    "Temperature",
    "TopK",
    "Tree",
    "Window",
    "above",
    "attend",
    "calibrate",
    "collate",
    "compare",
    "from_dense",
    "from_edge_index",
    "from_function",
    "from_neighbors",
    "from_networkx",
    "from_scipy_sparse_matrix",
    "generate",
    "knn_graph",
    "parse",
    "parse_list",
    "plan",
    "radius_graph",
    "record",
    "speculate",
    "stream",
    "to_block_mask",
    "to_networkx",
    "to_scipy_sparse_matrix",
    "unmask",
]

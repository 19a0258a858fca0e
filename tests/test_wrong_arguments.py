"""Graphs, their methods, converters and questions, given what they can't take: an error in words that help."""

import networkx
import pytest
import torch
from scipy.sparse import coo_matrix
from wrong_arguments import sweep

from attngraph import (
    Axial,
    Beside,
    Causal,
    Chunks,
    Disjoint,
    Documents,
    EdgeList,
    Full,
    Global,
    Neighborhood,
    PerHead,
    Prefix,
    Random,
    ShiftedWindows,
    Strided,
    Tree,
    Window,
    analysis,
    from_dense,
    from_edge_index,
    from_function,
    from_networkx,
    from_scipy_sparse_matrix,
    parse,
    parse_list,
    to_block_mask,
    to_networkx,
    to_scipy_sparse_matrix,
)

EDGES = torch.tensor([[0, 1], [1, 2]])
CASES = {
    "Causal": (Causal, {"offset": 0}),
    "Window": (Window, {"left": 1, "right": 0, "dilation": 1}),
    "Prefix": (Prefix, {"length": 1}),
    "Global": (Global, {"nodes": [1]}),
    "Strided": (Strided, {"stride": 2}),
    "Chunks": (Chunks, {"chunk": 2, "offset": 0}),
    "Random": (Random, {"degree": 2, "seed": 0, "num_keys": 5}),
    "Documents": (Documents, {"lengths": [1, 2]}),
    "Tree": (Tree, {"parents": [-1, 0]}),
    "Neighborhood": (Neighborhood, {"shape": (2, 3), "radius": 1, "dilation": 1}),
    "Axial": (Axial, {"shape": (2, 3)}),
    "ShiftedWindows": (ShiftedWindows, {"shape": (2, 3), "window": 2, "shift": 1}),
    "EdgeList": (EdgeList, {"edge_index": EDGES, "size": 3}),
    "Disjoint": (Disjoint, {"graphs": [Causal()]}),
    "Beside": (Beside, {"a": Full().sized(None, 2), "b": Causal()}),
    "PerHead": (PerHead, {"graphs": [Causal()]}),
    "rows": (Causal().rows, {"start": 0, "stop": 2}),
    "sized": (Causal().sized, {"num_queries": 2, "num_keys": 3}),
    "with_global_nodes": (Causal().with_global_nodes, {"count": 1}),
    "mask": (Causal().mask, {"n": 2, "m": 3, "device": "cpu"}),
    "edge_index": (Causal().edge_index, {"n": 2, "m": 3}),
    "num_edges": (Causal().num_edges, {"n": 2, "m": 3}),
    "in_degrees": (Causal().in_degrees, {"n": 2, "m": 3}),
    "out_degrees": (Causal().out_degrees, {"n": 2, "m": 3}),
    "spans": (Causal().spans, {"start": 0, "stop": 2, "n": 2, "m": 3}),
    "parse": (parse, {"text": "Causal()"}),
    "parse_list": (parse_list, {"text": "Causal()"}),
    "from_dense": (from_dense, {"mask": torch.ones(2, 2, dtype=torch.bool)}),
    "from_edge_index": (from_edge_index, {"edge_index": EDGES, "num_nodes": 3}),
    "from_function": (from_function, {"function": lambda q, k: q > k, "size": (3, 3)}),
    "from_networkx": (from_networkx, {"G": networkx.path_graph(3), "nodelist": [2, 1, 0]}),
    "from_scipy_sparse_matrix": (from_scipy_sparse_matrix, {"matrix": coo_matrix((2, 2))}),
    "to_networkx": (to_networkx, {"graph": Causal(), "n": 2, "m": 3}),
    "to_scipy_sparse_matrix": (to_scipy_sparse_matrix, {"graph": Causal(), "n": 2, "m": 3}),
    "to_block_mask": (to_block_mask, {"graph": Causal(), "n": 2, "m": 3, "block_size": 128, "device": "cpu"}),
    "is_causal": (analysis.is_causal, {"graph": Causal(), "n": 3}),
    "leaks": (analysis.leaks, {"graphs": [Causal()], "n": 3}),
    "receptive_field": (analysis.receptive_field, {"graphs": [Causal()], "node": 1, "n": 3}),
    "reach": (analysis.reach, {"graphs": [Causal()], "n": 3}),
    "last_reader": (analysis.last_reader, {"graph": Causal(), "n": 2, "m": 3}),
    "cost": (analysis.cost, {"graph": Causal(), "n": 3, "dim": 8, "heads": 2}),
}


@pytest.mark.parametrize("name", CASES)
def test_wrong_arguments_are_told_in_words_of_ours(name):
    function, good = CASES[name]
    assert dict(sweep(function, **good)) == {}

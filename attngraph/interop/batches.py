"""Samples with graphs of their own, packed into one: what a DataLoader collates them with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from attngraph.arguments import checked, shown
from attngraph.graph.base import Graph
from attngraph.graph.compose import Disjoint
from attngraph.graph.edge_list import EdgeList


@checked
def collate(samples: Sequence[Sequence[Any]]) -> tuple[Any, ...]:
    """A batch of samples with graphs as one larger graph: ``DataLoader(dataset, collate_fn=attngraph.collate)``.

    A sample is a tuple, one of its items a graph. Items are packed by what they are, as PyG does it:

    - graphs side by side, as `Disjoint`; those that are all an `EdgeList`, as an `EdgeList` of all their edges, in the
      order in which they were given, so that ``EdgeBias.of(graph, values)`` takes what was packed for each edge;
    - tensors behind each other along their first dimension: of nodes (N, …), of edges (E, …), of the sample (1, …);
      one that is neither in some sample is an error;
    - numbers, and tensors without a dimension, as a vector; all else, such as names, as a list.

    One item more comes last: of each node (of queries), the sample to which it belongs, int64, as PyG's ``batch``.

    >>> x, y = torch.randn(3, 8), 1
    >>> graph = EdgeList([[0, 1], [1, 2]], size=3)
    >>> x, graph, y, batch = collate([(x, graph, y), (x[:2], graph.rows(0, 2).T.rows(0, 2), y)])
    >>> x.shape, graph.size, y, batch
    (torch.Size([5, 8]), (5, 5), tensor([1, 1]), tensor([0, 0, 0, 1, 1]))

    Raises ValueError for samples of different lengths, without a graph, or with one that doesn't know its size.
    """
    for sample in samples:
        if not isinstance(sample, tuple | list):
            raise TypeError(f"samples must be tuples, such as (x, graph, y) (got {shown(sample)})")
    columns = list(zip(*samples, strict=True)) if len({len(sample) for sample in samples}) == 1 else []
    if not columns:
        lengths = sorted({len(sample) for sample in samples})
        raise ValueError(f"samples must be one or more tuples of one length (got {len(samples)}, of lengths {lengths})")
    of_graphs = [column for column in columns if any(isinstance(item, Graph) for item in column)]
    if len(of_graphs) != 1 or not all(isinstance(item, Graph) for item in of_graphs[0]):
        raise ValueError("samples must each have one graph, all at the same place")
    (graphs,) = of_graphs
    whole = _packed_graphs(graphs)
    packed = [whole if column is graphs else _packed(i, column, graphs) for i, column in enumerate(columns)]
    return *packed, torch.arange(len(graphs)).repeat_interleave(torch.tensor([graph.size[0] for graph in graphs]))


def _packed_graphs(graphs: Sequence[Graph]) -> Graph:
    for position, graph in enumerate(graphs):
        if None in graph.size:
            raise ValueError(
                f"samples must have graphs that know their size (got {graph} in sample {position}): "
                f"graph.sized(num_nodes, num_nodes)"
            )
    if not all(isinstance(graph, EdgeList) for graph in graphs):
        return Disjoint(graphs)
    rows = columns = 0
    edges = []
    for graph in cast(Sequence[EdgeList], graphs):
        edges.append(torch.stack([graph.key + columns, graph.query + rows])[:, graph.position])
        rows, columns = rows + cast(int, graph.size[0]), columns + cast(int, graph.size[1])
    return EdgeList(torch.cat(edges, dim=1), (rows, columns))


def _packed(place: int, items: Sequence[Any], graphs: Sequence[Graph]) -> Tensor | list[Any]:
    """Tensors behind each other, numbers as a vector, all else as a list."""
    if not all(isinstance(item, Tensor | int | float | np.ndarray | np.number) for item in items):
        return list(items)
    tensors = [torch.as_tensor(item) for item in items]
    try:
        if not any(tensor.ndim for tensor in tensors):
            return torch.stack(tensors)
        _require_kind(place, tensors, graphs)
        return torch.cat(tensors)
    except (TypeError, RuntimeError) as error:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors[:4])
        raise ValueError(f"item {place} of the samples must fit together (got shapes {shapes} …: {error})") from None


def _require_kind(place: int, tensors: Sequence[Tensor], graphs: Sequence[Graph]) -> None:
    """Raise unless the first dimension of a tensor is, in every sample, that of its nodes, or its edges, or 1."""
    found = [tensor.shape[0] if tensor.ndim else 0 for tensor in tensors]
    queries, keys = ([graph.size[side] for graph in graphs] for side in (0, 1))
    edges = [len(graph.position) if isinstance(graph, EdgeList) else graph.num_edges() for graph in graphs]
    if found in (queries, keys, edges, [1] * len(found)):
        return
    fits = [size in own for size, *own in zip(found, queries, keys, edges, [1] * len(found), strict=True)]
    sample = fits.index(False) if False in fits else 0
    raise ValueError(
        f"item {place} must be of the nodes, of the edges, or (1, …) of the sample, the same in all samples (got "
        f"{found[sample]} rows in sample {sample}, which has {queries[sample]} nodes and {edges[sample]} edges)"
    )

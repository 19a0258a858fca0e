"""Graphs on grids: nodes numbered row by row, connectivity that is decided axis by axis."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import prod

import torch
from torch import Tensor

from attngraph.graph.algebra import Full
from attngraph.graph.base import Graph, require_ints
from attngraph.graph.boxes import require_memory
from attngraph.graph.listing import BYTES_PER_EDGE, list_edges, merge_edges
from attngraph.graph.patterns import Chunks, Identity, Window, integers
from attngraph.graph.values import plain_int


class _Grid(Graph):
    """Nodes on a grid, numbered row by row; connectivity that is decided axis by axis."""

    shape: Sequence[int]

    def _check(self):
        if isinstance(self.shape, int):
            object.__setattr__(self, "shape", (self.shape,))
        integers(self, "shape", at_least=1)
        if not self.shape:
            raise ValueError("shape must have at least one axis (got none)")

    def _own_size(self):
        nodes = prod(self.shape)
        return nodes, nodes

    @property
    def products(self) -> tuple[tuple[Graph, ...], ...]:
        """One graph an axis: nodes are joined where all axes join their coordinates. Of several, any suffices."""
        raise TypeError(f"{type(self).__name__} must define products")

    def _coordinates(self, index: Tensor) -> list[Tensor]:
        found = []
        for length in reversed(self.shape):
            found.append(index % length)
            index = index // length
        return found[::-1]

    def contains(self, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        query, key = self._coordinates(q_idx), self._coordinates(kv_idx)
        joined = [
            torch.stack([axis.contains(*at) for axis, *at in zip(axes, query, key, strict=True)]).all(0)
            for axes in self.products
        ]
        return torch.stack(joined).any(0)

    def _classify_boxes(self, boxes):
        inner, found = 1, [[] for _ in self.products]
        for axis in reversed(range(len(self.shape))):
            at = boxes.along(inner, self.shape[axis])
            for kinds, axes in zip(found, self.products, strict=True):
                kinds.append(axes[axis]._classify_boxes(at))
            inner *= self.shape[axis]
        return torch.stack([torch.stack(kinds).amin(0) for kinds in found]).amax(0)

    def _box_pattern(self, boxes):
        # All axes but the first repeat, and along the first the axis' own graph tells.
        inner = prod(self.shape[1:])
        first = boxes.along(inner, self.shape[0])
        own = [number for axes in self.products for number in axes[0]._box_pattern(first)]
        return [boxes.top % inner, boxes.left % inner, *own]

    def _edges(self, n, m):
        edges = sum(map(self._product_count, self.products))
        require_memory(edges * BYTES_PER_EDGE, f"to list the {edges:,} edges of {self}")
        return merge_edges([self._product_edges(axes) for axes in self.products], m)

    def _product_edges(self, axes: tuple[Graph, ...]) -> tuple[Tensor, Tensor]:
        query = key = torch.zeros(1, dtype=torch.int64)
        for axis, length in zip(axes, self.shape, strict=True):
            q_axis, k_axis = list_edges(axis, length, length)
            query = (query[:, None] * length + q_axis).flatten()
            key = (key[:, None] * length + k_axis).flatten()
        return query, key

    def _count(self, n, m):
        if len(self.products) > 1:
            return super()._count(n, m)
        return self._product_count(next(iter(self.products)))

    def _product_count(self, axes: tuple[Graph, ...]) -> int:
        return prod(axis.num_edges(length, length) for axis, length in zip(axes, self.shape, strict=True))

    def _each_axis(self, name: str, at_least: int) -> None:
        """A field with one number for all axes, or one for each."""
        given = getattr(self, name)
        numbers = tuple(map(plain_int, given)) if isinstance(given, Iterable) else (given,) * len(self.shape)
        if len(numbers) != len(self.shape):
            raise ValueError(f"{name} must be one number, or one for each axis of shape {self.shape} (got {given!r})")
        for number in numbers:
            require_ints(at_least, **{name: number})
        object.__setattr__(self, name, numbers[0] if len(set(numbers)) == 1 else numbers)

    def _on_axes(self, name: str) -> tuple[int, ...]:
        value = getattr(self, name)
        return value if isinstance(value, tuple) else (value,) * len(self.shape)


class Neighborhood(_Grid):
    """On a 1-, 2- or 3-D grid, each node hears those at most `radius` steps away on every axis.

    At the border a node has fewer neighbours, as in a convolution with zero padding (NATTEN, Hassani et al. 2023, moves
    the window inwards instead). With a dilation d the steps are d nodes wide.

    >>> Neighborhood((2, 2), 1).num_edges()
    16
    >>> Neighborhood((3, 3), 1).in_degrees().view(3, 3)
    tensor([[4, 6, 4],
            [6, 9, 6],
            [4, 6, 4]])
    """

    radius: int | tuple[int, ...]
    dilation: int | tuple[int, ...] = 1

    def _check(self):
        super()._check()
        self._each_axis("radius", at_least=0)
        self._each_axis("dilation", at_least=1)

    @property
    def products(self):
        return (
            tuple(Window(r, r, d) for r, d in zip(self._on_axes("radius"), self._on_axes("dilation"), strict=True)),
        )


class Axial(_Grid):
    """On a grid, each node hears those on its own lines: all but one coordinate are the same (Ho et al. 2019).

    >>> Axial((2, 2)).mask().int()
    tensor([[1, 1, 1, 0],
            [1, 1, 0, 1],
            [1, 0, 1, 1],
            [0, 1, 1, 1]], dtype=torch.int32)
    """

    @property
    def products(self):
        axes = range(len(self.shape))
        return tuple(tuple(Full() if axis == free else Identity() for axis in axes) for free in axes)

    def _count(self, n, m):
        own = type(self).products is Axial.products  # else of a class derived from this one
        return n * (sum(self.shape) - len(self.shape) + 1) if own else super()._count(n, m)


class ShiftedWindows(_Grid):
    """On a grid, the windows of a tiling hear each other, its borders moved by `shift` (Swin, Liu et al. 2021).

    As in Swin, the parts of windows that the shift cuts off at opposite borders do not hear each other.

    >>> ShiftedWindows((4,), 2, 1).mask().int()
    tensor([[1, 0, 0, 0],
            [0, 1, 1, 0],
            [0, 1, 1, 0],
            [0, 0, 0, 1]], dtype=torch.int32)
    """

    window: int | tuple[int, ...]
    shift: int | tuple[int, ...] = 0

    def _check(self):
        super()._check()
        self._each_axis("window", at_least=1)
        self._each_axis("shift", at_least=0)

    @property
    def products(self):
        return (tuple(Chunks(w, s) for w, s in zip(self._on_axes("window"), self._on_axes("shift"), strict=True)),)

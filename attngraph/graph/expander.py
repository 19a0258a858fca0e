"""Random regular graphs that are told pair by pair: permutations computed from hashes, at any number of nodes."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from attngraph.graph.base import Graph, require_ints
from attngraph.graph.boxes import require_memory
from attngraph.graph.listing import BYTES_PER_EDGE, merge_edges
from attngraph.graph.patterns import hashed, require_seed

ROUNDS = 4  # of the Feistel network, after which a permutation looks random (Luby and Rackoff 1988)


class Expander(Graph):
    """A random regular graph, in which few steps lead everywhere: Exphormer's (Shirzad et al. 2023).

    The union of degree / 2 random cycles, each through all nodes: i and j hear each other if they are next to each
    other on one of them. So it is symmetric and connected, without self-loops, and every node hears `degree` others but
    where two cycles share an edge: any two share about two, at any number of nodes. Its second eigenvalue is near
    2·√(degree - 1), the least possible (Friedman 2008). It is the same on every device and in every run.

    The number of nodes arrives with the tensors, as any size does. Where there are fewer queries than keys, or fewer
    keys than queries, they are the first of the nodes. Exphormer is ``(graph | Expander(4)).with_global_nodes(1)``.

    >>> Expander(2).mask(5, 5).int()
    tensor([[0, 0, 1, 1, 0],
            [0, 0, 0, 1, 1],
            [1, 0, 0, 0, 1],
            [1, 1, 0, 0, 0],
            [0, 1, 1, 0, 0]], dtype=torch.int32)
    """

    degree: int
    seed: int = 0
    num_nodes: int | None = None

    def _check(self):
        require_ints(0, degree=self.degree)
        if self.degree % 2:
            raise ValueError(f"degree must be even, two for each cycle (got {self.degree})")
        require_seed(self.seed)
        if self.num_nodes is not None:
            require_ints(0, num_nodes=self.num_nodes)

    def _own_size(self):
        return self.num_nodes, self.num_nodes

    def _bind(self, n, m):
        if n is None or m is None:
            return self
        whole = replace(self, num_nodes=max(n, m))
        if n == m:
            return whole
        return whole.rows(0, n) if n < m else whole.rows(0, m).T  # it is symmetric

    def _waits(self):
        return self.num_nodes is None

    def contains(self, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        if self.num_nodes is None:
            raise ValueError(f"{self} needs its number of nodes: graph.sized(num_nodes, num_nodes)")
        found = (q_idx < 0) & (kv_idx < 0)
        for cycle in range(self.degree // 2):
            apart = (self._place(q_idx, cycle) - self._place(kv_idx, cycle)).abs()
            found = found | (apart == 1) | (apart == self.num_nodes - 1)
        return found & (q_idx != kv_idx)

    def _place(self, node: Tensor, cycle: int) -> Tensor:
        """Where on a cycle a node stands: a permutation of the numbers of nodes."""
        return self._within(node, cycle, 1)

    def _node(self, place: Tensor, cycle: int) -> Tensor:
        """Which node stands at a place of a cycle: the inverse."""
        return self._within(place, cycle, -1)

    def _within(self, number: Tensor, cycle: int, sign: int) -> Tensor:
        """A permutation of the numbers of nodes, or its inverse: that of a few more numbers, until it ends within."""
        nodes = cast(int, self.num_nodes)
        if number.numel() > nodes:
            return self._within(torch.arange(nodes, device=number.device), cycle, sign)[number]
        found = self._feistel(number, cycle, sign)
        while bool((beyond := found >= nodes).any()):
            found[beyond] = self._feistel(found[beyond], cycle, sign)
        return found

    def _feistel(self, number: Tensor, cycle: int, sign: int) -> Tensor:
        """A permutation of the numbers a · columns + b below rows · columns: a and b in turn moved by hashes."""
        rows = math.isqrt(max(cast(int, self.num_nodes) - 1, 0)) + 1
        columns = -(-cast(int, self.num_nodes) // rows) or 1
        a, b = number // columns, number % columns
        for step in range(ROUNDS)[::sign]:
            key = hashed(number.new_tensor(cycle * ROUNDS + step), self.seed)
            if step % 2:
                a = (a + sign * (hashed(b + key, 0) % rows)) % rows
            else:
                b = (b + sign * (hashed(a + key, 0) % columns)) % columns
        return a * columns + b

    def _found_by_listing(self):
        return True

    def _edges(self, n, m):
        return self._edges_of_rows(0, n, n, m)

    def _edges_of_rows(self, start, stop, n, m):
        edges = (stop - start) * self.degree
        require_memory(edges * BYTES_PER_EDGE, f"to list the {edges:,} edges of {self}")
        query, found = torch.arange(stop - start), []
        for cycle in range(self.degree // 2):
            place = self._place(query + start, cycle)
            for step in (1, -1):
                key = self._node((place + step) % max(m, 1), cycle)
                found.append((query[key != query + start], key[key != query + start]))
        return merge_edges(found, m)

"""GRAPHS: every kind of graph with an independent oracle. A law that holds for graphs is tested on each of these.

Adding a graph is one line: the graph, a size, and a plain Python function that says whether query i hears key j. The
oracles know nothing of tensors or of the library.
"""

from typing import NamedTuple

import networkx
import torch

from attngraph import (
    Axial,
    Batched,
    Beside,
    Blocks,
    Causal,
    ChunkEnds,
    Chunks,
    Disjoint,
    Documents,
    EdgeList,
    Empty,
    Expander,
    Full,
    Global,
    Graph,
    Identity,
    Neighborhood,
    PerHead,
    Prefix,
    Random,
    ShiftedWindows,
    Strided,
    Tree,
    Window,
    above,
    from_function,
)


class Case(NamedTuple):
    graph: Graph
    n: int
    m: int
    oracle: object  # (i, j) → bool, or a list of them, one for each head

    @property
    def mask(self) -> torch.Tensor:
        """(n, m), or (H, n, m)."""
        heads = self.oracle if isinstance(self.oracle, list) else [self.oracle]
        masks = [[[bool(hears(i, j)) for j in range(self.m)] for i in range(self.n)] for hears in heads]
        found = torch.tensor(masks, dtype=torch.bool).reshape(len(heads), self.n, self.m)
        return found if isinstance(self.oracle, list) else found[0]


def near(i, j, shape, radius, dilation=1):
    """Whether two nodes of a grid lie at most so many dilated steps apart on every axis."""
    for length in reversed(shape):
        distance = abs(i % length - j % length)
        if distance % dilation or distance > radius * dilation:
            return False
        i, j = i // length, j // length
    return True


def differing(i, j, shape):
    """On how many axes the coordinates of two nodes differ."""
    count = 0
    for length in reversed(shape):
        count += i % length != j % length
        i, j = i // length, j // length
    return count


def swin_region(p, window, shift):
    """Swin's region of a position: the shifted tiling, with the part that wraps around kept apart."""
    return -1 if p < shift else (p - shift) // window


KARATE = networkx.karate_club_graph()
EDGES = [(0, 3), (4, 3), (4, 0), (2, 2), (1, 5)]  # (key, query)
PARENTS = [-1, 0, 0, 1, 1, 2, -1, 6]
RANDOM, SMALL = Random(3, seed=7).mask(9, 11), Random(2, seed=1).mask(5, 4)
EXPANDER = Expander(4, seed=3).mask(11, 11)


def ancestor(i, j):
    while i >= 0:
        if i == j:
            return True
        i = PARENTS[i]
    return False


GRAPHS = [
    Case(Full(), 5, 7, lambda i, j: True),
    Case(Full(), 1, 1, lambda i, j: True),
    Case(Full(), 0, 4, lambda i, j: True),
    Case(Full(), 4, 0, lambda i, j: True),
    Case(Empty(), 4, 3, lambda i, j: False),
    Case(Identity(), 4, 6, lambda i, j: i == j),
    Case(Causal(), 6, 6, lambda i, j: j <= i),
    Case(Causal(), 3, 8, lambda i, j: j <= i),
    Case(Causal(), 8, 3, lambda i, j: j <= i),
    Case(Causal(-1), 5, 5, lambda i, j: j < i),
    Case(Causal(3), 4, 9, lambda i, j: j <= i + 3),
    Case(Window(2, 1), 7, 9, lambda i, j: i - 2 <= j <= i + 1),
    Case(Window(0, 0), 3, 3, lambda i, j: i == j),
    Case(Window(2, 1, dilation=3), 13, 11, lambda i, j: j - i in (-6, -3, 0, 3)),
    Case(Prefix(3), 5, 7, lambda i, j: j < 3),
    Case(Prefix(0), 3, 3, lambda i, j: False),
    Case(Prefix(9), 3, 4, lambda i, j: True),
    Case(Global([4, 1]), 6, 6, lambda i, j: i in (1, 4) or j in (1, 4)),
    Case(Global([]), 2, 3, lambda i, j: False),
    Case(Strided(3), 8, 7, lambda i, j: (i - j) % 3 == 0),
    Case(Chunks(3), 8, 10, lambda i, j: i // 3 == j // 3),
    Case(Chunks(4, 1), 10, 7, lambda i, j: (i + 3) // 4 == (j + 3) // 4),
    Case(ChunkEnds(4, 1), 5, 10, lambda i, j: j % 4 == 3),
    Case(ChunkEnds(5, 3, -7), 3, 13, lambda i, j: (j + 7) % 5 > 1),
    Case(ChunkEnds(9, 4, 2), 4, 5, lambda i, j: j < 2),
    Case(ChunkEnds(3, 3), 2, 4, lambda i, j: True),
    Case(ChunkEnds(3, 0), 2, 4, lambda i, j: False),
    Case(Causal() & (Chunks(4) | ChunkEnds(4, 2)), 11, 11, lambda i, j: j <= i and (i // 4 == j // 4 or j % 4 > 1)),
    Case(Documents([3, 0, 1, 4]), 8, 8, lambda i, j: (i >= 3) + (i >= 4) == (j >= 3) + (j >= 4)),
    Case(Documents([]), 0, 0, lambda i, j: True),
    Case(Neighborhood((3, 4), 1), 12, 12, lambda i, j: near(i, j, (3, 4), 1)),
    Case(Neighborhood((5, 5), 1, 2), 25, 25, lambda i, j: near(i, j, (5, 5), 1, 2)),
    Case(Neighborhood((2, 3, 2), 1), 12, 12, lambda i, j: near(i, j, (2, 3, 2), 1)),
    Case(Neighborhood(6, 2), 6, 6, lambda i, j: abs(i - j) <= 2),
    Case(Axial((3, 4)), 12, 12, lambda i, j: differing(i, j, (3, 4)) <= 1),
    Case(Axial((2, 2, 3)), 12, 12, lambda i, j: differing(i, j, (2, 2, 3)) <= 1),
    Case(
        ShiftedWindows((4, 6), 2, 1),
        24,
        24,
        lambda i, j: (
            (swin_region(i // 6, 2, 1), swin_region(i % 6, 2, 1))
            == (swin_region(j // 6, 2, 1), swin_region(j % 6, 2, 1))
        ),
    ),
    Case(ShiftedWindows((5,), 2), 5, 5, lambda i, j: i // 2 == j // 2),
    Case(Tree(PARENTS), 8, 8, ancestor),
    Case(Tree([]), 0, 0, lambda i, j: True),
    Case(Random(3, seed=7), 9, 11, lambda i, j: bool(RANDOM[i, j])),
    Case(Random(9), 3, 4, lambda i, j: True),
    Case(Expander(4, seed=3), 11, 11, lambda i, j: bool(EXPANDER[i, j])),
    Case(Expander(4, seed=3), 7, 11, lambda i, j: bool(EXPANDER[i, j])),
    Case(Expander(4, seed=3), 11, 7, lambda i, j: bool(EXPANDER[i, j])),
    Case(Expander(2), 3, 3, lambda i, j: i != j),
    Case(Expander(4), 1, 1, lambda i, j: False),
    Case(Expander(0), 3, 3, lambda i, j: False),
    Case(Random(0), 3, 4, lambda i, j: False),
    Case(EdgeList(list(zip(*EDGES, strict=True)), (7, 6)), 7, 6, lambda i, j: (j, i) in EDGES),
    Case(EdgeList([[0, 0, 1], [2, 2, 0]], 3), 3, 3, lambda i, j: (j, i) in {(0, 2), (1, 0)}),
    Case(EdgeList([[], []], (3, 2)), 3, 2, lambda i, j: False),
    Case(from_function(lambda q, k: (q * k) % 3 == 1), 6, 7, lambda i, j: i * j % 3 == 1),
    Case(Causal() & (Window(2, 0) | Prefix(1)), 9, 9, lambda i, j: j <= i and (j >= i - 2 or j < 1)),
    Case(Causal() & Strided(3) | Window(1, 0), 10, 10, lambda i, j: (j <= i and (i - j) % 3 == 0) or i - 1 <= j <= i),
    Case(Causal() - Window(2, 2), 8, 8, lambda i, j: j <= i and abs(i - j) > 2),
    Case(Causal() ^ Prefix(3), 6, 7, lambda i, j: (j <= i) != (j < 3)),
    Case(~Window(1, 1), 5, 6, lambda i, j: abs(i - j) > 1),
    Case(~Random(3, seed=7) & Full(), 9, 11, lambda i, j: not RANDOM[i, j]),
    Case((Random(3, seed=7) | Causal()) - Identity(), 9, 11, lambda i, j: (RANDOM[i, j] or j <= i) and i != j),
    Case((Causal() & Window(2, 0)).T, 7, 5, lambda i, j: i <= j and j - 2 <= i),
    Case(Random(3, seed=7).T, 11, 9, lambda i, j: bool(RANDOM[j, i])),
    Case((Expander(4, seed=3) | Causal()) - Identity(), 11, 11, lambda i, j: EXPANDER[i, j] or j < i),
    Case(Expander(4, seed=3).rows(2, 6), 4, 11, lambda i, j: bool(EXPANDER[i + 2, j])),
    Case(Expander(4, seed=3).with_global_nodes(1), 12, 9, lambda i, j: i < 1 or j < 1 or bool(EXPANDER[i - 1, j - 1])),
    Case(Window(1, 0) @ Window(0, 1), 5, 5, lambda i, j: any(i - 1 <= k <= i and k <= j <= k + 1 for k in range(5))),
    Case(
        EdgeList([[0, 3], [1, 2]], (4, 5)) @ EdgeList([[1, 0], [0, 3]], (5, 3)),
        4,
        3,
        lambda i, j: (i, j) in {(1, 1), (2, 0)},
    ),
    Case(Causal().rows(4, 7), 3, 8, lambda i, j: j <= i + 4),
    Case(Random(3, seed=7).rows(2, 5), 3, 11, lambda i, j: bool(RANDOM[i + 2, j])),
    Case(Documents([2, 3]).rows(1, 4), 3, 5, lambda i, j: (i + 1 >= 2) == (j >= 2)),
    Case(Causal().sized(4, 5), 4, 5, lambda i, j: j <= i),
    Case(Window(1, 0).with_global_nodes(2), 6, 7, lambda i, j: i < 2 or j < 2 or i - 1 <= j <= i),
    Case(Random(3, seed=7).with_global_nodes(1), 10, 12, lambda i, j: i < 1 or j < 1 or bool(RANDOM[i - 1, j - 1])),
    Case(
        Disjoint([Causal().sized(2, 3), Empty().sized(1, 0), Full()]),
        5,
        6,
        lambda i, j: (i < 2 and j <= i) or (i >= 3 and j >= 3),
    ),
    Case(
        Batched([Full().sized(1, 2), (Causal() & Random(2, seed=1)).sized(5, 4), Empty().sized(3, 3)]),
        15,
        12,
        lambda i, j: (i < 1 and j < 2) or (5 <= i < 10 and 4 <= j < 8 and j - 4 <= i - 5 and SMALL[i - 5, j - 4]),
    ),
    Case(Blocks(Causal(), 3), 7, 8, lambda i, j: j // 3 <= i // 3),
    Case(Blocks(Expander(4, seed=3), 2), 21, 22, lambda i, j: bool(EXPANDER[i // 2, j // 2])),
    Case(
        Blocks(EdgeList(list(zip(*EDGES, strict=True)), (7, 6)), (2, 3), 13, 17) - Causal(),
        13,
        17,
        lambda i, j: (j // 3, i // 2) in EDGES and j > i,
    ),
    Case(Beside(Prefix(1).sized(None, 2), Causal()), 4, 6, lambda i, j: j < 1 or (j >= 2 and j - 2 <= i)),
    Case(above(Full().sized(2, None), Causal()), 6, 4, lambda i, j: i < 2 or j <= i - 2),
    Case(Beside(Random(3, 7).sized(9, 11), Identity()), 9, 15, lambda i, j: RANDOM[i, j] if j < 11 else i == j - 11),
    Case(
        Blocks(EdgeList([[0, 1, 1, 0, 1], [0, 1, 3, 4, 5]], (6, 2)), (16, 64), 90, 120) & Causal(),
        90,
        120,
        lambda i, j: j <= i and (i // 16, j // 64) in {(0, 0), (1, 1), (3, 1), (4, 0), (5, 1)},
    ),
    Case(PerHead([Causal(-1), Prefix(2)]), 5, 4, [lambda i, j: j < i, lambda i, j: j < 2]),
    Case(
        ~PerHead([Causal(), Random(3, 7)]).T & Window(3, 3),
        11,
        9,
        [lambda i, j: not i <= j and abs(i - j) <= 3, lambda i, j: not RANDOM[j, i] and abs(i - j) <= 3],
    ),
    Case(
        Disjoint([PerHead([Full(), Empty()]).sized(2, 2), Causal().sized(3, 3)]),
        5,
        5,
        [
            lambda i, j: (i < 2 and j < 2) or (i >= 2 and 2 <= j <= i),
            lambda i, j: i >= 2 and 2 <= j <= i,
        ],
    ),
]

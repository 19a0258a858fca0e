"""The closed forms: connectivity that is one line of arithmetic on node numbers. Nothing here enumerates pairs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import accumulate
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from attngraph.graph.base import Graph, require_ints
from attngraph.graph.boxes import between_diagonals, classify, classify_groups, require_memory
from attngraph.graph.counting import Breakpoints
from attngraph.graph.listing import BYTES_PER_EDGE, merge_edges
from attngraph.graph.values import plain_int

SHALLOW = 64  # ancestors of a node, in the mean, up to which a tree is listed
MAX_BORDERS = 1 << 20  # chunks beyond which their borders are no short list

# ----------------------------------------------------------------------------------------- any number of nodes


class Identity(Graph):
    """Everyone hears itself alone.

    >>> Identity().mask(2, 3).int()
    tensor([[1, 0, 0],
            [0, 1, 0]], dtype=torch.int32)
    """

    def contains(self, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return q_idx == kv_idx

    def _classify_boxes(self, boxes):
        return between_diagonals(boxes, 0, 0)

    def _box_pattern(self, boxes):
        return [boxes.left - boxes.top]

    def _breakpoints(self, n, m):
        return Breakpoints(diagonals=frozenset({0, 1}))


class Causal(Graph):
    """Query i hears the keys j ≤ i + offset: GPT. An offset of -1 leaves out the node itself.

    >>> Causal().mask(3, 3).int()
    tensor([[1, 0, 0],
            [1, 1, 0],
            [1, 1, 1]], dtype=torch.int32)
    """

    offset: int = 0

    def _check(self):
        require_ints(None, offset=self.offset)

    def _own_places(self):
        return (None,) if self.offset else ()  # it looks ahead, or its queries stand behind

    def contains(self, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return kv_idx <= q_idx + self.offset

    def _classify_boxes(self, boxes):
        return between_diagonals(boxes, None, self.offset)

    def _box_pattern(self, boxes):
        return [boxes.left - boxes.top]

    def _breakpoints(self, n, m):
        return Breakpoints(diagonals=frozenset({self.offset + 1}))


class Window(Graph):
    """Query i hears the keys i - left … i + right, inclusive, as in FlashAttention.

    With a dilation d it hears as many, each d-th: i - left·d, …, i - d, i, i + d, …, i + right·d.

    >>> Window(left=1, right=0).mask(3, 3).int()
    tensor([[1, 0, 0],
            [1, 1, 0],
            [0, 1, 1]], dtype=torch.int32)
    """

    left: int
    right: int
    dilation: int = 1

    def _check(self):
        require_ints(0, left=self.left, right=self.right)
        require_ints(1, dilation=self.dilation)
        require_ints(0, **{"left or right * dilation": max(self.left, self.right) * self.dilation})

    def contains(self, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        ahead = kv_idx - q_idx
        near = (ahead >= -self.left * self.dilation) & (ahead <= self.right * self.dilation)
        return near if self.dilation == 1 else near & (ahead % self.dilation == 0)

    def _classify_boxes(self, boxes):
        return between_diagonals(boxes, -self.left * self.dilation, self.right * self.dilation, self.dilation)

    def _box_pattern(self, boxes):
        return [boxes.left - boxes.top]

    def _breakpoints(self, n, m):
        ends = frozenset({-self.left * self.dilation, self.right * self.dilation + 1})
        return Breakpoints(diagonals=ends, period=self.dilation)


class Prefix(Graph):
    """Everyone hears the first `length` keys: attention sinks; with Causal, the prefix-LM.

    >>> Prefix(1).mask(2, 3).int()
    tensor([[1, 0, 0],
            [1, 0, 0]], dtype=torch.int32)
    """

    length: int

    def _check(self):
        require_ints(0, length=self.length)

    def contains(self, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return (q_idx >= 0) & (kv_idx < self.length)

    def _classify_boxes(self, boxes):
        return classify(boxes.left >= self.length, boxes.right <= self.length)

    def _box_pattern(self, boxes):
        return [boxes.left]

    def _breakpoints(self, n, m):
        return Breakpoints(columns=frozenset({self.length}))


class Global(Graph):
    """These nodes hear all and are heard by all (Longformer, Beltagy et al. 2020).

    >>> Global([1]).mask(3, 3).int()
    tensor([[0, 1, 0],
            [1, 1, 1],
            [0, 1, 0]], dtype=torch.int32)
    """

    nodes: Sequence[int]

    def _check(self):
        integers(self, "nodes", at_least=0)
        object.__setattr__(self, "nodes", tuple(sorted(set(self.nodes))))

    def contains(self, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        nodes = torch.tensor(self.nodes, dtype=torch.int64, device=q_idx.device)
        return (q_idx[..., None] == nodes).any(-1) | (kv_idx[..., None] == nodes).any(-1)

    def _classify_boxes(self, boxes):
        nodes = torch.tensor(self.nodes, dtype=torch.int64)
        top, bottom, left, right = (torch.searchsorted(nodes, side) for side in boxes)
        rows, columns = bottom - top, right - left  # how many of the nodes the box has on each side
        full = (rows == boxes.bottom - boxes.top) | (columns == boxes.right - boxes.left)
        return classify((rows == 0) & (columns == 0), full)

    def _box_pattern(self, boxes):
        nodes = torch.tensor(self.nodes, dtype=torch.int64)
        top, bottom, left, right = (torch.searchsorted(nodes, side) for side in boxes)
        return [torch.where(bottom > top, boxes.top, -1), torch.where(right > left, boxes.left, -1)]

    def _breakpoints(self, n, m):
        ends = frozenset(end for node in self.nodes for end in (node, node + 1))
        return Breakpoints(rows=ends, columns=ends)

    def _edges(self, n, m):
        require_memory(self._count(n, m) * BYTES_PER_EDGE, f"to list the edges of {self} at {n} × {m}")
        rows, columns = ([node for node in self.nodes if node < side] for side in (n, m))
        global_queries, global_keys = (torch.tensor(side, dtype=torch.int64) for side in (rows, columns))
        of_global_queries = global_queries.repeat_interleave(m), torch.arange(m).repeat(len(rows))
        of_global_keys = torch.arange(n).repeat_interleave(len(columns)), global_keys.repeat(n)
        return merge_edges([of_global_queries, of_global_keys], m)

    def _count(self, n, m):
        rows, columns = (sum(node < side for node in self.nodes) for side in (n, m))
        return rows * m + columns * n - rows * columns


class Strided(Graph):
    """Query i hears each key whose distance is a multiple of the stride (Sparse Transformer, Child et al. 2019).

    >>> Strided(2).mask(2, 4).int()
    tensor([[1, 0, 1, 0],
            [0, 1, 0, 1]], dtype=torch.int32)
    """

    stride: int

    def _check(self):
        require_ints(1, stride=self.stride)

    def contains(self, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return (kv_idx - q_idx) % self.stride == 0

    def _classify_boxes(self, boxes):
        return between_diagonals(boxes, None, None, self.stride)

    def _box_pattern(self, boxes):
        return [(boxes.left - boxes.top) % self.stride]

    def _breakpoints(self, n, m):
        return Breakpoints(period=self.stride)

    def _edges(self, n, m):
        ahead = torch.arange(-((n - 1) // self.stride), (m - 1) // self.stride + 1) * self.stride
        require_memory(n * len(ahead) * BYTES_PER_EDGE, f"to list the edges of {self} at {n} × {m}")
        query, ahead = torch.cartesian_prod(torch.arange(n), ahead).reshape(-1, 2).unbind(1)
        kept = (query + ahead >= 0) & (query + ahead < m)
        return query[kept], (query + ahead)[kept]


class Chunks(Graph):
    """Consecutive groups of `chunk` nodes hear each other; with an offset, the borders lie at offset + multiples.

    >>> Chunks(2).mask(3, 3).int()
    tensor([[1, 1, 0],
            [1, 1, 0],
            [0, 0, 1]], dtype=torch.int32)
    """

    chunk: int
    offset: int = 0

    def _check(self):
        require_ints(1, chunk=self.chunk)
        require_ints(None, offset=self.offset)

    def contains(self, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return (q_idx - self.offset) // self.chunk == (kv_idx - self.offset) // self.chunk

    def _classify_boxes(self, boxes):
        nodes = (boxes.top, boxes.bottom - 1, boxes.left, boxes.right - 1)
        return classify_groups(*((node - self.offset) // self.chunk for node in nodes))

    def _box_pattern(self, boxes):
        return [boxes.left - boxes.top, (boxes.top - self.offset) % self.chunk]

    def _breakpoints(self, n, m):
        first = self.offset % self.chunk
        if max(n, m) // self.chunk > MAX_BORDERS:
            return None
        borders = frozenset(range(first, max(n, m), self.chunk))
        return Breakpoints(rows=borders, columns=borders)

    def _edges(self, n, m):
        chunk = min(self.chunk, 2 * max(n, m))
        require_memory(n * chunk * BYTES_PER_EDGE, f"to list the edges of {self} at {n} × {m}")
        query, step = torch.cartesian_prod(torch.arange(n), torch.arange(self.chunk)).reshape(-1, 2).unbind(1)
        key = (query - self.offset) // self.chunk * self.chunk + self.offset + step
        kept = (key >= 0) & (key < m)
        return query[kept], key[kept]

    def _count(self, n, m):
        both, first = min(n, m), self.offset % self.chunk
        if both <= first:
            return min(n, first) * min(m, first)
        whole = (both - first) // self.chunk
        last = first + whole * self.chunk  # where the chunk begins in which the shorter side ends
        rest_n, rest_m = (min(side - last, self.chunk) for side in (n, m))
        return first * first + whole * self.chunk**2 + rest_n * rest_m


class ChunkEnds(Graph):
    """Everyone hears the last `length` keys of each chunk of consecutive keys, whose borders are those of `Chunks`.

    What a chunk keeps for later: with `Chunks`, the fixed pattern of the Sparse Transformer (Child et al. 2019). An
    offset of `length` moves the same keys to the beginnings of the chunks.

    >>> (Causal() & (Chunks(3) | ChunkEnds(3, 1))).mask(6, 6).int()
    tensor([[1, 0, 0, 0, 0, 0],
            [1, 1, 0, 0, 0, 0],
            [1, 1, 1, 0, 0, 0],
            [0, 0, 1, 1, 0, 0],
            [0, 0, 1, 1, 1, 0],
            [0, 0, 1, 1, 1, 1]], dtype=torch.int32)
    """

    chunk: int
    length: int
    offset: int = 0

    def _check(self):
        require_ints(1, chunk=self.chunk)
        require_ints(0, length=self.length)
        require_ints(None, offset=self.offset)
        if self.length > self.chunk:
            raise ValueError(f"length must be at most chunk (got {self.length} and {self.chunk})")

    def contains(self, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return (q_idx >= 0) & ((kv_idx - self.offset) % self.chunk >= self.chunk - self.length)

    def _heard_before(self, key: int | Tensor) -> Any:
        """How many keys are heard from the border at `offset` on, and before this one; negative on its other side."""
        whole, rest = (key - self.offset) // self.chunk, (key - self.offset) % self.chunk
        first = self.chunk - self.length
        return whole * self.length + (rest - first) * (rest > first)

    def _classify_boxes(self, boxes):
        heard = self._heard_before(boxes.right) - self._heard_before(boxes.left)
        return classify(heard == 0, heard == boxes.right - boxes.left)

    def _box_pattern(self, boxes):
        return [(boxes.left - self.offset) % self.chunk]

    def _breakpoints(self, n, m):
        if m // self.chunk > MAX_BORDERS:
            return None
        borders = range(self.offset % self.chunk, m + self.chunk, self.chunk)
        return Breakpoints(columns=frozenset(borders) | frozenset(border - self.length for border in borders))

    def _edges(self, n, m):
        require_memory(self._count(n, m) * BYTES_PER_EDGE, f"to list the edges of {self} at {n} × {m}")
        if not self.length or not m:
            return torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64)
        stop = torch.arange(self.offset % self.chunk, m + self.chunk, self.chunk)
        start = (stop - self.length).clamp(0, m)
        count = stop.clamp(max=m) - start
        key = torch.arange(int(count.sum())) + (start - count.cumsum(0) + count).repeat_interleave(count)
        return torch.arange(n).repeat_interleave(len(key)), key.repeat(n)

    def _count(self, n, m):
        return n * (self._heard_before(m) - self._heard_before(0))


class Random(Graph):
    """Every query hears `degree` different keys, picked at random: the same on every device and in every run.

    The keys are cut into `degree` equal stretches and one key is drawn from each by a hash of (seed, query, stretch),
    so that one pair is decided in constant time. The number of keys arrives with the tensors, as any size does.

    >>> Random(2, seed=1).in_degrees(3, 8)
    tensor([2, 2, 2])
    """

    degree: int
    seed: int = 0
    num_keys: int | None = None

    def _check(self):
        require_ints(0, degree=self.degree)
        require_seed(self.seed)
        if self.num_keys is not None:
            require_ints(0, num_keys=self.num_keys)

    def _own_size(self):
        return (None, self.num_keys)

    def _bind(self, n, m):
        return replace(self, num_keys=m) if m is not None else self

    def _waits(self):
        return self.num_keys is None

    def contains(self, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        if self.num_keys is None:
            raise ValueError(f"{self} needs its number of keys: graph.sized(num_queries, num_keys)")
        if self.num_keys <= self.degree or not self.degree:
            return (q_idx >= 0) & (kv_idx >= (0 if self.degree else self.num_keys))
        stretch = ((kv_idx + 1) * self.degree - 1) // self.num_keys
        return kv_idx == self._drawn(q_idx, stretch)

    def _drawn(self, query: Tensor, stretch: Tensor) -> Tensor:
        """The key that a query hears in a stretch of the keys."""
        keys = cast(int, self.num_keys)
        start, stop = stretch * keys // self.degree, (stretch + 1) * keys // self.degree
        return start + hashed(hashed(query, self.seed) + stretch, 0) % (stop - start).clamp(min=1)

    def _found_by_listing(self):
        return True

    def _edges(self, n, m):
        return self._edges_of_rows(0, n, n, m)

    def _edges_of_rows(self, start, stop, n, m):
        nodes, degree = stop - start, min(self.degree, m)
        require_memory(nodes * degree * 100, f"to list the {nodes * degree:,} edges of {self}")
        query = torch.arange(nodes).repeat_interleave(degree)
        stretch = torch.arange(degree).repeat(nodes)
        return query, stretch if m <= self.degree else self._drawn(query + start, stretch)

    def _count(self, n, m):
        return n * min(self.degree, m)


def require_seed(seed: int) -> None:
    """Raise unless it is an int, of any size."""
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed must be an int (got {seed!r})")


def hashed(x: Tensor, seed: int) -> Tensor:
    """Non-negative 62-bit hashes of int64 numbers: SplitMix64's finaliser (Steele et al. 2014), in wrapping int64."""
    x = x + ((seed + 1) * 0x9E3779B97F4A7C15 + (1 << 63)) % (1 << 64) - (1 << 63)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * (factor - (1 << 64))
    return (x ^ (x >> 31)) & ((1 << 62) - 1)


# ------------------------------------------------------------------------------------- a given number of nodes


class Documents(Graph):
    """Consecutive documents of these lengths, each hearing itself: packing that cannot leak.

    >>> Documents([1, 2]).mask().int()
    tensor([[1, 0, 0],
            [0, 1, 1],
            [0, 1, 1]], dtype=torch.int32)
    """

    lengths: Sequence[int]

    def _check(self):
        integers(self, "lengths", at_least=0)

    def _own_size(self):
        nodes = sum(self.lengths)
        return nodes, nodes

    @cached_property
    def starts(self) -> Tensor:
        """The first node of each document, and the number of nodes."""
        return torch.tensor([0, *accumulate(self.lengths)], device="cpu")

    def _document(self, index: Tensor) -> Tensor:
        return torch.bucketize(index.contiguous(), self.starts[1:].to(index.device), right=True)

    def contains(self, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return self._document(q_idx) == self._document(kv_idx)

    def _classify_boxes(self, boxes):
        return classify_groups(
            *(self._document(node) for node in (boxes.top, boxes.bottom - 1, boxes.left, boxes.right - 1))
        )

    def _breakpoints(self, n, m):
        borders = frozenset(self.starts.tolist())
        return Breakpoints(rows=borders, columns=borders)

    def _edges(self, n, m):
        require_memory(self._count(n, m) * BYTES_PER_EDGE, f"to list the edges of {self} at {n} × {m}")
        lengths = torch.tensor(self.lengths, dtype=torch.int64)
        start, length = (column.repeat_interleave(lengths) for column in (self.starts[:-1].to(lengths.device), lengths))
        query = torch.arange(n).repeat_interleave(length)
        first = length.cumsum(0) - length
        step = torch.arange(len(query)) - first.repeat_interleave(length)
        return query, start.repeat_interleave(length) + step

    def _count(self, n, m):
        return sum(length**2 for length in self.lengths)


class Tree(Graph):
    """Each node hears its ancestors and itself; `parents[i]` is the parent of node i, -1 for a root.

    >>> Tree([-1, 0, 0, 1]).mask().int()
    tensor([[1, 0, 0, 0],
            [1, 1, 0, 0],
            [1, 0, 1, 0],
            [1, 1, 0, 1]], dtype=torch.int32)
    """

    parents: Sequence[int]

    def _check(self):
        integers(self, "parents", at_least=-1)
        for node, parent in enumerate(self.parents):
            if parent >= len(self.parents):
                raise ValueError(
                    f"parents must be node numbers below {len(self.parents)}, or -1 (got {parent} for {node})"
                )
        self.interval  # noqa: B018  finds cycles

    def _own_size(self):
        return len(self.parents), len(self.parents)

    @cached_property
    def interval(self) -> Tensor:
        """(2, N): when a walk through the tree enters and leaves each node's descendants."""
        children = [[] for _ in self.parents]
        for node, parent in enumerate(self.parents):
            if parent >= 0:
                children[parent].append(node)
        enter, leave, clock = [-1] * len(self.parents), [0] * len(self.parents), 0
        stack = [(node, False) for node, parent in enumerate(self.parents) if parent < 0]
        while stack:
            node, done = stack.pop()
            if done:
                leave[node] = clock
                continue
            enter[node], clock = clock, clock + 1
            stack.append((node, True))
            stack.extend((child, False) for child in children[node])
        if -1 in enter:
            raise ValueError(
                f"parents must lead to a root (following them from node {enter.index(-1)} ends in a cycle)"
            )
        return torch.tensor([enter, leave], dtype=torch.int64, device="cpu")

    def contains(self, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        if not self.parents:
            return (q_idx < 0) & (kv_idx < 0)
        enter, leave = self.interval.to(q_idx.device)
        return (enter[kv_idx] <= enter[q_idx]) & (enter[q_idx] < leave[kv_idx])

    @cached_property
    def _depths(self) -> Tensor:
        """How many nodes each hears, itself included."""
        parents = torch.tensor([*self.parents, -1], device="cpu")  # the last entry is beyond the roots
        depth, ancestor = torch.ones_like(parents), parents.clone()
        depth[-1] = 0
        for _ in range(len(parents).bit_length()):  # twice as far up each time
            depth += depth[ancestor]
            ancestor = ancestor[ancestor]
        return depth[:-1]

    def _count(self, n, m):
        return int(self._depths.sum())

    def _found_by_listing(self):
        return int(self._depths.sum()) <= SHALLOW * len(self.parents)

    def _classify_boxes(self, boxes):
        first, last = (_Extremes.of(side.to(boxes.top.device)) for side in self.interval)
        query_first, query_last = first.least(boxes.top, boxes.bottom), first.most(boxes.top, boxes.bottom)
        keys = boxes.left, boxes.right
        full = (first.most(*keys) <= query_first) & (query_last < last.least(*keys))
        return classify((first.least(*keys) > query_last) | (last.most(*keys) <= query_first), full)

    def _edges(self, n, m):
        require_memory(self._count(n, m) * BYTES_PER_EDGE, f"to list the edges of {str(self)[:60]} at {n} × {m}")
        parents = torch.tensor(self.parents, dtype=torch.int64)
        query = key = torch.arange(n)
        found = []
        while len(query):
            found.append((query, key))
            key = parents[key]
            query, key = query[key >= 0], key[key >= 0]
        return merge_edges(found, m) if found else (query, key)


# --------------------------------------------------------------------------------------------------- the parts


class _Extremes(NamedTuple):
    """Tables of the least and the largest of any 2^level successive numbers: (levels, numbers) each."""

    low: Tensor
    high: Tensor

    @staticmethod
    def of(numbers: Tensor) -> _Extremes:
        """The tables of some numbers."""
        low = high = numbers
        lows, highs = [low], [high]
        for level in range(len(numbers).bit_length() - 1):
            after = (torch.arange(len(numbers), device=numbers.device) + (1 << level)).clamp(max=len(numbers) - 1)
            low, high = torch.minimum(low, low[after]), torch.maximum(high, high[after])
            lows.append(low)
            highs.append(high)
        return _Extremes(torch.stack(lows), torch.stack(highs))

    def least(self, start: Tensor, stop: Tensor) -> Tensor:
        """The least number from start on and before stop."""
        return torch.minimum(*(self.low[at] for at in self._halves(start, stop)))

    def most(self, start: Tensor, stop: Tensor) -> Tensor:
        """The largest."""
        return torch.maximum(*(self.high[at] for at in self._halves(start, stop)))

    @staticmethod
    def _halves(start: Tensor, stop: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        level = (torch.frexp((stop - start).double()).exponent - 1).long()
        return (level, start), (level, stop - (1 << level))


def integers(graph: Graph, name: str, at_least: int) -> None:
    """A field that holds several node numbers or counts, as a tuple of ints."""
    given = getattr(graph, name)
    if isinstance(given, Tensor) and given.ndim == 1:
        given = given.tolist()
    if not isinstance(given, Iterable) or isinstance(given, str | bytes | Graph | Tensor):
        raise TypeError(f"{name} must be a list of ints (got {given!r})")
    values = tuple(map(plain_int, given))
    for value in values:
        require_ints(at_least, **{name: value})
    object.__setattr__(graph, name, values)

"""Graphs whose edges queries and keys choose: who answers best is heard.

They combine with other graphs as all graphs do, ``| & - ^ ~``, and one rule holds in every combination: a choice is
made among what the graphs around it allow, so that ``TopK(8) & Causal()`` are the 8 best of the past. `resolve` puts
the edges that queries and keys chose in the place of each choice: what is left is an ordinary graph.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from attngraph.graph.algebra import (
    Complement,
    Difference,
    Empty,
    Full,
    Intersection,
    Sized,
    SymmetricDifference,
    Union,
)
from attngraph.graph.base import Graph, at_size, require_ints
from attngraph.graph.boxes import EMPTY, PARTIAL, Boxes
from attngraph.graph.compose import Batched, Blocks, Disjoint, PerHead
from attngraph.graph.edge_list import EdgeList, of_neighbors
from attngraph.graph.listing import count_edges
from attngraph.graph.patterns import Causal, Random

SCORES_PER_STEP = 1 << 22  # that are looked at at once: 16 MiB
BLOCK_SCORES_PER_STEP = 1 << 19  # of blocks: 2 MiB, most of which stay in a core's cache
KERNEL_BLOCK = 64  # keys of blocks that kernels take whole
MOST_LISTED = 1 << 24  # edges of other blocks, which run one by one as long as they can be listed
ROWS_PER_STEP = 256  # queries, of a graph that allows few pairs: their keys lie close together


def largest(scores: Tensor, count: int) -> Tensor:
    """Where the largest of scores (…, M) are, of equal ones the first, ascending, after -1 for each that is -inf.

    int64 (…, count), with count ≤ M.
    """
    top = scores.topk(min(count + 1, scores.shape[-1]), dim=-1)
    found = top.indices[..., :count].masked_fill(top.values[..., :count] == -torch.inf, -1)
    if 0 < count < scores.shape[-1]:
        least, next_best = top.values[..., count - 1], top.values[..., count]
        tied = (least == next_best) & (least > -torch.inf)
        if bool(tied.any()):
            rows, least = scores[tied], least[tied][:, None]
            better, equal = rows > least, rows == least
            equal &= equal.cumsum(-1) <= count - better.sum(-1, keepdim=True)
            found[tied] = (better | equal).nonzero()[:, 1].view(-1, count)
    return found.sort(-1).values


def in_turn(num_steps: int, run: Callable[[int], None]) -> None:
    """run(0) … run(num_steps - 1)."""
    for step in range(num_steps):
        run(step)


class Chooser(NamedTuple):
    """What choices are found by; there may be something faster than torch alone."""

    largest: Callable[[Tensor, int], Tensor] = largest
    for_each: Callable[[int, Callable[[int], None]], None] = in_turn
    """As `in_turn`, in any order, by threads in which each operation of torch runs by itself."""


IN_TORCH = Chooser()


def not_known(graph: Graph) -> ValueError:
    """What is asked before the data of a graph whose edges queries and keys choose."""
    return ValueError(
        f"the edges of {graph} are not known before the data: graph.resolve(q, k) gives the graph of these queries and "
        f"keys"
    )


class _Choice(Graph):
    """Of each query, or block of queries, the keys or blocks of keys with the highest scores."""

    _is_choice = True

    def contains(self, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        raise not_known(self)

    def _found_by_listing(self):
        return False

    @property
    def _blocks(self) -> tuple[int, int]:
        """How many queries choose together, and how many keys are chosen together."""
        return 1, 1

    @abstractmethod
    def _best(self, q: Tensor, k: Tensor, allowed: Graph, attention_mask: Tensor | None, by: Chooser) -> Tensor:
        """q (B, H, N, D), k (B, Hkv, M, D) → what was chosen of what is allowed, -1 for none: int64 (B, H, I, C)."""

    @abstractmethod
    def _chosen(self, best: Tensor, num_queries: int, num_keys: int) -> Graph:
        """Of (I, C), the graph; of (E, I, C), those of E entries side by side, of whole blocks."""

    def _blocks_at_once(self, entries: int, n: int, m: int) -> tuple[int, int]:
        """How many queries and keys have to stay together, where entries stand side by side."""
        return 1, 1

    def _chosen_by_entries(self, best: Tensor, rows: int, columns: int, n: int, m: int) -> Graph:
        """The graph of (E, I, C), of entries of so many queries and keys, n and m of which are real."""
        return self._chosen(best, rows, columns)

    def _is_all(self, n: int, m: int) -> Graph | None:
        """What it is where nothing is left to choose; else None."""
        return None

    @abstractmethod
    def _keeps_within(self, graph: Graph) -> bool:
        """Whether all pairs that it chooses among those of a graph are edges of it."""

    @abstractmethod
    def _num_scores(self, allowed: Graph, n: int, m: int) -> int:
        """How many it looks at, of each head."""

    @abstractmethod
    def _alike(self, n: int, m: int) -> Graph:
        """A graph of as many edges that is known before the data."""


class TopK(_Choice):
    """Each query hears the k keys that answer best, by q·k, of those that the graphs around it allow.

    Chosen for each head and batch entry, block of queries after block of queries, so that no matrix of all scores is
    ever in memory. The choice has no gradient; what flows along its edges has. Of equal scores, the first is chosen.

    >>> graph = TopK(32) & Causal()
    >>> q, k, v = torch.randn(3, 2, 4, 100, 16)
    >>> attend(q, k, v, graph).shape, graph.resolve(q, k).of_head(0).in_degrees().max()
    (torch.Size([2, 4, 100, 16]), tensor(32))
    """

    k: int

    def _check(self):
        require_ints(1, k=self.k)

    def _best(self, q, k, allowed, attention_mask, by):
        found = q.new_full((*q.shape[:3], self.k), -1, dtype=torch.int64)
        for start, stop, columns in _allowed_keys(allowed, q.shape[2], k.shape[2], len(q) * q.shape[1], q.device):
            scores = _scores(q[:, :, start:stop], k if columns is None else k[:, :, columns])
            keys = torch.arange(k.shape[2], device=q.device) if columns is None else columns
            if allowed != Full():
                rows = torch.arange(start, stop, device=q.device)
                scores.masked_fill_(~allowed.contains(rows[:, None], keys), -torch.inf)
            if attention_mask is not None:
                scores.masked_fill_(~attention_mask[:, None, None, keys], -torch.inf)
            best = by.largest(scores, min(self.k, len(keys)))
            found[:, :, start:stop, self.k - best.shape[3] :] = torch.where(best < 0, -1, keys[best])
        return found

    def _chosen(self, best, num_queries, num_keys):
        return of_neighbors(best, num_keys)

    def _keeps_within(self, graph):
        return True

    def _is_all(self, n, m):
        return Full() if self.k >= m else None

    def _num_scores(self, allowed, n, m):
        return count_edges(allowed, n, m)

    def _alike(self, n, m):
        return Random(self.k, num_keys=m)


class BlockTopK(_Choice):
    """Each query hears the k blocks of keys whose mean key answers it best, by q·k, its own block always among them.

    Mixture of block attention (MoBA, Lu et al. 2025). Where it is `causal`, no key after a query is heard or counts in
    its choice. With `queries`, a divisor of `block`, so many consecutive queries choose together, which is faster:
    causal ones by the first of them, as the others come later, and others by their mean. The choice has no gradient.

    >>> q = k = torch.tensor([[9.0], [9.0], [1.0], [1.0], [5.0], [5.0]])
    >>> BlockTopK(2, 2).resolve(q, k).mask().int()
    tensor([[1, 0, 0, 0, 0, 0],
            [1, 1, 0, 0, 0, 0],
            [1, 1, 1, 0, 0, 0],
            [1, 1, 1, 1, 0, 0],
            [1, 1, 0, 0, 1, 0],
            [1, 1, 0, 0, 1, 1]], dtype=torch.int32)
    """

    block: int
    k: int
    queries: int = 1
    causal: bool = True

    def _check(self):
        require_ints(1, block=self.block, k=self.k, queries=self.queries)
        if not isinstance(self.causal, bool):
            raise TypeError(f"causal must be a bool (got {self.causal!r})")
        if self.block % self.queries:
            raise ValueError(
                f"queries must be a divisor of block, so that those that choose together have one own block (got "
                f"{self.queries} and {self.block})"
            )

    @property
    def _blocks(self):
        return self.queries, self.block

    def _best(self, q, k, allowed, attention_mask, by):
        n, m = q.shape[2], k.shape[2]
        allowed = Full() if self._keeps_within(allowed) else allowed
        means, has_keys = _means(k, self.block, attention_mask)
        asked = q[:, :, :: self.queries] if self.causal else _means(q, self.queries)[0]
        blocks = torch.arange(means.shape[2], device=q.device)
        most = min(self.k, len(blocks))
        step = max(ROWS_PER_STEP // 4, BLOCK_SCORES_PER_STEP // max(1, len(q) * q.shape[1] * len(blocks)))
        found = [blocks] * -(-asked.shape[2] // step)

        def run(number: int) -> None:
            start = number * step
            first = torch.arange(start, min(start + step, asked.shape[2]), device=q.device)[:, None] * self.queries
            own, stop = first // self.block, len(blocks)
            if self.causal:
                stop = min(stop, (start + len(first) - 1) * self.queries // self.block + 1)  # later ones are not heard
            near = slice(start * self.queries // self.block, stop)  # with all blocks that are own or later
            scores = _scores(asked[:, :, start : start + step], means[:, :, :stop])
            if attention_mask is not None:
                scores.masked_fill_(~has_keys[:, None, None, :stop], -torch.inf)
            if self.causal:
                scores[..., near].masked_fill_(blocks[near] > own, -torch.inf)
            scores[..., near].masked_fill_(blocks[near] == own, torch.inf)
            if allowed != Full():
                scores.masked_fill_(self._none_allowed(allowed, first, blocks[:stop], n, m), -torch.inf)
            best = by.largest(scores, min(most, stop))
            found[number] = pad(best, (most - best.shape[3], 0), value=-1) if stop < most else best

        for_each = by.for_each if allowed == Full() else in_turn  # what a graph asks may not be for other threads
        for_each(len(found), run)
        return torch.cat(found, 2) if found else blocks.new_empty(*asked.shape[:3], most)

    def _none_allowed(self, allowed: Graph, first: Tensor, blocks: Tensor, n: int, m: int) -> Tensor:
        """Of queries from each of `first` on, and blocks of keys, whether a graph allows no pair."""
        top, left = (side.flatten() for side in torch.broadcast_tensors(first, blocks * self.block))
        boxes = Boxes(top, (top + self.queries).clamp(max=n), left, (left + self.block).clamp(max=m))
        kind = allowed._classify_boxes(boxes)
        none = kind == EMPTY
        row, column = (torch.arange(count, device=top.device) for count in (self.queries, self.block))
        for some in (kind == PARTIAL).nonzero()[:, 0].split(max(1, SCORES_PER_STEP // (self.queries * self.block))):
            query, key = top[some, None, None] + row[:, None], left[some, None, None] + column
            inside = (query < n) & (key < m) & ((key <= query) | (not self.causal))
            inside &= allowed.contains(query.clamp(max=n - 1), key.clamp(max=m - 1))
            none[some] = ~inside.flatten(1).any(1)
        return none.view(len(first), len(blocks))

    def _chosen(self, best, num_queries, num_keys):
        sizes = (num_queries, num_keys) if best.ndim == 2 else ()
        blocks = Blocks(of_neighbors(best, -(-num_keys // self.block)), self._blocks, *sizes)
        return blocks & Causal() if self.causal else blocks

    def _blocks_at_once(self, entries, n, m):
        edges = entries * n * min(self.k, -(-m // self.block)) * self.block
        is_listed = self.block % KERNEL_BLOCK and edges <= MOST_LISTED
        return (1, 1) if is_listed else (self.queries, self.block)

    def _chosen_by_entries(self, best, rows, columns, n, m):
        if self._blocks_at_once(len(best), n, m) != (1, 1):  # the answer by which rows and columns were filled up
            if more := rows // self.queries - best.shape[1]:
                best = pad(best, (0, 0, 0, more), value=-1)
            return self._chosen(best, rows, columns)
        keys = best[..., None] * self.block + torch.arange(self.block, device=best.device)
        keys = keys.masked_fill_((best < 0)[..., None] | (keys >= m), -1).flatten(2).repeat_interleave(self.queries, 1)
        keys = pad(keys, (0, 0, 0, max(0, rows - keys.shape[1])), value=-1)[:, :rows]
        if self.causal:
            keys.masked_fill_(keys > torch.arange(rows, device=best.device)[:, None], -1)
        return of_neighbors(keys, columns)

    def _keeps_within(self, graph):
        return self.causal and graph == Causal()

    def _is_all(self, n, m):
        all_keys = Causal() if self.causal else Full()
        return all_keys if self.k >= -(-m // self.block) and (n == m or not self.causal) else None

    def _num_scores(self, allowed, n, m):
        return -(-n // self.queries) * -(-m // self.block)

    def _alike(self, n, m):
        count = -(-m // self.block)
        rows, of_each = -(-n // self.queries), min(self.k, count)
        if self.block % KERNEL_BLOCK:
            return Random(min(self.k * self.block, m), num_keys=m)
        blocks: Graph = Random(of_each, num_keys=count)
        if rows * of_each <= MOST_LISTED:  # which is what kernels of blocks take
            blocks = EdgeList(blocks.edge_index(rows, count), (rows, count), is_sorted=True)
        return Blocks(blocks, self._blocks, n, m)


# ------------------------------------------------------------------------------------------------ resolving


def resolve(graph: Graph, q: Tensor, k: Tensor, attention_mask: Tensor | None = None) -> Graph:
    """See `Graph.resolve`."""
    q, k, attention_mask = _checked(q, k, attention_mask)
    n, m = q.shape[2], k.shape[2]
    bound = settled(at_size(graph, n, m)[0], n, m)
    if not graph._unresolved:
        return graph
    if torch.compiler.is_compiling():
        raise RuntimeError(
            f"a compiled program can't make a graph, which {graph} needs for heads with graphs of their own, biases, "
            f"weights and scores with numbers for each head: resolve(q, k) outside of it"
        )
    found: list[list[Graph]] = [[] for _ in range(len(q))]
    choices = _Choices(q, k, attention_mask)
    for h in range(q.shape[1]):
        own, of_head = (choices, h) if graph.heads is None else (choices.of_head(h), 0)
        for b, heads in enumerate(found):
            choose = lambda part, allowed, c=own, b=b, h=of_head: part._chosen(c.best(part, allowed)[b, h], n, m)  # noqa: E731
            heads.append(_replaced(bound.of_head(h), Full(), choose, lambda part: part).sized(n, m))
    entries = [heads[0] if len(heads) == 1 else PerHead(heads) for heads in found]
    return entries[0] if len(entries) == 1 else Batched([entry.sized(n, m) for entry in entries])


def settled(graph: Graph, n: int, m: int) -> Graph:
    """A graph without choices among no more than they take."""
    if isinstance(graph, _Choice):
        found = graph._is_all(n, m)
        return graph if found is None else found
    return graph._map(settled, n, m) if graph._unresolved else graph


def may_fold(graph: Graph, n: int, m: int) -> bool:
    """Whether `Folded` can hold a graph of n queries and m keys."""
    causal = any(isinstance(part, BlockTopK) and part.causal for part in _choices_in(graph))
    return graph.heads is None and (n == m or not causal)


class Folded(NamedTuple):
    """All heads of all batch entries as the nodes of one head of one entry, one after the other, with their graph."""

    graph: Graph
    num_queries: int
    """Of each head, filled up to whole blocks; and keys."""
    num_keys: int
    batch: int
    heads: int

    @staticmethod
    def of(graph: Graph, q: Tensor, k: Tensor, attention_mask: Tensor | None, by: Chooser) -> Folded:
        """What queries (B, H, N, D) and keys (B, Hkv, M, D) choose, where the graph `may_fold`."""
        (batch, heads, n, _), m = q.shape, k.shape[2]
        choices = _Choices(q, k, attention_mask, by)
        blocks = [part._blocks_at_once(batch * heads, n, m) for part in _choices_in(graph)]
        rows, columns = (
            -(-count // together) * together
            for count, each in zip((n, m), zip(*blocks, strict=True) if blocks else ((), ()), strict=True)
            for together in (math.lcm(*each),)
        )
        if n == m:
            rows = columns = max(rows, columns)  # in which causal is what it was

        def choose(part: _Choice, allowed: Graph) -> Graph:
            return part._chosen_by_entries(choices.best(part, allowed).flatten(0, 1), rows, columns, n, m)

        def repeat(part: Graph) -> Graph:
            own = part.sized(n, m)
            filled = own if (rows, columns) == (n, m) else Disjoint((own, Empty().sized(rows - n, columns - m)))
            return Disjoint((filled,) * (batch * heads))

        found = _replaced(at_size(graph, n, m)[0], Full(), choose, repeat)
        return Folded(found, rows, columns, batch, heads)

    def queries(self, x: Tensor) -> Tensor:
        """(B, H, N, …) → (1, 1, B · H · num_queries, …)."""
        return _filled_up(x, self.num_queries).flatten(0, 2)[None, None]

    def keys(self, x: Tensor) -> Tensor:
        """(B, Hkv, M, D) → (1, 1, B · H · num_keys, D)."""
        x = x.repeat_interleave(self.heads // x.shape[1], 1) if x.shape[1] < self.heads else x
        return _filled_up(x, self.num_keys).flatten(0, 2)[None, None]

    def mask(self, attention_mask: Tensor | None, k: Tensor) -> Tensor | None:
        """(B, M) → (1, B · H · num_keys); None where all keys of k are real and none were added."""
        more = self.num_keys - k.shape[2]
        if attention_mask is None and not more:
            return None
        real = k.new_ones(len(k), k.shape[2], dtype=torch.bool) if attention_mask is None else attention_mask
        return pad(real, (0, more))[:, None].expand(-1, self.heads, -1).flatten()[None]

    def of_queries(self, x: Tensor, num_queries: int) -> Tensor:
        """(1, 1, B · H · num_queries, …) → (B, H, N, …), without those that were added."""
        return x[0, 0].unflatten(0, (self.batch, self.heads, self.num_queries))[:, :, :num_queries]

    def sum_of_keys(self, x: Tensor, k: Tensor) -> Tensor:
        """Gradients (1, 1, B · H · num_keys, D) → (B, Hkv, M, D), of k's heads and nodes."""
        of_heads = x[0, 0].unflatten(0, (self.batch, k.shape[1], -1, self.num_keys))
        return of_heads[:, :, :, : k.shape[2]].sum(2)


class _Choices:
    """What queries and keys choose, found once for each choice."""

    def __init__(self, q: Tensor, k: Tensor, attention_mask: Tensor | None, by: Chooser = IN_TORCH):
        self.q, self.k, self.attention_mask = q.detach(), k.detach(), attention_mask
        self.by = by if bool((self.q.sum() + self.k.sum()).isfinite()) else by._replace(largest=_nan_first(by.largest))
        self._known: dict[tuple[Graph, Graph], Tensor] = {}
        self._heads: dict[int, _Choices] = {}

    def best(self, part: _Choice, allowed: Graph) -> Tensor:
        """See `_Choice._best`."""
        if (part, allowed) not in self._known:
            self._known[part, allowed] = part._best(self.q, self.k, allowed, self.attention_mask, self.by)
        return self._known[part, allowed]

    def of_head(self, head: int) -> _Choices:
        """Those of one query head, for graphs of its own."""
        if head not in self._heads:
            key_head = head // (self.q.shape[1] // self.k.shape[1])
            sides = self.q[:, head : head + 1], self.k[:, key_head : key_head + 1]
            self._heads[head] = _Choices(*sides, self.attention_mask, self.by)
        return self._heads[head]


def _nan_first(of_numbers: Callable[[Tensor, int], Tensor]) -> Callable[[Tensor, int], Tensor]:
    """The same, with NaN among the largest: it is heard, and seen in what comes of it."""
    return lambda scores, count: of_numbers(scores.nan_to_num_(torch.inf, torch.inf, -torch.inf), count)


def alike(graph: Graph, n: int, m: int) -> tuple[Graph, int]:
    """A graph of about as many edges, known before the data, for plans; and how many scores a head chooses by."""
    bound, scores = settled(at_size(graph, n, m)[0], n, m), []

    def choose(part: _Choice, allowed: Graph) -> Graph:
        scores.append(part._num_scores(allowed, n, m))
        return part._alike(n, m)

    heads = [_replaced(bound.of_head(h), Full(), choose, lambda part: part) for h in range(graph.heads or 1)]
    return heads[0] if graph.heads is None else PerHead(heads), sum(scores) // len(heads)


def _replaced(
    graph: Graph, allowed: Graph, choose: Callable[[_Choice, Graph], Graph], known: Callable[[Graph], Graph]
) -> Graph:
    """A graph with choose(choice, what is allowed around it) in the place of each choice, and known(part) of others."""
    if not graph._unresolved:
        return known(graph)
    if isinstance(graph, _Choice):
        return choose(graph, allowed)
    within = allowed
    if isinstance(graph, Intersection | Difference):
        first, *others = graph.graphs
        for part in (first, *(others if isinstance(graph, Intersection) else map(Complement, others))):
            if not part._unresolved:
                within = part if within == Full() else within & part
    if isinstance(graph, Intersection):
        choices = [part for part in graph.graphs if part._unresolved]
        others = [part for part in graph.graphs if not part._unresolved]
        kept = [
            part
            for part in others
            if not all(isinstance(each, _Choice) and each._keeps_within(part) for each in choices)
        ]
        parts = [_replaced(part, within, choose, known) for part in choices] + [known(part) for part in kept]
        return parts[0] if len(parts) == 1 else Intersection(tuple(parts))
    if isinstance(graph, Complement):  # of the pairs of these nodes, whatever lies beside them
        return known(Full()) - _replaced(graph.graph, within, choose, known)
    if not isinstance(graph, Union | Difference | SymmetricDifference | Sized):
        raise ValueError(
            f"{type(graph).__name__} can't be made of a graph whose edges are not known before the data: put the "
            f"operation around what `resolve` returns (got {graph})"
        )
    return graph._map(lambda part: _replaced(part, within, choose, known))


def _choices_in(graph: Graph) -> Iterator[_Choice]:
    """The choices in an expression."""
    if isinstance(graph, _Choice):
        yield graph
    for part in graph._children:
        yield from _choices_in(part)


def _checked(q: Any, k: Any, attention_mask: Any) -> tuple[Tensor, Tensor, Tensor | None]:
    """Queries and keys with all their dimensions; raise unless they fit."""
    sides = []
    for name, side in (("q", q), ("k", k)):
        if not isinstance(side, Tensor) or not side.is_floating_point():
            raise TypeError(f"{name} must be a tensor of floating-point numbers (got {_kind(side)})")
        if side.ndim not in (2, 3, 4):
            raise ValueError(f"{name} must have shape (B, H, N, D), (H, N, D) or (N, D) (got {tuple(side.shape)})")
        sides.append(side.reshape((1,) * (4 - side.ndim) + side.shape))
    q, k = sides
    if len(q) != len(k) or q.shape[3] != k.shape[3] or not k.shape[1] or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"q and k must have one batch size and dimension, and q's heads be a multiple of k's (got {tuple(q.shape)} "
            f"and {tuple(k.shape)})"
        )
    if attention_mask is None:
        return q, k, None
    shape = len(k), k.shape[2]
    if not isinstance(attention_mask, Tensor) or attention_mask.dtype != torch.bool or attention_mask.shape != shape:
        raise ValueError(f"attention_mask must be a tensor of bool of shape {shape} (got {_kind(attention_mask)})")
    return q, k, attention_mask


def _filled_up(x: Tensor, nodes: int) -> Tensor:
    """(B, H, N, …) with zeros for further nodes."""
    return x if x.shape[2] == nodes else pad(x, (0, 0) * (x.ndim - 3) + (0, nodes - x.shape[2]))


def _kind(value: object) -> str:
    return f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


# -------------------------------------------------------------------------------------------------- scores


def _scores(q: Tensor, k: Tensor) -> Tensor:
    """q (B, H, N, D), k (B, Hkv, M, D) → q·k (B, H, N, M), in float32 or more."""
    exact = torch.promote_types(q.dtype, torch.float32)
    group = q.shape[1] // k.shape[1]
    by_key_head = q.to(exact).unflatten(1, (k.shape[1], group)).flatten(2, 3)  # consecutive heads share a key head
    with torch.autocast(q.device.type, enabled=False):
        products = by_key_head @ k.to(exact).transpose(2, 3)
    return products.unflatten(2, (group, -1)).flatten(1, 2)


def _means(x: Tensor, block: int, attention_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The mean vector of each block of nodes, (B, H, ⌈N / block⌉, D), and which have nodes that count: bool (B, …)."""
    count, exact = -(-x.shape[2] // block), torch.promote_types(x.dtype, torch.float32)
    counts = x.new_ones(len(x), x.shape[2], dtype=exact)
    if attention_mask is not None:
        counts, x = attention_mask.to(exact), x.masked_fill(~attention_mask[:, None, :, None], 0)
    if more := count * block - x.shape[2]:
        counts, x = pad(counts, (0, more)), pad(x, (0, 0, 0, more))
    total = counts.view(len(x), count, block).sum(2)
    sums = x.unflatten(2, (count, block)).sum(3, dtype=exact)
    return sums / total.clamp(min=1)[:, None, :, None], total > 0


def _allowed_keys(
    graph: Graph, n: int, m: int, heads: int, device: torch.device
) -> Iterator[tuple[int, int, Tensor | None]]:
    """Steps over the queries: start, stop, and the keys that these may hear, int64 (keys,), or None: all."""
    step = max(1, SCORES_PER_STEP // max(1, heads * m))
    if graph == Full():
        yield from ((start, min(start + step, n), None) for start in range(0, n, step))
        return
    start = 0
    while start < n:
        stop = min(start + max(step, ROWS_PER_STEP), n)
        ranges = graph.spans(start, stop, n, m)
        width = sum(last - first for first, last in ranges)
        stop = min(stop, start + max(1, SCORES_PER_STEP // max(1, heads * width)))
        columns = [torch.arange(*each) for each in ranges]
        if columns:
            yield start, stop, torch.cat(columns).to(device)
        start = stop

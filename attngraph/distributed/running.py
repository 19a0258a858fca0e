"""One call on a `ShardedPlan`: block after block, while rows of other ranks travel; forward and backward.

All ranks take part in the same collectives in the same order, whether or not they have rows to send.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from attngraph.distributed.exchange import packed_rows, unpacked_rows
from attngraph.distributed.routes import Block, Nodes, Route, Transfer
from attngraph.kernels.contract import Gradients, Modifiers, NodeNumbers, ScoreBias
from attngraph.kernels.merge import merge
from attngraph.planning.call import Call
from attngraph.planning.execution import kernel_precision
from attngraph.planning.planner import Plan, planned

if TYPE_CHECKING:
    from attngraph.distributed.sharded import ShardedPlan

Wait = Callable[[], Tensor]


class Work(NamedTuple):
    """A block, the nodes held that it is of, and where its distances lie among those of all blocks."""

    block: Block
    queries: Nodes
    keys: Nodes
    distances: slice


class Way:
    """A route of one rank, as all ranks of a group go theirs.

    `of_ranks` says of each, int64 (ranks, 3), how many rows of keys and how many queries come to it, and how many edges
    it computes.
    """

    def __init__(self, route: Route, queries: Nodes, keys: Nodes, of_ranks: Tensor):
        self.route, self.edges = route, of_ranks[:, 2].tolist()
        self.moves_keys, self.moves_queries = (bool(rows.any()) for rows in of_ranks.T[:2])
        at = 0

        def works(blocks: tuple[Block, ...], queries: Nodes, keys: Nodes) -> tuple[Work, ...]:
            nonlocal at
            made = []
            for block in blocks:
                made.append(Work(block, queries, keys, slice(at, at + block.num_distances)))
                at += block.num_distances
            return tuple(made)

        self.own = works(route.own, queries, keys)
        self.stages = [works(stage.blocks, queries, stage.keys.held) for stage in route.stages]
        self.guests = works(route.guests, route.queries.held, keys)
        every = [*self.own, *(work for stage in self.stages for work in stage), *self.guests]
        found = [work.block.distances(work.queries.numbers, work.keys.numbers) for work in every]
        self.distances = torch.cat([torch.empty(0, dtype=torch.int64), *found])
        """Those of all blocks, one after the other: int64. Known before a program that has a bias is compiled."""


class Run:
    """One call."""

    def __init__(self, plan: ShardedPlan, q: Tensor, k: Tensor, v: Tensor, modifiers: Modifiers):
        self.plan, self.q, self.k, self.v = plan, q, k, v
        self.ranks, self.exact = plan.ranks, torch.promote_types(q.dtype, torch.float32)
        numbered = modifiers.edges is not None or (modifiers.bias is not None and modifiers.bias.kind == "edge")
        plan.require_alike(q, k, v, modifiers)
        self.way = plan.way(numbered)
        if modifiers.dropout is not None:
            seed = self.ranks.from_first(modifiers.dropout.seed[None], f"the seed of the dropout on {plan.graph}")[0]
            modifiers = modifiers._replace(dropout=modifiers.dropout._replace(seed=seed))
        self.modifiers = modifiers
        B, H, _, D = q.shape
        Hkv, Dv = k.shape[1], v.shape[3]
        self.of_queries, self.of_keys, self.of_values = (B, H, D), (B, Hkv, D), (B, Hkv, Dv)
        self.of_out, self.of_lse = (B, H, Dv), (B, H, 1)

    # ------------------------------------------------------------------------------------------------ forward

    def forward(self) -> tuple[Tensor, Tensor]:
        """out and lse of the own queries."""
        came, keys = self._ask_guests([self.q]), self._ask_keys(0)
        works, sides = list(self.way.own), (self.q, self.k, self.v, self._mask)
        if works and works[0].block.queries == slice(0, self.q.shape[2]):  # its results are the first sums
            out, lse = self._computed(works.pop(0), *sides)
        else:
            out = self.q.new_zeros(*self.q.shape[:3], self.v.shape[3], dtype=self.exact)
            lse = self.q.new_full(self.q.shape[:3], -torch.inf, dtype=self.exact)
        for work in works:
            self._add(work, *sides, out, lse)
        home = self._answer_guests(came)
        for number, works in enumerate(self.way.stages):
            k, v, mask = self._keys(keys)
            keys = self._ask_keys(number + 1)
            for work in works:
                self._add(work, self.q, k, v, mask, out, lse)
        for row, (part, part_lse) in self._parts(home, self.way.route.queries.sent, [self.of_out, self.of_lse]):
            own, own_lse = out[:, :, row], lse[:, :, row]
            self._merge(own, own_lse, part, part_lse[..., 0])
            out[:, :, row], lse[:, :, row] = own, own_lse
        return out, lse

    def _add(self, work: Work, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, out: Tensor, lse: Tensor) -> None:
        """What one block gives, to out and lse of the queries."""
        queries = work.block.queries
        self._merge(out[:, :, queries], lse[:, :, queries], *self._computed(work, q, k, v, mask))

    def _computed(self, work: Work, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """out and lse of the queries of one block."""
        queries, keys = work.block.queries, work.block.keys
        sides = q[:, :, queries], k[:, :, keys], v[:, :, keys]
        plan, modifiers = self._block_plan(work, *sides), self._of_block(work, mask)
        own_q, own_k, own_v = kernel_precision(plan, *sides)
        out, lse = plan.forward(own_q, own_k, own_v, modifiers)
        return out.to(self.exact), lse.to(self.exact)

    def _merge(self, out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
        if self.modifiers.normalize == "softmax":
            merge(out, lse, part, part_lse)
        else:  # each weight by itself: sums add up
            out += part

    # ----------------------------------------------------------------------------------------------- backward

    def backward(self, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None, bias_grad: bool) -> Gradients:
        """What the own rows, and what all ranks share, get from this rank."""
        self.bias_grad = bias_grad
        self.own = [_Sum(x, self.exact) for x in (self.q, self.k, self.v)]
        bias, terms = self.modifiers.bias, self.modifiers.edges
        self.dbias = torch.zeros_like(bias.values, dtype=self.exact) if bias is not None and bias_grad else None
        self.dterms = [x if x is None else torch.zeros_like(x) for x in ((None,) * 3 if terms is None else terms[:3])]
        results = [out.to(self.exact), lse.to(self.exact)[..., None], dout.to(self.exact)]
        results += [] if dlse is None else [dlse.to(self.exact)[..., None]]
        came, keys = self._ask_guests([self.q.to(self.exact), *results]), self._ask_keys(0)
        home_queries = self._answer_guests_backward(came, has_dlse=dlse is not None)
        home: Wait | None = None
        for number, works in enumerate(self.way.stages):
            k, v, mask = self._keys(keys)
            keys = self._ask_keys(number + 1)
            theirs = [_Sum(x, self.exact) for x in (k, v)]
            for work in works:
                self._add_gradients(work, self.q, k, v, mask, results, [self.own[0], *theirs])
            if home is not None:
                self._add_home(number - 1, home)
            sums = [each.total() for each in theirs]
            home = self._send_home(self.way.route.stages[number].keys, sums, "the gradients of keys and values")
        for work in self.way.own:
            self._add_gradients(work, self.q, self.k, self.v, self._mask, results, self.own)
        if home is not None:
            self._add_home(len(self.way.stages) - 1, home)
        for row, (part,) in self._parts(home_queries, self.way.route.queries.sent, [self.of_queries]):
            self.own[0].add(row, part)
        de, dto_key, dto_value = self.dterms
        dq, dk, dv = (each.total() for each in self.own)
        return Gradients(dq, dk, dv, self.dbias, (de, dto_key, dto_value))

    def _add_gradients(self, work: Work, q, k, v, mask, results: list[Tensor], sums: list[_Sum]) -> None:
        """Those of one block, to the sums of q, k and v."""
        queries, keys = work.block.queries, work.block.keys
        sides = q[:, :, queries], k[:, :, keys], v[:, :, keys]
        out, lse, dout, *dlse = (side[:, :, queries] for side in results)
        plan, modifiers = self._block_plan(work, *sides), self._of_block(work, mask)
        own_q, own_k, own_v, out, dout = kernel_precision(plan, *sides, out.to(q.dtype), dout.to(q.dtype))
        own_dlse = dlse[0][..., 0] if dlse else None
        part = plan.backward(own_q, own_k, own_v, out, lse[..., 0], dout, own_dlse, modifiers, self.bias_grad)
        for total, rows, gradient in zip(sums, (queries, keys, keys), part[:3], strict=True):
            total.add(rows, gradient.to(self.exact))
        bias = modifiers.bias
        if self.dbias is not None and part.dbias is not None and self.modifiers.bias is not None and bias is not None:
            if self.modifiers.bias.kind == "edge":
                self.dbias.index_add_(-1, _of(work.block.numbers), part.dbias.to(self.exact))
            else:
                self.dbias[:, work.distances] += part.dbias.to(self.exact).reshape(bias.values.shape[-2], -1)
        de, *matrices = part.dedges
        if de is not None and self.dterms[0] is not None:
            self.dterms[0].index_add_(1, _of(work.block.numbers), de.to(self.dterms[0].dtype))
        for total, matrix in zip(self.dterms[1:], matrices, strict=True):
            if total is not None and matrix is not None:
                total += matrix

    def _add_home(self, number: int, home: Wait) -> None:
        """The gradients of own keys and values that other ranks found in a stage."""
        sent = self.way.route.stages[number].keys.sent
        for row, (dk, dv) in self._parts(home, sent, [self.of_keys, self.of_values], keys=True):
            self.own[1].add(row, dk)
            self.own[2].add(row, dv)

    # -------------------------------------------------------------------------------------------- what travels

    def _ask_keys(self, stage: int) -> Wait | None:
        """The keys, values and padding of a stage begin to travel."""
        if not self.way.moves_keys or stage >= len(self.way.stages):
            return None
        sides = [self.k, self.v]
        if (mask := self._mask) is not None:
            sides.append(mask[:, None, :, None].to(self.k.dtype))
        transfer = self.way.route.stages[stage].keys
        return self._send(transfer.sent, transfer.received, sides, "keys and values", keys=True)

    def _keys(self, keys: Wait | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Those that have come."""
        if keys is None:
            return self.k[:, :, :0], self.v[:, :, :0], None if self._mask is None else self._mask[:, :0]
        shapes = [self.of_keys, self.of_values, *([] if self._mask is None else [(self.of_keys[0], 1, 1)])]
        k, v, *mask = unpacked_rows(keys(), shapes)
        return k, v, mask[0][:, 0, :, 0] != 0 if mask else None

    def _ask_guests(self, sides: list[Tensor]) -> Wait | None:
        """Queries begin to travel to the ranks that compute them, with what else is known of them."""
        if not self.way.moves_queries:
            return None
        transfer = self.way.route.queries
        return self._send(transfer.sent, transfer.received, sides, "queries")

    def _answer_guests(self, came: Wait | None) -> Wait | None:
        """The results of queries of others by own keys begin to travel home."""
        if came is None:
            return None
        (q,) = unpacked_rows(came(), [self.of_queries])
        out = self.q.new_zeros(*q.shape[:3], self.v.shape[3], dtype=self.exact)
        lse = self.q.new_full(q.shape[:3], -torch.inf, dtype=self.exact)
        for work in self.way.guests:
            self._add(work, q, self.k, self.v, self._mask, out, lse)
        return self._send_home(self.way.route.queries, [out, lse[..., None]], "results of queries")

    def _answer_guests_backward(self, came: Wait | None, has_dlse: bool) -> Wait | None:
        """The gradients of queries of others, the same way."""
        if came is None:
            return None
        more = [self.of_lse] if has_dlse else []
        q, *results = unpacked_rows(came(), [self.of_queries, self.of_out, self.of_lse, self.of_out, *more])
        q = q.to(self.q.dtype)
        theirs = _Sum(q, self.exact)
        for work in self.way.guests:
            self._add_gradients(work, q, self.k, self.v, self._mask, results, [theirs, *self.own[1:]])
        return self._send_home(self.way.route.queries, [theirs.total()], "the gradients of queries")

    def _send(
        self, sent: tuple[Nodes, ...], received: tuple[Nodes, ...], sides: list[Tensor], what: str, keys: bool = False
    ) -> Wait:
        partition = self.plan.key_partition if keys else self.plan.partition
        row = partition.rows(Nodes.joined(list(sent)).numbers).to(self.q.device)
        return self.ranks.exchange(
            packed_rows(sides, row), totals(sent), totals(received), f"sending {what} along {self.plan.graph}"
        )

    def _send_home(self, transfer: Transfer, sides: list[Tensor], what: str) -> Wait:
        """To the ranks from which rows came, what is found of them."""
        everything = torch.arange(sides[0].shape[2], device=self.q.device)
        message, back = packed_rows(sides, everything), (totals(transfer.received), totals(transfer.sent))
        return self.ranks.exchange(message, back[0], back[1], f"returning {what} along {self.plan.graph}")

    def _parts(
        self, home: Wait | None, sent: tuple[Nodes, ...], shapes: list, keys: bool = False
    ) -> Iterator[tuple[Tensor, list[Tensor]]]:
        """What came home from each rank, in their order: the own rows that it is of, and its tensors."""
        if home is None:
            return
        partition, message, at = self.plan.key_partition if keys else self.plan.partition, home(), 0
        for nodes in sent:
            if count := nodes.total:
                row = partition.rows(nodes.numbers).to(self.q.device)
                yield row, unpacked_rows(message[at : at + count], shapes)
                at += count

    # ------------------------------------------------------------------------------------------------ blocks

    @property
    def _mask(self) -> Tensor | None:
        return self.modifiers.attention_mask

    def _block_plan(self, work: Work, q: Tensor, k: Tensor, v: Tensor) -> Plan:
        given = self.modifiers
        bias = given.bias and ("offset" if given.bias.kind == "offset" and work.block.distance is not None else "edge")
        features = (0, 0) if given.edges is None else (given.edges.key_dim, given.edges.value_dim)
        call = Call(
            q.shape[2], k.shape[2], q.shape[1], k.shape[1], k.shape[3], v.shape[3], q.dtype, q.device, bias,
            "dot" if given.transform is None else given.transform.kind, given.normalize,
            padding=given.attention_mask is not None, dropout=given.dropout is not None, part=True,
            key_features=features[0], value_features=features[1], renumbered=given.dropout is not None,
        )  # fmt: skip
        return planned(work.block.graph, call, "auto")

    def _of_block(self, work: Work, mask: Tensor | None) -> Modifiers:
        """The modifiers of a block, of all those of the call."""
        given, block = self.modifiers, work.block
        bias, edges, dropout = given.bias, given.edges, given.dropout
        if bias is not None and bias.kind == "edge":
            bias = ScoreBias("edge", bias.values[..., _of(block.numbers)])
        elif bias is not None:
            values = bias.values[:, work.distances]
            bias = ScoreBias("offset", values) if block.distance is not None else ScoreBias("edge", values[None])
        if edges is not None:
            edges = edges._replace(values=edges.values[:, _of(block.numbers)])
        if dropout is not None:
            numbers = NodeNumbers(
                work.queries.numbers[block.queries].to(self.q.device), work.keys.numbers[block.keys].to(self.q.device)
            )
            dropout = dropout._replace(nodes=numbers)
        mask = mask if mask is None else mask[:, block.keys]
        return given._replace(bias=bias, attention_mask=mask, dropout=dropout, edges=edges)


class _Sum:
    """Gradients of the rows of x (B, H, N, D), of parts in any order: one of all rows is what others add to."""

    def __init__(self, x: Tensor, dtype: torch.dtype):
        self.like, self.dtype = x, dtype
        self.whole: Tensor | None = None
        self.parts: list[tuple[slice | Tensor, Tensor]] = []

    def add(self, rows: slice | Tensor, part: Tensor) -> None:
        """What some rows, each once, get more."""
        if self.whole is None and isinstance(rows, slice) and rows == slice(0, self.like.shape[2]):
            self.whole = part
        else:
            self.parts.append((rows, part))

    def total(self) -> Tensor:
        """The sum."""
        total = torch.zeros_like(self.like, dtype=self.dtype) if self.whole is None else self.whole
        for rows, part in self.parts:
            total[:, :, rows] += part
        return total


def totals(sides: tuple[Nodes, ...]) -> list[int]:
    """How many nodes there are of each rank."""
    return [nodes.total for nodes in sides]


def _of(numbers: Tensor | None) -> Tensor:
    assert numbers is not None, "values of edges need listed blocks"
    return numbers

"""Attention on a graph over the ranks of a process group: each has some of the nodes, and only what crosses travels.

Own queries hear own keys while the keys of others travel; then theirs; the results of disjoint edges merge exactly by
their lse. A query with edges to many keys of another rank moves there instead, and its partial result comes home.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from attngraph.arguments import checked
from attngraph.bias import Bias, DenseBias, EdgeBias, fits_heads, kind_of, placed, score_bias
from attngraph.distributed.exchange import Ranks
from attngraph.distributed.partition import Partition
from attngraph.distributed.routes import Route, Routing
from attngraph.distributed.running import Run, Way
from attngraph.distributed.strategies import Widths, explained, load_of
from attngraph.edge_features import EdgeFeatures, edge_terms
from attngraph.graph.base import require_ints
from attngraph.graph.edge_list import EdgeList
from attngraph.kernels.contract import EdgeTerms, Gradients, Modifiers, ScoreBias
from attngraph.planning.backends.base import only_fused_attention
from attngraph.planning.call import Call
from attngraph.planning.planner import Plan


@dataclass(frozen=True, eq=False, kw_only=True)
class ShardedPlan(Plan):
    """One rank's share of a graph: `attend(q, k, v, plan)` takes the rows of its own nodes, and gives theirs.

    Every rank of the group makes the same calls. See `distribute`.
    """

    ranks: Ranks
    partition: Partition
    """Of the queries."""
    key_partition: Partition
    """Of the keys; the same where a graph is of one set of nodes."""
    stage_rows: int | None
    """How many rows of keys are received at a time from each rank; None: all at once."""
    move_queries: bool = True
    """Whether a query with edges to many keys of another rank may go there."""
    is_whole: ClassVar[bool] = False
    ways: dict[bool, Way] = field(default_factory=dict)
    """As `way` gives them."""
    number: int
    """The same on all ranks, and of this plan alone."""
    _calls: list[None] = field(default_factory=list)

    def __reduce__(self):
        raise TypeError("a sharded plan belongs to a process group, and can't be saved: distribute the graph again")

    def __copy__(self) -> ShardedPlan:
        return self

    @property
    def placement(self) -> tuple:
        """Whose rows this rank has."""
        return (self.ranks.rank, self.ranks.count, self.partition.n, self.partition.digest)

    def __repr__(self) -> str:
        rows = f"{len(self.nodes):,} of {self.partition.n:,} nodes on rank {self.ranks.rank} of {self.ranks.count}"
        return f"ShardedPlan({self.graph}, {rows}, {self.partition.name})"

    @cached_property
    def takes_no_dims(self) -> bool:
        """Whether keys may be of dimension 0."""
        return False

    @cached_property
    def takes_half(self) -> bool:
        """Whether it takes half precision as it is: rows travel in the dtype of q."""
        return True

    @property
    def nodes(self) -> Tensor:
        """The nodes whose rows this rank has, ascending: int64 (rows,)."""
        return self._nodes

    @cached_property
    def _nodes(self) -> Tensor:
        return self.partition.nodes(self.ranks.rank)

    @cached_property
    def key_nodes(self) -> Tensor:
        """The same of the keys."""
        return self.key_partition.nodes(self.ranks.rank)

    @cached_property
    def own_edges(self) -> EdgeList:
        """The edges of the own queries, in the node numbers of the whole graph: those that values of edges are of."""
        query, key = self._routing(numbered=True).own_edges(self.ranks.rank)
        return EdgeList(torch.stack([key, query]), (self.partition.n, self.key_partition.n), is_sorted=True)

    # ------------------------------------------------------------------------------------------- agreement

    def _routing(self, numbered: bool) -> Routing:
        moves = self.move_queries and not numbered  # a value of an edge stays with its query
        return Routing(self.graph, self.partition, self.key_partition, numbered=numbered, move_queries=moves)

    def way(self, numbered: bool = False) -> Way:
        """What this rank computes and sends; `numbered`: so that each edge has a number. All ranks ask at once."""
        if numbered not in self.ways:
            rank = self.ranks.rank
            route = self._routing(numbered).of(rank, self.stage_rows)
            agreed = agreed_on(route, self.ranks, self.call.device)
            self.ways[numbered] = Way(route, self.partition.held(rank), self.key_partition.held(rank), agreed)
        return self.ways[numbered]

    def require_alike(self, q: Tensor, k: Tensor, v: Tensor, modifiers: Modifiers) -> None:
        """Raise on every rank unless all of them make the same call; see `Ranks.checks_calls`, and the first always."""
        if self._calls and not self.ranks.checks_calls:
            return
        bias = None if modifiers.bias is None else modifiers.bias.kind
        kind = {
            "plan": f"number {self.number}, {self.graph}", "batch": len(q), "heads": q.shape[1],
            "key heads": k.shape[1], "dimensions": (q.shape[3], v.shape[3]), "dtype": q.dtype,
            "scale": modifiers.scale, "score": modifiers.transform, "bias": bias,
            "features of edges": modifiers.edges is not None, "padding": modifiers.attention_mask is not None,
            "dropout_p": modifiers.dropout and modifiers.dropout.p, "normalize": modifiers.normalize,
        }  # fmt: skip
        facts = {name: str(value) for name, value in kind.items()}
        require_same(self.ranks, facts, f"attend on {self}", self.call.device)
        if not self._calls:
            self._calls.append(None)

    @checked
    def explain(  # pyright: ignore[reportIncompatibleMethodOverride]  (each rank's call decides its options)
        self, *, heads: int = 8, kv_heads: int | None = None, head_dim: int = 64, dtype: torch.dtype = torch.float32
    ) -> str:
        """What this rank computes, receives and sends, and how evenly all share: a table to read."""
        kv_heads = heads if kv_heads is None else kv_heads
        require_ints(1, heads=heads, kv_heads=kv_heads, head_dim=head_dim)
        if heads % kv_heads:
            raise ValueError(f"heads must be a multiple of kv_heads (got {heads} and {kv_heads})")
        way, widths = self.way(), Widths(heads, kv_heads, head_dim, dtype)
        load = load_of(way.route, self.ranks.rank, len(self.nodes), widths, self.costs)
        return explained(repr(self), load, way.edges, way.route, widths, self.costs)

    # -------------------------------------------------------------------------------------- rows and their nodes

    def scatter(self, x: Tensor, dim: int = -2) -> Tensor:
        """Of x, which has all nodes along a dimension, the rows of this rank: a copy."""
        if not -x.ndim <= dim < x.ndim or x.shape[dim] != self.partition.n:
            raise ValueError(
                f"x must have all {self.partition.n:,} nodes in dimension {dim} (got shape {tuple(x.shape)}): the rows "
                f"of rank {self.ranks.rank} are taken of them"
            )
        return x.index_select(dim, self.nodes.to(x.device))

    def gather(self, x: Tensor, dim: int = -2) -> Tensor:
        """Of x, which has this rank's rows along a dimension, those of all ranks, in the order of the nodes.

        Not differentiable: for what is to be looked at or saved.
        """
        rows = x.detach().movedim(dim, 0)
        counts, own = self.partition.counts, len(self.nodes)
        if len(rows) != own:
            raise ValueError(
                f"x must have the {own} rows of rank {self.ranks.rank} in dimension {dim} (got {len(rows)})"
            )
        most = int(counts.max())
        padded = rows.new_zeros(most, *rows.shape[1:])
        padded[:own] = rows
        parts = self.ranks.to_all(padded, "gathering rows")
        out = rows.new_empty(self.partition.n, *rows.shape[1:])
        for rank, part in enumerate(parts):
            out[self.partition.nodes(rank).to(x.device)] = part[: int(counts[rank])]
        return out.movedim(0, dim)

    # ------------------------------------------------------------------------------------- what `attend` asks

    def fitted(self, call: Call, name: str = "auto") -> Plan:
        """Itself, if it can run the call."""
        self.require_sizes(call)
        self.require_unchanged()
        if name != "auto":
            raise ValueError(f"each rank chooses its own backends: leave out backend={name!r}")
        if (reason := only_fused_attention(call)) is not None or call.return_weights:
            raise ValueError(f"{self} can't run this call ({reason or 'weights stay on the ranks that made them'})")
        return self

    def require_sizes(self, call: Call) -> None:
        """Raise unless a call has the rows of this rank, on the device of the plan."""
        given = call.num_queries, call.num_keys
        if given != (len(self.nodes), len(self.key_nodes)) or call.device.type != self.call.device.type:
            raise ValueError(
                f"rank {self.ranks.rank} has {len(self.nodes)} queries and {len(self.key_nodes)} keys of {self.graph} "
                f"on {self.call.device.type} (got {given[0]} and {given[1]} on {call.device}): x[:, plan.nodes], or "
                f"plan.scatter(x), are its rows"
            )

    def placed(self, bias: Bias, q: Tensor, k: Tensor) -> Bias:
        """As `bias.placed`, of the own edges."""
        graph = self.own_edges if isinstance(bias, EdgeBias) and bias.edges != "sorted" else self.graph
        if isinstance(bias, EdgeBias) and bias.edges == "sorted" and bias.values.shape[-1] != self.edge_values:
            raise ValueError(
                f"an EdgeBias on rank {self.ranks.rank} of a sharded graph needs one value for each of the "
                f"{self.edge_values:,} edges of its own queries, plan.own_edges (got {bias.values.shape[-1]:,})"
            )
        return placed(bias, graph, self.partition.n, self.key_partition.n, q)

    def edge_terms(self, features: EdgeFeatures, q: Tensor, k: Tensor) -> EdgeTerms | None:
        """As `edge_features.edge_terms`, of the own edges."""
        graph = self.graph if features.edges == "sorted" else self.own_edges
        return edge_terms(features, graph, self.partition.n, self.key_partition.n, q)

    def score_bias(self, bias: Bias | None, q: Tensor, k: Tensor) -> tuple[ScoreBias | None, Tensor | None]:
        """A bias of distances as one number for each distance of each block, block after block."""
        if bias is None or kind_of(bias) == "edge":
            return score_bias(bias, q, k)
        if isinstance(bias, DenseBias):
            if bias.values.shape[-1] == 1:
                return score_bias(bias, q, k)
            raise ValueError("a bias of all pairs is not sharded: give an EdgeBias of the edges of the own queries")
        ahead = self.way().distances.to(q.device)
        values = bias.at((-ahead).clamp(min=0), ahead.clamp(min=0))
        return ScoreBias("offset", fits_heads(values, q, edge_dims=1)), None

    # ---------------------------------------------------------------------------------------- forward, backward

    def forward(self, q: Tensor, k: Tensor, v: Tensor, modifiers: Modifiers) -> tuple[Tensor, Tensor]:
        """Own rows in, own rows out; see `Plan.forward`."""
        return Run(self, q, k, v, modifiers).forward()

    def backward(
        self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None,
        modifiers: Modifiers, bias_grad: bool,
    ) -> Gradients:  # fmt: skip
        """The gradients of own rows; of what all ranks share, as a bias, what this rank adds to them."""
        return Run(self, q, k, v, modifiers).backward(out, lse, dout, dlse, bias_grad)


MAX_SHOWN = 300  # characters of what differs, in an error


def agreed_on(route: Route, ranks: Ranks, device: torch.device) -> Tensor:
    """Of each rank how many rows of keys and how many queries come to it, and its edges: int64 (ranks, 3)."""
    own = torch.tensor([route.halo_rows, route.queries.held.total, route.edges], device=device)
    return ranks.to_all(own, "agreeing on routes").cpu()


def require_same(ranks: Ranks, facts: dict[str, str], what: str, device: torch.device) -> None:
    """Raise ValueError on every rank, naming those that differ, unless facts are the same on all of them."""
    digests = [zlib.crc32(fact.encode()) for fact in facts.values()]
    together = torch.tensor([zlib.crc32(repr(digests).encode())], device=device)
    doing = f"comparing what the ranks ask of {what}"
    if (all_together := ranks.to_all(together, doing)).eq(all_together[0]).all():
        return
    found = ranks.to_all(torch.tensor(digests, device=device), doing).tolist()
    for number, (name, fact) in enumerate(facts.items()):
        by_rank = [digest[number] for digest in found]
        usual = max(set(by_rank), key=by_rank.count)
        others = [rank for rank, digest in enumerate(by_rank) if digest != usual]
        if others:
            ranks_of = "all ranks" if by_rank.count(usual) == 1 else f"rank {', '.join(map(str, others))}"
            fact = fact if len(fact) <= MAX_SHOWN else f"{fact[:MAX_SHOWN]}… ({len(fact):,} characters)"
            raise ValueError(
                f"all {ranks.count} ranks must ask for the same in {what}: {name} is not the same on {ranks_of} "
                f"(rank {ranks.rank} has {fact})"
            )

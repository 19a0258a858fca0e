"""What is compared, and with whom: the graphs of `benchmarks.attention`, and attention on them as others compute it.

A peer is a function from a task to attention(q, k, v): what it does once for a graph (a mask, a table, a plan) happens
in the function, what it does at every call in what it returns. Each is written as its users would write it at its best.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from importlib.util import find_spec
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import and_masks, create_block_mask, flex_attention, or_masks
from torch.nn.functional import scaled_dot_product_attention

from attngraph import (
    Causal,
    Documents,
    EdgeList,
    Global,
    Graph,
    Neighborhood,
    Prefix,
    Random,
    Window,
    analysis,
    attend,
    comparison,
    parse,
    plan,
    to_block_mask,
)
from attngraph.graph.base import at_size

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
PHASES: tuple[str, str] = ("forward", "forward + backward")
MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # FlexAttention's (batch, head, q_idx, kv_idx) → bool

# --------------------------------------------------------- closed forms, as users of FlexAttention write their masks


def near(left: int, right: int) -> MaskMod:
    return lambda b, h, q_idx, kv_idx: (kv_idx >= q_idx - left) & (kv_idx <= q_idx + right)


def causal(b, h, q_idx, kv_idx):
    return kv_idx <= q_idx


def prefix(length: int) -> MaskMod:
    return lambda b, h, q_idx, kv_idx: (q_idx >= 0) & (kv_idx < length)


def first_are_global(count: int) -> MaskMod:
    return lambda b, h, q_idx, kv_idx: (q_idx < count) | (kv_idx < count)


def same_document(lengths: Sequence[int], device: str = "cpu") -> MaskMod:
    document = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)).to(device)
    return lambda b, h, q_idx, kv_idx: document[q_idx] == document[kv_idx]


def near_on_grid(side: int, radius: int) -> MaskMod:
    def mask_mod(b, h, q_idx, kv_idx):
        down, across = q_idx // side - kv_idx // side, q_idx % side - kv_idx % side
        return (down.abs() <= radius) & (across.abs() <= radius)

    return mask_mod


def drawn(degree: int, n: int, device: str = "cpu") -> MaskMod:
    """Random(degree) from a table: query i hears one key, table[i, s], in each of `degree` stretches s of keys."""
    table = Random(degree).edge_index(n, n)[0].view(n, degree).to(device)
    return lambda b, h, q_idx, kv_idx: table[q_idx, ((kv_idx + 1) * degree - 1) // n] == kv_idx


# ------------------------------------------------------------------------------------------- irregular graphs, seeded


def documents(n: int) -> tuple[int, ...]:
    """Lengths that add up to n: most are short, some twenty times as long, on average 512."""
    cuts = np.cumsum(np.random.default_rng(0).lognormal(5.74, 1.0, n // 64 + 1)).astype(int)
    return tuple(np.diff([0, *cuts[cuts < n], n]).tolist())


def edge_list(key: np.ndarray, query: np.ndarray, n: int) -> EdgeList:
    """These edges, and every node hears itself."""
    own = np.arange(n)
    return EdgeList(np.stack([np.concatenate([key, own]), np.concatenate([query, own])]), size=n)


def uniform(n: int) -> EdgeList:
    """About 16 keys a query, all equally likely; a query may hear nobody."""
    return EdgeList(np.random.default_rng(0).integers(n, size=(2, 16 * n)), size=n)


def power_law(n: int) -> EdgeList:
    """About 10 n edges; the i-th node is heard in proportion to i^-0.7 and hears so too; node 0 hears n / 2 nodes."""
    random = np.random.default_rng(0)
    chance = np.arange(1, n + 1) ** -0.7
    key, query = (random.permutation(n)[random.choice(n, 9 * n - n // 2, p=chance / chance.sum())] for _ in range(2))
    hub = random.choice(n, n // 2, replace=False)
    return edge_list(np.concatenate([key, hub]), np.concatenate([query, np.zeros_like(hub)]), n)


def clusters(n: int) -> EdgeList:
    """A stochastic block model: blocks of 128, about 1/4 of the pairs within one, and 4 edges a node to all."""
    random = np.random.default_rng(0)
    within = n * 128 // 4
    query = np.concatenate([random.integers(n, size=within), random.integers(n, size=4 * n)])
    key = np.concatenate(
        [query[:within] // 128 * 128 + random.integers(128, size=within), random.integers(n, size=4 * n)]
    )
    return edge_list(np.minimum(key, n - 1), query, n)


def small_world(n: int) -> EdgeList:
    """A square grid where each node hears its four neighbours, and a tenth of the nodes one far away."""
    side, random = math.isqrt(n), np.random.default_rng(0)
    node = np.arange(side * side).reshape(side, side)
    key = np.concatenate([node[:, :-1].ravel(), node[:-1].ravel(), random.integers(side * side, size=n // 10)])
    query = np.concatenate([node[:, 1:].ravel(), node[1:].ravel(), random.integers(side * side, size=n // 10)])
    return edge_list(np.concatenate([key, query]), np.concatenate([query, key]), side * side)


# -------------------------------------------------------------------------------------------------------- workloads


class Workload(NamedTuple):
    """A graph of n nodes, at which sizes, and what its users write for FlexAttention (None: look into a dense mask).

    What they write is a function of n and of the device.
    """

    name: str
    graph: Callable[[int], Graph]
    mask_mod: Callable[[int, str], MaskMod] | None
    sizes: tuple[int, ...] = (512, 2048, 8192, 32_768, 131_072)
    dim: int = 64
    causal: bool = False  # all edges are causal, so that SDPA's is_causal computes at least these


SQUARES = (1024, 4096, 16_384, 65_536)
WORKLOADS = [
    Workload("window", lambda n: Window(256, 0), lambda n, device: near(256, 0), causal=True),
    Workload(
        "window + sinks",
        lambda n: Causal() & (Window(256, 0) | Prefix(4)),
        lambda n, device: and_masks(causal, or_masks(near(256, 0), prefix(4))),
        causal=True,
    ),
    Workload(
        "BigBird",
        lambda n: Window(192, 192) | Global(tuple(range(64))) | Random(3),
        lambda n, device: or_masks(near(192, 192), first_are_global(64), drawn(3, n, device)),
    ),
    Workload(
        "mixed",
        lambda n: Window(256, 0) | Prefix(4) | Random(8),
        lambda n, device: or_masks(near(256, 0), prefix(4), drawn(8, n, device)),
        (512, 2048, 8192, 65_536, 131_072),
    ),
    Workload(
        "neighbourhood",
        lambda n: Neighborhood((math.isqrt(n),) * 2, 6),
        lambda n, device: near_on_grid(math.isqrt(n), 6),
        SQUARES,
    ),
    Workload(
        "documents",
        lambda n: Causal() & Documents(documents(n)),
        lambda n, device: and_masks(causal, same_document(documents(n), device)),
        causal=True,
    ),
    Workload("causal", lambda n: Causal(), lambda n, device: causal, causal=True),
    Workload("power law", power_law, None, (1600, 6400, 25_000, 100_000), dim=16),
    Workload("uniform", uniform, None, (1250, 5000, 20_000, 80_000), dim=16),
    Workload("clusters", clusters, None),
    Workload("small world", small_world, None, SQUARES),
]


@dataclass(frozen=True)
class Task:
    """A workload at one size: what a peer may know before q, k and v arrive."""

    workload: Workload
    nodes: int
    device: str = "cpu"
    heads: int = 8

    @cached_property
    def graph(self) -> Graph:
        return self.workload.graph(self.nodes)

    @cached_property
    def n(self) -> int:
        """The number of nodes: the largest square at most `nodes`, where the graph is a grid."""
        return self.graph.size[0] or self.nodes

    @cached_property
    def edges(self) -> tuple[Tensor, Tensor]:
        """(query, key), each (E,), sorted by query."""
        key, query = self.graph.edge_index(self.n, self.n).to(self.device)
        return query, key

    @property
    def dtype(self) -> torch.dtype:
        """What is usual on the device."""
        return torch.float32 if self.device == "cpu" else torch.bfloat16

    @property
    def scale(self) -> float:
        return self.workload.dim**-0.5

    def mask(self) -> Tensor:
        """The dense bool mask (n, n), a few rows at a time."""
        graph, n, _ = at_size(self.graph, self.n, self.n)
        mask, rows = torch.empty(n, n, dtype=torch.bool, device=self.device), max(1, (1 << 20) // n)
        every = torch.arange(n, device=self.device)
        for some in every.split(rows):
            mask[some[0] : some[-1] + 1] = graph.contains(some[:, None], every)
        return mask

    def inputs(self, node_major: bool, grad: bool) -> list[Tensor]:
        """q, k, v and the gradient that arrives, each (1, H, N, D), or (N, H, D) for a node-major peer.

        In memory sequences have the heads first, which suits SDPA; and graphs the nodes, as layers of PyG make them.
        """
        random = torch.Generator().manual_seed(0)
        sides = [torch.randn(1, self.heads, self.n, self.workload.dim, generator=random) for _ in range(4)]
        sides = [side.to(self.device, self.dtype) for side in sides]
        if node_major or self.workload.mask_mod is None:
            sides = [side[0].transpose(0, 1).contiguous() for side in sides]
            sides = sides if node_major else [side.transpose(0, 1)[None] for side in sides]
        return [side.requires_grad_(grad and place < 3) for place, side in enumerate(sides)]


OWN = "graph "  # begins the name of a workload that is a graph of one's own, written as `parse` reads it


def workload_of(name: str) -> Workload:
    if not name.startswith(OWN):
        return next(known for known in WORKLOADS if known.name == name)
    graph = parse(name.removeprefix(OWN))
    size = graph.size[0]
    sizes = (512, 2048, 8192) if size is None else (size,)

    def mask_mod(n: int, device: str) -> MaskMod:
        return to_block_mask(graph, n, n, device=device).mask_mod

    return Workload(name, lambda n: graph, mask_mod, sizes, causal=analysis.is_causal(graph, sizes[-1]))


# ------------------------------------------------------------------------------------------------------------ peers


def call_of(phase: str, attention: Attention, sides: Sequence[Tensor]) -> Callable[[], Tensor | tuple[Tensor, ...]]:
    """One call of a phase: the result (forward), or the gradients of q, k and v; sides are these and the upstream."""
    q, k, v, upstream = sides

    def forward() -> Tensor:
        with torch.no_grad():
            return attention(q, k, v)

    def both() -> tuple[Tensor, ...]:
        return torch.autograd.grad(attention(q, k, v), (q, k, v), upstream)

    return forward if phase == PHASES[0] else both


def on_plan(graph: Graph, n: int, device: str, *, heads: int, dim: int, backend: str = "auto") -> Attention:
    """`attend` with a plan made now."""
    return partial(attend, graph=plan(graph, n, n, heads=heads, head_dim=dim, device=device, backend=backend))


def sdpa_mask(task: Task) -> Attention:
    """PyTorch's attention with a dense bool mask."""
    return partial(scaled_dot_product_attention, attn_mask=task.mask())


def sdpa_causal(task: Task) -> Attention:
    """PyTorch's flash kernel for all causal pairs: more edges than the graph has, and without a mask to read."""
    return partial(scaled_dot_product_attention, is_causal=True)


torch._dynamo.config.recompile_limit = 256  # each size and mask is compiled for itself, and stays compiled
compiled_block_mask = torch.compile(create_block_mask, dynamic=False)
compiled_flex = torch.compile(flex_attention, dynamic=False)


def flex(task: Task) -> Attention:
    """FlexAttention, it and its block mask compiled, as its documentation advises."""
    if task.workload.mask_mod:
        mask_mod = task.workload.mask_mod(task.n, task.device)
    else:
        mask = task.mask()

        def mask_mod(b, h, q_idx, kv_idx):
            return mask[q_idx, kv_idx]

    block_mask = compiled_block_mask(mask_mod, None, None, task.n, task.n, device=task.device)
    return partial(compiled_flex, block_mask=block_mask)


def gather_scatter(task: Task) -> Attention:
    """What PyG's TransformerConv does, its edges sorted by target: gather, softmax over each node's edges, add up."""
    return comparison.gather_scatter(*task.edges, task.n, task.scale)


def gather_scatter_compiled(task: Task) -> Attention:
    return torch.compile(gather_scatter(task), dynamic=False)


def flash_attn(task: Task) -> Attention:
    """Tri Dao's own package, on the window that it knows; it takes (B, N, H, D)."""
    from flash_attn import flash_attn_func

    window = (task.graph.left, task.graph.right)

    def attention(q, k, v):
        return flash_attn_func(*(side.transpose(1, 2) for side in (q, k, v)), window_size=window).transpose(1, 2)

    return attention


GATHERED = 1 << 21  # numbers of K that the padded baseline gathers at once: 8 MiB, faster here than more or fewer


def padded(task: Task) -> Attention:
    """Neighbours in tables: nodes bucketed by degree (powers of two), padded to the bucket's longest, in chunks."""
    query, key = task.edges
    degree = torch.bincount(query, minlength=task.n)
    start, order = degree.cumsum(0) - degree, degree.argsort()
    buckets = order.split(
        torch.bincount(degree[order].clamp(min=1).log2().ceil().long() + (degree[order] > 0)).tolist()
    )
    tables = []
    for bucket in buckets:
        longest = int(degree[bucket].max()) if len(bucket) else 0
        for nodes in bucket.split(max(1, GATHERED // (max(longest, 1) * task.heads * task.workload.dim))):
            place = torch.arange(longest, device=nodes.device)
            is_edge = place < degree[nodes, None]  # (n, longest)
            tables.append((nodes, key[(start[nodes, None] + place).where(is_edge, 0)], ~is_edge[..., None]))
    back = order.argsort()

    def attention(q, k, v):  # (1, H, N, D)
        parts = []
        for nodes, keys, padding in tables:
            near_k, near_v = (side[0].index_select(1, keys.view(-1)).unflatten(1, keys.shape) for side in (k, v))
            scores = near_k @ (q[0].index_select(1, nodes) * task.scale)[..., None]  # (H, n, longest, 1)
            weights = scores.masked_fill(padding, -torch.inf).softmax(-2)
            parts.append((weights.mT @ near_v)[:, :, 0])
        return torch.cat(parts, 1).index_select(1, back)[None]

    return attention


def ours(backend: str) -> Callable[[Task], Attention]:
    """`attend`; a backend that is named makes its layout at the first call."""

    def build(task: Task) -> Attention:
        if backend == "auto":
            on_plan(task.graph, task.n, task.device, heads=task.heads, dim=task.workload.dim)
        return partial(attend, graph=task.graph, backend=backend)

    return build


class Peer(NamedTuple):
    """A way to compute attention, and what must be known to treat it fairly."""

    name: str
    build: Callable[[Task], Attention]
    node_major: bool = False  # takes and gives (N, H, D)
    compiles: bool = False  # its first build and call take long, and say nothing
    all_causal: bool = False  # computes all causal edges, whatever the graph
    only: Callable[[Workload], bool] = lambda workload: True
    package: str | None = None  # that must be installed, beside ours
    gpu: bool = False  # runs on nothing else

    def absent(self, device: str) -> str | None:
        """Why it can't be here."""
        if self.package and find_spec(self.package.replace("-", "_")) is None:
            return f"{self.package} is not installed"
        return "runs on a GPU only" if self.gpu and device == "cpu" else None


AUTO, SDPA_MASK, SDPA_CAUSAL = "ours, auto", "SDPA + mask", "SDPA is_causal, all edges"
FLEX, PYG, PYG_COMPILED = "FlexAttention", "PyG", "PyG compiled"
PEERS = [
    Peer(AUTO, ours("auto"), compiles=True),
    Peer("ours, tiles", ours("tiles"), compiles=True),
    Peer("ours, rows", ours("rows"), compiles=True),
    Peer(SDPA_MASK, sdpa_mask),
    Peer(SDPA_CAUSAL, sdpa_causal, all_causal=True, only=lambda workload: workload.causal),
    Peer(FLEX, flex, compiles=True),
    Peer("flash-attn", flash_attn, package="flash-attn", gpu=True, only=lambda workload: workload.name == "window"),
    Peer(PYG, gather_scatter, node_major=True),
    Peer(PYG_COMPILED, gather_scatter_compiled, node_major=True, compiles=True),
    Peer("padded buckets", padded),
]

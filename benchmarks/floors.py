"""What the goals of benchmarks/gpu.py must cost on an H200 by arithmetic alone, before anything is measured.

    python -m benchmarks.floors      writes results/floors.json; needs no GPU

The lower bound of a roofline: the larger of FLOP over the rate of a matrix product and bytes over the rate of a copy.
Kernels with a softmax between their products reach about half of that rate (`SHARE`), and gathers `GATHERED` of theirs.
FlexAttention is expected to reach the same share, of the pairs of *its* blocks of 128 × 128: by that alone it is as
fast in windows.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from attngraph import Causal, Full, Graph, Prefix, Window
from benchmarks.experiment import Experiment, Figures, Records
from benchmarks.internals import TILE, pairs_of_tiles, parts
from benchmarks.page import Keep, prose, table
from benchmarks.peers import PHASES, workload_of

NAME = "floors"
H200 = (790e12, 4.3e12)  # FLOP/s of a product in bfloat16, bytes/s of a copy
SHARE, GATHERED = 0.55, 0.7
FLEX = (128, 128)
PRODUCTS = dict(zip(PHASES, (2, 9), strict=True))  # S and O; then S, dP, dQ by query; S, dP, dV, dK by key
PASSES = dict(zip(PHASES, (4, 18), strict=True))  # over q, k, v, out; then also dout, dq, dk, dv
WORKLOADS = {"BigBird": "BigBird", "documents": "causal packed documents", "neighbourhood": ""}  # and what to call them
IRREGULAR = (
    ("uniform random", 1_000_000, 32_000_000, 4, 64, "floor ≥ 70% of the time"),
    ("power law like yelp", 716_847, 13_954_819, 1, 128, "≤ 1.7 ms"),
    ("power law like igb_medium", 10_000_000, 120_077_694, 1, 128, "≤ 17 ms"),
    ("power law like ogbn-products", 2_449_029, 123_718_280, 1, 128, "≤ 15 ms"),
)


@dataclass(frozen=True)
class Work:
    """What is multiplied and moved."""

    flops: float = 0.0
    bytes: float = 0.0

    def least(self, rate: tuple[float, float] = H200) -> float:
        """Milliseconds, at these FLOP/s and bytes/s."""
        return max(self.flops / rate[0], self.bytes / rate[1]) * 1e3

    def expected(self, rate: tuple[float, float] = H200) -> float:
        """The same where products reach their usual share."""
        return Work(self.flops / SHARE, self.bytes).least(rate)


def tiled(pairs: int, n: int, heads: int, dim: int, phase: str) -> Work:
    """Attention over so many pairs of tiles, two bytes a number."""
    return Work(2 * PRODUCTS[phase] * pairs * heads * dim, PASSES[phase] * 2 * n * heads * dim)


def gathered(edges: int, heads: int, dim: int, phase: str) -> Work:
    """Attention edge by edge: K and V of each; then again by query, and q and dout by key, with what is written."""
    return Work(0.0, {"forward": 1, "forward + backward": 3.5}[phase] * 4 * dim * edges * heads)


def flash(edges: int, heads: int, dim: int, phase: str) -> Work:
    """All-pairs attention by PyTorch's kernel, whose backward takes one pass: S, dP, dQ, dK, dV."""
    return Work(2 * {"forward": 2, "forward + backward": 7}[phase] * edges * heads * dim)


def step(parameters: int, tokens: int, attention: Work) -> Work:
    """A training step: two products forward and four backward for each parameter and token."""
    return Work(6.0 * parameters * tokens + attention.flops)


@dataclass(frozen=True)
class Line:
    """A goal, what it costs at least, and what is expected."""

    text: str
    goal: str
    least_ms: float
    expected: str


def lines() -> Iterator[Line]:
    """Each workload of benchmarks/gpu.py."""
    for graph in (Causal(), Full()):
        for phase in PHASES:
            work = flash(graph.num_edges(8192, 8192), 16, 128, phase)
            text = f"{graph}, N = 8,192, H = 16, D = 128, {phase}"
            yield Line(text, "≤ 1.02 of SDPA's time", work.least(), "1.00: it is SDPA's kernel")
    for dim in (64, 128):
        yield from beside_flex("Window(1024, 0)", Window(1024, 0), 65_536, dim, ("≥ 1.15", "≥ 1.1"))
    for nodes in (32_768, 131_072):
        for workload, name in WORKLOADS.items():
            graph = workload_of(workload).graph(nodes)
            yield from beside_flex(name or str(graph), graph, graph.size[0] or nodes, 64, ("≥ 1.15", "≥ 1.15"))
    yield from largest()
    yield from irregular()
    yield from in_parts()


def beside_flex(name: str, graph: Graph, n: int, dim: int, goals: tuple[str, str]) -> Iterator[Line]:
    banded, residual = parts(graph, n)  # what tiles run, and what rows do
    pairs, edges, of_flex = pairs_of_tiles(banded, n), residual.num_edges(n, n), pairs_of_tiles(graph, n, FLEX)
    for phase, goal in zip(PHASES, goals, strict=True):
        tiles, rows = tiled(pairs, n, 16, dim, phase), gathered(edges, 16, dim, phase)
        ours = tiles.expected() + rows.least() / GATHERED
        ratio = tiled(of_flex, n, 16, dim, phase).expected() / ours
        text, expected = f"{name}, N = {n:,}, H = 16, D = {dim}, {phase}", f"{ours:.2f} ms; {ratio:.2f} times"
        yield Line(text, f"{goal} times as fast as FlexAttention", tiles.least() + rows.least(), expected)


def largest() -> Iterator[Line]:
    """The longest window that fits."""
    for n, arrays, phase in ((280_000_000, 4, "forward"), (140_000_000, 7, "forward + backward")):
        sample = 1 << 20
        pairs = pairs_of_tiles(Window(256, 0), sample) * n // sample
        tiles = pairs // (TILE[0] * TILE[1])
        gib = (arrays * 2 * 64 * n + 8 * n + tiles * (3 * 8 + 3 * 4)) / 2**30  # numbers, lse and Δ, table and rows
        text, work = f"Window(256, 0), {n:,} nodes, one head, D = 64, {phase}", tiled(pairs, n, 1, 64, phase)
        yield Line(text, "fits in 139 GiB", work.least(), f"{gib:.0f} GiB, {work.expected():.0f} ms")


def irregular() -> Iterator[Line]:
    """Edges gathered one by one."""
    for name, nodes, edges, heads, dim, goal in IRREGULAR:
        for phase, wanted in zip(PHASES, (goal, "runs"), strict=True):
            least = gathered(edges, heads, dim, phase).least()
            text = f"{name}, {nodes:,} nodes, {edges:,} edges, H = {heads}, D = {dim}, {phase}"
            yield Line(text, wanted, least, f"{least / GATHERED:.2f} ms where caches remember nothing")
    for n, arrays, halves, phase in ((229_000_000, 4, 1, "forward"), (114_500_000, 7, 2, "forward + backward")):
        gib = (arrays * 2 * 64 * n + 8 * n + halves * (4 * 32 + 8) * n) / 2**30  # numbers, lse and Δ, edges
        least = gathered(32 * n, 1, 64, phase).least()
        text = f"uniform random, {n:,} nodes, {32 * n:,} edges, one head, D = 64, {phase}"
        yield Line(text, "fits in 139 GiB", least, f"{gib:.0f} GiB, {least / GATHERED:.0f} ms")


def in_parts() -> Iterator[Line]:
    """A graph of tiles and rows, and training steps."""
    banded, n = Window(512, 0) | Prefix(16), 262_144
    works = tiled(pairs_of_tiles(banded, n), n, 8, 64, "forward"), gathered(16 * n, 8, 64, "forward")
    expected = works[0].expected() + works[1].least() / GATHERED
    text = f"{banded} | Random(16), N = {n:,}, H = 8, D = 64, forward"
    yield Line(text, "faster than tiles or rows alone", sum(part.least() for part in works), f"{expected:.2f} ms")
    for graph, n, batch, goal in (
        (Causal(), 1024, 8, "≤ 1.02 of the time on SDPA"),
        (Causal() & (Window(512, 0) | Prefix(4)), 32_768, 1, "≥ 1.1 times as fast as on FlexAttention"),
    ):
        attention = tiled(pairs_of_tiles(graph, n) * batch, n * batch, 12 * 12, 64, "forward + backward")
        work = step(124_000_000, batch * n, attention)
        text = f"a training step of GPT-2's size, {graph}, block {n:,}, batch {batch}"
        yield Line(text, goal, work.least(), f"{work.expected():.0f} ms")


def run(options: Namespace) -> Iterator[Figures]:
    yield {line.text: {**asdict(line), "section": NAME} for line in lines()}


def render(records: Records, keep: Keep) -> Iterator[str]:
    rates = f"{H200[0] / 1e12:.0f} TFLOP/s and {H200[1] / 1e12:.1f} TB/s"
    yield from prose(f"""
        `python -m benchmarks.floors`: what an H200 must take at least, at {rates}, and what is expected of it where
        products reach {SHARE:.0%} of their rate and gathers {GATHERED:.0%} of theirs:
    """)
    rows = [
        [line["text"], line["goal"], f"{line['least_ms']:.2f}", line["expected"]] for line in records[NAME].values()
    ]
    yield from table(["", "goal", "at least, ms", "expected"], rows)


EXPERIMENT = Experiment(NAME, __doc__, run, render, headline="least_ms")

if __name__ == "__main__":
    EXPERIMENT.main()

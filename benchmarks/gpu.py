"""Attention on a GPU, beside PyTorch's SDPA and FlexAttention in the same run.

    python -m benchmarks.gpu                              every section, under 8 minutes
    python -m benchmarks.gpu --section dense --section window

Each section is recorded when it is done, in results/gpu.json; --missing runs those alone that are not there yet. First
the results are compared with float64 on this device. Contestants are compiled, warmed up and timed in turn by CUDA
events; medians with quartiles. `predicted` is the arithmetic of benchmarks/floors.py at the rates of this GPU.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

import attngraph
from attngraph import (
    Causal,
    Documents,
    EdgeList,
    Full,
    Global,
    Graph,
    Machine,
    Neighborhood,
    Prefix,
    Random,
    Window,
    attend,
    from_edge_index,
    plan,
)
from attngraph.graph.base import list_edges
from attngraph.models import GPT
from attngraph.nn import TransformerConfig
from benchmarks import floors
from benchmarks.measure import RESULTS, machine, quartiles, spread
from benchmarks.peers import (
    WORKLOADS,
    and_masks,
    causal,
    compiled_block_mask,
    compiled_flex,
    documents,
    drawn,
    first_are_global,
    near,
    near_on_grid,
    or_masks,
    prefix,
    same_document,
)

NAME = "gpu"


class Figure(NamedTuple):
    """One line of the table: what was wanted and reached, or why not."""

    text: str
    wanted: float
    reached: float | str
    at_most: bool = False
    ours_ms: list[float] | None = None
    theirs_ms: list[float] | None = None
    predicted_ms: float | None = None

    @property
    def yes(self) -> bool:
        if isinstance(self.reached, str):
            return False
        return self.reached <= self.wanted if self.at_most else self.reached >= self.wanted


def timed(runs: dict[str, Callable[[], object]], repeats: int = 20) -> dict[str, list[float]]:
    """Milliseconds of several functions, in turn and in another order each round, after three calls to warm up."""
    for run in runs.values():
        for _ in range(3):
            run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    order = random.Random(0)
    for _ in range(repeats):
        for name in order.sample(list(runs), len(runs)):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            start.record()
            runs[name]()
            end.record()
            torch.cuda.synchronize()
            times[name].append(start.elapsed_time(end))
    return times


def sides_of(n: int, heads: int, dim: int, dtype=torch.bfloat16) -> list[Tensor]:
    """q, k, v that want gradients, and the gradient of the result."""
    sides = [torch.randn(1, heads, n, dim, device="cuda", dtype=dtype) for _ in range(4)]
    return [*(side.requires_grad_() for side in sides[:3]), sides[3]]


def both(attention: Callable, sides: list[Tensor]) -> Callable:
    q, k, v, up = sides
    return lambda: torch.autograd.grad(attention(q, k, v), (q, k, v), up)


def forward(attention: Callable, sides: list[Tensor]) -> Callable:
    q, k, v, _ = sides

    def run():
        with torch.no_grad():
            return attention(q, k, v)

    return run


def compared(
    text: str, wanted: float, ours: Callable, theirs: Callable, predicted: float | None, at_most=False
) -> Figure:
    """Ours beside theirs: their time over ours; with `at_most`, ours over theirs."""
    times = timed({"ours": ours, "theirs": theirs})
    ours_ms, theirs_ms = (quartiles(times[name]) for name in ("ours", "theirs"))
    pairs = zip(times["ours"], times["theirs"], strict=True)
    ratio = quartiles([a / b if at_most else b / a for a, b in pairs])[1]
    return Figure(text, wanted, ratio, at_most, ours_ms, theirs_ms, predicted)


# ------------------------------------------------------------------------------------------------ the sections


def rates() -> tuple[float, float]:
    """FLOP/s of a product in bfloat16, and bytes/s of a copy, counting both ways."""
    a, b = torch.randn(2, 8192, 8192, device="cuda", dtype=torch.bfloat16)
    whole, to = torch.empty(2, 1 << 30, device="cuda", dtype=torch.uint8)
    times = timed({"product": lambda: a @ b, "copy": lambda: to.copy_(whole)})
    seconds = {name: quartiles(each)[1] / 1e3 for name, each in times.items()}
    return 2 * 8192**3 / seconds["product"], 2 * (1 << 30) / seconds["copy"]


def correctness(rate) -> Iterator[Figure]:
    """The largest error of each kernel, over that of SDPA in the same precision."""
    graphs = [Causal(), Window(100, 0) | Prefix(4), Window(30, 30) | Global([0]) | Random(3), Neighborhood((32, 32), 3)]
    for graph in graphs:
        for dim in (64, 128):
            q, k, v, up = sides_of(1024, 4, dim)
            mask = graph.mask(1024, 1024, "cuda")

            def masked(*sides, mask=mask):
                return scaled_dot_product_attention(*sides, attn_mask=mask)

            wide = [side.detach().double().requires_grad_() for side in (q, k, v)]
            right = [masked(*wide), *both(masked, [*wide, up.double()])()]
            found = [
                [run(q, k, v), *both(run, [q, k, v, up])()]
                for run in (
                    lambda *sides: attend(*sides, graph, backend="tiles"),  # noqa: B023  called here
                    lambda *sides: attend(*sides, graph, backend="rows"),  # noqa: B023
                    masked,
                )
            ]
            apart = [[(a - b).detach().abs().max() for a, b in zip(each, right, strict=True)] for each in found]
            errors = [float(torch.stack(each).max()) for each in apart]  # NaN, if any is
            for backend, error in zip(("tiles", "rows"), errors, strict=False):
                text = f"{graph}, D = {dim}, {backend}: error over that of SDPA in bfloat16"
                yield Figure(text, 1.5, error / errors[2], True)


def dense(rate) -> Iterator[Figure]:
    for graph in (Causal(), Full()):
        for name, phase in (("forward", forward), ("forward + backward", both)):
            sides = sides_of(8192, 16, 128)
            ours = phase(lambda q, k, v, graph=graph: attend(q, k, v, graph), sides)
            theirs = phase(
                lambda q, k, v, graph=graph: scaled_dot_product_attention(q, k, v, is_causal=graph == Causal()), sides
            )
            predicted = floors.flash(graph.num_edges(8192, 8192), 16, 128, name).expected(rate)
            yield compared(f"{graph}, N = 8192, D = 128, {name}: time over SDPA's", 1.02, ours, theirs, predicted, True)


def beside_flex(rate, graph: Graph, mask_mod, n: int, heads: int, dim: int, wanted: tuple) -> Iterator[Figure]:
    """Forward, and forward + backward, and the building of the mask, beside FlexAttention."""
    sides, name = sides_of(n, heads, dim), f"{short(graph)}, N = {n:,}, H = {heads}, D = {dim}"
    try:
        block_mask = compiled_block_mask(mask_mod, None, None, n, n, device="cuda")
        start = time.perf_counter()
        block_mask = compiled_block_mask(mask_mod, None, None, n, n, device="cuda")
        torch.cuda.synchronize()
        build = time.perf_counter() - start
    except Exception as error:
        yield Figure(f"{name}: FlexAttention", wanted[0], f"its mask: {type(error).__name__}: {str(error)[:100]}")
        return
    start = time.perf_counter()
    made = plan(graph, n, n, heads=heads, head_dim=dim, device="cuda")
    torch.cuda.synchronize()
    planned = time.perf_counter() - start
    theirs = lambda q, k, v: compiled_flex(q, k, v, block_mask=block_mask)  # noqa: E731
    ours = lambda q, k, v: attend(q, k, v, made)  # noqa: E731
    tiles = sum(part.pairs for part in made.parts)
    for phase_name, phase, least in (("forward", forward, wanted[0]), ("forward + backward", both, wanted[1])):
        predicted = floors.tiled(tiles, n, heads, dim, phase_name).expected(rate)
        text = f"{name}, {phase_name}: times as fast as FlexAttention"
        try:
            yield compared(text, least, phase(ours, sides), phase(theirs, sides), predicted)
        except torch.OutOfMemoryError as error:
            yield Figure(text, least, f"out of memory: {str(error)[:80]}")
            torch.cuda.empty_cache()
    yield Figure(f"{name}: planning, times as fast as building FlexAttention's mask", wanted[2], build / planned)


def window(rate) -> Iterator[Figure]:
    for dim in (64, 128):
        yield from beside_flex(rate, Window(1024, 0), near(1024, 0), 65_536, 16, dim, (1.15, 1.1, 100))


def patterns(rate) -> Iterator[Figure]:
    for n, side in ((32_768, 181), (131_072, 362)):
        for graph, mask_mod in (
            (
                Window(192, 192) | Global(range(64)) | Random(3),
                or_masks(near(192, 192), first_are_global(64), drawn(3, n, "cuda")),
            ),
            (
                Causal() & Documents(documents(n)),
                and_masks(causal, same_document(documents(n), "cuda")),
            ),
            (Neighborhood((side, side), 6), near_on_grid(side, 6)),
        ):
            size = side * side if isinstance(graph, Neighborhood) else n
            yield from beside_flex(rate, graph, mask_mod, size, 16, 64, (1.15, 1.15, 10))
    for name, phase in (("forward", forward), ("forward + backward", both)):
        whole = tile_rate(Full(), 8192, phase)
        for graph, n in (
            (Window(1024, 0), 65_536),
            (Window(192, 192) | Global(range(64)), 32_768),
            (Causal() & Documents(documents(32_768)), 32_768),
            (Neighborhood((181, 181), 6), 181 * 181),
        ):
            text = f"{short(graph)}, {name}: pairs of occupied tiles a second, over those of our own Full()"
            yield Figure(text, 0.9, tile_rate(graph, n, phase) / whole)


def tile_rate(graph: Graph, n: int, phase: Callable) -> float:
    """Pairs of tiles a millisecond."""
    made = plan(graph, n, n, heads=16, head_dim=64, device="cuda", backend="tiles")
    run = phase(lambda q, k, v: attend(q, k, v, made), sides_of(n, 16, 64))
    return sum(part.pairs for part in made.parts) / quartiles(timed({"ours": run})["ours"])[1]


def short(graph: Graph) -> str:
    """A graph's text, of which lists of numbers are cut."""
    return re.sub(r"\[(\d+, \d+), [\d, ]+\]", r"[\1, …]", str(graph))


def tokens(rate) -> Iterator[Figure]:
    """How many nodes fit: one head, one operator, some rows checked."""
    graph = Window(256, 0)
    for name, n in (("forward", 280_000_000), ("forward + backward", 140_000_000)):
        try:
            torch.cuda.empty_cache()
            made = plan(graph, n, n, device="cuda", backend="tiles")
            _ = made.parts[0].layout.by_query, name == "forward" or made.parts[0].layout.by_key  # while there is room
            torch.cuda.empty_cache()
            q, k, v = (torch.randn(1, 1, n, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
            sides = [side.requires_grad_(name != "forward") for side in (q, k, v)]
            out = attend(*sides, made)
            for i in (0, n // 3, n - 1):
                few = slice(max(0, i - 256), i + 1)
                right = attend(q[:, :, i : i + 1], k[:, :, few], v[:, :, few], Full(), backend="dense")
                assert float((out[:, :, i : i + 1] - right).detach().abs().max()) < 0.03
            if name != "forward":
                grads = torch.autograd.grad(out, sides, out.detach())
                for i in (600, n // 3, n - 600):  # a piece around i, large enough for all that i hears and is heard by
                    few = slice(i - 520, i + 520)
                    part = [side[:, :, few].detach().requires_grad_() for side in sides]
                    own = torch.autograd.grad(attend(*part, graph, backend="dense"), part, out[:, :, few].detach())
                    for whole, piece in zip(grads, own, strict=True):
                        assert float((whole[:, :, i] - piece[:, :, 520]).abs().max()) < 0.05
            reached: float | str = float(n)
        except (RuntimeError, MemoryError, AssertionError) as error:
            reached = f"{type(error).__name__}: {str(error)[:120]}"
        made = out = grads = sides = q = k = v = None
        torch.cuda.empty_cache()
        yield Figure(f"Window(256, 0), D = 64, one head: nodes, {name}", n, reached)


def random_edges(n: int, edges: int, power: float = 0.0) -> EdgeList:
    """Edges between nodes drawn evenly, or the i-th in proportion to i^-power, by both ends."""
    chance = torch.Generator("cuda").manual_seed(0)
    at = torch.rand(2, edges, generator=chance, device="cuda", dtype=torch.float64)
    nodes = (at ** (1 / (1 - power)) * n).long().clamp(max=n - 1)
    mixed = torch.randperm(n, generator=chance, device="cuda")
    return from_edge_index(mixed[nodes], n)


def gather_scatter(graph: EdgeList, scale: float) -> Callable:
    """What PyG's TransformerConv does, with its own softmax: gather along edges sorted by target, weigh, add up."""
    from torch_geometric.utils import softmax

    query, key = (side.cuda() for side in list_edges(graph, *graph.size))

    def attention(q, k, v):  # (1, H, N, D)
        q, k, v = (side[0].transpose(0, 1) for side in (q, k, v))
        score = (q.index_select(0, query) * k.index_select(0, key)).sum(-1).float() * scale  # (E, H)
        weight = softmax(score, query, num_nodes=len(q))
        message = v.index_select(0, key) * weight[..., None].to(v.dtype)
        return torch.zeros_like(v).index_add(0, query, message).transpose(0, 1)[None]

    return attention


def peak(run: Callable) -> float:
    """Bytes beyond those that are there before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def rows(rate) -> Iterator[Figure]:
    """Irregular graphs: uniform beside the gather floor and PyG; power laws of published sizes; a mixed plan; size."""
    for part in (uniform, power_laws, merged, largest):
        torch.cuda.empty_cache()
        try:
            yield from part(rate)
        except torch.OutOfMemoryError as error:  # of one part: the others are still told
            yield Figure(part.__name__, math.nan, f"out of memory: {str(error)[:80]}")


def uniform(rate) -> Iterator[Figure]:
    n, heads, dim = 1_000_000, 4, 64
    graph, name = random_edges(n, 32 * n), "uniform random, N = 1M, degree 32, H = 4, D = 64"
    sides = sides_of(n, heads, dim)
    made = plan(graph, heads=heads, head_dim=dim, device="cuda", backend="rows")
    ours, peer = (lambda q, k, v: attend(q, k, v, made)), gather_scatter(graph, dim**-0.5)
    floor, twice = (floors.gathered(len(graph.code), heads, dim, phase).floor(rate) for phase in floors.PRODUCTS)
    time_of = quartiles(timed({"ours": forward(ours, sides)})["ours"])
    yield Figure(f"{name}, forward: share of the gather floor", 0.7, floor / time_of[1], False, time_of, None, floor)
    for label, theirs, wanted in (("PyG", peer, 12), ("PyG compiled", torch.compile(peer), 3)):
        try:
            text = f"{name}, forward + backward: times as fast as {label}"
            yield compared(text, wanted, both(ours, sides), both(theirs, sides), twice)
        except torch.OutOfMemoryError as error:
            yield Figure(f"{name}, forward + backward: {label}", wanted, f"out of memory: {str(error)[:80]}")
            torch.cuda.empty_cache()
    try:
        memory = peak(both(ours, sides)) / peak(both(peer, sides))
    except torch.OutOfMemoryError:
        memory = "theirs: out of memory"
    yield Figure(f"{name}, forward + backward: peak extra memory over PyG's", 0.1, memory, True)


def power_laws(rate) -> Iterator[Figure]:
    for like, nodes, edges, wanted in (
        ("yelp", 716_847, 13_954_819, 1.7),
        ("igb_medium", 10_000_000, 120_077_694, 17.0),
        ("ogbn-products", 2_449_029, 123_718_280, 15.0),
    ):
        torch.cuda.empty_cache()
        graph = random_edges(nodes, edges, 0.5)
        sides = sides_of(nodes, 1, 128, torch.float16)
        made = plan(graph, heads=1, head_dim=128, device="cuda", backend="rows")
        run = lambda q, k, v, made=made: attend(q, k, v, made)  # noqa: E731
        floor, twice = (floors.gathered(len(graph.code), 1, 128, phase).floor(rate) for phase in floors.PRODUCTS)
        text = f"power law of {like}'s size, D = 128, one head, fp16"
        forward_ms, both_ms = (quartiles(timed({"ours": phase(run, sides)}, 5)["ours"]) for phase in (forward, both))
        yield Figure(f"{text}, forward: ms", wanted, forward_ms[1], True, forward_ms, None, floor)
        theirs: list[float] | str
        try:
            peer = gather_scatter(graph, 128**-0.5)
            theirs = quartiles(timed({"theirs": both(peer, sides)}, 3)["theirs"])
        except torch.OutOfMemoryError:
            theirs = "out of memory"
        name = f"{text}, forward + backward: ms; PyG: {theirs if isinstance(theirs, str) else f'{theirs[1]:.1f}'}"
        most = math.inf if isinstance(theirs, str) else theirs[1]
        yield Figure(name, most, both_ms[1], True, both_ms, None if isinstance(theirs, str) else theirs, twice)
        peer = None


def merged(rate) -> Iterator[Figure]:
    graph, n, heads, dim = Window(512, 0) | Prefix(16) | Random(16), 262_144, 8, 64
    plans = {
        name: plan(graph, n, n, heads=heads, head_dim=dim, device="cuda", backend=name)
        for name in ("auto", "tiles", "rows")
    }
    sides = sides_of(n, heads, dim)
    runs = {name: forward(lambda q, k, v, made=made: attend(q, k, v, made), sides) for name, made in plans.items()}
    for name in ("tiles", "rows"):
        text = f"{graph}, N = 262,144, forward: the merged plan, times as fast as {name} alone"
        yield compared(text, 1.0, runs["auto"], runs[name], None)
    mask_mod = or_masks(near(512, 0), prefix(16), drawn(16, n, "cuda"))
    text = f"{graph}, N = 262,144, forward: the merged plan, times as fast as FlexAttention"
    try:
        block_mask = compiled_block_mask(mask_mod, None, None, n, n, device="cuda")
        flex = forward(lambda q, k, v: compiled_flex(q, k, v, block_mask=block_mask), sides)
        yield compared(text, 1.0, runs["auto"], flex, None)
    except Exception as error:
        yield Figure(text, 1.0, f"FlexAttention: {type(error).__name__}: {str(error)[:80]}")


def largest(rate) -> Iterator[Figure]:
    """How many nodes fit whose edges are stored one by one: one head, one operator, some rows checked."""
    graph = Random(32)
    for name, most in (("forward", 229_000_000), ("forward + backward", 114_500_000)):
        reached: float | str = "nothing fits"
        for share in (1.0, 0.98, 0.96, 0.9, 0.8):
            n = int(share * most)
            torch.cuda.empty_cache()
            try:
                made = plan(graph, n, n, device="cuda", backend="rows")
                by_query = made.parts[0].layout.by_query
                if name != "forward":
                    _ = made.parts[0].layout.by_key  # sorted while there is room
                torch.cuda.empty_cache()
                q, k, v = (torch.randn(1, 1, n, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
                sides = [side.requires_grad_(name != "forward") for side in (q, k, v)]
                out = attend(*sides, made)
                if name != "forward":
                    grads = torch.autograd.grad(out, sides, out.detach())
                    assert all(bool(grad[:, :, -1000:].isfinite().all()) for grad in grads)
                for i in (0, n // 3, n - 1):
                    few = by_query.neighbor[by_query.start[i] : by_query.start[i + 1]].long()
                    right = attend(q[:, :, i : i + 1], k[:, :, few], v[:, :, few], Full(), backend="dense")
                    assert float((out[:, :, i : i + 1] - right).detach().abs().max()) < 0.03
                reached = float(n)
                break
            except (RuntimeError, MemoryError, AssertionError) as error:
                print(f"   {n:,} nodes: {type(error).__name__}: {str(error)[:120]}")
            finally:
                made = by_query = out = grads = sides = q = k = v = None
        yield Figure(f"{graph}, D = 64, one head, edges stored one by one: nodes, {name}", most, reached)


def grid(rate) -> Iterator[Figure]:
    """On every graph of benchmarks/attention.py, auto beside each backend that can be named."""
    over_best: dict[str, float] = {}
    for workload in WORKLOADS:
        for nodes in (8192, 65_536):
            graph = workload.graph(nodes)
            n = graph.size[0] or nodes
            sides = sides_of(n, 8, workload.dim)
            names = ("auto", "tiles", "rows", *(["dense"] if n <= 8192 else []))
            plans = {
                name: plan(graph, n, n, heads=8, head_dim=workload.dim, device="cuda", backend=name) for name in names
            }
            for phase_name, phase in (("forward", forward), ("forward + backward", both)):
                runs = {
                    name: phase(lambda q, k, v, made=made: attend(q, k, v, made), sides) for name, made in plans.items()
                }
                times = {name: quartiles(each)[1] for name, each in timed(runs, 7).items()}
                best = min(times[name] for name in names[1:])
                over_best[f"{workload.name}, N = {n:,}, {phase_name}"] = times["auto"] / best
    worst = max(over_best, key=over_best.__getitem__)
    text = f"every graph of the benchmark, N = 8,192 and 65,536: auto over the best named backend, at worst ({worst})"
    yield Figure(text, 1.25, over_best[worst], True)


def training(rate) -> Iterator[Figure]:
    """Steps of GPT-2's size: causal beside SDPA at block 1024, sparse beside FlexAttention at block 32,768."""
    config = TransformerConfig(embed_dim=768, num_layers=12, num_heads=12, activation="gelu_tanh", max_length=32_768)
    sparse = Causal() & (Window(512, 0) | Prefix(4))
    mask_mod = and_masks(causal, or_masks(near(512, 0), prefix(4)))
    block_mask = compiled_block_mask(mask_mod, None, None, 32_768, 32_768, device="cuda")

    def bare(q, k, v, graph, *, bias, scale, dropout_p):
        return scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)

    def flex(q, k, v, graph, *, bias, scale, dropout_p):
        return compiled_flex(q, k, v, block_mask=block_mask, scale=scale)

    for graph, n, batch, theirs, wanted, at_most in (
        (Causal(), 1024, 8, bare, 1.02, True),
        (sparse, 32_768, 1, flex, 1.1, False),
    ):
        pairs = floors.pairs_of(graph, n) * batch
        attention = floors.tiled(pairs, n * batch, 12 * 12, 64, "forward + backward")
        model = GPT(config, vocab_size=50_304, graph=graph).cuda()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        text = torch.randint(50_304, (batch, n + 1), device="cuda")

        def step(model=model, optimizer=optimizer, text=text):
            with torch.autocast("cuda", dtype=torch.bfloat16):
                loss = cross_entropy(model(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        def other(step=step, theirs=theirs):
            with patch.object(attngraph.nn.attention, "attend", theirs):
                step()

        count = sum(parameter.numel() for parameter in model.parameters())
        predicted = floors.step(count, batch * n, attention).expected(rate)
        name = f"a training step, {count / 1e6:.0f}M parameters, {graph}, block {n:,}"
        unit = "time over that on SDPA" if at_most else "times as fast as on FlexAttention"
        yield compared(f"{name}: {unit}", wanted, step, other, predicted, at_most)
        del model, optimizer
        torch.cuda.empty_cache()


SECTIONS = {
    "correctness": correctness,
    "dense": dense,
    "window": window,
    "patterns": patterns,
    "rows": rows,
    "grid": grid,
    "tokens": tokens,
    "training": training,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--section", action="append", choices=list(SECTIONS), help="one section; all by default")
    parser.add_argument("--missing", action="store_true", help="only what is not recorded yet")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of gpu.json")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("a GPU is required, and torch sees none")
    path = options.out / f"{NAME}.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    Machine.here("cuda")  # measured now, not within a section
    rate = rates()
    print(f"{torch.cuda.get_device_name()}: {rate[0] / 1e12:.0f} TFLOP/s, {rate[1] / 1e12:.2f} TB/s\n")
    for name in options.section or SECTIONS:
        if options.missing and name in known and not known[name]["failure"]:
            continue
        begun, found = time.perf_counter(), []
        try:
            for figure in SECTIONS[name](rate):
                found.append(figure)
                show(figure)
            failure = None
        except Exception as error:
            failure = f"{type(error).__name__}: {str(error)[:500]}"
            print(f"{name}: {failure}")
        known[name] = {
            "figures": [recorded(figure) for figure in found],
            "failure": failure,
            "seconds": round(time.perf_counter() - begun, 1),
            "flops": rate[0],
            "bytes": rate[1],
            "machine": machine("cuda"),
        }
        options.out.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(known, indent=2, allow_nan=False) + "\n")
    print(f"\nrecorded in {path}")
    wrong = known.get("correctness", {"figures": [], "failure": None})
    if wrong["failure"] or not all(figure["yes"] for figure in wrong["figures"]):
        raise SystemExit("results are not as exact as SDPA's on this device")


def recorded(figure: Figure) -> dict:
    """As JSON, which has no NaN."""
    told = {**figure._asdict(), "yes": figure.yes}
    finite = {name: str(told[name]) for name in ("reached", "wanted") if not math.isfinite(_float(told[name]))}
    return {**told, **finite}


def _float(value: float | str) -> float:
    return 0.0 if isinstance(value, str) else value


def show(figure: Figure) -> None:
    sign, reached = "≤" if figure.at_most else "≥", figure.reached
    reached = f"{reached:.3g}" if isinstance(reached, float) else reached
    times = ""
    if figure.ours_ms:
        times = f"   ours {spread(figure.ours_ms, 2)} ms"
        times += f", theirs {spread(figure.theirs_ms, 2)} ms" if figure.theirs_ms else ""
        times += f", predicted {figure.predicted_ms:.2f} ms" if figure.predicted_ms else ""
    print(f"{'yes' if figure.yes else 'no':4}{sign} {figure.wanted:<6g}{reached:<8} {figure.text}{times}", flush=True)


if __name__ == "__main__":
    main()

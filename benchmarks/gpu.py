"""Attention on a GPU, beside PyTorch's SDPA and FlexAttention in the same run.

    python -m benchmarks.gpu                              every section, under 8 minutes
    python -m benchmarks.gpu --section dense --section window

Goals are recorded as they come, in results/gpu.json; --missing runs those sections alone that are not there yet. First
the results are compared with float64 on this device. Contestants are compiled, warmed up and timed in turn by CUDA
events; medians with quartiles. `predicted` is the arithmetic of benchmarks/floors.py at the rates of this GPU.
"""

from __future__ import annotations

import math
import re
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import product

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from attngraph import (
    Causal,
    EdgeList,
    Full,
    Global,
    Graph,
    Neighborhood,
    Prefix,
    Random,
    Window,
    attend,
    cache,
    comparison,
    from_edge_index,
    plan,
)
from attngraph.models import GPT
from attngraph.nn import TransformerConfig
from benchmarks import floors, peers
from benchmarks.experiment import TO_ITS_END, Figures, Goal, Records, goal_rows, goals_experiment, run_sections
from benchmarks.internals import keys_of, pairs_of, pairs_of_tiles, sort_edges
from benchmarks.measure import cost, failure, in_turn, milliseconds, ratios, seconds_of
from benchmarks.page import Keep, table
from benchmarks.peers import PHASES, Attention, MaskMod, call_of, near, on_plan, or_masks, prefix, workload_of
from benchmarks.steps import on_other_attention, training_step
from benchmarks.train_gpt import Bare, Size, copied

NAME = "gpu"


def sides_of(n: int, heads: int, dim: int, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    """q, k, v that want gradients, and the gradient of the result."""
    sides = [torch.randn(1, heads, n, dim, device="cuda", dtype=dtype) for _ in range(4)]
    return [*(side.requires_grad_() for side in sides[:3]), sides[3]]


def time_of(run: Callable[[], object], repeats: int = 20) -> list[float]:
    """Quartiles of milliseconds."""
    return milliseconds(in_turn({"": run}, repeats, warmup=3)[""])


def beside(
    text: str,
    wanted: float,
    ours: Callable[[], object],
    theirs: Callable[[], object],
    predicted: float | None = None,
    at_most: bool = False,
) -> Goal:
    """Their time over ours; with `at_most`, ours over theirs. A failure is a result."""
    try:
        times = in_turn({"ours": ours, "theirs": theirs}, 20, warmup=3)
    except Exception as error:  # out of memory, no backward, …
        torch.cuda.empty_cache()
        return Goal(text, wanted, failure(error, 80), at_most)
    first, second = ("ours", "theirs") if at_most else ("theirs", "ours")
    ratio = ratios(times[first], times[second])[1]
    return Goal(text, wanted, ratio, at_most, "", milliseconds(times["ours"]), milliseconds(times["theirs"]), predicted)


def flex_of(mask_mod: MaskMod, n: int) -> Attention:
    """FlexAttention on a block mask that is built now."""
    block_mask = peers.compiled_block_mask(mask_mod, None, None, n, n, device="cuda")
    return partial(peers.compiled_flex, block_mask=block_mask)


# ------------------------------------------------------------------------------------------------ the sections


def rates() -> tuple[float, float]:
    """FLOP/s of a product in bfloat16, and bytes/s of a copy, counting both ways."""
    a, b = torch.randn(2, 8192, 8192, device="cuda", dtype=torch.bfloat16)
    whole, to = torch.empty(2, 1 << 30, device="cuda", dtype=torch.uint8)
    times = in_turn({"product": lambda: a @ b, "copy": lambda: to.copy_(whole)}, 20, warmup=3)
    seconds = {name: milliseconds(each)[1] / 1e3 for name, each in times.items()}
    return 2 * 8192**3 / seconds["product"], 2 * (1 << 30) / seconds["copy"]


def correctness(options: Namespace) -> Iterator[Goal]:
    """The largest error of each kernel, over that of SDPA in the same precision."""
    graphs = [
        Causal(),
        Window(100, 0) | Prefix(4),
        Window(30, 30) | Global((0,)) | Random(3),
        Neighborhood((32, 32), 3),
    ]
    for graph, dim in product(graphs, (64, 128)):
        sides, mask = sides_of(1024, 4, dim), graph.mask(1024, 1024, "cuda")
        contestants = {backend: partial(attend, graph=graph, backend=backend) for backend in ("tiles", "rows")}
        contestants["SDPA"] = partial(scaled_dot_product_attention, attn_mask=mask)
        wide = [side.detach().double().requires_grad_(place < 3) for place, side in enumerate(sides)]
        right = results_of(contestants["SDPA"], wide)
        errors = {}
        for name, attention in contestants.items():
            apart = [(a - b).abs().max() for a, b in zip(results_of(attention, sides), right, strict=True)]
            errors[name] = float(torch.stack(apart).max())  # NaN, if any is
        for name in ("tiles", "rows"):
            text = f"{graph}, D = {dim}, {name}: error over that of SDPA in bfloat16"
            yield Goal(text, 1.5, errors[name] / errors["SDPA"], at_most=True)


def results_of(attention: Attention, sides: list[Tensor]) -> list[Tensor]:
    """The result, and the gradients of q, k and v."""
    out = attention(*sides[:3])
    return [out.detach(), *torch.autograd.grad(out, sides[:3], sides[3])]


def dense(options: Namespace) -> Iterator[Goal]:
    for graph, phase in product((Causal(), Full()), PHASES):
        sides = sides_of(8192, 16, 128)
        ours = call_of(phase, partial(attend, graph=graph), sides)
        theirs = call_of(phase, partial(scaled_dot_product_attention, is_causal=graph == Causal()), sides)
        predicted = floors.flash(graph.num_edges(8192, 8192), 16, 128, phase).expected(options.rate)
        text = f"{graph}, N = 8192, D = 128, {phase}: time over SDPA's"
        yield beside(text, 1.02, ours, theirs, predicted, at_most=True)


def beside_flex(
    options: Namespace, graph: Graph, mask_mod: MaskMod, n: int, dim: int, wanted: tuple[float, float, float]
) -> Iterator[Goal]:
    """Forward, and forward + backward, and the building of the mask, beside FlexAttention."""
    sides, name = sides_of(n, 16, dim), f"{short(graph)}, N = {n:,}, H = 16, D = {dim}"
    try:
        theirs = flex_of(mask_mod, n)
        build = seconds_of(lambda: flex_of(mask_mod, n))
    except Exception as error:
        yield Goal(f"{name}: FlexAttention", wanted[0], f"its mask: {failure(error, 100)}")
        return
    sizes = {"heads": 16, "head_dim": dim, "device": "cuda"}
    plan(graph, n, n, **sizes)  # as FlexAttention's mask: a second time, when all that runs is loaded
    cache.clear()
    planned = seconds_of(lambda: plan(graph, n, n, **sizes))
    made = plan(graph, n, n, **sizes)
    for phase, least in zip(PHASES, wanted, strict=False):
        predicted = floors.tiled(pairs_of(made), n, 16, dim, phase).expected(options.rate)
        text = f"{name}, {phase}: times as fast as FlexAttention"
        ours = call_of(phase, lambda q, k, v: attend(q, k, v, made), sides)
        yield beside(text, least, ours, call_of(phase, theirs, sides), predicted)
    yield Goal(f"{name}: planning, times as fast as building FlexAttention's mask", wanted[2], build / planned)


def window(options: Namespace) -> Iterator[Goal]:
    for dim in (64, 128):
        yield from beside_flex(options, Window(1024, 0), near(1024, 0), 65_536, dim, (1.15, 1.1, 100))


def patterns(options: Namespace) -> Iterator[Goal]:
    for nodes, name in product((32_768, 131_072), ("BigBird", "documents", "neighbourhood")):
        workload = workload_of(name)
        graph = workload.graph(nodes)
        assert workload.mask_mod is not None
        n = graph.size[0] or nodes
        yield from beside_flex(options, graph, workload.mask_mod(nodes, "cuda"), n, 64, (1.15, 1.15, 10))
    graphs = [(Window(1024, 0), 65_536), (Window(192, 192) | Global(tuple(range(64))), 32_768)]
    graphs += [(workload_of("documents").graph(32_768), 32_768), (Neighborhood((181, 181), 6), 181 * 181)]
    for phase in PHASES:
        whole = tile_rate(Full(), 8192, phase)
        for graph, n in graphs:
            text = f"{short(graph)}, {phase}: pairs of occupied tiles a second, over those of our own Full()"
            yield Goal(text, 0.9, tile_rate(graph, n, phase) / whole)


def tile_rate(graph: Graph, n: int, phase: str) -> float:
    """Pairs of tiles a millisecond."""
    made = plan(graph, n, n, heads=16, head_dim=64, device="cuda", backend="tiles")
    return pairs_of(made) / time_of(call_of(phase, lambda q, k, v: attend(q, k, v, made), sides_of(n, 16, 64)))[1]


def short(graph: Graph) -> str:
    """A graph's text, of which lists of numbers are cut."""
    return re.sub(r"\[(\d+, \d+), [\d, …]+\]", r"[\1, …]", str(graph))


def largest(options: Namespace) -> Iterator[Goal]:
    """How many nodes fit: one head, one operator, some rows checked."""
    for phase, most in zip(PHASES, (280_000_000, 140_000_000), strict=True):
        text = f"Window(256, 0), D = 64, one head: nodes, {phase}"
        yield Goal(text, most, fits(Window(256, 0), most, phase, "tiles"))
    for phase, most in zip(PHASES, (229_000_000, 114_500_000), strict=True):
        text, reached = f"{Random(32)}, D = 64, one head, edges stored one by one: nodes, {phase}", "nothing fits"
        for share in (1.0, 0.98, 0.96, 0.9, 0.8):
            reached = fits(Random(32), int(share * most), phase, "rows")
            if not isinstance(reached, str):
                break
        yield Goal(text, most, reached)


def fits(graph: Graph, n: int, phase: str, backend: str) -> float | str:
    """n, if so many nodes fit, or what went wrong."""
    torch.cuda.empty_cache()
    try:
        check_largest(graph, n, phase != PHASES[0], backend)
        return float(n)
    except (RuntimeError, MemoryError, AssertionError) as error:
        return f"{n:,} nodes: {failure(error, 120)}"
    finally:
        torch.cuda.empty_cache()


def check_largest(graph: Graph, n: int, grad: bool, backend: str) -> None:
    """Run it once, and compare some rows with the same computed alone; tests/gpu compares gradients."""
    made = plan(graph, n, n, device="cuda", backend=backend)
    sort_edges(made, by_key=grad)  # while there is room
    torch.cuda.empty_cache()
    q, k, v = sides = [torch.randn(1, 1, n, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    for side in sides:
        side.requires_grad_(grad)
    out = attend(q, k, v, made)
    for i in (0, n // 3, n - 1):
        keys = torch.arange(max(0, i - 256), i + 1, device="cuda") if backend == "tiles" else keys_of(made, i)
        right = attend(q[:, :, i : i + 1], k[:, :, keys], v[:, :, keys], Full(), backend="dense")
        assert float((out[:, :, i : i + 1] - right).detach().abs().max()) < 0.03
    if not grad:
        return
    assert all(bool(side[:, :, -1000:].isfinite().all()) for side in torch.autograd.grad(out, sides, out.detach()))


def random_edges(n: int, edges: int, power: float = 0.0) -> EdgeList:
    """Edges between nodes drawn evenly, or the i-th in proportion to i^-power, by both ends."""
    chance = torch.Generator("cuda").manual_seed(0)
    at = torch.rand(2, edges, generator=chance, device="cuda", dtype=torch.float64)
    nodes = (at ** (1 / (1 - power)) * n).long().clamp(max=n - 1)
    mixed = torch.randperm(n, generator=chance, device="cuda")
    return from_edge_index(mixed[nodes], n)


def pyg(graph: EdgeList, scale: float) -> Attention:
    """What PyG's TransformerConv does, with softmax by query, on (1, H, N, D)."""
    key, query = graph.edge_index(*graph.size).cuda()
    attention = comparison.gather_scatter(query, key, graph.size[0], scale, sort=False)
    return lambda q, k, v: attention(*(side[0].transpose(0, 1) for side in (q, k, v))).transpose(0, 1)[None]


def uniform(options: Namespace) -> Iterator[Goal]:
    n, heads, dim = 1_000_000, 4, 64
    graph, name = random_edges(n, 32 * n), "uniform random, N = 1M, degree 32, H = 4, D = 64"
    sides, peer = sides_of(n, heads, dim), pyg(graph, dim**-0.5)
    attention = on_plan(graph, n, "cuda", heads=heads, dim=dim, backend="rows")
    least, twice = (floors.gathered(len(graph.code), heads, dim, phase).least(options.rate) for phase in PHASES)
    ms = time_of(call_of(PHASES[0], attention, sides))
    yield Goal(f"{name}, forward: share of the gather floor", 0.7, least / ms[1], ours_ms=ms, predicted_ms=least)
    ours, theirs = (call_of(PHASES[1], each, sides) for each in (attention, peer))
    for label, each, wanted in (("PyG", peer, 12), ("PyG compiled", torch.compile(peer), 3)):
        text = f"{name}, forward + backward: times as fast as {label}"
        yield beside(text, wanted, ours, call_of(PHASES[1], each, sides), twice)
    try:
        memory: float | str = (cost(ours)[1] or 0.0) / (cost(theirs)[1] or math.nan)
    except torch.OutOfMemoryError as error:
        memory = failure(error, 80)
    yield Goal(f"{name}, forward + backward: peak extra memory over PyG's", 0.1, memory, at_most=True)


def power_laws(options: Namespace) -> Iterator[Goal]:
    for like, nodes, edges, wanted in (
        ("yelp", 716_847, 13_954_819, 1.7),
        ("igb_medium", 10_000_000, 120_077_694, 17.0),
        ("ogbn-products", 2_449_029, 123_718_280, 15.0),
    ):
        torch.cuda.empty_cache()
        graph, sides = random_edges(nodes, edges, 0.5), sides_of(nodes, 1, 128, torch.float16)
        attention = on_plan(graph, nodes, "cuda", heads=1, dim=128, backend="rows")
        least, twice = (floors.gathered(len(graph.code), 1, 128, phase).least(options.rate) for phase in PHASES)
        text = f"power law of {like}'s size, D = 128, one head, fp16"
        forward_ms, both_ms = (time_of(call_of(phase, attention, sides), 5) for phase in PHASES)
        yield Goal(f"{text}, forward: ms", wanted, forward_ms[1], True, ours_ms=forward_ms, predicted_ms=least)
        theirs_ms, note = None, ""
        try:
            theirs_ms = time_of(call_of(PHASES[1], pyg(graph, 128**-0.5), sides), 3)
        except torch.OutOfMemoryError:
            note = "PyG: out of memory"
        most = theirs_ms[1] if theirs_ms else math.inf
        text = f"{text}, forward + backward: ms, at most PyG's"
        yield Goal(text, most, both_ms[1], True, note, both_ms, theirs_ms, twice)


def merged(options: Namespace) -> Iterator[Goal]:
    graph, n, heads, dim = Window(512, 0) | Prefix(16) | Random(16), 262_144, 8, 64
    sides, text = sides_of(n, heads, dim), f"{graph}, N = 262,144, forward: the merged plan, times as fast as"
    runs = {
        backend: call_of(PHASES[0], on_plan(graph, n, "cuda", heads=heads, dim=dim, backend=backend), sides)
        for backend in ("auto", "tiles", "rows")
    }
    for backend in ("tiles", "rows"):
        yield beside(f"{text} {backend} alone", 1.0, runs["auto"], runs[backend])
    try:
        flex = flex_of(or_masks(near(512, 0), prefix(16), peers.drawn(16, n, "cuda")), n)
        yield beside(f"{text} FlexAttention", 1.0, runs["auto"], call_of(PHASES[0], flex, sides))
    except Exception as error:
        yield Goal(f"{text} FlexAttention", 1.0, f"FlexAttention: {failure(error, 80)}")


def grid(options: Namespace) -> Iterator[Goal]:
    """On every graph of benchmarks/attention.py, auto beside each backend that can be named."""
    over_best: dict[str, float] = {}
    for workload, nodes in product(peers.WORKLOADS, (8192, 65_536)):
        graph = workload.graph(nodes)
        n = graph.size[0] or nodes
        sides = sides_of(n, 8, workload.dim)
        attentions = {
            backend: on_plan(graph, n, "cuda", heads=8, dim=workload.dim, backend=backend)
            for backend in ("auto", "tiles", "rows", *(["dense"] if n <= 8192 else []))
        }
        for phase in PHASES:
            runs = {backend: call_of(phase, attention, sides) for backend, attention in attentions.items()}
            times = {backend: milliseconds(each)[1] for backend, each in in_turn(runs, 7, warmup=3).items()}
            auto = times.pop("auto")
            over_best[f"{workload.name}, N = {n:,}, {phase}"] = auto / min(times.values())
    worst = max(over_best, key=over_best.__getitem__)
    text = "every graph of the benchmark, N = 8,192 and 65,536: auto over the best named backend, at worst"
    yield Goal(text, 1.25, over_best[worst], at_most=True, note=worst)


def training(options: Namespace) -> Iterator[Goal]:
    """Steps of GPT-2's size: causal beside SDPA at block 1024, sparse beside FlexAttention at block 32,768."""
    config = TransformerConfig(embed_dim=768, num_layers=12, num_heads=12, activation="gelu_tanh", max_length=32_768)
    on_flex = flex_of(peers.and_masks(peers.causal, or_masks(near(512, 0), prefix(4))), 32_768)

    def bare(q, k, v, graph, *, scale, **others):
        return scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)

    def flex(q, k, v, graph, *, scale, **others):
        return on_flex(q, k, v, scale=scale)

    for graph, n, batch, theirs, wanted, at_most in (
        (Causal(), 1024, 8, bare, 1.02, True),
        (Causal() & (Window(512, 0) | Prefix(4)), 32_768, 1, flex, 1.1, False),
    ):
        torch.cuda.empty_cache()
        attention = floors.tiled(pairs_of_tiles(graph, n) * batch, n * batch, 12 * 12, 64, PHASES[1])
        model = GPT(config, vocab_size=50_304, graph=graph).cuda()
        tokens = torch.randint(50_304, (batch, n + 1), device="cuda")
        step = training_step(model, tokens[:, :-1], tokens[:, 1:], "cuda")
        count = sum(parameter.numel() for parameter in model.parameters())
        predicted = floors.step(count, batch * n, attention).expected(options.rate)
        unit = "time over that on SDPA" if at_most else "times as fast as on FlexAttention"
        text = f"a training step, {count / 1e6:.0f}M parameters, {graph}, block {n:,}: {unit}"
        yield beside(text, wanted, step, on_other_attention(step, theirs), predicted, at_most)


PEAK = 989.4e12  # FLOP/s of bfloat16 in the data sheet of an H100 or H200 (SXM, dense), by which MFU is counted


def gpt2(options: Namespace) -> Iterator[Goal]:
    """examples/gpt.py --preset gpt2, a step of one batch, beside nanoGPT's model; both compiled."""
    size, batch = Size(12, 12, 768, 1024), 12
    bare = Bare(50_304, size).cuda()
    ours = copied(bare).cuda()
    tokens = torch.randint(50_304, (batch, size.context + 1), device="cuda")
    steps = [training_step(torch.compile(model), tokens[:, :-1], tokens[:, 1:], "cuda") for model in (ours, bare)]
    losses = [step() for step in steps]
    if abs(losses[0] - losses[1]) > 0.02:
        raise ValueError(f"the two models must have the same loss (got {losses})")
    text = "GPT-2 (124M), a step of 12 × 1,024 tokens, compiled: time over nanoGPT's"
    goal = beside(text, 1.02, *steps, at_most=True)
    count = sum(parameter.numel() for parameter in bare.parameters()) - bare.positions.weight.numel()
    flop = 6 * count + 12 * size.layers * size.width * size.context  # of a token, as nanoGPT counts
    told = []
    for name, ms in (("ours", goal.ours_ms), ("nanoGPT's", goal.theirs_ms)):
        if ms is not None:
            rate = batch * size.context / ms[1] * 1e3
            told.append(f"{name} {rate:,.0f} tokens/s, {rate * flop / PEAK:.1%} MFU of {PEAK / 1e12:.0f} TFLOP/s")
    yield replace(goal, note="; ".join(told))


SECTIONS = {
    "correctness": correctness,
    "dense": dense,
    "window": window,
    "patterns": patterns,
    "uniform": uniform,
    "power laws": power_laws,
    "merged": merged,
    "grid": grid,
    "largest": largest,
    "training": training,
    "gpt2": gpt2,
}


def run(options: Namespace) -> Iterator[Figures]:
    """The sections asked for; results that are not as exact as SDPA's end the program with an error."""
    known = Records(options.out)[NAME]
    if options.missing:
        there = {goal["section"] for key, goal in known.items() if TO_ITS_END not in key}
        there -= {goal["section"] for key, goal in known.items() if TO_ITS_END in key}
        options.section = [name for name in options.section or SECTIONS if name not in there] or ["correctness"]
    options.rate, exact = rates(), True
    print(f"{torch.cuda.get_device_name()}: {options.rate[0] / 1e12:.0f} TFLOP/s, {options.rate[1] / 1e12:.2f} TB/s\n")
    for found in run_sections(SECTIONS, options):
        exact &= all(goal["yes"] for goal in found.values() if goal["section"] == "correctness")
        yield found
    if not exact:
        raise SystemExit("results are not as exact as SDPA's on this device")


def render(records: Records, keep: Keep) -> Iterator[str]:
    found = records[NAME]
    if not found:
        yield from ["`python -m benchmarks.gpu`: not yet run on hardware.", ""]
        return
    machine = next(iter(found.values()))["machine"]
    versions = ", ".join(f"{name} {machine[name]}" for name in ("driver", "cuda", "torch", "triton", "python"))
    yield from [f"`python -m benchmarks.gpu` on one {machine['device']}, {versions}; medians of milliseconds:", ""]
    yield from table(*goal_rows(found))


OPTIONS: dict[str, dict] = {"missing": {"action": "store_true", "help": "only sections that are not recorded yet"}}
EXPERIMENT = goals_experiment(NAME, __doc__, SECTIONS, run=run, render=render, options=OPTIONS, device="cuda")

if __name__ == "__main__":
    EXPERIMENT.main()

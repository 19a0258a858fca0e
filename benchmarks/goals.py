"""What is to be reached on a CPU, and whether it is: python -m benchmarks.goals [--section window …]

    python -m benchmarks.goals --out runs/after                             does not touch the recorded figures
    python -m benchmarks.goals --out runs/after --compare BEFORE.json       one table: before, after, ratio

Ratios of medians in one run, float32; see `attention.py`, whose contestants, graphs and ways of measuring these are.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator

import torch
from torch.nn.functional import scaled_dot_product_attention

from attngraph import Causal, Window, attend, plan
from attngraph.kernels.contract import Modifiers
from benchmarks import calls, changing, connect, decoding, instructions, planning, pyg, seeing, steps
from benchmarks.attention import NAMED, measured, over_best_named
from benchmarks.experiment import Goal, goals_experiment
from benchmarks.measure import Progress, isolated, paired
from benchmarks.page import number
from benchmarks.peers import AUTO, FLEX, PHASES, PYG, PYG_COMPILED, SDPA_MASK, WORKLOADS

NAME = "goals"


def figure(found: dict, phase: str, peer: str, read: Callable[[dict], float]) -> float | str:
    """A number read from the figures of a contestant beside ours, or the failure of one of the two."""
    for name in (AUTO, peer):
        own = found[phase]["contestants"][name]
        if "failure" in own:
            return f"{name}: {own['failure']}"
    return read(own)


def faster(found: dict, phase: str, peer: str) -> float | str:
    return figure(found, phase, peer, lambda own: own["over_ours"][1])


def at_size(workload: str, nodes: int, peers: tuple[str, ...], options: Namespace, **more) -> dict[str, dict]:
    """The figures of these contestants at one size, by phase."""
    given = {**vars(options), "peer": peers, "gemm": None, **more}
    return dict(measured(workload, [nodes], Namespace(**given)))[nodes]


def irregular_goals(options: Namespace) -> Iterator[Goal]:
    peers = AUTO, PYG, PYG_COMPILED
    found, name = at_size("uniform", 20_000, peers, options), "uniform random, N = 20,000, degree 16, D = 16"
    for peer, least in ((PYG, (12, 12)), (PYG_COMPILED, (1, 1))):
        for phase, wanted in zip(PHASES, least, strict=True):
            yield Goal(f"{name}, {phase}: times as fast as {peer}", wanted, faster(found, phase, peer))
    own = found[PHASES[1]]["contestants"][AUTO]
    less = figure(found, PHASES[1], PYG, lambda theirs: own["extra_mib"] / theirs["extra_mib"])
    yield Goal(f"{name}, {PHASES[1]}: peak extra memory over PyG's", 0.1, less, at_most=True)
    found = at_size("power law", 100_000, peers, options)
    name = f"power law, {found['forward'].get('edges', 0):,} edges, a hub of degree 50,000, D = 16"
    for peer, wanted in ((PYG, 8), (PYG_COMPILED, 1)):
        yield Goal(f"{name}, forward: times as fast as {peer}", wanted, faster(found, "forward", peer))


def mixed_goals(options: Namespace) -> Iterator[Goal]:
    found, name = at_size("mixed", 65_536, (AUTO, FLEX), options), "Window(256, 0) | Prefix(4) | Random(8), N = 65,536"
    ours = found["forward"]["contestants"][AUTO]

    def times(own: dict, planning_s: float) -> float:
        return (own["prepare_s"] + own["ms"][1] / 1000) / (planning_s + ours["ms"][1] / 1000)

    text = f"{name}: times as fast as FlexAttention with its mask build"
    yield Goal(text, 50, figure(found, "forward", FLEX, lambda own: times(own, 0.0)))
    text += ", our planning included"
    yield Goal(text, 50, figure(found, "forward", FLEX, lambda own: times(own, ours["prepare_s"])))
    reached, theirs = (most_memory(found["forward"]["contestants"][peer]) for peer in (AUTO, FLEX))
    text, note = f"{name}: GiB that preparation and first call need at most", f"{FLEX}: {number(theirs, '.3g')}"
    yield Goal(text, 2, reached, at_most=True, note=note)


def most_memory(own: dict) -> float | str:
    return own.get("failure") or max(own["prepare_mib"], own["first_mib"]) / 1024


def planning_goals(options: Namespace) -> Iterator[Goal]:
    for text, n, limits in (
        ("Window(256, 0)", 1_000_000, {"seconds": 0.5, "mib": 100}),
        ("Window(256, 0) | Prefix(4) | Random(8)", 262_144, {"seconds": 5}),
    ):
        found = isolated(planning.alone, text, n, "cpu", 1, seconds=options.limit, gib=options.memory)
        for unit, wanted in limits.items():
            reached = found.get("failure") or found[unit][0]
            yield Goal(f"plan({text}, {n:,}, {n:,}): {unit}", wanted, reached, at_most=True)


def overhead_alone(progress: Progress) -> dict:
    (q, k, v), graph = torch.randn(3, 1, 8, 1024, 64), Causal()  # made once, as a model does
    with torch.no_grad():
        return paired(
            lambda: attend(q, k, v, graph), lambda: scaled_dot_product_attention(q, k, v, is_causal=True), 300
        )


def training_alone(progress: Progress) -> dict:
    """Training steps of a GPT, on ours and with its `attend` replaced by SDPA with a mask, which is built once."""
    progress({}, 600.0)
    ours, theirs = steps.contestants("GPT", 4096, "cpu", steps.CONTESTANTS[1:]).values()
    losses = ours(), theirs()
    if abs(losses[0] - losses[1]) > 1e-3:
        raise ValueError(f"the two models must have the same loss (got {losses})")
    progress({}, 3600.0)
    return paired(ours, theirs, 40, warmup=1)


SMALL = Window(16, 0)


def small_alone(progress: Progress, n: int, backward: bool) -> dict:
    """A window on few nodes, beside SDPA with its mask."""
    sides, mask = [torch.randn(1, 8, n, 64, requires_grad=backward) for _ in range(3)], SMALL.mask(n, n)

    def run(attention: Callable) -> None:
        out = attention(*sides)
        if backward:
            out.sum().backward()

    return paired(
        lambda: run(lambda q, k, v: attend(q, k, v, SMALL)),
        lambda: run(lambda q, k, v: scaled_dot_product_attention(q, k, v, mask)),
        400,
        warmup=20,
    )


def overhead_of_tiles(progress: Progress) -> dict:
    """A call of `attend`, beside the kernel that it runs."""
    q, k, v = torch.randn(3, 1, 8, 128, 64)
    (part,), modifiers = plan(SMALL, 128, 128, heads=8, backend="tiles").parts, Modifiers(0.125)
    with torch.no_grad():
        return paired(
            lambda: attend(q, k, v, SMALL, backend="tiles"),
            lambda: part.backend.forward(q, k, v, part.layout, modifiers),
            1000,
            warmup=50,
        )


def small_goals(options: Namespace) -> Iterator[Goal]:
    """Calls as small as those of the examples."""
    for n in (128, 256):
        for backward in (False, True):
            found = isolated(small_alone, n, backward, seconds=600.0, gib=options.memory)
            text = f"{SMALL}, N = {n}, H = 8, D = 64, {PHASES[backward]}: time over that of {SDPA_MASK}"
            yield Goal(text, 1, found.get("failure") or found["ratio"][1], at_most=True)
    found = isolated(overhead_of_tiles, seconds=600.0, gib=options.memory)
    more = found.get("failure") or 1000 * (found["ours_ms"][1] - found["theirs_ms"][1])
    yield Goal(f"{SMALL}, N = 128, forward: µs of a call over its kernel", 25, more, at_most=True)


def pair_goals(options: Namespace) -> Iterator[Goal]:
    found = isolated(overhead_alone, seconds=600.0, gib=options.memory)
    yield Goal("Causal(), N = 1024, auto: time over bare SDPA's", 1.02, found.get("failure") or found["ratio"][1], True)
    found = isolated(training_alone, seconds=600.0, gib=options.memory)
    reached = found.get("failure") or 1 / found["ratio"][1]
    yield Goal(
        "GPT training step, Causal() & (Window(64, 0) | Prefix(4)), 4096: times as fast as SDPA + mask", 5, reached
    )


def grid_goals(options: Namespace) -> Iterator[Goal]:
    """On every graph, auto beside each backend that can be named."""
    over_best: dict[str, float] = {}
    for workload in WORKLOADS:
        for n, repeats in SIZES.items():
            by_phase = at_size(workload.name, n, (AUTO, *NAMED), options, repeats=repeats)
            for phase, found in by_phase.items():
                if over := over_best_named(found):
                    over_best[f"{workload.name}, N = {n}, {phase}"] = over[1]
    worst, middle = max(over_best, key=over_best.__getitem__), sorted(over_best.values())[len(over_best) // 2]
    text = "every graph of the benchmark, N = 512 and 8192: time of auto over the best named backend's, at worst"
    note = f"{worst}; {middle:.2f} in the middle of {len(over_best)} cases"
    yield Goal(text, 1.25, over_best[worst], at_most=True, note=note)


SIZES = {512: 60, 8192: 7}  # and how many turns: calls of a millisecond vary by half
SECTIONS = {
    "planning": planning_goals,
    "pairs": pair_goals,
    "small": small_goals,
    "window": instructions.goals,
    "irregular": irregular_goals,
    "mixed": mixed_goals,
    **calls.SECTIONS,
    **changing.SECTIONS,
    **decoding.SECTIONS,
    **pyg.SECTIONS,
    **connect.SECTIONS,
    **seeing.SECTIONS,
    "grid": grid_goals,
}
OPTIONS: dict[str, dict] = {"repeats": {"default": 15}, "limit": {"default": 300.0}, "memory": {}}
EXPERIMENT = goals_experiment(NAME, __doc__, SECTIONS, options=OPTIONS)

if __name__ == "__main__":
    EXPERIMENT.main()

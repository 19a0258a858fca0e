"""Attention on sparse graphs: ours beside PyTorch's, FlexAttention, PyG and padded tables, in the same run.

    python -m benchmarks.attention                                  every graph and size, hours
    python -m benchmarks.attention --workload window --n 2048 8192
    python -m benchmarks.attention --quick                          a smoke test, in a minute

float32, batch 1, 8 heads. Each contestant first runs alone in a process with limits of memory and of time a call: does
it survive, and with how much memory? Then the survivors run in one process, in turn, after their results are compared
with one another; that gives the times. A failure is a result too. `peers.py` holds the contestants and the graphs,
`goals.py` what is to be reached.

- `prepare`: what is made once for a graph (mask, edges, tables, plan); FlexAttention's when compiled before.
- `GFLOP/s`: useful ones, 4·E·H·D a forward pass over the time, and their share of what a 2048³ matrix product reaches.
- `MiB`: how far a call raises the resident memory, the inputs and what was prepared not counted.
- `/ ours`: the time over that of `attend(…, backend="auto")`, turn by turn.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from textwrap import shorten

import torch
from torch import Tensor

from attngraph import Causal
from benchmarks.measure import RESULTS, cost, in_turn, isolated, quartiles, record, spread
from benchmarks.peers import AUTO, FLEX, PEERS, WORKLOADS, Attention, Peer, Task

PHASES = ("forward", "forward + backward")
TO_COMPILE = 180.0  # seconds more for the first calls of what compiles itself
GEMM = 2048
QUICK = {"window": 256, "uniform": 1250}


# ------------------------------------------------------------------------------- in a process of its own


def task_of(workload: str, nodes: int) -> Task:
    return Task(next(known for known in WORKLOADS if known.name == workload), nodes)


def call_of(phase: str, attention: Attention, sides: list[Tensor]) -> Callable[[], object]:
    """One call of a phase: the result (forward), or the gradients of q, k and v."""
    q, k, v, upstream = sides

    def forward():
        with torch.no_grad():
            return attention(q, k, v)

    def both():
        return torch.autograd.grad(attention(q, k, v), (q, k, v), upstream)

    return forward if phase == "forward" else both


def alone(progress, workload: str, nodes: int, peer_name: str, phases: list[str], seconds: float) -> dict:
    """What a contestant needs: seconds and MiB to prepare, and for each phase MiB and roughly the seconds of a call.

    All phases in one process: what was found before one fails is kept.
    """
    task, peer = task_of(workload, nodes), next(known for known in PEERS if known.name == peer_name)
    first_seconds = seconds + TO_COMPILE * peer.compiles
    figures: dict = {}
    built: list[Attention] = []

    def build():
        built[:] = [peer.build(task)]

    progress(figures, first_seconds)
    _ = task.n  # the graph itself is everyone's
    figures["prepare_s"], figures["prepare_mib"] = cost(build)
    if peer_name == FLEX:
        progress(figures, seconds)
        figures["compile_s"] = figures["prepare_s"]
        figures["prepare_s"], figures["prepare_mib"] = cost(build)
    for phase in phases:
        call = call_of(phase, built[0], task.inputs(peer.node_major, grad=phase != "forward"))
        progress(figures, first_seconds)
        first_s, first_mib = cost(call)
        progress(figures, seconds)
        call_s, call_mib = cost(call)
        figures[phase] = {"first_s": first_s, "first_mib": first_mib, "alone_s": call_s, "extra_mib": call_mib}
    return figures


def contest(progress, workload: str, nodes: int, survivors: dict[str, list[str]], repeats: int, seconds: float) -> dict:
    """The survivors of each phase in turn: their seconds, whether they agree, and the rate of the machine's GEMM."""
    task = task_of(workload, nodes)
    peers = [peer for peer in PEERS if any(peer.name in names for names in survivors.values())]
    progress({}, 3600.0)
    attentions = {peer.name: peer.build(task) for peer in peers}
    left, right = torch.randn(2, GEMM, GEMM)
    found: dict = {"n": task.n, "graph": task.graph.text, "edges": task.graph.num_edges(task.n, task.n)}
    for phase, names in survivors.items():
        progress(found, 3600.0)
        playing = [peer for peer in peers if peer.name in names]
        sides = {major: task.inputs(major, grad=phase != "forward") for major in {peer.node_major for peer in playing}}
        calls = {peer.name: call_of(phase, attentions[peer.name], sides[peer.node_major]) for peer in playing}
        wrong = disagreements(task, playing, calls)  # which also warms them
        times = in_turn({**calls, "GEMM": lambda: left @ right}, repeats, seconds)
        found[phase] = {"gemm_gflops": 2 * GEMM**3 / quartiles(times.pop("GEMM"))[1] / 1e9, "s": times, "wrong": wrong}
    return found


def disagreements(task: Task, peers: list[Peer], calls: dict[str, Callable]) -> dict[str, float]:
    """The peers whose result is not that of the first one (not ours) up to 1e-4, and how far it is from it."""
    reference, wrong = None, {}
    for peer in sorted(peers, key=lambda peer: peer.name.startswith("ours")):
        results = calls[peer.name]()
        if peer.all_causal and task.graph != Causal():
            continue
        results = [results] if isinstance(results, Tensor) else results
        results = [side.transpose(0, 1)[None] if peer.node_major else side for side in results]
        reference = reference or results
        for side, right in zip(results, reference, strict=True):
            off = float((side - right).abs().max() / right.abs().max().clamp(min=1))
            if not off < 1e-4:  # NaN is wrong
                wrong[peer.name] = max(off, wrong.get(peer.name, 0.0))
    return wrong


# --------------------------------------------------------------------------------- one workload, one size


def measured(workload: str, nodes: int, options: argparse.Namespace, known: dict[str, str] | None = None) -> dict:
    """All figures of a workload at one size, by phase. `known` are failures of smaller sizes, which are not tried."""
    task, phases = task_of(workload, nodes), PHASES[: 1 if options.phase == "forward" else 2]
    field = [peer for peer in PEERS if task.workload.causal or not peer.all_causal]
    field = [peer for peer in field if not options.peer or peer.name in options.peer]
    lone = {}
    for peer in field:
        status(f"{workload}, N = {nodes}: {peer.name} alone")
        if known and peer.name in known:
            lone[peer.name] = {"failure": known[peer.name]}
            continue
        arguments = workload, nodes, peer.name, phases, options.limit
        lone[peer.name] = isolated(alone, *arguments, seconds=options.limit + TO_COMPILE, gib=options.memory)
    survivors = {phase: [name for name, figures in lone.items() if phase in figures] for phase in phases}
    status(f"{workload}, N = {nodes}: in turn")
    arguments = workload, nodes, survivors, options.repeats, options.limit
    together = isolated(contest, *arguments, seconds=3600.0, gib=1.5 * options.memory)
    return {phase: joined(task.workload.dim, phase, lone, together) for phase in phases}


def joined(dim: int, phase: str, lone: dict[str, dict], together: dict) -> dict:
    """The figures of a phase, of its contestants alone and together; where together they fail, the times alone."""
    times_alone = {name: [figures[phase]["alone_s"]] * 2 for name, figures in lone.items() if phase in figures}
    turns = together.get(phase, {"s": times_alone, "wrong": {}, "gemm_gflops": float("nan")})
    auto = turns["s"].get(AUTO)
    contestants = {}
    for name, figures in lone.items():
        own = {key: figures[key] for key in ("prepare_s", "prepare_mib", "compile_s") if key in figures}
        if name in turns["wrong"]:
            own["failure"] = f"wrong by {turns['wrong'][name]:.1g}"
        elif name in turns["s"]:
            seconds = turns["s"][name]
            own |= figures[phase] | {"ms": quartiles([1000 * value for value in seconds]), "turns": len(seconds)}
            if auto:
                own["over_ours"] = quartiles([a / b for a, b in zip(seconds, auto, strict=False)])
            if phase == "forward" and "edges" in together:
                own["useful_gflops"] = 4 * together["edges"] * Task.heads * dim / (own["ms"][1] / 1000) / 1e9
        else:
            own["failure"] = figures["failure"]
        contestants[name] = own
    kept = {key: together[key] for key in ("n", "graph", "edges") if key in together}
    if phase not in together:
        kept["failure"] = together["failure"]
    return {**kept, "phase": phase, "dim": dim, "gemm_gflops": turns["gemm_gflops"], "contestants": contestants}


def status(text: str = "") -> None:
    """What is running, on a line of the terminal that the next one overwrites."""
    if sys.stderr.isatty():
        print(f"{text:78}", end="\r", file=sys.stderr, flush=True)


def show(workload: str, by_phase: dict[str, dict]) -> None:
    """Print the table of a workload at one size."""
    status()
    for phase, figures in by_phase.items():
        edges, gemm = figures.get("edges", 0), figures["gemm_gflops"]
        print(f"\n{workload}, {phase}: N = {figures.get('n')}, {edges:,} edges, D = {figures['dim']}; ", end="")
        print(f"GEMM {gemm:.0f} GFLOP/s\n  {shorten(str(figures.get('graph')), 110)}")
        print(f"{'':26}{'prepare, s':>11}{'ms (quartiles)':>30}{'/ ours':>8}{'GFLOP/s':>9}{'share':>7}{'MiB':>9}")
        if "failure" in figures:
            print(f"  in turn: {figures['failure']}; times alone")
        for name, own in figures["contestants"].items():
            prepare = f"{own['prepare_s']:.3f}" if "prepare_s" in own else ""
            if "failure" in own:
                print(f"  {name:24}{prepare:>11}   {own['failure'][:120]}")
                continue
            over = f"{own['over_ours'][1]:.2f}" if "over_ours" in own else ""
            useful = own.get("useful_gflops")
            rate, share = (f"{useful:.1f}", f"{useful / gemm:.0%}") if useful else ("", "")
            mib = "" if own["extra_mib"] is None else f"{own['extra_mib']:.1f}"
            print(f"  {name:24}{prepare:>11}{spread(own['ms'], 2):>30}{over:>8}{rate:>9}{share:>7}{mib:>9}")


def run(options: argparse.Namespace) -> Path:
    """Every workload asked for, from its smallest size to its largest; each size is recorded when it is done."""
    path = options.out / "attention.json"
    for workload in WORKLOADS:
        if options.workload and workload.name not in options.workload:
            continue
        known: dict[str, str] = {}
        for nodes in sorted(options.n or ([QUICK[workload.name]] if options.quick else workload.sizes)):
            found = measured(workload.name, nodes, options, known)
            show(workload.name, found)
            sections = {f"{workload.name}, N = {nodes}, {phase}": figures for phase, figures in found.items()}
            path = record("attention", sections, options.out)
            for name, own in found["forward"]["contestants"].items():
                if own.get("failure", "").startswith("over "):
                    known[name] = f"not tried, was {own['failure']} at N = {nodes}"
    return path


# ---------------------------------------------------------------------------------------------- the picture


def draw(recorded: dict[str, dict], phase: str, path: Path) -> None:
    """Time against N, a panel for each workload; a cross on the upper edge is a failure."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    entries = [(key.split(",")[0], figures) for key, figures in recorded.items() if figures["phase"] == phase]
    order = [workload.name for workload in WORKLOADS]
    entries = sorted((e for e in entries if "n" in e[1]), key=lambda e: (order.index(e[0]), e[1]["n"]))
    panels = [(name, [figures for _, figures in group]) for name, group in groupby(entries, key=lambda e: e[0])]
    if not panels:
        return
    columns = min(4, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4.2 * columns + 2.6, 3.6 * rows), squeeze=False)
    for ax, (name, sizes) in zip(axes.flat, panels, strict=False):
        panel(ax, name, sizes)
    for ax in axes.flat[len(panels) :]:
        ax.set_axis_off()
    lines = [line for line in axes[0, 0].get_lines() if not line.get_label().startswith("_")]
    machine = panels[0][1][0]["machine"]
    figure.suptitle(
        f"Attention, float32, 8 heads, {phase}; {machine['processor']}, threads: {machine['threads']}", fontsize=14
    )
    figure.legend(handles=lines, loc="center right", title="× at the top:\nover a limit, or unsupported", frameon=False)
    figure.tight_layout(rect=(0, 0, 1 - 2.6 / (4.2 * columns + 2.6), 0.98))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def panel(ax, name: str, sizes: list[dict]) -> None:
    """One workload: a line for each contestant, whichever it meets."""
    for place, peer in enumerate(PEERS):
        style = {"color": f"C{place}", "lw": 2.4 if peer.name == AUTO else 1.2}
        own = [(figures["n"], figures["contestants"].get(peer.name, {})) for figures in sizes]
        done = [(n, found["ms"]) for n, found in own if "ms" in found]
        failed = [n for n, found in own if "failure" in found]
        ax.plot([n for n, _ in done], [ms[1] for _, ms in done], marker="o", ms=4, label=peer.name, **style)
        if done:
            low, _, high = zip(*(ms for _, ms in done), strict=True)
            ax.fill_between([n for n, _ in done], low, high, color=style["color"], alpha=0.2, lw=0)
        height = 0.98 - 0.035 * place  # a strip for each, so that crosses do not hide one another
        ax.plot(failed, [height] * len(failed), "x", transform=ax.get_xaxis_transform(), ms=5, color=style["color"])
    ax.set(xscale="log", yscale="log", title=name, xlabel="N", ylabel="ms")
    ax.set_xticks([figures["n"] for figures in sizes], [f"{figures['n']:,}" for figures in sizes], fontsize=8)
    ax.minorticks_off()
    medians = [own["ms"][1] for figures in sizes for own in figures["contestants"].values() if "ms" in own] or [1.0]
    low, high = 10.0 ** math.floor(math.log10(min(medians))), 1.5 * max(medians)
    ax.set_ylim(low, high * (high / low) ** 0.45)  # room for the crosses
    ax.grid(alpha=0.3)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    names = [workload.name for workload in WORKLOADS]
    parser.add_argument("--workload", action="append", choices=names, help="one of the graphs; may be repeated")
    parser.add_argument("--peer", action="append", choices=[peer.name for peer in PEERS], help="one contestant")
    parser.add_argument("--n", type=int, nargs="+", help="numbers of nodes; by default those of each graph")
    parser.add_argument("--phase", choices=("forward", "both"), default="both", help="without or with backward")
    parser.add_argument("--repeats", type=int, default=15, help="turns of each contestant")
    parser.add_argument("--limit", type=float, default=30.0, help="seconds a call, and about that for all turns")
    parser.add_argument("--memory", type=float, default=12.0, help="GiB of resident memory of a contestant")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of attention.json and its pictures")
    parser.add_argument("--quick", action="store_true", help="two small graphs, recorded in a temporary folder")
    options = parser.parse_args()
    if options.quick:
        options.workload, options.repeats = options.workload or list(QUICK), min(options.repeats, 5)
        options.out = Path(tempfile.mkdtemp()) if options.out == RESULTS else options.out
    path = run(options)
    for phase, suffix in zip(PHASES, ("", "_backward"), strict=True):
        draw(json.loads(path.read_text()), phase, path.with_name(f"attention{suffix}.png"))
    print(f"\nmedians with quartiles of up to {options.repeats} turns; recorded in {path}, drawn beside it")


if __name__ == "__main__":
    main()

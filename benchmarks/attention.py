"""Attention on sparse graphs: ours beside PyTorch's, FlexAttention, PyG and padded tables, in the same run.

    python -m benchmarks.attention                                  every graph and size, hours
    python -m benchmarks.attention --workload window --n 2048 8192
    python -m benchmarks.attention --graph "Causal() & Window(64, 0)" --nodes 1024 4096
    python -m benchmarks.attention --workload uniform --n 1250 --out /tmp/bench      a smoke test

Batch 1, 8 heads; float32 on a CPU, bfloat16 on a GPU. All contestants of a graph run in one process of their own. At
each size each is first tried alone (does it survive its limits of memory and of time a call, and how much memory does
it need?); then the survivors' results are compared, and they run in turn; that gives the times. A failure is a result
too, and larger sizes are then not tried. `peers.py` holds the contestants and the graphs, `goals.py` what is to be
reached, `report.py` draws.

- `prepare`: what is made once for a graph (mask, edges, tables, plan); FlexAttention's when compiled before.
- `GFLOP/s`: useful ones, 4·E·H·D a forward pass over the time, and their share of what a matrix product reaches.
- `MiB`: by how much a call raises the memory in use, the inputs and what was prepared not counted.
- `/ ours`: the time over that of `attend(…, backend="auto")`, turn by turn.
"""

from __future__ import annotations

import argparse
import math
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from textwrap import shorten

import torch
from torch import Tensor

from attngraph import Causal, parse
from benchmarks import peers, pictures
from benchmarks.experiment import Experiment, Figures, Records
from benchmarks.measure import Progress, cost, failure, in_turn, isolated, milliseconds, now, ratios
from benchmarks.page import Keep, aligned, folded, number, picture, spread, status, table
from benchmarks.peers import AUTO, PEERS, PHASES, SDPA_CAUSAL, SDPA_MASK, WORKLOADS, Attention, Peer, Task, call_of

NAME = "attention"
TO_COMPILE = 180.0  # s more for the first calls of what compiles itself
GEMM = {"cpu": 2048, "cuda": 8192}
EXACT = {torch.float32: 1e-4, torch.bfloat16: 3e-2}  # largest relative difference of two right results
DENSE = (SDPA_MASK, SDPA_CAUSAL)
IRREGULAR = (peers.PYG, peers.PYG_COMPILED)
NAMED = ("ours, tiles", "ours, rows", SDPA_MASK)  # a backend that can be named each; the last is "dense"

# ------------------------------------------------------------------------------- in a process of its own


@dataclass
class History:
    """What smaller sizes tell, of a peer in a phase: seconds of a call there; or why larger ones are not tried."""

    seconds: dict[tuple[str, str], tuple[int, float]] = field(default_factory=dict)
    failures: dict[tuple[str, str], str] = field(default_factory=dict)

    def fail(self, peer: str, phase: str, text: str, nodes: int) -> None:
        """Also in the phases that need more; "prepare": in all."""
        for more in PHASES if phase == "prepare" else PHASES[PHASES.index(phase) :]:
            self.failures.setdefault((peer, more), f"not tried: at N = {nodes:,} {text}")

    def expect(self, peer: str, phase: str, nodes: int, limit: float) -> str | None:
        """Why not to try: it failed before, or would take too long even if time grew only as fast as the nodes."""
        before, seconds = self.seconds.get((peer, phase), (nodes, 0.0))
        if seconds * nodes / before > limit:
            self.fail(peer, phase, f"a call took {seconds:.2g} s", before)
        return self.failures.get((peer, phase))


def contest(
    progress: Progress, workload: str, sizes: list[int], names: list[str], history: History, options: Namespace
) -> dict:
    """The figures of all sizes of a workload, by size and phase; what is running stands in `now` of the progress."""
    found: dict = {"sizes": {}, "history": history, "now": None}
    for nodes in sizes:
        if now() > options.until:
            break
        contenders = [peer for peer in PEERS if peer.name in names]
        match = Match(Task(peers.workload_of(workload), nodes, options.device), contenders, options, history)

        def report(peer: Peer | None, phase: str, found=found, nodes=nodes) -> None:
            found["now"] = peer and (nodes, peer.name, phase)
            slow = TO_COMPILE if peer and peer.compiles else 30.0
            progress(found, 3600.0 if peer is None else slow + 2 * options.limit)

        found["sizes"][nodes] = match.figures(report)
    return found


class Match:
    """The contestants of one graph at one size."""

    def __init__(self, task: Task, contenders: list[Peer], options: Namespace, history: History):
        self.task, self.peers, self.options, self.history = task, contenders, options, history
        self.prepared: dict[str, Attention] = {}
        self.own: dict[str, dict] = {peer.name: {} for peer in contenders}  # what is known of each, whatever the phase

    def figures(self, report: Callable) -> dict[str, dict]:
        """By phase: size, graph, edges, and the figures of each contestant."""
        task, options = self.task, self.options
        known = {"n": task.n, "graph": str(task.graph), "edges": task.graph.num_edges(task.n, task.n)}
        known |= {"dim": task.workload.dim, "heads": task.heads, "dtype": str(task.dtype).removeprefix("torch.")}
        size, by_phase = options.gemm or GEMM[torch.device(task.device).type], {}
        left, right = torch.randn(2, size, size, device=task.device, dtype=task.dtype)
        for peer in self.peers:
            report(peer, "prepare")
            self.prepare(peer)
        for phase in PHASES:
            sides = {major: task.inputs(major, grad=phase != PHASES[0]) for major in (False, True)}
            calls, contestants = {}, {}
            for peer in self.peers:
                report(peer, phase)
                contestants[peer.name] = dict(self.own[peer.name])
                with self.trying(peer, phase, contestants[peer.name]) as worth_it:
                    if worth_it:
                        call = call_of(phase, self.prepared[peer.name], sides[peer.node_major])
                        contestants[peer.name] |= alone(call, peer, options.limit)
                        self.history.seconds[peer.name, phase] = task.nodes, contestants[peer.name]["alone_s"]
                        calls[peer.name] = call
            report(None, phase)
            for name, error in self.wrong(calls).items():
                contestants[name] = {"failure": f"wrong by {error:.1g}"}
                del calls[name]
            times = in_turn({**calls, "GEMM": lambda: left @ right}, options.repeats, seconds=options.limit)
            gemm = 2 * size**3 / milliseconds(times.pop("GEMM"))[1] / 1e6
            for name, seconds in times.items():
                contestants[name] |= turns_of(seconds, times.get(AUTO), known, phase)
            by_phase[phase] = {**known, "phase": phase, "gemm_gflops": gemm, "contestants": contestants}
        return by_phase

    def prepare(self, peer: Peer) -> None:
        """What a contestant makes once for this graph, and what that costs."""

        def build() -> None:
            self.prepared[peer.name] = peer.build(self.task)

        own = self.own[peer.name]
        with self.trying(peer, "prepare", own) as worth_it:
            if not worth_it:
                return
            own["prepare_s"], own["prepare_mib"] = cost(build)
            if peer.name == peers.FLEX:
                own["compile_s"] = own["prepare_s"]
                own["prepare_s"], own["prepare_mib"] = cost(build)

    @contextmanager
    def trying(self, peer: Peer, phase: str, own: dict) -> Iterator[bool]:
        """Whether to try; an error inside is the contestant's failure, here and at larger sizes."""
        phases = PHASES if phase == "prepare" else (phase,)
        known = [self.history.expect(peer.name, each, self.task.nodes, self.options.limit) for each in phases]
        if all(known):
            own["failure"] = known[0]
            yield False
            return
        try:
            yield True
        except Exception as error:
            own["failure"] = str(error) if isinstance(error, TooSlow) else failure(error, 200)
            self.history.fail(peer.name, phase, own["failure"], self.task.nodes)
            torch._dynamo.reset()  # which else runs uncompiled whatever it once failed to compile

    def wrong(self, calls: dict[str, Callable]) -> dict[str, float]:
        """Whose result is not that of the first contestant that is not ours, and how far from it; also warms all."""
        reference, errors = None, {}
        playing = [peer for peer in self.peers if peer.name in calls]
        for peer in sorted(playing, key=lambda peer: peer.name.startswith("ours")):
            results = calls[peer.name]()
            if peer.all_causal and self.task.graph != Causal():
                continue
            results = [results] if isinstance(results, Tensor) else results
            results = [side.transpose(0, 1)[None] if peer.node_major else side for side in results]
            reference = reference or results
            for side, right in zip(results, reference, strict=True):
                error = float((side - right).abs().max() / right.abs().max().clamp(min=1))
                if not error < EXACT[self.task.dtype]:  # NaN is wrong
                    errors[peer.name] = max(error, errors.get(peer.name, 0.0))
        return errors


class TooSlow(Exception):
    """A call took longer than its limit."""


def alone(call: Callable, peer: Peer, limit: float) -> dict:
    """What a call needs alone: the first, which may compile, and another."""
    first_s, first_mib = cost(call)
    if first_s > limit and not peer.compiles:
        raise TooSlow(f"over {limit:g} s a call ({first_s:.1f})")
    call_s, call_mib = cost(call)
    if call_s > limit:
        raise TooSlow(f"over {limit:g} s a call ({call_s:.1f})")
    return {"first_s": first_s, "first_mib": first_mib, "alone_s": call_s, "extra_mib": call_mib}


def turns_of(seconds: list[float], auto: list[float] | None, known: dict, phase: str) -> dict:
    """The figures of a contestant's turns."""
    own: dict = {"ms": milliseconds(seconds), "turns": len(seconds)}
    if auto:
        own["over_ours"] = ratios(seconds, auto)
    if phase == PHASES[0]:
        own["useful_gflops"] = 4 * known["edges"] * known["heads"] * known["dim"] / (own["ms"][1] / 1000) / 1e9
    return own


def measured(workload: str, sizes: list[int], options: Namespace) -> Iterator[tuple[int, dict[str, dict]]]:
    """Size after size: all figures of a workload, by phase.

    A contestant that has to be killed is left out where it was, and all begins again there without it.
    """
    known = peers.workload_of(workload)
    here = [peer.name for peer in PEERS if peer.only(known) and not peer.absent(options.device)]
    names = [name for name in here if not options.peer or name in options.peer]
    history, left = History(), sorted(sizes)
    while left and now() < options.until:
        status(f"{workload}, N = {', '.join(map(str, left))}")
        arguments = workload, left, names, history, options
        found = isolated(contest, *arguments, seconds=3600.0, gib=options.memory)
        history = found["history"]
        yield from found["sizes"].items()
        left = left[len(found["sizes"]) :]
        if "failure" in found:
            if not found["now"]:
                raise RuntimeError(f"{workload}, N = {left[0]}, all together: {found['failure']}")
            nodes, peer, phase = found["now"]
            history.fail(peer, phase, found["failure"], nodes)


def run(options: Namespace) -> Iterator[Figures]:
    """Every workload asked for, from its smallest size to its largest."""
    for name in options.graph or options.workload or [workload.name for workload in WORKLOADS]:
        known = peers.workload_of(name)
        sizes = known.sizes if name.startswith(peers.OWN) and known.graph(0).size[0] else options.n or known.sizes
        for nodes, found in measured(name, list(sizes), options):
            yield {f"{name}, N = {nodes}, {phase}": figures for phase, figures in found.items()}


def own_graph(text: str) -> str:
    """The name of the workload of a graph of one's own."""
    try:
        graph = parse(text)
    except (ValueError, TypeError) as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if graph.heads is not None:
        raise argparse.ArgumentTypeError(f"one graph for all heads is required (got {graph}, one for each head)")
    if graph.size[0] != graph.size[1]:
        raise argparse.ArgumentTypeError(f"as many queries as keys are required (got {graph} of size {graph.size})")
    return peers.OWN + text


HEAD = ["", "ms (quartiles)", "over ours", "prepare, s", "MiB", "turns"]


def row_of(name: str, own: dict) -> list[str]:
    """A contestant in a table with this head."""
    prepare = number(own.get("prepare_s"), ".3f")
    if "failure" in own:
        return [name, shorten(own["failure"], 110, placeholder=" …"), "", prepare, "", ""]
    over = spread(own["over_ours"], 2) if "over_ours" in own else ""
    return [name, spread(own["ms"], 2), over, prepare, number(own["extra_mib"]), str(own["turns"])]


def show(key: str, figures: dict) -> str:
    """The table of a workload at one size, with useful GFLOP/s and their share of a matrix product's."""
    gemm, rows = figures["gemm_gflops"], []
    for name, own in figures["contestants"].items():
        useful = own.get("useful_gflops")
        rows.append([*row_of(name, own), number(useful), number(useful and useful / gemm, ".0%")])
    title = f"\n{key}: {figures['edges']:,} edges, D = {figures['dim']}; GEMM {gemm:.0f} GFLOP/s"
    graph = "  " + shorten(str(figures["graph"]), 110, placeholder=" …")
    return "\n".join([title, graph, *aligned([*HEAD, "GFLOP/s", "share"], rows)])


def by_workload(records: Records) -> dict[str, dict[str, list[dict]]]:
    """Of each graph, by phase, its sizes from the smallest."""
    order = {workload.name: place for place, workload in enumerate(WORKLOADS)}
    named = [(key.rsplit(", N = ", 1)[0], figures) for key, figures in records[NAME].items()]
    named.sort(key=lambda each: (order.get(each[0], -1), each[0], each[1]["phase"], each[1]["n"]))
    found: dict[str, dict[str, list[dict]]] = {}
    for name, figures in named:
        found.setdefault(name, {}).setdefault(figures["phase"], []).append(figures)
    return found


def answer(records: Records) -> list[str]:
    """A table: from which size on sparse is worth it, graph by graph."""
    rows, phases = [], {}
    for name, phases in by_workload(records).items():
        last = list(phases.values())[-1]
        edges, n = last[-1]["edges"], last[-1]["n"]
        share = f"{edges:,} of {n:,}² ({edges / n**2:.2%})"
        rows.append([name, *map(worth, phases.values()), largest(last, DENSE), largest(last, IRREGULAR), share])
    last = list(phases)[-1]
    head = ["graph", *(f"faster from N ≈, {phase}" for phase in phases)]
    head += [f"times as fast as dense, {last}", f"times as fast as PyG, {last}", "edges at the largest N"]
    return table(head, rows)


def beside(figures: dict, names: tuple[str, ...]) -> dict | None:
    """The fastest of these, if it ran beside ours."""
    found = [own for name in names if "ms" in (own := figures["contestants"].get(name, {}))]
    best = min(found, key=lambda own: own["ms"][1], default={})
    return best if "over_ours" in best else None


def worth(sizes: list[dict]) -> str:
    """The number of nodes from which on sparse is faster than dense."""
    dense = [(figures["n"], found["over_ours"][1]) for figures in sizes if (found := beside(figures, DENSE))]
    slower = [at for at, (_, ratio) in enumerate(dense) if ratio < 1]
    if not dense:
        return "not measured"
    if not slower:
        return f"{dense[0][0]:,} or less"
    if slower[-1] == len(dense) - 1:
        return f"not up to {dense[-1][0]:,}"
    (n, ratio), (next_n, next_ratio) = dense[slower[-1]], dense[slower[-1] + 1]
    share = -math.log(ratio) / (math.log(next_ratio) - math.log(ratio))
    return f"{n * (next_n / n) ** share:,.0f}"


def largest(sizes: list[dict], names: tuple[str, ...] = DENSE) -> str:
    """How many times as fast as the best of these, at the largest size where one of them ran."""
    for figures in reversed(sizes):
        if theirs := beside(figures, names):
            return f"{spread(theirs['over_ours'], 1)} at N = {figures['n']:,}"
    return "none ran"


def over_best_named(figures: dict) -> list[float] | None:
    """auto's time over that of the best backend that can be named, if one ran."""
    named = [own["over_ours"] for name in NAMED if "over_ours" in (own := figures["contestants"].get(name, {}))]
    best = min(named, key=lambda over: over[1], default=[])
    return [1 / over for over in reversed(best)] or None


def regrets(records: Records) -> list[tuple[str, list[float]]]:
    """The same of all graphs, sizes and phases."""
    return [(key, over) for key, figures in records[NAME].items() if (over := over_best_named(figures))]


def render(records: Records, keep: Keep) -> Iterator[str]:
    """Time and memory against N, a picture a graph, and every figure."""
    if not records[NAME]:
        return
    yield from ["## Time and memory against size", ""]
    for name, phases in by_workload(records).items():
        first = next(iter(phases.values()))[0]
        graph = shorten(first["graph"], 120, placeholder=" …")
        yield from [f"### {name}", "", f"`{graph}`" if len(first["graph"]) < 2000 else "", ""]
        caption = f"{name}: batch 1, {first['heads']} heads of dimension {first['dim']}, {first['dtype']}"
        plain = "".join(letter if letter.isalnum() else "-" for letter in name.lower()).replace("---", "-")
        yield from picture(keep, f"crossover-{plain}", pictures.crossover(phases), caption)
        rows = [
            [phase, f"{figures['n']:,}", *row_of(peer, own)]
            for phase, sizes in phases.items()
            for figures in sizes
            for peer, own in figures["contestants"].items()
        ]
        yield from folded("every figure", table(["", "N", *HEAD], rows))


OPTIONS: dict[str, dict] = {
    "workload": {
        "action": "append",
        "choices": [workload.name for workload in WORKLOADS],
        "help": "one of the graphs; may be repeated",
    },
    "graph": {
        "action": "append",
        "type": own_graph,
        "metavar": "EXPRESSION",
        "help": 'a graph of your own instead, such as "Causal() & Window(64, 0)"; may be repeated',
    },
    "peer": {"action": "append", "choices": [peer.name for peer in PEERS], "help": "one contestant; may be repeated"},
    "n": {"type": int, "nargs": "+", "also": ("--nodes",), "help": "numbers of nodes; by default those of each graph"},
    "repeats": {"default": 15},
    "limit": {"default": 30.0},
    "memory": {},
    "device": {},
    "gemm": {"type": int, "help": f"size of the matrix product to compare with; by default {GEMM}"},
}
EXPERIMENT = Experiment(NAME, __doc__, run, render, OPTIONS, show)

if __name__ == "__main__":
    EXPERIMENT.main()

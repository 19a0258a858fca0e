"""Attention on sparse graphs: ours beside PyTorch's, FlexAttention, PyG and padded tables, in the same run.

    python -m benchmarks.attention                                  every graph and size, hours
    python -m benchmarks.attention --workload window --n 2048 8192
    python -m benchmarks.attention --quick                          a smoke test, in a minute

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
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import shorten

import torch
from torch import Tensor

from attngraph import Causal
from benchmarks.measure import RESULTS, cost, in_turn, isolated, quartiles, record, spread
from benchmarks.peers import AUTO, FLEX, PEERS, WORKLOADS, Attention, Peer, Task, Workload

PHASES = ("forward", "forward + backward")
TO_COMPILE = 180.0  # seconds more for the first calls of what compiles itself
GEMM = {"cpu": 2048, "cuda": 8192}
EXACT = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
QUICK = {"window": 256, "uniform": 1250}


# ------------------------------------------------------------------------------- in a process of its own


def call_of(phase: str, attention: Attention, sides: list[Tensor]) -> Callable[[], object]:
    """One call of a phase: the result (forward), or the gradients of q, k and v."""
    q, k, v, upstream = sides

    def forward():
        with torch.no_grad():
            return attention(q, k, v)

    def both():
        return torch.autograd.grad(attention(q, k, v), (q, k, v), upstream)

    return forward if phase == "forward" else both


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


def contest(progress, workload: str, sizes: list[int], peers: list[str], history: History, options) -> dict:
    """The figures of all sizes of a workload, by size and phase; what is running stands in `now` of the progress."""
    found: dict = {"sizes": {}, "history": history, "now": None}
    for nodes in sizes:
        if time.monotonic() > options.until:
            break
        contenders = [peer for peer in PEERS if peer.name in peers]
        match = Match(Task(workload_of(workload), nodes, options.device), contenders, options, history)

        def report(peer: Peer | None, phase: str, found=found, nodes=nodes) -> None:
            found["now"] = peer and (nodes, peer.name, phase)
            slow = TO_COMPILE if peer and peer.compiles else 30.0
            progress(found, 3600.0 if peer is None else slow + 2 * options.limit)

        found["sizes"][nodes] = match.figures(report)
    return found


def workload_of(name: str) -> Workload:
    return next(known for known in WORKLOADS if known.name == name)


class Match:
    """The contestants of one graph at one size."""

    def __init__(self, task: Task, peers: list[Peer], options, history: History):
        self.task, self.peers, self.options, self.history = task, peers, options, history
        self.prepared: dict[str, Attention] = {}
        self.own: dict[str, dict] = {peer.name: {} for peer in peers}  # what is known of each, whatever the phase

    def figures(self, report: Callable) -> dict[str, dict]:
        """By phase: size, graph, edges, and the figures of each contestant."""
        task, options = self.task, self.options
        known = {"n": task.n, "graph": task.graph.text, "edges": task.graph.num_edges(task.n, task.n)}
        known |= {"dim": task.workload.dim, "heads": task.heads, "dtype": str(task.dtype).removeprefix("torch.")}
        size, by_phase = GEMM[torch.device(task.device).type], {}
        left, right = torch.randn(2, size, size, device=task.device, dtype=task.dtype)
        for peer in self.peers:
            report(peer, "prepare")
            self.prepare(peer)
        for phase in PHASES[: 1 if options.phase == "forward" else 2]:
            sides = {major: task.inputs(major, grad=phase != PHASES[0]) for major in (False, True)}
            calls, contestants = {}, {}
            for peer in self.peers:
                report(peer, phase)
                contestants[peer.name] = dict(self.own[peer.name])
                with self.noted(peer, phase, contestants[peer.name]) as trying:
                    if trying:
                        call = call_of(phase, self.prepared[peer.name], sides[peer.node_major])
                        contestants[peer.name] |= tried(call, peer, options.limit)
                        self.history.seconds[peer.name, phase] = task.nodes, contestants[peer.name]["alone_s"]
                        calls[peer.name] = call
            report(None, phase)
            playing = [peer for peer in self.peers if peer.name in calls]
            for name, off in self.disagreements(playing, calls).items():
                contestants[name] = {"failure": f"wrong by {off:.1g}"}
                del calls[name]
            times = in_turn({**calls, "GEMM": lambda: left @ right}, options.repeats, options.limit)
            gemm = 2 * size**3 / quartiles(times.pop("GEMM"))[1] / 1e9
            for name, seconds in times.items():
                contestants[name] |= told(seconds, times.get(AUTO), known, phase)
            by_phase[phase] = {**known, "phase": phase, "gemm_gflops": gemm, "contestants": contestants}
        return by_phase

    def prepare(self, peer: Peer) -> None:
        """What a contestant makes once for this graph, and what that costs."""

        def build() -> None:
            self.prepared[peer.name] = peer.build(self.task)

        own = self.own[peer.name]
        with self.noted(peer, "prepare", own) as trying:
            if not trying:
                return
            own["prepare_s"], own["prepare_mib"] = cost(build)
            if peer.name == FLEX:
                own["compile_s"] = own["prepare_s"]
                own["prepare_s"], own["prepare_mib"] = cost(build)

    @contextmanager
    def noted(self, peer: Peer, phase: str, own: dict) -> Iterator[bool]:
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
            kind = "" if isinstance(error, TooSlow) else f"{type(error).__name__}: "
            own["failure"] = kind + " ".join(str(error).split())[:200]
            self.history.fail(peer.name, phase, own["failure"], self.task.nodes)
            torch._dynamo.reset()  # which else runs uncompiled whatever it once failed to compile

    def disagreements(self, peers: list[Peer], calls: dict[str, Callable]) -> dict[str, float]:
        """The peers whose result is not that of the first one (not ours), and how far it is from it; also warms all."""
        reference, wrong = None, {}
        for peer in sorted(peers, key=lambda peer: peer.name.startswith("ours")):
            results = calls[peer.name]()
            if peer.all_causal and self.task.graph != Causal():
                continue
            results = [results] if isinstance(results, Tensor) else results
            results = [side.transpose(0, 1)[None] if peer.node_major else side for side in results]
            reference = reference or results
            for side, right in zip(results, reference, strict=True):
                off = float((side - right).abs().max() / right.abs().max().clamp(min=1))
                if not off < EXACT[self.task.dtype]:  # NaN is wrong
                    wrong[peer.name] = max(off, wrong.get(peer.name, 0.0))
        return wrong


class TooSlow(Exception):
    """A call took longer than its limit."""


def tried(call: Callable, peer: Peer, limit: float) -> dict:
    """What a call needs alone: the first, which may compile, and another."""
    first_s, first_mib = cost(call)
    if first_s > limit and not peer.compiles:
        raise TooSlow(f"over {limit:g} s a call ({first_s:.1f})")
    call_s, call_mib = cost(call)
    if call_s > limit:
        raise TooSlow(f"over {limit:g} s a call ({call_s:.1f})")
    return {"first_s": first_s, "first_mib": first_mib, "alone_s": call_s, "extra_mib": call_mib}


def told(seconds: list[float], auto: list[float] | None, known: dict, phase: str) -> dict:
    """The figures of a contestant's turns."""
    own: dict = {"ms": quartiles([1000 * value for value in seconds]), "turns": len(seconds)}
    if auto:
        own["over_ours"] = quartiles([a / b for a, b in zip(seconds, auto, strict=False)])
    if phase == PHASES[0]:
        own["useful_gflops"] = 4 * known["edges"] * known["heads"] * known["dim"] / (own["ms"][1] / 1000) / 1e9
    return own


# --------------------------------------------------------------------------------------------- one workload


def measured(workload: str, sizes: list[int], options: argparse.Namespace) -> Iterator[tuple[int, dict[str, dict]]]:
    """Size after size: all figures of a workload, by phase.

    A contestant that has to be killed is left out where it was, and all begins again there without it.
    """
    known = workload_of(workload)
    here = [peer.name for peer in PEERS if peer.only(known) and not peer.absent(options.device)]
    names = [name for name in here if not options.peer or name in options.peer]
    history, left = History(), sorted(sizes)
    while left and time.monotonic() < options.until:
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


def status(text: str = "") -> None:
    """What is running, on a line of the terminal that the next one overwrites."""
    if sys.stderr.isatty():
        print(f"{text:78}", end="\r", file=sys.stderr, flush=True)


def show(workload: str, by_phase: dict[str, dict]) -> None:
    """Print the table of a workload at one size."""
    status()
    for phase, figures in by_phase.items():
        gemm = figures["gemm_gflops"]
        print(f"\n{workload}, {phase}: N = {figures['n']}, {figures['edges']:,} edges, D = {figures['dim']}; ", end="")
        print(f"GEMM {gemm:.0f} GFLOP/s\n  {shorten(str(figures['graph']), 110)}")
        print(f"{'':26}{'prepare, s':>11}{'ms (quartiles)':>30}{'/ ours':>8}{'GFLOP/s':>9}{'share':>7}{'MiB':>9}")
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
    for name in options.workload or [workload.name for workload in WORKLOADS]:
        sizes = options.n or ([QUICK[name]] if options.quick else workload_of(name).sizes)
        for nodes, found in measured(name, list(sizes), options):
            show(name, found)
            sections = {f"{name}, N = {nodes}, {phase}": figures for phase, figures in found.items()}
            path = record("attention", sections, options.out, options.device)
    return path


def parser_of() -> argparse.ArgumentParser:
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
    parser.add_argument("--memory", type=float, default=18.0, help="GiB of resident memory of all contestants")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no size after so many")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of attention.json")
    parser.add_argument("--quick", action="store_true", help="two small graphs, recorded in a temporary folder")
    return parser


def main() -> None:
    options = parser_of().parse_args()
    options.until = time.monotonic() + 60 * options.minutes
    if options.quick:
        options.workload, options.repeats = options.workload or list(QUICK), min(options.repeats, 5)
        options.out = Path(tempfile.mkdtemp()) if options.out == RESULTS else options.out
    path = run(options)
    print(f"\nmedians with quartiles of up to {options.repeats} turns; recorded in {path}")


if __name__ == "__main__":
    main()

"""One page from what was recorded: python -m benchmarks.report FOLDER writes report.md and report.html there.

Both hold their pictures within themselves. `text` is the page as Markdown, for whoever keeps the pictures elsewhere.
"""

from __future__ import annotations

import argparse
import base64
import json
import math
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path
from textwrap import shorten

from markdown_it import MarkdownIt

from benchmarks import density, pictures, planning, quality, steps
from benchmarks.measure import spread
from benchmarks.peers import FLEX, PEERS, PYG, PYG_COMPILED, SDPA_CAUSAL, SDPA_MASK, WORKLOADS

DENSE = (SDPA_MASK, SDPA_CAUSAL)
IRREGULAR = (PYG, PYG_COMPILED)
Keep = Callable[[str, bytes], str]  # keeps a picture of this name, and gives the target of its link

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2rem auto; padding: 0 1rem; color: #1f2937 }
img { max-width: 100% } h1, h2 { line-height: 1.2 } h2 { margin-top: 2.5rem }
table { border-collapse: collapse; font-size: 14px; display: block; overflow-x: auto }
th, td { border-bottom: 1px solid #e5e7eb; padding: 4px 10px; text-align: left; white-space: nowrap }
code { font-size: 14px; background: #f3f4f6; padding: 1px 4px } summary { cursor: pointer; color: #2a5d9f }
"""


class Records:
    """What was recorded in a folder; a section that was not is empty."""

    def __init__(self, folder: Path):
        self.all = {name: _read(folder / f"{name}.json") for name in
                    ("attention", density.NAME, planning.NAME, steps.NAME, quality.NAME)}  # fmt: skip

    def __getattr__(self, name: str) -> dict:
        return self.all[name]

    @property
    def machines(self) -> list[dict]:
        """Where all this was measured, each once."""
        every = [section["machine"] for records in self.all.values() for section in records.values()]
        return [machine for at, machine in enumerate(every) if machine not in every[:at]]

    @property
    def workloads(self) -> dict[str, dict[str, list[dict]]]:
        """Of each graph, by phase, its sizes from the smallest."""
        order = [workload.name for workload in WORKLOADS]
        named = [(key.split(",")[0], figures) for key, figures in self.attention.items()]
        named.sort(key=lambda each: (order.index(each[0]), each[1]["phase"], each[1]["n"]))
        found: dict[str, dict[str, list[dict]]] = {}
        for name, figures in named:
            found.setdefault(name, {}).setdefault(figures["phase"], []).append(figures)
        return found


def _read(path: Path) -> dict:
    return json.loads(path.read_text()) if path.exists() else {}


# ------------------------------------------------------------------------------------------------------- the page


def text(folder: Path, keep: Keep) -> str:
    """The page as Markdown."""
    records = Records(folder)
    parts = [answer(records), crossovers(records, keep), backends(records, keep), regret(records, keep)]
    parts += [plans(records, keep), training(records, keep), losses(records, keep), compared(records)]
    return "\n".join(line for part in parts for line in part)


def figure(keep: Keep, name: str, drawn, caption: str) -> list[str]:
    return [f"![{caption}]({keep(name, pictures.png(drawn))})", "", f"*{caption}*", ""]


def table(head: list[str], rows: Iterator[list[str]] | list[list[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return [*("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines), ""]


def prose(paragraph: str) -> list[str]:
    return [" ".join(paragraph.split()), ""]


def folded(summary: str, lines: list[str]) -> list[str]:
    return [f"<details><summary>{summary}</summary>", "", *lines, "</details>", ""]


def described(machine: dict) -> str:
    """A machine and its versions, in a line."""
    own = machine.get("device", machine["processor"])
    where = f"{own}, {machine['gib']} GiB" + ("" if "device" in machine else f", {machine['threads']} threads")
    shown = ("driver", "cuda", "torch", "python", "numba", "triton", "torch-geometric")
    versions = ", ".join(f"{name} {machine[name]}" for name in shown if name in machine)
    return f"{where}; {versions}; {machine['date']}"


def answer(records: Records) -> Iterator[str]:
    """From which size on sparse is worth it, graph by graph."""
    yield from ["# Dense against sparse", "", *(f"On {described(machine)}." for machine in records.machines), ""]
    if not records.attention:
        return
    yield from ["## From which size on is sparse worth it?", ""]
    yield from prose("""
        *Dense* is the faster of PyTorch's `scaled_dot_product_attention` with a mask and, where all edges are causal,
        with `is_causal`; *sparse* is `attend(q, k, v, graph)` as it comes. Sizes at which they are equal lie between
        measured ones and are interpolated. A dense form that failed or took too long is named in the tables below.
    """)
    rows = []
    for name, phases in records.workloads.items():
        row = [name, *(worth(sizes) for sizes in phases.values())]
        last = list(phases.values())[-1]
        edges, n = last[-1]["edges"], last[-1]["n"]
        rows.append([*row, largest(last), largest(last, IRREGULAR), f"{edges:,} of {n:,}² ({edges / n**2:.2%})"])
    phases = list(next(iter(records.workloads.values())))
    head = ["graph", *(f"faster from N ≈, {phase}" for phase in phases), f"times as fast as dense, {phases[-1]}",
            f"times as fast as PyG, {phases[-1]}", "edges at the largest N"]  # fmt: skip
    yield from table(head, rows)


def fastest(figures: dict, names: tuple[str, ...]) -> dict | None:
    """The figures of the fastest of these."""
    found = [own for name in names if "ms" in (own := figures["contestants"].get(name, {}))]
    return min(found, key=lambda own: own["ms"][1], default=None)


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


def beside(figures: dict, names: tuple[str, ...]) -> dict | None:
    """The fastest of these, if it ran beside ours."""
    found = fastest(figures, names)
    return found if found and "over_ours" in found else None


def largest(sizes: list[dict], names: tuple[str, ...] = DENSE) -> str:
    """How many times as fast as the best of these, at the largest size where one of them ran."""
    for figures in reversed(sizes):
        if theirs := beside(figures, names):
            return f"{spread(theirs['over_ours'], 1)} at N = {figures['n']:,}"
    return "none ran"


def crossovers(records: Records, keep: Keep) -> Iterator[str]:
    """Time and memory against N, a picture a graph, and every figure."""
    if not records.attention:
        return
    yield from ["## Time and memory against size", ""]
    for name, phases in records.workloads.items():
        first = next(iter(phases.values()))[0]
        graph = shorten(first["graph"], 120, placeholder=" …")
        yield from [f"### {name}", "", f"`{graph}`" if len(first["graph"]) < 2000 else "", ""]
        caption = f"{name}: batch 1, {first['heads']} heads of dimension {first['dim']}, {first['dtype']}"
        yield from figure(keep, f"crossover-{_plain(name)}", pictures.crossover(phases), caption)
        rows = [
            [phase, f"{figures['n']:,}", peer, *_told(own)]
            for phase, sizes in phases.items()
            for figures in sizes
            for peer, own in figures["contestants"].items()
        ]
        head = ["", "N", "", "ms (quartiles)", "over ours", "prepare, s", "MiB", "turns"]
        yield from folded("every figure", table(head, rows))


def _plain(name: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in name.lower()).replace("---", "-")


def _told(own: dict) -> list[str]:
    prepare = f"{own['prepare_s']:.3f}" if "prepare_s" in own else ""
    if "failure" in own:
        return [shorten(own["failure"], 110, placeholder=" …"), "", prepare, "", ""]
    over = spread(own["over_ours"], 2) if "over_ours" in own else ""
    mib = "" if own["extra_mib"] is None else f"{own['extra_mib']:.1f}"
    return [spread(own["ms"], 2), over, prepare, mib, str(own["turns"])]


def backends(records: Records, keep: Keep) -> Iterator[str]:
    """Which backend wins."""
    if not records.density:
        return
    one = next(iter(records.density.values()))
    yield from ["## Which backend wins, by density and size", ""]
    caption = (
        f"the fastest backend of each cell, and how many times as fast as the next one; {one['phase']}, batch 1, "
        f"{one['heads']} heads of dimension {one['dim']}, {'bfloat16' if 'device' in one['machine'] else 'float32'}"
    )
    yield from figure(keep, "density", pictures.heat_map(records.density), caption)
    rows = []
    for kind, section in records.density.items():
        for cell in section["cells"]:
            told = [spread(cell["ms"][name], 2) if name in cell["ms"] else cell["failures"].get(name, "")
                    for name in ("auto", *density.BACKENDS)]  # fmt: skip
            chosen = " + ".join(cell["chosen"])
            rows.append([kind, f"{cell['n']:,}", f"{cell['density']:.1%}", f"{cell['edges']:,}", *told, chosen])
    head = [
        "",
        "N",
        "density",
        "edges",
        "auto, ms (quartiles)",
        *(f"{name}, ms" for name in density.BACKENDS),
        "auto is",
    ]
    yield from folded("every figure", table(head, rows))


def regret(records: Records, keep: Keep) -> Iterator[str]:
    """The planner's choice beside the best that can be named."""
    cases = [
        (f"{kind}, {cell['density']:.1%}, N = {cell['n']:,}", cell["regret"])
        for kind, section in records.density.items()
        for cell in section["cells"]
    ]
    for key, figures in records.attention.items():
        named = [own for name, own in figures["contestants"].items()
                 if name in ("ours, tiles", "ours, rows", SDPA_MASK) and "over_ours" in own]  # fmt: skip
        if named:
            low, middle, high = min((own["over_ours"] for own in named), key=lambda over: over[1])
            cases.append((key, [1 / high, 1 / middle, 1 / low]))
    if not cases:
        return
    middle = sorted(three[1] for _, three in cases)
    share = sum(each <= 1.25 for each in middle) / len(middle)
    yield from ["## The planner's choice", ""]
    yield from prose(f"""
        The time of `auto` over that of the best backend that can be named, in {len(cases)} cases, both pictures above
        together: {middle[len(middle) // 2]:.2f} in the middle, at most 1.25 in {share:.0%} of them, {middle[-1]:.2f}
        at worst. Below 1 lie graphs that it cuts into parts for several backends, and noise.
    """)
    yield from figure(keep, "regret", pictures.regrets(cases), "auto's time over that of the best named backend")
    worst = sorted(cases, key=lambda case: -case[1][1])[:8]
    yield from folded("the worst cases", table(["", "times"], [[name, spread(three, 2)] for name, three in worst]))


def plans(records: Records, keep: Keep) -> Iterator[str]:
    """What planning costs."""
    if not records.planning:
        return
    by_name = {name: list(each) for name, each in groupby(records.planning.values(), key=lambda each: each["name"])}
    masks = [
        (key.split(",")[0], figures["n"], own["prepare_s"])
        for key, figures in records.attention.items()
        if figures["phase"] == "forward" and "prepare_s" in (own := figures["contestants"].get(FLEX, {}))
    ]
    yield from ["## Planning", "", "Once for a graph, however often it runs:", ""]
    caption = "plan(graph, N, N): seconds with quartiles, and memory, each from nothing"
    yield from figure(keep, "planning", pictures.planning(by_name, masks), caption)
    rows = []
    for name, sizes in by_name.items():
        for each in sizes:
            told = each.get("failure") or spread(each["s"], 4)
            mib = "" if each.get("mib") is None else f"{each['mib']:.1f}"
            rows.append([name, f"`{shorten(each['graph'], 60, placeholder=' …')}`", f"{each['n']:,}", told, mib])
    rows += [[f"FlexAttention's block mask, {name}", "", f"{n:,}", f"{s:.4f}", ""] for name, n, s in masks]
    yield from folded("every figure", table(["", "graph", "N", "seconds (quartiles)", "MiB at most"], rows))


def training(records: Records, keep: Keep) -> Iterator[str]:
    """Whole training steps."""
    if not records.steps:
        return
    by_kind = {kind: list(each) for kind, each in groupby(records.steps.values(), key=lambda each: each["kind"])}
    done = next(each for each in records.steps.values() if "ms" in each)
    yield from ["## A training step", ""]
    yield from prose(f"""
        Forward, backward and AdamW of four layers, 128 wide, four heads, batch 1. Dense graphs are PyTorch's own flash
        kernels; the sparse ones are `{done["graphs"][1]}` for the GPT and `Neighborhood(…, 3)` with a CLS node for the
        ViT.
    """)
    drawn = {kind: [each for each in sizes if "ms" in each] for kind, sizes in by_kind.items()}
    yield from figure(keep, "steps", pictures.steps(drawn), "a whole training step, by the number of nodes")
    rows = []
    for each in records.steps.values():
        for name in steps.CONTESTANTS:
            if "failure" in each:
                rows.append([each["kind"], f"{each['n']:,}", name, each["failure"], "", ""])
                continue
            ratio, mib = spread(each["over_sparse"][name], 2), each["extra_mib"][name]
            rows.append(
                [each["kind"], f"{each['n']:,}", name, spread(each["ms"][name], 1), ratio, f"{mib:.1f}" if mib else ""]
            )
    head = ["", "nodes", "", "ms (quartiles)", "over the sparse graph's", "MiB"]
    yield from folded("every figure", table(head, rows))


def losses(records: Records, keep: Keep) -> Iterator[str]:
    """What the missing edges cost in quality."""
    found = {name: each for name, each in records.quality.items() if each["losses"]}
    if not found:
        return
    one = next(iter(found.values()))
    context, every = one["context"], one["context"] * (one["context"] + 1) // 2
    yield from ["## What it costs in quality", ""]
    yield from prose(f"""
        The same GPT ({one["parameters"]:,} parameters, 3 layers, context {context}) with the same {one["steps"]:,}
        steps, {one["tokens"]:,} characters, seeds and batches, on {one["source"]}: the loss over the whole validation
        text. A bar that lies within the dots of another tells nothing.
    """)
    yield from figure(keep, "quality", pictures.quality(found, context), "validation loss against the edges kept")
    head = ["", "graph", "edges kept", "validation loss, mean", "of each seed"]
    rows = [
        [name, f"`{each['graph']}`", f"{each['edges']:,} ({each['edges'] / every:.0%})",
         f"{sum(each['losses']) / len(each['losses']):.4f}", ", ".join(f"{loss:.4f}" for loss in each["losses"])]
        for name, each in found.items()
    ]  # fmt: skip
    yield from table(head, rows)


def compared(records: Records) -> Iterator[str]:
    """How it was measured, and who is absent."""
    device = "cuda" if any("device" in machine for machine in records.machines) else "cpu"
    ran = {name for figures in records.attention.values() for name in figures["contestants"]}
    absent = [f"{peer.name} ({why})" for peer in PEERS if peer.name not in ran and (why := peer.absent(device))]
    left = [workload.name for workload in WORKLOADS if workload.name not in records.workloads]
    yield from ["## How this was measured", ""]
    yield from prose("""
        All contestants of a graph run in one process, in turn and in another order each round, after two calls each to
        warm up and after their results were compared with one another; times are medians with quartiles, ratios are
        taken turn by turn. FlexAttention, its block mask and `PyG compiled` are compiled for each size. `PyG` is what
        its TransformerConv does between the projections: gather, softmax over each node's edges, add up. Memory is by
        how much a call raises the memory in use at its highest.
    """)
    natten = "NATTEN shifts its windows at borders, which is another graph, and is not compared"
    yield from [f"Absent: {', '.join(absent)}; {natten}." if absent else f"{natten}.", ""]
    if left and records.attention:
        yield from [f"Graphs that were not measured: {', '.join(left)}; `--workload` names them.", ""]


# ------------------------------------------------------------------------------------------------------ the files


def write(folder: Path) -> Path:
    """report.md and report.html, each whole in itself."""
    kept: dict[str, str] = {}

    def inline(name: str, content: bytes) -> str:
        kept[name] = f"data:image/png;base64,{base64.b64encode(content).decode()}"
        return f"#{name}"

    page = text(folder, inline)
    for name in kept:
        page = page.replace(f"](#{name})", f"][{name}]")
    page += "\n" + "\n".join(f"[{name}]: {content}" for name, content in kept.items()) + "\n"
    (folder / "report.md").write_text(page, encoding="utf-8")
    body = MarkdownIt("commonmark").enable("table").render(page)
    head = f'<!doctype html><meta charset="utf-8"><title>Dense against sparse</title><style>{STYLE}</style>'
    (folder / "report.html").write_text(f"{head}\n{body}", encoding="utf-8")
    return folder / "report.html"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, nargs="?", default=Path("runs/bench"), help="where the records are")
    folder = parser.parse_args().folder
    if not any(Records(folder).all.values()):
        parser.error(
            f"{folder} must hold records, such as attention.json (none found): python -m benchmarks makes them"
        )
    print(f"written: {write(folder)}")


if __name__ == "__main__":
    main()

"""One page from what was recorded: python -m benchmarks.report FOLDER writes report.md and report.html there.

Both hold their pictures within themselves. `text` is the page as Markdown, for whoever keeps the pictures elsewhere.
"""

from __future__ import annotations

import argparse
import base64
from collections.abc import Iterator
from pathlib import Path

from markdown_it import MarkdownIt

from benchmarks import attention, density, pictures, planning, quality, steps
from benchmarks.experiment import Records
from benchmarks.page import Keep, described, folded, picture, prose, spread, table
from benchmarks.peers import OWN, PEERS, WORKLOADS

EXPERIMENTS = tuple(module.EXPERIMENT for module in (attention, density, planning, steps, quality))

FEWEST_DRAWN = 8  # cases of a picture; fewer are a table

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2rem auto; padding: 0 1rem; color: #1f2937 }
img { max-width: 100% } h1, h2 { line-height: 1.2 } h2 { margin-top: 2.5rem }
table { border-collapse: collapse; font-size: 14px; display: block; overflow-x: auto }
th, td { border-bottom: 1px solid #e5e7eb; padding: 4px 10px; text-align: left; white-space: nowrap }
code { font-size: 14px; background: #f3f4f6; padding: 1px 4px } summary { cursor: pointer; color: #2a5d9f }
"""


# ------------------------------------------------------------------------------------------------------- the page


def text(folder: Path, keep: Keep) -> str:
    """The page as Markdown."""
    records = Records(folder)
    parts = [answer(records), attention.render(records, keep), density.render(records, keep), regret(records, keep)]
    parts += [module.render(records, keep) for module in (planning, steps, quality)]
    return "\n".join(line for part in [*parts, compared(records)] for line in part)


def machines(records: Records) -> list[dict]:
    """Where all this was measured, each once."""
    every = [figures["machine"] for each in EXPERIMENTS for figures in records[each.name].values()]
    return [machine for at, machine in enumerate(every) if machine not in every[:at]]


def answer(records: Records) -> Iterator[str]:
    """Where it was measured, and from which size on sparse is worth it."""
    yield from ["# Dense against sparse", "", *(f"On {described(machine)}." for machine in machines(records)), ""]
    if not records[attention.NAME]:
        return
    yield from ["## From which size on is sparse worth it?", ""]
    yield from prose("""
        *Dense* is the faster of PyTorch's `scaled_dot_product_attention` with a mask and, where all edges are causal,
        with `is_causal`; *sparse* is `attend(q, k, v, graph)` as it comes. Sizes at which they are equal lie between
        measured ones and are interpolated. A dense form that failed or took too long is named in the tables below.
    """)
    yield from attention.answer(records)


def regret(records: Records, keep: Keep) -> Iterator[str]:
    """The planner's choice beside the best that can be named."""
    cases = density.regrets(records) + attention.regrets(records)
    if not cases:
        return
    middle = sorted(three[1] for _, three in cases)
    share = sum(each <= 1.25 for each in middle) / len(middle)
    yield from ["## The planner's choice", ""]
    yield from prose(f"""
        The time of `auto` over that of the best backend that can be named, in {len(cases)} cases of those above:
        {middle[len(middle) // 2]:.2f} in the middle, at most 1.25 in {share:.0%} of them, {middle[-1]:.2f} at worst.
        Below 1 lie graphs that it cuts into parts for several backends, and noise.
    """)
    if len(cases) >= FEWEST_DRAWN:
        drawn = pictures.regrets([three for _, three in cases])
        yield from picture(keep, "regret", drawn, "auto's time over that of the best named backend")
    worst = sorted(cases, key=lambda case: -case[1][1])[:8]
    yield from folded("the worst cases", table(["", "times"], [[name, spread(three, 2)] for name, three in worst]))


def compared(records: Records) -> Iterator[str]:
    """How it was measured, and who is absent."""
    device = "cuda" if any("device" in machine for machine in machines(records)) else "cpu"
    found = records[attention.NAME]
    ran = {name for figures in found.values() for name in figures["contestants"]}
    absent = [f"{peer.name} ({why})" for peer in PEERS if peer.name not in ran and (why := peer.absent(device))]
    out = [peer.name for peer in PEERS if peer.name not in ran and not peer.absent(device)]
    measured = attention.by_workload(records)
    left = [] if any(name.startswith(OWN) for name in measured) else [each.name for each in WORKLOADS]
    left = [name for name in left if name not in measured]
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
    if out and found:
        yield from [f"Left out here: {', '.join(out)}.", ""]
    if left and found:
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


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path, nargs="?", default=Path("runs/bench"), help="where the records are")
    folder = parser.parse_args(arguments).folder
    if not any(Records(folder)[each.name] for each in EXPERIMENTS):
        parser.error(
            f"{folder} must hold records, such as attention.json (none found): python -m benchmarks makes them"
        )
    print(f"written: {write(folder)}")


if __name__ == "__main__":
    main()

"""Writes what is measured into README.md, docs/measured.md, results/gpu.md and examples/README.md.

python -m benchmarks.readme
"""

from __future__ import annotations

from pathlib import Path

from attngraph import Prefix, Random, Window
from benchmarks import (
    compilers,
    devices,
    dynamic,
    examples,
    floors,
    goals,
    gpu,
    outcomes,
    overhead,
    quality,
    report,
    train_gpt,
)
from benchmarks.experiment import Records
from benchmarks.internals import explained
from benchmarks.measure import RESULTS
from benchmarks.page import prose

ROOT = Path(__file__).parent.parent
LECTURE = ROOT / "examples" / "README.md"
README, MEASURED, GPU = ROOT / "README.md", ROOT / "docs" / "measured.md", RESULTS / "gpu.md"
PICTURES = ROOT / "docs" / "pictures" / "measured"
MARKS = {
    name: (f"<!-- {name}: python -m benchmarks.readme -->", f"<!-- end of {name} -->") for name in ("figures", "plan")
}


def link(name: str, content: bytes = b"") -> str:
    """Of a picture, from docs/."""
    return f"pictures/measured/{name}.png"


def figures() -> str:
    """The README's section: what users ask first."""
    records = Records(RESULTS)
    answer = list(report.answer(records))
    lines = [
        *answer[answer.index("") + 1 :],  # without its heading
        *(line for line in quality.render(records, link) if not line.startswith("*val")),
        *train_gpt.render(records, link),
        "Everything else, with every figure's spread: [docs/measured.md](docs/measured.md).",
    ]
    return "\n".join(line.replace("(pictures/", "(docs/pictures/").replace("## ", "### ") for line in lines)


def measured() -> str:
    """The page docs/measured.md: the report, then the goals of this project."""
    records = Records(RESULTS)
    lines = [
        report.text(RESULTS, link),
        "# The goals of this project",
        "",
        *train_gpt.render(records, link),
        *overhead.render(records, link),
        "## Speed and memory",
        "",
        *goals.EXPERIMENT.render(records, link),
        *compilers.render(records, link),
        "",
        "## Connectivity that is computed",
        "",
        *dynamic.EXPERIMENT.render(records, link),
        "",
        "## Many devices",
        "",
        *devices.EXPERIMENT.render(records, link),
        "",
        "## The examples",
        "",
        *examples.EXPERIMENT.render(records, link),
        *train_gpt.render_choices(records),
        "On a GPU: [benchmarks/results/gpu.md](../benchmarks/results/gpu.md). This page is written by "
        "`python -m benchmarks.readme` from `benchmarks/results`.",
        "",
    ]
    return "\n".join(lines)


def on_a_gpu() -> str:
    """A page: what `python -m benchmarks.floors` expects of a GPU, and what `python -m benchmarks.gpu` found there."""
    records = Records(RESULTS)
    lines = ["# On a GPU", "", "Written by `python -m benchmarks.readme`.", ""]
    return "\n".join([*lines, *floors.render(records, link), *gpu.render(records, link)])


def lecture() -> str:
    """A page: the examples, in the order of the lecture."""
    text = """
        The lecture that this project comes from says that all of this is one thing: nodes that send messages along
        edges, and what distinguishes the systems is who may hear whom. Each example is one file, read from top to
        bottom: a model, its graph and a task of minutes on two cores. It prints its figure beside what that is to be
        compared with, and leaves its pictures in `runs/`; `--graph` changes who hears whom, `--quick` takes seconds,
        `--resume` goes on. `make lecture` runs all of them in their quick form and leaves `runs/lecture/index.html`;
        `python -m attngraph examples` lists them. The figures are of whole runs, the mean of the seeds in brackets.
    """
    head = ["# The whole lecture", "", *prose(text)]
    last = "Written by `python -m benchmarks.readme` from what `python -m benchmarks.examples` recorded."
    return "\n".join([*head, *outcomes.page(Records(RESULTS)), last, ""])


def written(text: str) -> str:
    """The README with its figures, and the plan that it shows, up to date."""
    plan = explained(Window(256, 0) | Prefix(4) | Random(8), 65_536, heads=8, head_dim=64)
    for name, content in (("figures", figures()), ("plan", f"```\n{plan}\n```")):
        begin, end = MARKS[name]
        before, rest = text.split(begin)
        text = f"{before}{begin}\n\n{content}\n\n{end}{rest.split(end)[1]}"
    return text


def main() -> None:
    README.write_text(written(README.read_text(encoding="utf-8")), encoding="utf-8")
    GPU.write_text(on_a_gpu(), encoding="utf-8")
    LECTURE.write_text(lecture(), encoding="utf-8")
    PICTURES.mkdir(parents=True, exist_ok=True)
    for old in PICTURES.glob("*.png"):
        old.unlink()

    def keep(name: str, content: bytes) -> str:
        (PICTURES / f"{name}.png").write_bytes(content)
        return link(name)

    report.text(RESULTS, keep)
    MEASURED.write_text(measured(), encoding="utf-8")


if __name__ == "__main__":
    main()

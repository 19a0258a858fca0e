"""Writes what is measured, from benchmarks/results, into README.md, docs/measured.md and results/gpu.md.

python -m benchmarks.readme
"""

from __future__ import annotations

import json
from pathlib import Path

from attngraph import Machine, Prefix, Random, Window, plan
from benchmarks import report
from benchmarks.measure import RESULTS, spread

ROOT = Path(__file__).parent.parent
README, MEASURED, GPU = ROOT / "README.md", ROOT / "docs" / "measured.md", RESULTS / "gpu.md"
PICTURES = ROOT / "docs" / "pictures" / "measured"
HEAD = ("| | goal | reached | |", "|---|---|---|---|")
MARKS = {
    name: (f"<!-- {name}: python -m benchmarks.readme -->", f"<!-- end of {name} -->") for name in ("figures", "plan")
}


def figures() -> str:
    """The README's section: what users ask first."""
    records = report.Records(RESULTS)
    answer = list(report.answer(records))
    quality = list(report.losses(records, lambda name, content: link(name)))
    lines = [
        *answer[answer.index("") + 1 :],  # without its heading
        *(line for line in quality if not line.startswith("*val")),
        *training(),
        "",
        "Everything else, with every figure's spread: [docs/measured.md](docs/measured.md).",
    ]
    return "\n".join(line.replace("(pictures/", "(docs/pictures/").replace("## ", "### ") for line in lines)


def measured() -> str:
    """The page docs/measured.md: the report, then the goals of this project."""
    lines = [
        report.text(RESULTS, lambda name, content: link(name)),
        "# The goals of this project",
        "",
        *training(),
        "",
        *overhead(),
        "",
        *goals(),
        "",
        *examples(),
        "",
        *choices(),
        "",
        "On a GPU: [benchmarks/results/gpu.md](../benchmarks/results/gpu.md).",
        "",
    ]
    lines[-2] += " This page is written by `python -m benchmarks.readme` from `benchmarks/results`."
    return "\n".join(lines)


def link(name: str) -> str:
    """Of a picture, from docs/."""
    return f"pictures/measured/{name}.png"


def training() -> list[str]:
    """GPTs on text, as recorded by `python -m benchmarks.train_gpt`."""
    found = json.loads((RESULTS / "train_gpt.json").read_text())
    nanogpt, demo, bigram = (found[name] for name in ("nanogpt", "demo", "bigram"))
    machine = nanogpt["machine"]
    return [
        "## Training",
        "",
        f"`python -m benchmarks.train_gpt`, on {nanogpt['text']} ({machine['threads']} threads, torch "
        f"{machine['torch']}); losses in nats per character:",
        "",
        "| | validation loss, whole text | seconds |",
        "|---|---|---|",
        f"| nanoGPT's CPU recipe on `Causal()` | {nanogpt['ours_whole_validation_loss']:.3f} "
        f"({nanogpt['ours_validation_loss']:.3f} as nanoGPT estimates it) | {nanogpt['ours_seconds']:.0f} |",
        f"| the same in nanoGPT's own form, on bare SDPA | {nanogpt['theirs_whole_validation_loss']:.3f} "
        f"({nanogpt['theirs_validation_loss']:.3f}) | {nanogpt['theirs_seconds']:.0f} |",
        f"| `make demo`, {demo['parameters']:,} parameters | {demo['validation_loss']:.3f} | {demo['seconds']:.0f}, "
        "its evaluations included |",
        f"| `--model bigram` | {bigram['validation_loss']:.3f}; its limit, from counts, is "
        f"{bigram['limit_from_training_counts']:.3f} | |",
        "",
        f"A step of the first takes {spread(nanogpt['ratio'])} times as long as one of the second: median and "
        f"quartiles of {nanogpt['pairs']} alternating pairs.",
    ]


def overhead() -> list[str]:
    """What `attend` adds to SDPA, as recorded by `python -m benchmarks.overhead`."""
    found = json.loads((RESULTS / "overhead.json").read_text())
    lines = [
        "## Beside bare SDPA",
        "",
        "`python -m benchmarks.overhead`, N = 1024, H = 8, D = 64: the time of `attend` over that of bare SDPA",
        "",
        "| | forward | forward + backward |",
        "|---|---|---|",
    ]
    for graph in ("Causal()", "Full()"):
        ratios = (spread(found[f"{graph} {phase}"]["ratio"]) for phase in ("forward", "forward + backward"))
        lines.append(f"| `{graph}` | {' | '.join(ratios)} |")
    return lines


def choices() -> list[str]:
    """What the demo's recipe is made of."""
    losses = json.loads((RESULTS / "train_gpt.json").read_text())["choices"]["losses"]
    return [
        "## The demo's recipe",
        "",
        "What each choice bought, by undoing it at the same number of tokens (`python -m benchmarks.train_gpt "
        "--sections choices`; one run each, nothing tuned again: small differences mean little):",
        "",
        "| undone | validation loss | |",
        "|---|---|---|",
        *(f"| {name} | {loss:.3f} | {loss - losses['the recipe']:+.3f} |" for name, loss in losses.items()),
    ]


def explained() -> str:
    """The plan that the README shows, on a machine of default speed."""
    graph = Window(256, 0) | Prefix(4) | Random(8)
    text = plan(graph, 65_536, 65_536, heads=8, head_dim=64, machine=Machine()).explain()
    return f"```\n{text}\n```"


def goals() -> list[str]:
    """What was to be reached, and what was, as recorded by `python -m benchmarks.goals`."""
    found = json.loads((RESULTS / "goals.json").read_text())
    lines = [
        "## Speed and memory",
        "",
        "`python -m benchmarks.goals`:",
        "",
        "| | goal | reached | |",
        "|---|---|---|---|",
    ]
    return lines + [_row(goal) for goal in found.values()]


def examples() -> list[str]:
    """What the examples reach, as recorded by `python -m benchmarks.examples`."""
    found = json.loads((RESULTS / "examples.json").read_text())
    lines = [
        "## The examples",
        "",
        "`python -m benchmarks.examples`:",
        "",
        "| | goal | reached | |",
        "|---|---|---|---|",
    ]
    return lines + [_row(figure) for section in found.values() for figure in section["figures"]]


def on_a_gpu() -> str:
    """A page: what `python -m benchmarks.floors` expects of a GPU, and what `python -m benchmarks.gpu` found there."""
    expected = json.loads((RESULTS / "floors.json").read_text())
    rates = f"{expected['flops'] / 1e12:.0f} TFLOP/s and {expected['bytes'] / 1e12:.1f} TB/s"
    lines = [
        "# On a GPU",
        "",
        "Written by `python -m benchmarks.readme`.",
        "",
        f"`python -m benchmarks.floors`: what an H200 must take at least, at {rates}, and what is expected of it where",
        f"products reach {expected['share']:.0%} of their rate and gathers {expected['gathered']:.0%} of theirs:",
        "",
        "| | goal | floor, ms | expected |",
        "|---|---|---|---|",
    ]
    for line in expected["lines"]:
        text = line["text"].replace("|", "\\|")
        lines.append(f"| {text} | {line['goal']} | {line['floor']:.2f} | {line['expected']} |")
    path = RESULTS / "gpu.json"
    if not path.exists():
        return "\n".join([*lines, "", "`python -m benchmarks.gpu`: not yet run on hardware.", ""])
    found = json.loads(path.read_text())
    machine = next(iter(found.values()))["machine"]
    versions = ", ".join(f"{name} {machine[name]}" for name in ("driver", "cuda", "torch", "triton", "python"))
    lines += ["", f"`python -m benchmarks.gpu` on one {machine['device']}, {versions}; medians of milliseconds:", ""]
    lines += ["| | goal | reached | | ours | theirs | predicted |", "|---|---|---|---|---|---|---|"]
    for name, section in found.items():
        for figure in section["figures"]:
            times = (figure["ours_ms"] and figure["ours_ms"][1], figure["theirs_ms"] and figure["theirs_ms"][1])
            told = " | ".join("" if time is None else f"{time:.2f}" for time in (*times, figure["predicted_ms"]))
            lines.append(f"{_row(figure)} {told} |")
        if section["failure"]:
            lines.append(f"| {name}: {_cell(section['failure'])} | | | not reached | | | |")
    return "\n".join([*lines, ""])


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _row(goal: dict) -> str:
    reached = f"{goal['reached']:.3g}" if isinstance(goal["reached"], float) else _cell(goal["reached"])
    sign = "≤" if goal["at_most"] else "≥"
    wanted = goal["wanted"] if isinstance(goal["wanted"], str) else f"{goal['wanted']:g}"
    return f"| {_cell(goal['text'])} | {sign} {wanted} | {reached} | {'✓' if goal['yes'] else 'not reached'} |"


def written(text: str) -> str:
    """The README with its figures up to date."""
    for name, content in (("figures", figures()), ("plan", explained())):
        begin, end = MARKS[name]
        before, rest = text.split(begin)
        text = f"{before}{begin}\n\n{content}\n\n{end}{rest.split(end)[1]}"
    return text


def main() -> None:
    README.write_text(written(README.read_text(encoding="utf-8")), encoding="utf-8")
    GPU.write_text(on_a_gpu(), encoding="utf-8")
    PICTURES.mkdir(parents=True, exist_ok=True)
    for old in PICTURES.glob("*.png"):
        old.unlink()
    report.text(RESULTS, lambda name, content: str((PICTURES / f"{name}.png").write_bytes(content)))
    MEASURED.write_text(measured(), encoding="utf-8")


if __name__ == "__main__":
    main()

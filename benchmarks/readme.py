"""Writes the figures of the README, and the page on GPUs, from benchmarks/results: python -m benchmarks.readme"""

from __future__ import annotations

import json
from pathlib import Path

from attngraph import Machine, Prefix, Random, Window, plan
from benchmarks.measure import RESULTS, spread

README = Path(__file__).parent.parent / "README.md"
GPU = RESULTS / "gpu.md"
MARKS = {
    name: (f"<!-- {name}: python -m benchmarks.readme -->", f"<!-- end of {name} -->") for name in ("figures", "plan")
}


def figures() -> str:
    """The section as Markdown."""
    overhead, training = (json.loads((RESULTS / f"{name}.json").read_text()) for name in ("overhead", "train_gpt"))
    nanogpt, demo, bigram = (training[name] for name in ("nanogpt", "demo", "bigram"))
    machine = nanogpt["machine"]
    lines = [
        f"On {machine['threads']} cores ({machine['processor']}), torch {machine['torch']}, Python {machine['python']},"
        f" {nanogpt['text']}; losses in nats per character, medians with quartiles.",
        "",
        "`python -m benchmarks.train_gpt`:",
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
        f"A step of the first takes {spread(nanogpt['ratio'])} times as long as one of the second, in "
        f"{nanogpt['pairs']} alternating pairs.",
        "",
        "`python -m benchmarks.overhead`, N = 1024, H = 8, D = 64: the time of `attend` over that of bare SDPA",
        "",
        "| | forward | forward + backward |",
        "|---|---|---|",
    ]
    for graph in ("Causal()", "Full()"):
        ratios = (spread(overhead[f"{graph} {phase}"]["ratio"]) for phase in ("forward", "forward + backward"))
        lines.append(f"| `{graph}` | {' | '.join(ratios)} |")
    lines += ["", *goals(), "", *examples()]
    if "choices" in training:
        losses = training["choices"]["losses"]
        lines += [
            "",
            "What each choice of the demo's recipe bought, by undoing it at the same number of tokens "
            "(`--sections choices`; one run each, nothing tuned again: small differences mean little):",
            "",
            "| undone | validation loss | |",
            "|---|---|---|",
            *(f"| {name} | {loss:.3f} | {loss - losses['the recipe']:+.3f} |" for name, loss in losses.items()),
        ]
    return "\n".join(lines)


def explained() -> str:
    """The plan that the README shows, on a machine of default speed."""
    graph = Window(256, 0) | Prefix(4) | Random(8)
    text = plan(graph, 65_536, 65_536, heads=8, head_dim=64, machine=Machine()).explain()
    return f"```\n{text}\n```"


def goals() -> list[str]:
    """What was to be reached, and what was, as recorded by `python -m benchmarks.goals`."""
    found = json.loads((RESULTS / "goals.json").read_text())
    lines = ["`python -m benchmarks.goals`:", "", "| | goal | reached | |", "|---|---|---|---|"]
    return lines + [_row(goal) for goal in found.values()]


def examples() -> list[str]:
    """What the examples reach, as recorded by `python -m benchmarks.examples`."""
    found = json.loads((RESULTS / "examples.json").read_text())
    lines = ["`python -m benchmarks.examples`:", "", "| | goal | reached | |", "|---|---|---|---|"]
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


if __name__ == "__main__":
    README.write_text(written(README.read_text(encoding="utf-8")), encoding="utf-8")
    GPU.write_text(on_a_gpu(), encoding="utf-8")

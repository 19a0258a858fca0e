"""The pictures of the report, from what was recorded. Every function takes records and gives a figure."""

from __future__ import annotations

import io
import math

from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from benchmarks.density import winner_of
from benchmarks.peers import AUTO, PEERS
from benchmarks.steps import CONTESTANTS

COLOURS = {peer.name: f"C{place}" for place, peer in enumerate(PEERS)}
BACKENDS = {"dense": "#6b7280", "tiles": "#2a5d9f", "rows": "#c2410c"}
STEPS = dict(zip(CONTESTANTS, ("#6b7280", "#2a5d9f", "#c2410c"), strict=True))


def png(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, dpi=110, format="png", metadata={"Software": None})
    return file.getvalue()


def crossover(sizes: dict[str, list[dict]]) -> Figure:
    """Time of each phase and memory of the last one against N, a line a contestant; a cross on top is a failure."""
    phases = list(sizes)
    figure = Figure(figsize=(4.3 * (len(phases) + 1), 4.4), layout="constrained")
    axes = figure.subplots(1, len(phases) + 1)
    for ax, phase in zip(axes, phases, strict=False):
        _lines(ax, sizes[phase], lambda own: own["ms"])
        ax.set(title=phase, ylabel="ms a call, median and quartiles")
    _lines(axes[-1], sizes[phases[-1]], lambda own: [max(own["extra_mib"] or 0, 0.1)] * 3)
    axes[-1].set(title=f"{phases[-1]}: memory", ylabel="MiB that a call needs at most")
    handles = {line.get_label(): line for ax in axes for line in ax.get_lines() if line.get_label()[0] != "_"}
    title = "× on top: failed, or not tried at this size"
    figure.legend(handles=handles.values(), loc="outside lower center", ncols=5, title=title, frameon=False, fontsize=9)
    return figure


def _lines(ax, sizes: list[dict], read) -> None:
    names = [peer.name for peer in PEERS if any(peer.name in figures["contestants"] for figures in sizes)]
    drawn = []
    for place, name in enumerate(names):
        own = [(figures["n"], figures["contestants"].get(name, {})) for figures in sizes]
        done = [(n, read(found)) for n, found in own if "ms" in found]
        drawn += [three[1] for _, three in done]
        at, colour = [n for n, _ in done], COLOURS[name]
        width = 2.6 if name == AUTO else 1.3
        ax.plot(at, [three[1] for _, three in done], "o-", ms=4, lw=width, color=colour, label=name)
        if done:
            low, _, high = zip(*(three for _, three in done), strict=True)
            ax.fill_between(at, low, high, color=colour, alpha=0.2, lw=0)
        height = 0.98 - 0.03 * place  # a strip for each, so that crosses do not hide one another
        failed = [n for n, found in own if "failure" in found]
        ax.plot(failed, [height] * len(failed), "x", transform=ax.get_xaxis_transform(), ms=5, color=colour)
    ax.set(xscale="log", yscale="log", xlabel="N, nodes")
    ax.set_xticks([figures["n"] for figures in sizes], [f"{figures['n']:,}" for figures in sizes], fontsize=8)
    ax.minorticks_off()
    low, high = 10.0 ** math.floor(math.log10(min(drawn, default=1.0))), 1.5 * max(drawn, default=10.0)
    ax.set_ylim(low, high * (high / low) ** 0.42)  # room for the crosses
    ax.grid(alpha=0.3)


def heat_map(kinds: dict[str, dict]) -> Figure:
    """Of each kind of graph: which backend is the fastest by density and N, and how far ahead of the next."""
    figure = Figure(figsize=(6.4 * len(kinds), 4.6), layout="constrained")
    for ax, (kind, section) in zip(figure.subplots(1, len(kinds), squeeze=False)[0], kinds.items(), strict=True):
        cells = section["cells"]
        sizes, densities = sorted({cell["n"] for cell in cells}), sorted({cell["density"] for cell in cells})
        for cell in cells:
            x, y = sizes.index(cell["n"]), densities.index(cell["density"])
            backend, ahead = winner_of(cell)
            strength = min(1.0, 0.25 + 0.75 * math.log(max(ahead, 1.0), 6)) if math.isfinite(ahead) else 1.0
            colour = [1 - strength * (1 - part) for part in to_rgb(BACKENDS[backend])]
            ax.add_patch(_square(x, y, colour))
            text = f"{backend}\n{ahead:.1f}×" if math.isfinite(ahead) else f"{backend}\nalone"
            ax.text(x, y, text, ha="center", va="center", fontsize=8, color="white" if strength > 0.55 else "black")
        ax.set(xlim=(-0.5, len(sizes) - 0.5), ylim=(-0.5, len(densities) - 0.5), title=kind)
        ax.set(xlabel="N, nodes", ylabel="share of all pairs that are edges")
        ax.set_xticks(range(len(sizes)), [f"{n:,}" for n in sizes])
        ax.set_yticks(range(len(densities)), [f"{density:.1%}".replace(".0%", "%") for density in densities])
    return figure


def _square(x: int, y: int, colour):
    from matplotlib.patches import Rectangle

    return Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=colour, edgecolor="white")


def regrets(found: list[tuple[str, list[float]]]) -> Figure:
    """The planner's time over the best named backend's, from the best to the worst case, with quartiles."""
    found = sorted(found, key=lambda case: case[1][1])
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    ax = figure.subplots()
    at, middle = range(len(found)), [three[1] for _, three in found]
    low, high = ([abs(three[side] - three[1]) for _, three in found] for side in (0, 2))
    ax.errorbar(at, middle, yerr=(low, high), fmt="o", ms=3, lw=0.8, color=BACKENDS["tiles"], ecolor="#9ab5d6")
    ax.axhline(1.0, color="black", lw=0.8)
    ax.axhline(1.25, color=BACKENDS["rows"], lw=0.8, ls="--", label="1.25")
    ax.set(xlabel="graphs and sizes, sorted", ylabel="auto over the best, times", xticks=[])
    ax.set_ylim(0.95 * min(middle), max(2.0, 1.05 * max(middle)))
    ax.legend(frameon=False)
    ax.grid(alpha=0.3, axis="y")
    return figure


def planning(plans: dict[str, list[dict]], masks: list[tuple[str, int, float]]) -> Figure:
    """Seconds and MiB of `plan` against N; and FlexAttention's block masks, where they were built."""
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    for place, (name, sizes) in enumerate(plans.items()):
        done = [each for each in sizes if "s" in each]
        at = [each["n"] for each in done]
        left.plot(at, [each["s"][1] for each in done], "o-", ms=4, color=f"C{place}", label=name)
        left.fill_between(
            at, [each["s"][0] for each in done], [each["s"][2] for each in done], color=f"C{place}", alpha=0.2
        )
        known = [each for each in done if each["mib"] is not None]
        right.plot(
            [each["n"] for each in known], [max(each["mib"], 0.1) for each in known], "o-", ms=4, color=f"C{place}"
        )
    if masks:
        left.plot(*zip(*((n, s) for _, n, s in masks), strict=True), "kx", ms=5, label="FlexAttention's block mask")
    left.set(xscale="log", yscale="log", xlabel="N, nodes", ylabel="seconds, once a graph")
    right.set(xscale="log", yscale="log", xlabel="N, nodes", ylabel="MiB at most")
    for ax in (left, right):
        ax.grid(alpha=0.3)
    left.legend(fontsize=8, frameon=False)
    return figure


def steps(kinds: dict[str, list[dict]]) -> Figure:
    """A training step against the number of nodes."""
    figure = Figure(figsize=(5 * len(kinds), 3.8), layout="constrained")
    for ax, (kind, sizes) in zip(figure.subplots(1, len(kinds), squeeze=False)[0], kinds.items(), strict=True):
        for name, colour in STEPS.items():
            done = [(each["n"], each["ms"][name]) for each in sizes if "ms" in each]
            at, three = [n for n, _ in done], [ms for _, ms in done]
            ax.plot(at, [ms[1] for ms in three], "o-", ms=4, color=colour, label=name)
            ax.fill_between(at, [ms[0] for ms in three], [ms[2] for ms in three], color=colour, alpha=0.2, lw=0)
        ax.set(xscale="log", yscale="log", title=kind, ylabel="ms a step, median and quartiles")
        ax.set_xlabel("tokens" if kind == "GPT" else "patches")
        ax.set_xticks([each["n"] for each in sizes], [f"{each['n']:,}" for each in sizes])
        ax.minorticks_off()
        ax.grid(alpha=0.3)
        ax.legend(fontsize=8, frameon=False)
    return figure


def quality(graphs: dict[str, dict], context: int) -> Figure:
    """The validation loss of each seed against the share of causal pairs that are edges."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    ax, every = figure.subplots(), context * (context + 1) // 2
    for place, (name, found) in enumerate(graphs.items()):
        share, losses = 100 * found["edges"] / every, found["losses"]
        ax.plot([share] * len(losses), losses, "o", ms=4, alpha=0.5, color=f"C{place}")
        ax.plot([share], [sum(losses) / len(losses)], "_", ms=18, mew=2, color=f"C{place}", label=name)
    ax.set(xlabel="edges kept, % of all causal pairs", ylabel="validation loss, nats a character", xlim=(0, 105))
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8, frameon=False, title="dots: seeds; bars: means")
    return figure

"""The pictures of the report, from what was recorded: every function gives a PNG."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence

from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from benchmarks.peers import AUTO, PEERS

COLOURS = {peer.name: f"C{place}" for place, peer in enumerate(PEERS)}
BACKENDS = {"dense": "#6b7280", "tiles": "#2a5d9f", "rows": "#c2410c"}


def _png(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, dpi=110, format="png", metadata={"Software": None})
    return file.getvalue()


def _axes(count: int, size: tuple[float, float]) -> tuple[Figure, Sequence[Axes]]:
    """A figure of so many axes side by side, each of this size."""
    figure = Figure(figsize=(size[0] * count, size[1]), layout="constrained")
    axes = list(figure.subplots(1, count, squeeze=False)[0])
    for ax in axes:
        ax.grid(alpha=0.3)
    return figure, axes


def _line(ax: Axes, at: list[int], quartiles: list[list[float]], colour: str, label: str, width: float = 1.3) -> None:
    """Medians, and the quartiles as a band."""
    ax.plot(at, [three[1] for three in quartiles], "o-", ms=4, lw=width, color=colour, label=label)
    low, high = ([three[side] for three in quartiles] for side in (0, 2))
    ax.fill_between(at, low, high, color=colour, alpha=0.2, lw=0)


def _against_size(ax: Axes, sizes: list[int], ylabel: str, xlabel: str = "N, nodes", title: str = "") -> None:
    """Both axes logarithmic, a tick a size."""
    ax.set(xscale="log", yscale="log", xlabel=xlabel, ylabel=ylabel, title=title)
    if len(set(sizes)) == 1:
        ax.set_xlim(sizes[0] / 2, sizes[0] * 2)
    ax.set_xticks(sizes, [f"{n:,}" for n in sizes], fontsize=8)
    ax.minorticks_off()


def crossover(phases: dict[str, list[dict]]) -> bytes:
    """Time of each phase and memory of the last one against N, a line a contestant; a cross on top is a failure."""
    figure, axes = _axes(len(phases) + 1, (4.3, 4.4))
    for ax, (phase, sizes) in zip(axes, phases.items(), strict=False):
        _contestants(ax, sizes, lambda own: own["ms"])
        _against_size(ax, [figures["n"] for figures in sizes], "ms a call, median and quartiles", title=phase)
    phase, sizes = list(phases.items())[-1]
    _contestants(axes[-1], sizes, lambda own: [max(own["extra_mib"] or 0, 0.1)] * 3)
    _against_size(axes[-1], [figures["n"] for figures in sizes], "peak MiB of a call", title=f"{phase}: memory")
    handles = {line.get_label(): line for ax in axes for line in ax.get_lines() if str(line.get_label())[0] != "_"}
    title = "× on top: failed, or not tried at this size"
    figure.legend(
        handles=list(handles.values()), loc="outside lower center", ncols=5, title=title, frameon=False, fontsize=9
    )
    return _png(figure)


def _contestants(ax: Axes, sizes: list[dict], read: Callable[[dict], list[float]]) -> None:
    names = [peer.name for peer in PEERS if any(peer.name in figures["contestants"] for figures in sizes)]
    medians = []
    for place, name in enumerate(names):
        own = [(figures["n"], figures["contestants"].get(name, {})) for figures in sizes]
        done = [(n, read(found)) for n, found in own if "ms" in found]
        medians += [three[1] for _, three in done]
        _line(ax, [n for n, _ in done], [three for _, three in done], COLOURS[name], name, 2.6 if name == AUTO else 1.3)
        height = 0.98 - 0.03 * place  # a strip for each, so that crosses do not hide one another
        failed = [n for n, found in own if "failure" in found]
        ax.plot(failed, [height] * len(failed), "x", transform=ax.get_xaxis_transform(), ms=5, color=COLOURS[name])
    low, high = 10.0 ** math.floor(math.log10(min(medians, default=1.0))), 1.5 * max(medians, default=10.0)
    ax.set_ylim(low, high * (high / low) ** 0.42)  # room for the crosses


def heat_map(kinds: dict[str, list[tuple[int, float, str, float]]]) -> bytes:
    """Of each kind of graph, from (N, density, fastest backend, how many times as fast as the next)."""
    figure, axes = _axes(len(kinds), (6.4, 4.6))
    for ax, (kind, cells) in zip(axes, kinds.items(), strict=True):
        sizes, densities = sorted({n for n, *_ in cells}), sorted({density for _, density, *_ in cells})
        for n, density, backend, ahead in cells:
            x, y = sizes.index(n), densities.index(density)
            strength = min(1.0, 0.25 + 0.75 * math.log(max(ahead, 1.0), 6)) if math.isfinite(ahead) else 1.0
            colour = [1 - strength * (1 - part) for part in to_rgb(BACKENDS[backend])]
            ax.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=colour, edgecolor="white"))
            text = f"{backend}\n{ahead:.1f}×" if math.isfinite(ahead) else f"{backend}\nalone"
            ax.text(x, y, text, ha="center", va="center", fontsize=8, color="white" if strength > 0.55 else "black")
        ax.set(xlim=(-0.5, len(sizes) - 0.5), ylim=(-0.5, len(densities) - 0.5), title=kind)
        ax.set(xlabel="N, nodes", ylabel="density: edges / all pairs")
        ax.set_xticks(range(len(sizes)), [f"{n:,}" for n in sizes])
        ax.set_yticks(range(len(densities)), [f"{density:.1%}".replace(".0%", "%") for density in densities])
        ax.grid(visible=False)
    return _png(figure)


def regrets(cases: list[list[float]]) -> bytes:
    """The planner's time over the best named backend's, from the best to the worst case, with quartiles."""
    cases = sorted(cases, key=lambda three: three[1])
    figure, (ax,) = _axes(1, (8, 3.4))
    middle = [three[1] for three in cases]
    errors = [[abs(three[side] - three[1]) for three in cases] for side in (0, 2)]
    ax.errorbar(range(len(cases)), middle, yerr=errors, fmt="o", ms=3, lw=0.8, color="#2a5d9f", ecolor="#9ab5d6")
    ax.axhline(1.0, color="black", lw=0.8)
    ax.axhline(1.25, color=BACKENDS["rows"], lw=0.8, ls="--", label="1.25")
    ax.set(xlabel="graphs and sizes, sorted", ylabel="time of auto / best named backend", xticks=[])
    ax.set_ylim(0.95 * min(0.95, *(three[0] for three in cases)), max(2.0, *(1.05 * three[2] for three in cases)))
    ax.legend(frameon=False)
    return _png(figure)


def planning(plans: dict[str, list[dict]], block_masks: list[tuple[str, int, float]]) -> bytes:
    """Seconds and MiB of `plan` against N; and FlexAttention's block masks, where they were built."""
    figure, (time, memory) = _axes(2, (5, 3.8))
    for place, (name, sizes) in enumerate(plans.items()):
        done = [each for each in sizes if "s" in each]
        _line(time, [each["n"] for each in done], [each["s"] for each in done], f"C{place}", name)
        known = [(each["n"], max(each["mib"], 0.1)) for each in done if each["mib"] is not None]
        memory.plot([n for n, _ in known], [mib for _, mib in known], "o-", ms=4, color=f"C{place}")
    if block_masks:
        at, seconds = [n for _, n, _ in block_masks], [s for _, _, s in block_masks]
        time.plot(at, seconds, "kx", ms=5, label="FlexAttention's block mask")
    time.set(xscale="log", yscale="log", xlabel="N, nodes", ylabel="s, once a graph")
    memory.set(xscale="log", yscale="log", xlabel="N, nodes", ylabel="peak MiB")
    time.legend(fontsize=8, frameon=False)
    return _png(figure)


def steps(kinds: dict[str, list[dict]]) -> bytes:
    """A training step against the number of nodes."""
    figure, axes = _axes(len(kinds), (5, 3.8))
    for ax, (kind, sizes) in zip(axes, kinds.items(), strict=True):
        at = [each["n"] for each in sizes]
        for name, colour in zip(sizes[0]["ms"], BACKENDS.values(), strict=True):
            _line(ax, at, [each["ms"][name] for each in sizes], colour, name)
        _against_size(ax, at, "ms a step, median and quartiles", "tokens" if kind == "GPT" else "patches", kind)
        ax.legend(fontsize=8, frameon=False)
    return _png(figure)


def quality(graphs: dict[str, dict], context: int) -> bytes:
    """The validation loss of each seed against the share of causal pairs that are edges."""
    figure, (ax,) = _axes(1, (7, 4))
    pairs = context * (context + 1) // 2
    for place, (name, found) in enumerate(graphs.items()):
        share, losses = 100 * found["edges"] / pairs, found["losses"]
        ax.plot([share] * len(losses), losses, "o", ms=4, alpha=0.5, color=f"C{place}")
        ax.plot([share], [sum(losses) / len(losses)], "_", ms=18, mew=2, color=f"C{place}", label=name)
    ax.set(xlabel="edges, % of all causal pairs", ylabel="validation loss, nats a character", xlim=(0, 105))
    ax.legend(fontsize=8, frameon=False, title="dots: seeds; bars: means")
    return _png(figure)

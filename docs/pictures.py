"""Draws the pictures of the README and of the docs: python docs/pictures.py

attention-map.png is left by a run of the demo: python docs/pictures.py runs/gpt
"""

import shutil
import sys
from pathlib import Path

import torch
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from attngraph import draw, parse

FOLDER = Path(__file__).parent / "pictures"

CLASSICS = [
    ("GPT hears the past", "Causal()", 16, 16),
    ("BERT hears both sides", "Full()", 16, 16),
    ("a decoder hears memory | itself", "Beside(Full().sized(None, 8), Causal())", 16, 24),
    ("a local ViT hears its neighbours and CLS", "Neighborhood((4, 4), 1).with_global_nodes(1)", 17, 17),
    ("your own", "Causal() & (Window(4, 0) | Prefix(2) | Random(2))", 16, 16),
]

GRAPHS = {
    "full": ("Full()", 16),
    "identity": ("Identity()", 16),
    "causal": ("Causal()", 16),
    "window": ("Window(3, 1)", 16),
    "dilated": ("Window(2, 2, 3)", 16),
    "prefix": ("Prefix(4)", 16),
    "global": ("Global([0, 9])", 16),
    "strided": ("Strided(4)", 16),
    "chunks": ("Chunks(4)", 16),
    "chunk-ends": ("ChunkEnds(4, 1)", 16),
    "documents": ("Documents([3, 7, 2, 4])", 16),
    "neighborhood": ("Neighborhood((4, 6), 1)", 24),
    "axial": ("Axial((4, 6))", 24),
    "shifted": ("ShiftedWindows((4, 6), 2, 1)", 24),
    "tree": ("Tree([-1, 0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7])", 16),
    "random": ("Random(3, seed=1)", 16),
    "expander": ("Expander(4)", 16),
    "sinks": ("Causal() & (Window(4, 0) | Prefix(2))", 16),
    "sparse-transformer": ("Causal() & (Window(3, 0) | Strided(4))", 16),
    "notes": ("Causal() & (Chunks(4) | ChunkEnds(4, 1))", 16),
    "bigbird": ("Window(1, 1) | Global([0, 1]) | Random(2)", 16),
    "prefix-lm": ("Causal() | Prefix(5)", 16),
    "packing": ("Causal() & Documents([3, 7, 2, 4])", 16),
    "cls": ("Neighborhood((4, 5), 1).with_global_nodes(1)", 21),
    "transpose": ("(Causal() & Window(4, 0)).T", 16),
    "two-hops": ("Window(1, 0) @ Strided(5)", 16),
    "difference": ("Causal() - Window(3, 0)", 16),
    "beside": ("Beside(Prefix(2).sized(None, 6), Causal())", 16),
    "heads": ("PerHead([Causal(), Causal() & Window(4, 0), Causal() & Strided(4)])", 16),
}


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    axes = Figure(figsize=(15, 3.6), layout="constrained").subplots(1, len(CLASSICS))
    for ax, (title, expression, n, m) in zip(axes, CLASSICS, strict=True):
        draw.connectivity(parse(expression), n, m, ax=ax, title=f"{title}\n{expression}")
    axes[0].figure.savefig(FOLDER / "classics.png", dpi=110)
    for name, (expression, n) in GRAPHS.items():
        graph = parse(expression)
        ax = Figure(figsize=(2.1, 2.1), layout="constrained").subplots()
        draw.connectivity(graph, n, graph.size[1] or (22 if name == "beside" else n), ax=ax, title="")
        ax.set(xlabel="", ylabel="", xticks=[], yticks=[])
        for bar in ax.figure.axes[1:]:
            bar.remove()
        ax.figure.savefig(FOLDER / f"{name}.png", dpi=70)
    draw_attention_page()
    draw_devices_page()
    if sys.argv[1:]:
        shutil.copy(Path(sys.argv[1]) / "attention.png", FOLDER / "attention-map.png")


def draw_attention_page() -> None:
    """The pictures of docs/attention.md."""
    graph = parse("Causal() & (Window(3, 0) | Prefix(1))")
    draw.messages(graph, 12, node=8).savefig(FOLDER / "messages.png", dpi=100)
    draw.connectivity(graph, 12).savefig(FOLDER / "messages-mask.png", dpi=80)
    layers = [parse("Causal() & Window(2, 0)")] * 4
    draw.receptive_field(layers, 20, 24).savefig(FOLDER / "cone.png", dpi=90)


def draw_devices_page() -> None:
    """The pictures of docs/devices.md."""
    text, n, ranks = "Causal() & (Window(4, 0) | Prefix(1))", 24, 3
    mask, share = parse(text).mask(n, n), n // ranks
    owner = torch.arange(n) // share
    kind = mask.long() + (mask & (owner[:, None] != owner)).long()  # 0 no edge, 1 own, 2 of another rank
    left, right = Figure(figsize=(11, 4.6), layout="constrained").subplots(1, 2, width_ratios=[1, 1.25])
    left.imshow(kind, cmap=ListedColormap(["white", "#4878a8", "#e08030"]), vmin=0, vmax=2)
    for border in range(share, n, share):
        left.axhline(border - 0.5, color="black", linewidth=0.8)
        left.axvline(border - 0.5, color="black", linewidth=0.8)
    left.set(xlabel="key", ylabel="query", title=f"{text},\n{n} nodes on {ranks} ranks")
    names = {"#4878a8": "key and query on one rank", "#e08030": "key on another rank: it travels"}
    left.legend(
        handles=[Patch(color=color, label=label) for color, label in names.items()], loc="upper right", fontsize=8
    )
    for rank in range(ranks):
        nodes = range(rank * share, (rank + 1) * share)
        right.add_patch(Rectangle((nodes[0] - 0.5, rank - 0.25), share, 0.5, color="#4878a8", alpha=0.35))
        heard = mask[owner == rank].any(0)
        travels = [key for key in heard.nonzero()[:, 0].tolist() if key not in nodes]
        right.scatter(nodes, [rank] * share, s=28, color="#4878a8", zorder=3)
        right.scatter(travels, [rank] * len(travels), s=28, color="#e08030", zorder=3)
        for key in travels:
            right.annotate(
                "", (key, rank - 0.12), (key, int(owner[key]) + 0.12),
                arrowprops={"arrowstyle": "->", "color": "#e08030", "alpha": 0.8},
            )  # fmt: skip
        right.text(n + 0.2, rank, f"rank {rank}: {len(travels)} rows\nof others", va="center", fontsize=9)
    right.set(
        xlabel="node",
        yticks=[],
        ylim=(ranks - 0.4, -0.6),
        xlim=(-1, n + 5),
        title="what each rank owns (blue) and receives",
    )
    left.figure.savefig(FOLDER / "devices-halo.png", dpi=100)

    lanes = [
        ("forward", "network", "#e08030", [(0, 2, "keys and values come")]),
        ("forward", "kernels", "#4878a8", [(0, 3.2, "own part"), (3.2, 1.2, "others' part"), (4.4, 0.4, "merge")]),
        ("backward", "network", "#e08030", [(0, 2, "keys and values"), (3.8, 2.4, "their gradients go home")]),
        ("backward", "kernels", "#4878a8", [(2, 1.8, "others' part"), (3.8, 5, "own part"), (8.8, 0.5, "add")]),
    ]
    ax = Figure(figsize=(10, 3), layout="constrained").subplots()
    for row, (_, _, color, spans) in enumerate(lanes):
        for begin, length, label in spans:
            ax.barh(row, length, left=begin, height=0.6, color=color, edgecolor="white", alpha=0.75)
            ax.text(begin + length / 2, row, label, ha="center", va="center", fontsize=8, rotation=90 * (length < 0.8))
    labels = [f"{phase}: {lane}" for phase, lane, _, _ in lanes]
    ax.set(
        yticks=range(len(lanes)),
        yticklabels=labels,
        xticks=[],
        xlabel="time (lengths are not measured)",
        title="One rank",
    )
    ax.invert_yaxis()
    ax.figure.savefig(FOLDER / "devices-time.png", dpi=100)


if __name__ == "__main__":
    main()

"""Draws the pictures of the README and of the docs: python docs/pictures.py

attention-map.png is left by a run of the demo: python docs/pictures.py runs/gpt
"""

import shutil
import sys
from pathlib import Path

from matplotlib.figure import Figure

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
    if sys.argv[1:]:
        shutil.copy(Path(sys.argv[1]) / "attention.png", FOLDER / "attention-map.png")


def draw_attention_page() -> None:
    """The pictures of docs/attention.md."""
    graph = parse("Causal() & (Window(3, 0) | Prefix(1))")
    draw.messages(graph, 12, node=8).savefig(FOLDER / "messages.png", dpi=100)
    draw.connectivity(graph, 12).savefig(FOLDER / "messages-mask.png", dpi=80)
    layers = [parse("Causal() & Window(2, 0)")] * 4
    draw.receptive_field(layers, 20, 24).savefig(FOLDER / "cone.png", dpi=90)


if __name__ == "__main__":
    main()

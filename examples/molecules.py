"""Attention on the graphs that the data has: from the bonds of a molecule to the gap between its electron levels.

    python examples/molecules.py                        bonds and a global node; beside it bonds alone, an expander, all
    python examples/molecules.py --graph "(bonds | bonds @ bonds).with_global_nodes(1)" --against    one of your own
    python examples/molecules.py --task csl --name csl --steps 150 --walks 24   which graph, by random walks and without

Molecules are random carbon skeletons; their HOMO-LUMO gap is Hückel's, of the eigenvalues of the bonds. A batch of
molecules is one graph, side by side. The other task (Murphy et al. 2019) has graphs that message passing can't tell
apart but by positions. Left in runs/NAME: config.json, metrics.csv, molecules.png or walks.png, error.png,
connectivity.png, outcome.json, and the model; in runs/NAME-against-1 and so on what other graphs led to.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import checkpoints
import command_line
import networkx
import optimization
import reporting
import torch
import training
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, l1_loss, one_hot, pad

from attngraph import EdgeList, Graph, Identity, collate, draw, from_dense, parse
from attngraph.nn import Transformer, TransformerConfig, pool, random_walk_positions

if TYPE_CHECKING:
    from matplotlib.axes import Axes

AGAINST = ["bonds", "bonds | Expander(4)", "Full()"]
METRICS = {"gap": "error of the gap [β]", "csl": "graphs right [%]"}


def settings(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line: a graph that is made of each molecule's `bonds`, and others to train the same on."""
    quick = {"steps": 300, "molecules": 1000, "against": []}
    parser = command_line.parser_of(
        __doc__, ("against",), quick, name="molecules", batch=32, steps=1200, evaluate_every=300, optimizer="adamw",
        lr=0.002,
    )  # fmt: skip
    add = parser.add_argument
    add("--task", default="gap", choices=list(METRICS), help="what is asked of a graph")
    text = "who hears whom, of each molecule's `bonds`, in which an atom hears those bonded to it and itself"
    add("--graph", default="bonds.with_global_nodes(1)", help=text)  # the one line
    add("--against", nargs="*", default=AGAINST, help="train the same on these too; none: alone")
    add("--walks", type=int, default=8, help="steps of the random walks that tell an atom where it stands; or 0")
    add("--molecules", type=int, default=2000, help="to learn from; 500 others test")
    add("--layers", type=int, default=4, help="of the Transformer")
    add("--heads", type=int, default=4, help="of attention, in each layer")
    add("--width", type=int, default=64, help="of the nodes' vectors")
    given = command_line.parsed(parser, arguments)
    command_line.require_at_least(given, parser, walks=0, molecules=50, layers=1, heads=1, width=1)
    command_line.require_heads(given, parser)
    if given.task == "csl" and not given.walks:
        parser.error("--walks must be 1 or more for --task csl, which compares with and without them (got 0)")
    bonds = Identity().sized(*[ATOMS if given.task == "gap" else NODES] * 2)
    command_line.require_graphs(given, parser, lambda graph: heard(graph, bonds))
    return given


# ------------------------------------------------------------------------------------------------------------ graphs

ATOMS, DEGREE, TEST = 16, 3, 500
SKIPS, NODES = (2, 3, 4, 5, 6, 9, 11, 12, 13, 16), 41


class Data(NamedTuple):
    """Graphs, and what is asked of each; the last `test` are held out."""

    adjacency: Tensor  # (graphs, n, n)
    target: Tensor  # (graphs,)
    test: int


def skeleton(generator: torch.Generator) -> networkx.Graph:
    """A tree of carbons with up to three neighbours, in which some rings of five and six are closed."""

    def below(count: int) -> int:
        return int(torch.randint(count, (), generator=generator))

    molecule = networkx.empty_graph(1)
    while len(molecule) < ATOMS:
        free = [atom for atom in molecule if molecule.degree(atom) < DEGREE]
        molecule.add_edge(free[below(len(free))] if below(3) else free[-1], len(molecule))
    for _ in range(below(4)):
        free = [atom for atom in molecule if molecule.degree(atom) < DEGREE]
        apart = dict(networkx.all_pairs_shortest_path_length(molecule, 5))
        pairs = [(a, b) for a in free for b in free if a < b and apart[a].get(b) in (4, 5)]
        if pairs:
            molecule.add_edge(*pairs[below(len(pairs))])
    return molecule


def molecules(count: int) -> Data:
    """Their gaps in units of β, the energy of a bond: between the levels 8 and 9, as 16 electrons fill 8 of them."""
    generator = torch.Generator().manual_seed(0)
    made = [networkx.to_numpy_array(skeleton(generator), nodelist=range(ATOMS)) for _ in range(count + TEST)]
    adjacency = torch.stack([torch.from_numpy(each).float() for each in made])
    levels = torch.linalg.eigvalsh(adjacency.double())
    gap = (levels[:, ATOMS // 2] - levels[:, ATOMS // 2 - 1]).float()
    return Data(adjacency, gap.where(gap > 1e-6, 0), TEST)


def circulants() -> Data:
    """Ten classes of rings with a second edge to the node `skip` further, 15 of each, their nodes in any order."""
    generator, made = torch.Generator().manual_seed(0), []
    for _ in range(15):
        for skip in SKIPS:
            ring = torch.from_numpy(networkx.to_numpy_array(networkx.circulant_graph(NODES, [1, skip]))).float()
            order = torch.randperm(NODES, generator=generator)
            made.append(ring[order][:, order])
    return Data(torch.stack(made), torch.arange(len(SKIPS)).repeat(15), 3 * len(SKIPS))


def features(adjacency: Tensor, walks: int) -> Tensor:
    """What each atom is told of itself: how many bonds it has, and how likely random walks are to be back."""
    told = one_hot(adjacency.sum(2).long(), 5).float()
    if not walks:
        return told
    graphs, n, _ = adjacency.shape
    graph, query, key = adjacency.nonzero().T
    bonds = EdgeList(torch.stack([graph * n + key, graph * n + query]), graphs * n, entries=graphs)
    return torch.cat([told, random_walk_positions(bonds, walks)], 2)


def heard(expression: str, bonds: EdgeList) -> EdgeList:
    """The graph that an expression makes of a molecule's bonds, as its edges."""
    graph = parse(expression, {"bonds": bonds | Identity()})
    atoms, nodes = bonds.size[0], graph.size[0] or bonds.size[0]
    if graph.heads or not atoms <= nodes:
        raise ValueError(f"must be a graph of the {atoms} atoms, and of global nodes in front (got {expression})")
    return from_dense(graph.mask(nodes, nodes))  # its edges, quickly for so few nodes


def samples(data: Data, args: argparse.Namespace) -> list[tuple[Tensor, EdgeList, Tensor]]:
    """Of each graph: its nodes, global ones in front, who hears whom, and what is asked."""
    told = features(data.adjacency, args.walks)
    if args.walks:
        told[..., 5:] = (told[..., 5:] - told[..., 5:].mean((0, 1))) / (told[..., 5:].std((0, 1)) + 1e-3)
    found = []
    for nodes, adjacency, target in zip(told, data.adjacency, data.target, strict=True):
        graph = heard(args.graph, from_dense(adjacency.bool()))
        found.append((pad(nodes, (0, 0, graph.size[0] - len(nodes), 0)), graph, target))  # global ones: no bonds told
    return found


# ------------------------------------------------------------------------------------------------------------- model


class Reader(nn.Module):
    """Nodes hear each other along the graph; their mean is read off."""

    def __init__(self, args: argparse.Namespace, told: int, outputs: int):
        super().__init__()
        config = TransformerConfig(
            embed_dim=args.width, num_layers=args.layers, num_heads=args.heads, position="none", dropout=args.dropout
        )
        self.embedding = nn.Linear(told, args.width)
        self.transformer = Transformer(config, Identity())  # each batch brings its own graph
        self.head = nn.Linear(args.width, outputs)

    def forward(self, nodes: Tensor, graph: Graph, batch: Tensor) -> Tensor:
        """nodes (N, told) of a batch of graphs side by side → (graphs, outputs)."""
        return self.head(pool(self.transformer(self.embedding(nodes)[None], graph), batch=batch))


def train(args: argparse.Namespace) -> dict[str, Any]:
    """Train, and leave the run's folder behind. Returns the last figures."""
    data = molecules(args.molecules) if args.task == "gap" else circulants()
    known, device = len(data.target) - data.test, optimization.best_device(args.device)
    whole = samples(data, args)
    center, spread = (data.target[:known].mean(), data.target[:known].std()) if args.task == "gap" else (0.0, 1.0)
    torch.manual_seed(args.seed)
    model = Reader(args, whole[0][0].shape[1], 1 if args.task == "gap" else len(SKIPS)).to(device)
    edges = sum(graph.num_edges() for _, graph, _ in whole) * args.layers // len(whole)
    print(f"graphs    {known:,} to learn from, {data.test} others to test, {args.graph}, {edges:,} edges in each")

    def answer(chosen: list[int]) -> tuple[Tensor, Tensor]:
        nodes, graph, target, batch = collate([whole[number] for number in chosen])
        found = model(nodes.to(device), graph, batch.to(device)).float()
        return (found if args.task == "csl" else found[:, 0] * spread + center), target.to(device)

    def loss(number: int) -> Tensor:
        generator = training.batch_generator(args, number)
        found, target = answer(torch.randint(known, (args.batch,), generator=generator).tolist())
        if args.task == "csl":
            return cross_entropy(found, target)
        return l1_loss(found.where(target > 0, found.clamp(min=0)), target) / spread  # no gap is below 0

    def predictions() -> Tensor:
        parts = torch.arange(known, len(whole)).split(100)
        found = torch.cat([answer(part.tolist())[0] for part in parts]).cpu()
        return found if args.task == "csl" else found.clamp(min=0)

    def score() -> float:
        found, target = predictions(), data.target[known:]
        if args.task == "csl":
            return 100 * int((found.argmax(1) == target).sum()) / len(target)
        return float((found - target).abs().mean())

    task = training.Task(
        model,
        loss,
        score,
        device,
        identity={"told": whole[0][0].shape[1]},
        record={"example": "molecules", "edges": edges},
        unit="graphs",
        per_batch=args.batch,
        score="error" if args.task == "gap" else "accuracy",
        free=(*command_line.FREE, "against"),
    )
    with checkpoints.only_run(args):
        figure, metrics = training.fit(args, task)
        print(f"{METRICS[args.task]} {figure:.4g}, of {data.test} unseen graphs, after {metrics.seconds:.0f} s")
        folder, name = Path(args.runs) / args.name, METRICS[args.task]
        reporting.save_picture(reporting.loss_curve(metrics, args.graph, "loss", name), folder / "error.png")
        reporting.save_picture(draw.connectivity(whole[known][1], title=args.graph), folder / "connectivity.png")
        model.eval()
        with torch.no_grad():
            predicted = predictions() if args.task == "gap" else None
    return {"figure": figure, "seconds": metrics.seconds, "edges": edges, "predicted": predicted, "data": data}


# ------------------------------------------------------------------------------------------------------- contestants


def simple(data: Data, walks: int) -> dict[str, float]:
    """Errors of predicting the mean, and of linear regression on the sums and maxima of what atoms are told."""
    told, known = features(data.adjacency, walks).double(), len(data.target) - data.test
    columns = torch.cat([told.sum(1), told.amax(1), torch.ones(len(told), 1)], 1)
    target = data.target.double()
    weights = torch.linalg.lstsq(columns[:known], target[:known], driver="gelsd").solution
    found = {"linear regression": (columns[known:] @ weights).clamp(min=0), "the mean": target[:known].mean()}
    return {name: float((each - target[known:]).abs().mean()) for name, each in found.items()}


def main(args: argparse.Namespace) -> dict[str, Any]:
    """The graph, and beside it others; of the circulant graphs, nodes that aren't told where they stand."""
    figures = train(args)
    if args.task == "gap":
        baselines = {graph: each["figure"] for graph, each in reporting.beside(args, train).items()}
        baselines |= simple(figures["data"], args.walks)
    else:
        untold = argparse.Namespace(**{**vars(args), "walks": 0, "against": [args.graph]})
        (each,) = reporting.beside(untold, train).values()
        baselines = {"without random-walk positions": each["figure"]}
    folder = Path(args.runs) / args.name
    if args.task == "gap":
        report(folder, figures, {args.graph: figures["figure"], **baselines})
    else:
        draw_walks(folder, figures["data"], args.walks)
    outcome = reporting.Outcome(
        METRICS[args.task],
        figures["figure"],
        baselines,
        args.graph,
        figures["edges"],
        figures["seconds"],
        "molecules.png" if args.task == "gap" else "walks.png",
        lower_is_better=args.task == "gap",
    )
    return reporting.tell(folder, outcome)


def report(folder: Path, figures: dict[str, Any], errors: dict[str, float]) -> None:
    """Some molecules with their gaps, all predictions against the truth, and the errors by graph."""
    from matplotlib.figure import Figure

    data, predicted = figures["data"], figures["predicted"]
    true = data.target[-data.test :]
    shown = true.argsort()[torch.linspace(0, len(true) - 1, 5).long()].tolist()  # from the smallest gap to the largest
    sheet = Figure(figsize=(10, 6.5), layout="constrained")
    above, below = sheet.subfigures(2, 1, height_ratios=[1, 1.5])
    for ax, number in zip(above.subplots(1, 5), shown, strict=True):
        draw_molecule(ax, data.adjacency[-data.test + number])
        draw.set_title(ax, f"predicted {predicted[number]:.3f} β\ntrue {true[number]:.3f} β")
    scatter, bars = below.subplots(1, 2)
    scatter.plot(true, predicted, ".", color=draw.BLUE, alpha=0.5, label="molecule not trained on")
    scatter.plot([0, true.max()], [0, true.max()], color="#444444", lw=0.8, label="exact")
    scatter.set(xlabel="HOMO-LUMO gap [β]", ylabel="predicted [β]")
    scatter.legend()
    names = list(errors)[::-1]
    drawn = bars.barh(names, [errors[name] for name in names], color=["#9ca3af"] * (len(names) - 1) + [draw.BLUE])
    bars.bar_label(drawn, fmt="%.3f", padding=3)
    bars.set(xlabel="mean absolute error [β]", xlim=(0, 1.15 * max(errors.values())))
    reporting.save_picture(sheet, folder / "molecules.png")


def draw_molecule(ax: Axes, adjacency: Tensor) -> None:
    """Its skeleton."""
    molecule = networkx.from_numpy_array(adjacency.numpy())
    places = networkx.kamada_kawai_layout(molecule)
    networkx.draw_networkx_edges(molecule, places, ax=ax, width=1.5)
    networkx.draw_networkx_nodes(molecule, places, ax=ax, node_size=25, node_color="#374151")
    ax.set_aspect("equal")
    ax.axis("off")


def draw_walks(folder: Path, data: Data, walks: int) -> None:
    """How likely walks are to be back on each class of circulant graphs: all that tells them apart."""
    from matplotlib.figure import Figure

    ax = Figure(figsize=(7, 4), layout="constrained").subplots()
    told = features(data.adjacency[: len(SKIPS)], walks)[:, 0, 5:]  # all nodes of a graph stand alike
    for skip, chances in zip(SKIPS, told, strict=True):
        ax.plot(range(1, walks + 1), chances, "o-", ms=3, lw=1, label=f"{skip}")
    ax.set(xlabel="steps of a random walk", ylabel="probability to be back")
    draw.set_title(ax, f"circulant graphs of {NODES} nodes, each linked to the next and to the one `skip` ahead")
    ax.legend(title="skip", ncols=2)
    reporting.save_picture(ax.figure, folder / "walks.png")


if __name__ == "__main__":
    main(settings())

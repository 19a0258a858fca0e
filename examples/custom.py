"""A Transformer on a graph of your own, here Zachary's karate club: who sides with whom, told from half of its members.

    python examples/custom.py            the club from networkx, two sides
    python examples/custom.py --pyg      the same from PyTorch Geometric, four communities: any edge_index will do

It leaves karate.png, the graph, and outcome.json in runs/custom.

A member whose side is known is that side's vector, the others are all alike: what is learned is to listen to friends
(masked labels, as in UniMP, Shi et al. 2021).
"""

import argparse
import time
from pathlib import Path

import reporting
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from attngraph import Identity, draw, from_edge_index, from_networkx
from attngraph.nn import Transformer, TransformerConfig

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--pyg", action="store_true", help="the club as PyTorch Geometric has it, with four communities")
parser.add_argument("--runs", type=Path, default=Path("runs"), help="where runs are kept (default: %(default)s)")
parser.add_argument("--name", default="custom", help="the run's folder below --runs (default: %(default)s)")
parser.epilog = "graphs of your own: attngraph.from_edge_index, from_networkx, EdgeList; docs/connectivity.md"
args = parser.parse_args()
folder = args.runs / args.name
if args.pyg:
    from torch_geometric.datasets import KarateClub

    data = KarateClub().get(0)
    graph, labels = from_edge_index(data.edge_index, num_nodes=data.num_nodes), data.y
else:
    import networkx

    club = networkx.karate_club_graph()
    graph, members, _ = from_networkx(club)
    labels = torch.tensor([club.nodes[member]["club"] == "Officer" for member in members]).long()

graph, nodes, unknown = graph | Identity(), len(labels), int(labels.max()) + 1  # everybody hears friends, and themself
torch.manual_seed(0)
known = torch.rand(nodes) < 0.5
config = TransformerConfig(embed_dim=32, num_layers=2, num_heads=2, position="none")
embedding, model, head = nn.Embedding(unknown + 1, 32), Transformer(config, graph), nn.Linear(32, unknown)
parameters = [parameter for part in (embedding, model, head) for parameter in part.parameters()]
optimizer = torch.optim.AdamW(parameters, lr=0.003, weight_decay=0.1)
begin = time.perf_counter()
for step in range(1, 201):
    masked = known & (torch.rand(nodes) < 0.5)  # of the known, some are hidden and guessed from the others
    logits = head(model(embedding(labels.where(known & ~masked, unknown))[None]))[0]
    loss = cross_entropy(logits[masked], labels[masked])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 40 == 0:
        guess = head(model(embedding(labels.where(known, unknown))[None]))[0].argmax(-1)
        right = (guess == labels)[~known].float().mean()
        print(f"step {step:3}   loss {loss.item():.3f}   {right:.0%} of the {int((~known).sum())} others right")
folder.mkdir(parents=True, exist_ok=True)
draw.save(draw.connectivity(graph, nodes, title="the karate club"), folder / "karate.png")
commonest = (labels[~known] == labels[known].mode().values).float().mean()
others = {"the side that most of the known are on": 100 * float(commonest)}
edges, seconds = 2 * graph.num_edges(nodes, nodes), time.perf_counter() - begin
reporting.tell(folder, reporting.Outcome(
    "members right [%]", 100 * float(right), others, "from_networkx(club)", edges, seconds, "karate.png"
))  # fmt: skip

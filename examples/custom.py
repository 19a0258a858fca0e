"""A Transformer on a graph of your own, here Zachary's karate club: who sides with whom, told from two members.

python examples/custom.py              the club from networkx
python examples/custom.py --pyg        the same from PyTorch Geometric: any edge_index will do
"""

import sys

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from attngraph import Identity, draw, from_edge_index, from_networkx
from attngraph.nn import Transformer, TransformerConfig

if "--pyg" in sys.argv:
    from torch_geometric.datasets import KarateClub

    data = KarateClub()[0]
    graph, sides = from_edge_index(data.edge_index, data.num_nodes), (data.y % 2)
else:
    import networkx

    club = networkx.karate_club_graph()
    graph, sides = from_networkx(club), torch.tensor([club.nodes[node]["club"] == "Officer" for node in club]).long()

graph, nodes = graph | Identity(), len(sides)  # every member hears friends, and themself
torch.manual_seed(0)
config = TransformerConfig(
    embed_dim=32, num_layers=2, num_heads=2, max_length=nodes
)  # a learned vector for each member
model, head = Transformer(config, graph), nn.Linear(32, 2)
optimizer = torch.optim.AdamW([*model.parameters(), *head.parameters()], lr=0.01, weight_decay=0.1)
known = torch.tensor([0, nodes - 1])  # the instructor and the officer: the only labels that are learned from
for step in range(1, 101):
    logits = head(model(torch.zeros(1, nodes, 32)))[0]
    loss = cross_entropy(logits[known], sides[known])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 20 == 0:
        right = (logits.argmax(-1) == sides).float().mean()
        print(f"step {step:3}   loss {loss.item():.3f}   {right:.0%} of all members right")
draw.save(draw.connectivity(graph, nodes, title="the karate club: rows hear columns"), "karate.png")

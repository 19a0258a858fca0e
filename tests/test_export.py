"""An exported program means the same graph in another process, or export says what to do instead."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from graphs import GRAPHS
from torch.testing import assert_close

from attngraph import (
    Causal,
    Disjoint,
    EdgeList,
    Full,
    Graph,
    PerHead,
    Random,
    Window,
    attend,
    from_function,
    plan,
)
from attngraph.models import GPT
from attngraph.nn import TransformerConfig

ROOT = Path(__file__).parent.parent
LISTED = EdgeList(torch.randint(12, (2, 60), generator=torch.Generator().manual_seed(0)), 12)
RUN = """
import sys, torch
from attngraph import *
unrelated = [from_function(lambda i, j: j >= i), EdgeList([[0], [1]], 12), Causal(), Window(1, 1)]
unrelated += [EdgeList([range(12)] * 2, 12) & Window(step, 0) for step in range(9)]
for path in sys.argv[1:]:
    inputs, expected = torch.load(path + ".expected")
    program = torch.export.load(path).module()
    for _ in range(2):
        torch.testing.assert_close(program(*inputs), expected, msg=lambda text: path + text)
"""


class Ring(Graph):
    nodes: int

    def contains(self, q_idx, kv_idx):
        return (kv_idx - q_idx) % self.nodes == 1


class Layer(torch.nn.Module):
    def __init__(self, graph, backend="auto"):
        super().__init__()
        self.graph, self.backend = graph, backend

    def forward(self, q, k, v):
        return attend(q, k, v, self.graph, backend=self.backend)


def sides(n, m, heads=2):
    return tuple(torch.randn(1, heads, nodes, 4) for nodes in (n, m, m))


def same_elsewhere(folder, programs):
    """(module, inputs, options of export): each is exported and saved, and runs in one other process."""
    paths = []
    for number, (module, inputs, options) in enumerate(programs):
        path = folder / f"{number}.pt2"
        torch.export.save(torch.export.export(module, inputs, **options), path)
        torch.save((inputs, module(*inputs)), f"{path}.expected")
        paths.append(str(path))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TORCH_LOGS": "-all"}
    done = subprocess.run([sys.executable, "-c", RUN, *paths], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_programs_mean_the_same_in_another_process(tmp_path):
    graphs = [
        LISTED,
        Causal() & Window(3, 0),
        Disjoint([LISTED.rows(0, 5), LISTED.rows(5, 12)]).rows(0, 12).sized(12, 24),
    ]
    graphs += [PerHead([LISTED | Random(2, 5), ~LISTED.T]), Full(), (LISTED @ LISTED).with_global_nodes(0)]
    programs = [(Layer(graph), sides(12, graph.size[1] or 12), {}) for graph in graphs]
    programs.append((Layer(EdgeList(Ring(3).edge_index(12, 12), size=(12, 12))), sides(12, 12), {}))  # as errors advise
    programs += [(Layer(LISTED, backend), sides(12, 12), {"strict": True}) for backend in ("edges", "dense", "tiles")]
    config = TransformerConfig(embed_dim=8, num_layers=2, num_heads=2, position="rotary", dropout=0.1)
    model = GPT(config, 5, graph=[LISTED, Causal() & LISTED]).eval()
    programs.append((model, (torch.randint(5, (1, 12)),), {}))
    same_elsewhere(tmp_path, programs)


@pytest.mark.nightly
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("backend", ["auto", "edges", "dense"])
def test_programs_of_every_graph_mean_the_same_in_another_process(backend, strict, tmp_path):
    cases = [case for case in GRAPHS if "from_function" not in str(case.graph)]
    programs = [
        (Layer(case.graph, backend), sides(case.n, case.m, case.graph.heads or 2), {"strict": strict}) for case in cases
    ]
    same_elsewhere(tmp_path, programs)


def test_a_program_exported_with_symbolic_sizes_runs_at_other_sizes():
    nodes = torch.export.Dim("nodes", min=4, max=64)
    shapes = {side: {2: nodes} for side in "qkv"}
    for graph in (Causal() & Window(3, 0), PerHead([Causal(), Random(2)])):
        program = torch.export.export(Layer(graph), sides(12, 12), dynamic_shapes=shapes).module()
        for n in (12, 5, 33):
            inputs = sides(n, n)
            assert_close(program(*inputs), attend(*inputs, graph))


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("backend", ["auto", "edges", "dense"])
@pytest.mark.parametrize(
    "graph", [from_function(lambda i, j: j <= i), Ring(3), Causal() & Ring(3), PerHead([Full(), ~Ring(3)])], ids=str
)
def test_what_has_no_name_elsewhere_is_refused_with_a_way_out(graph, backend, strict):
    torch._dynamo.reset()
    with pytest.raises(Exception, match=r"can't be part of an exported program.*export with its edges, EdgeList"):
        torch.export.export(Layer(graph, backend), sides(12, 12), strict=strict)


def test_plans_are_refused():
    with pytest.raises(ValueError, match=r"a plan can't be part of an exported program.*export with its graph"):
        torch.export.export(Layer(plan(Causal() & Window(2, 0), 12, 12, heads=2)), sides(12, 12))

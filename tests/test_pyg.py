"""`attngraph.pyg`: the same results, gradients and weights as PyG's layers, from the same state, on the same inputs."""

from __future__ import annotations

import copy
import inspect
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import product

import pytest
import torch
import torch_geometric.nn as theirs
from torch import Tensor
from torch_geometric import EdgeIndex
from torch_geometric.data import Batch, Data, HeteroData
from torch_geometric.explain import AttentionExplainer, Explainer, GNNExplainer
from torch_geometric.explain.algorithm.utils import clear_masks, set_masks
from torch_geometric.loader import NeighborLoader
from torch_geometric.nn import to_hetero
from torch_geometric.utils import to_torch_coo_tensor, to_torch_csc_tensor, to_torch_csr_tensor

from attngraph import cache
from attngraph import pyg as ours
from attngraph.pyg.attending import Attending
from attngraph.pyg.edges import Edges

LAYERS = ("TransformerConv", "GATConv", "GATv2Conv")


def pair(name: str, *args, dtype=torch.float64, **options) -> tuple[torch.nn.Module, torch.nn.Module]:
    """PyG's layer and ours, of one state that a bias and a factor of zero or one would hide nothing of."""
    torch.manual_seed(0)
    layers = [getattr(module, name)(*args, **options).to(dtype) for module in (theirs, ours)]
    with torch.no_grad():
        for parameter in layers[0].parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    layers[1].load_state_dict(layers[0].state_dict())
    return layers[0], layers[1]


def found(layer: torch.nn.Module, x, *args, **options) -> list[Tensor]:
    """Results, weights where they are asked for, and the gradients of all that is differentiable."""
    leaves = [side.clone().requires_grad_() for side in (x if isinstance(x, tuple) else (x,))]
    options = {name: v.clone().requires_grad_() if name == "edge_attr" else v for name, v in options.items()}
    out = layer(tuple(leaves) if isinstance(x, tuple) else leaves[0], *args, **options)
    results = [out] if isinstance(out, Tensor) else [out[0], out[1][1]]
    leaves += [v for name, v in options.items() if name == "edge_attr"]
    total = sum((part * torch.linspace(-1, 2, part.numel(), dtype=part.dtype).view_as(part)).sum() for part in results)
    gradients = torch.autograd.grad(total, [*leaves, *layer.parameters()], allow_unused=True)
    return [*results, *(torch.zeros(()) if each is None else each for each in gradients)]


def assert_same(a: list[Tensor], b: list[Tensor], tolerance: float = 1e-10) -> None:
    assert len(a) == len(b)
    for one, other in zip(a, b, strict=True):
        assert one.dtype == other.dtype
        assert one.shape == other.shape
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def edges(num_sources: int, num_targets: int, count: int, kind: str) -> Tensor:
    """Random edges: each once; or some parallel; or leaving the last third of the targets alone."""
    torch.manual_seed(1)
    targets = num_targets if kind != "isolated" else 2 * num_targets // 3
    edge_index = torch.stack([torch.randint(num_sources, (count,)), torch.randint(targets, (count,))])
    if kind == "parallel":
        return torch.cat([edge_index, edge_index[:, : count // 2], edge_index[:, : count // 4]], 1)
    return edge_index.unique(dim=1)[:, torch.randperm(edge_index.unique(dim=1).shape[1])]


@pytest.mark.share(12)
@pytest.mark.parametrize(
    ("name", "concat", "edge_dim", "bipartite", "kind", "last"),
    list(product(LAYERS, (True, False), (None, 3), (False, True), ("once", "parallel", "isolated"), (False, True))),
)
def test_equals_pyg(name, concat, edge_dim, bipartite, kind, last):
    """`last`: beta of TransformerConv, the residual of the others."""
    channels = (5, 6) if bipartite else 5
    options = {"beta" if name == "TransformerConv" else "residual": last, "concat": concat, "edge_dim": edge_dim}
    if name != "TransformerConv":
        options["add_self_loops"] = not bipartite
    edge_index = edges(17, 13 if bipartite else 17, 60, kind)
    x = torch.randn(17, 5, dtype=torch.float64)
    x = (x, torch.randn(13, 6, dtype=torch.float64)) if bipartite else x
    attr = {} if edge_dim is None else {"edge_attr": torch.randn(edge_index.shape[1], edge_dim, dtype=torch.float64)}
    layers = pair(name, channels, 4, heads=3, **options)
    for wanted in ({}, {"return_attention_weights": True}):
        assert_same(*(found(layer, x, edge_index, **attr, **wanted) for layer in layers))


OTHERS = {
    "AGNNConv": ((), {}),
    "SuperGATConv": ((8, 4), {"heads": 2, "attention_type": "SD"}),
    "SuperGATConv MX": ((8, 4), {"heads": 2}),
    "TransformerConv of no root": ((8, 4), {"heads": 2, "root_weight": False, "bias": False}),
    "TransformerConv to sources": ((8, 4), {"heads": 2, "flow": "target_to_source"}),
    "GATConv to sources": ((8, 4), {"heads": 2, "flow": "target_to_source"}),
    "GATv2Conv to sources": ((8, 4), {"heads": 2, "flow": "target_to_source", "edge_dim": None}),
    "GATv2Conv of shared weights": ((8, 4), {"heads": 2, "share_weights": True}),
    "TransformerConv of the largest": ((8, 4), {"heads": 2, "aggr": "max"}),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_layers_and_options_equal_pyg(name):
    args, options = OTHERS[name]
    layers = pair(name.split()[0], *args, **options)
    for layer in layers:
        layer.eval()
    edge_index = edges(20, 20, 70, "parallel")
    x = torch.randn(20, 8, dtype=torch.float64)
    assert_same(*(found(layer, x, edge_index) for layer in layers))


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(name, dtype):
    exact = pair(name, 8, 4, heads=2)[0]
    layer = pair(name, 8, 4, heads=2, dtype=dtype)[1]
    exact.load_state_dict(layer.state_dict())
    edge_index, x = edges(20, 20, 70, "once"), torch.randn(20, 8).to(dtype)
    out = layer(x, edge_index)
    assert out.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 5e-2
    torch.testing.assert_close(out.double(), exact(x.double(), edge_index), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", ["TransformerConv", "GATConv", "GATv2Conv", "AGNNConv", "SuperGATConv"])
def test_every_kind_of_edge_index(name):
    args, options = ((), {}) if name == "AGNNConv" else ((8, 4), {"heads": 2})
    options = options | ({"add_self_loops": False} if name != "TransformerConv" else {})
    options |= {"attention_type": "SD"} if name == "SuperGATConv" else {}
    layer = pair(name, *args, **options)[1].eval()
    plain = edges(20, 20, 70, "once")
    order = (plain[1] * 20 + plain[0]).argsort()
    x, expected = torch.randn(20, 8, dtype=torch.float64), None
    expected = layer(x, plain)
    kinds = [
        plain[:, order],
        plain.to(torch.int32),
        EdgeIndex(plain, sparse_size=(20, 20)),
        EdgeIndex(plain[:, plain[0].argsort()], sparse_size=(20, 20), sort_order="row"),
        EdgeIndex(plain[:, plain[1].argsort()], sparse_size=(20, 20), sort_order="col").fill_cache_(),
        to_torch_coo_tensor(plain, size=(20, 20)).t().coalesce(),
        to_torch_csr_tensor(plain.flip(0), size=(20, 20)),
        to_torch_csc_tensor(plain.flip(0), size=(20, 20)),
    ]
    for kind in kinds:
        torch.testing.assert_close(layer(x, kind), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", LAYERS)
def test_sparse_matrices_bring_features_and_take_weights(name):
    options = {"heads": 2, "edge_dim": 3} | ({} if name == "TransformerConv" else {"add_self_loops": False})
    layers = pair(name, 8, 4, **options)
    plain, x = edges(20, 20, 70, "once"), torch.randn(20, 8, dtype=torch.float64)
    plain = plain[:, (plain[1] * 20 + plain[0]).argsort()]
    attr = torch.randn(plain.shape[1], 3, dtype=torch.float64)
    adjacency = torch.sparse_coo_tensor(plain.flip(0), attr, (20, 20, 3)).coalesce()
    for layer in layers:
        torch.testing.assert_close(layer(x, adjacency), layers[0](x, plain, edge_attr=attr), rtol=1e-10, atol=1e-10)
    if name == "TransformerConv":  # PyG's returns no weights there
        return
    adjacency = to_torch_csr_tensor(plain.flip(0), size=(20, 20))
    (a, (_, w)), (b, (_, z)) = (layer(x, adjacency, return_attention_weights=True) for layer in layers)
    assert_same([a, w], [b, z])


@pytest.mark.parametrize("name", LAYERS)
def test_empty_graphs_and_lazy_channels(name):
    for layer in (getattr(ours, name)(-1, 4, heads=2), getattr(ours, name)((-1, -1), 4, heads=2)):
        x = torch.randn(3, 5)
        x = (x, x) if "GAT" in name or isinstance(layer.in_channels, tuple) else x
        assert layer(x, torch.empty(2, 0, dtype=torch.int64)).shape == (3, 8)
    layer = getattr(ours, name)(5, 4)
    assert layer(torch.empty(0, 5), torch.empty(2, 0, dtype=torch.int64)).shape == (0, 4)


def hetero() -> HeteroData:
    torch.manual_seed(3)
    data, sizes = HeteroData(), {"a": 10, "b": 12}
    for kind, count in sizes.items():
        data[kind].x = torch.randn(count, 16)
    for source, target in (("a", "b"), ("b", "a"), ("a", "a")):
        data[source, f"to_{target}", target].edge_index = edges(sizes[source], sizes[target], 30, "parallel")
    return data


def test_hgt_equals_pyg():
    data = hetero()
    layers = pair("HGTConv", 16, 32, data.metadata(), heads=4, dtype=torch.float32)
    results = []
    for layer in layers:
        out = layer(data.x_dict, data.edge_index_dict)
        gradients = torch.autograd.grad(
            sum(each.square().sum() for each in out.values()), list(layer.parameters()), allow_unused=True
        )
        results.append([*out.values(), *(each for each in gradients if each is not None)])
    assert_same(*results, tolerance=1e-4)


class Net(torch.nn.Module):
    """Two layers of one class."""

    def __init__(self, layer, **options):
        super().__init__()
        self.first, self.last = layer((-1, -1), 8, heads=2, **options), layer((-1, -1), 8, **options)

    def forward(self, x, edge_index):
        return self.last(self.first(x, edge_index).relu(), edge_index)


@pytest.mark.parametrize("name", LAYERS)
def test_to_hetero(name):
    data, options = hetero(), {} if name == "TransformerConv" else {"add_self_loops": False}
    models = [to_hetero(Net(getattr(module, name), **options), data.metadata()) for module in (theirs, ours)]
    with torch.no_grad():
        for model in models:
            model(data.x_dict, data.edge_index_dict)
    models[1].load_state_dict(models[0].state_dict())
    a, b = (model(data.x_dict, data.edge_index_dict) for model in models)
    assert_same(list(a.values()), list(b.values()), tolerance=1e-5)
    assert sum(isinstance(module, Attending) for module in models[1].modules()) == 6


# ------------------------------------------------------------------------------------- who asks for the messages


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("algorithm", [GNNExplainer(epochs=3), AttentionExplainer()])
def test_explainers_see_what_they_see_of_pyg(name, algorithm):
    masks = []
    for module in (theirs, ours):
        torch.manual_seed(0)
        model = (
            Net(getattr(module, name))
            if name == "TransformerConv"
            else Net(getattr(module, name), add_self_loops=False)
        )
        edge_index, x = edges(20, 20, 70, "once"), torch.randn(20, 16)
        with torch.no_grad():
            before = model(x, edge_index)
        explainer = Explainer(
            model, copy.deepcopy(algorithm), explanation_type="model", edge_mask_type="object",
            node_mask_type="attributes" if isinstance(algorithm, GNNExplainer) else None,
            model_config={"mode": "regression", "task_level": "node", "return_type": "raw"},
        )  # fmt: skip
        masks.append(explainer(x, edge_index).edge_mask)
        torch.testing.assert_close(model(x, edge_index), before)
        assert module is theirs or model.first.falls_back() is None
    torch.testing.assert_close(*masks, rtol=1e-4, atol=1e-5)
    assert masks[0].abs().sum() > 0


@pytest.mark.parametrize("kind", ["MX", "SD"])
def test_supergat_s_loss(kind):
    layers, edge_index = pair("SuperGATConv", 8, 4, heads=2, attention_type=kind), edges(20, 20, 70, "once")
    negative, x = edges(20, 20, 30, "parallel"), torch.randn(20, 8, dtype=torch.float64)
    results = []
    for layer in layers:
        out = layer(x, edge_index, neg_edge_index=negative)
        results.append([out.detach(), layer.get_attention_loss().detach()])
        assert results[-1][1] > 0
    assert_same(*results)


def test_hooks_and_methods_of_ones_own_see_every_message():
    edge_index, x, seen = edges(20, 20, 70, "once"), torch.randn(20, 8), []
    layer = ours.GATConv(8, 4, heads=2)
    expected = layer(x, edge_index)
    handle = layer.register_message_forward_hook(lambda module, inputs, out: seen.append(out.shape))
    torch.testing.assert_close(layer(x, edge_index), expected)
    assert len(seen) == 1
    handle.remove()
    layer(x, edge_index)
    assert len(seen) == 1
    back = ours.GATConv(8, 4, flow="target_to_source")
    expected_back = back(x, edge_index)
    back.register_propagate_forward_hook(lambda module, inputs, out: seen.append(out.shape))
    torch.testing.assert_close(back(x, edge_index), expected_back)
    assert len(seen) == 2

    class Doubled(ours.GATConv):
        def message(self, x_j, alpha):
            return 2 * super().message(x_j, alpha)

    doubled = Doubled(8, 4, heads=2)
    doubled.load_state_dict(layer.state_dict())
    torch.testing.assert_close(doubled(x, edge_index) - layer.bias, 2 * (expected - layer.bias))
    assert "message" in str(doubled.falls_back())

    class Named(ours.GATConv):
        pass

    assert Named(8, 4).falls_back() is None


def test_a_layer_is_pyg_s_own_kind():
    layer = ours.TransformerConv(8, 4, heads=2)
    assert isinstance(layer, theirs.TransformerConv)
    assert str(layer) == str(theirs.TransformerConv(8, 4, heads=2))
    edge_index, x = edges(20, 20, 70, "once"), torch.randn(20, 8)
    for same in (copy.deepcopy(layer), torch.load(saved(layer), weights_only=False)):
        torch.testing.assert_close(same(x, edge_index), layer(x, edge_index))
        assert same.falls_back() is None
    assert layer(x, edge_index, return_attention_weights=False).shape == (20, 8)  # a tuple in PyG


def saved(thing):
    import io

    buffer = io.BytesIO()
    torch.save(thing, buffer)
    buffer.seek(0)
    return buffer


@pytest.mark.parametrize("name", LAYERS)
def test_edge_features_of_any_width_and_their_hooks(name):
    edge_index, x = edges(20, 20, 70, "once"), torch.randn(20, 8)
    attr = torch.randn(edge_index.shape[1], 3)
    layer = getattr(ours, name)(8, 4, edge_dim=-1)
    expected = layer(x, edge_index, attr)
    assert layer.lin_edge.weight.shape == (4, 3)
    torch.testing.assert_close(layer(x, edge_index, attr), expected)
    layer.lin_edge.register_forward_hook(lambda module, inputs, out: 2 * out)
    plain = layer._as_pyg()
    torch.testing.assert_close(layer(x, edge_index, attr), plain(x, edge_index, attr))
    assert not torch.allclose(plain(x, edge_index, attr), expected)


@pytest.mark.parametrize("name", LAYERS)
def test_a_forward_has_the_signature_of_its_layer(name):
    forward = getattr(ours, name).forward
    assert inspect.signature(forward) == inspect.signature(getattr(theirs, name).forward)
    assert forward.__qualname__ == f"{name}.forward"


@pytest.mark.slow
def test_layers_are_exported():
    edge_index, x, layer = edges(20, 20, 70, "once"), torch.randn(20, 8), ours.TransformerConv(8, 4).eval()
    program = torch.export.export(layer, (x, edge_index)).module()
    torch.testing.assert_close(program(x, edge_index), layer(x, edge_index))


@pytest.mark.parametrize("name", ["GATConv", "GATv2Conv"])
def test_messages_along_sparse_matrices_have_gradients(name):
    layers, plain = pair(name, 8, 4, heads=2), edges(20, 20, 70, "once")
    adjacency = to_torch_coo_tensor(plain, size=(20, 20)).t().coalesce()
    x = torch.randn(20, 8, dtype=torch.float64)
    results = []
    for layer in layers:
        out, (_, weights) = layer(x, adjacency, return_attention_weights=True)
        results.append(torch.autograd.grad(out.square().sum() + weights.square().sum(), list(layer.parameters())))
    assert_same(*map(list, results))
    for layer in layers:
        layer.register_message_forward_hook(lambda *given: None)
    assert_same(*(found(layer, x, adjacency) for layer in layers))


def test_threads_share_a_layer():
    layer, edge_index, x = ours.GATConv(8, 4), edges(20, 20, 70, "once"), torch.randn(20, 8)
    expected = layer(x, edge_index, return_attention_weights=True)[1][1]

    def run(turn):
        out = layer(x, edge_index, return_attention_weights=bool(turn % 2))
        return torch.equal(out[1][1], expected) if turn % 2 else isinstance(out, Tensor)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(run, range(100)))


@pytest.mark.parametrize("name", ["TransformerConv", "GATConv", "GATv2Conv", "AGNNConv"])
def test_autocast_and_dropping_all(name):
    args = () if name == "AGNNConv" else (8, 4)
    layers, edge_index, x = pair(name, *args, dtype=torch.float32), edges(20, 20, 70, "once"), torch.randn(20, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        a, b = (layer(x, edge_index) for layer in layers)
    assert a.dtype == b.dtype
    torch.testing.assert_close(a, b, rtol=5e-2, atol=5e-2)
    if name != "AGNNConv":
        for layer in layers:
            layer.dropout = 1.0
        torch.testing.assert_close(*(layer(x, edge_index) for layer in layers))


def test_torchscript_is_of_pyg_s_layer():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = ours.TransformerConv(8, 4, heads=2)

        def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
            return self.layer(x, edge_index)

    edge_index, x, model = edges(20, 20, 70, "once"), torch.randn(20, 8), Model()
    expected = model(x, edge_index)
    torch.testing.assert_close(torch.jit.script(model)(x, edge_index), expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("edge_dim", [None, 3])
def test_compiled_without_breaks(name, edge_dim):
    torch._dynamo.reset()
    options = {"edge_dim": edge_dim} | ({} if name == "TransformerConv" else {"add_self_loops": False})
    layer = pair(name, 8, 4, heads=2, dtype=torch.float32, **options)[1]
    compiled = torch.compile(layer, fullgraph=True)
    for count in (70, 50):
        edge_index, x = edges(20, 20, count, "parallel"), torch.randn(20, 8)
        attr = {} if edge_dim is None else {"edge_attr": torch.randn(edge_index.shape[1], 3)}
        for wanted in ({}, {"return_attention_weights": True}):
            assert_same(*(found(each, x, edge_index, **attr, **wanted) for each in (layer, compiled)), tolerance=1e-4)
    layer.dropout = 0.5
    torch.manual_seed(0)
    dropped = compiled(x, edge_index, **attr)
    torch.manual_seed(0)
    torch.testing.assert_close(compiled(x, edge_index, **attr), dropped)
    assert not torch.allclose(compiled(x, edge_index, **attr), dropped)


# ------------------------------------------------------------------------------------------------------- batches


def molecules(sizes=(5, 9, 1, 7)) -> Batch:
    torch.manual_seed(2)
    return Batch.from_data_list([Data(x=torch.randn(n, 16), edge_index=torch.randint(n, (2, 4 * n))) for n in sizes])


@pytest.mark.parametrize("conv", [None, "TransformerConv"])
@pytest.mark.parametrize("norm", ["batch_norm", "graph_norm", None])
def test_gps_hears_nothing_of_padding(conv, norm):
    batch = molecules()
    inner = [None, None] if conv is None else pair(conv, 16, 4, heads=4, dtype=torch.float32)
    a, b = (module.GPSConv(16, each, 4, norm=norm) for module, each in zip((theirs, ours), inner, strict=True))
    b.load_state_dict(a.state_dict())
    with torch.no_grad():
        expected, out = (layer(batch.x, batch.edge_index, batch.batch) for layer in (a, b))
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(b(batch.x, batch.edge_index), a(batch.x, batch.edge_index), rtol=1e-5, atol=1e-5)
    performer = ours.GPSConv(16, None, 4, attn_type="performer")
    assert "no attention along edges" in str(performer.falls_back())
    assert performer(batch.x, batch.edge_index, batch.batch).shape == (22, 16)


def test_gps_of_one_graph_does_not_depend_on_the_others():
    layer, batch = ours.GPSConv(16, None, 4, norm=None).eval(), molecules()
    alone = layer(batch[1].x, batch[1].edge_index, torch.zeros(9, dtype=torch.int64))
    x = batch.x.clone()
    x[batch.batch != 1] *= 1e6
    torch.testing.assert_close(layer(x, batch.edge_index, batch.batch)[batch.batch == 1], alone)


@pytest.mark.parametrize("concat", [True, False])
def test_set_transformer_equals_pyg(concat):
    options = {"num_seed_points": 3, "num_encoder_blocks": 2, "heads": 4, "concat": concat}
    a, b = (module(16, **options) for module in (theirs.aggr.SetTransformerAggregation, ours.SetTransformerAggregation))
    b.load_state_dict(a.state_dict())
    batch = molecules()
    torch.testing.assert_close(b(batch.x, batch.batch), a(batch.x, batch.batch), rtol=1e-5, atol=1e-5)
    index = torch.tensor([0] * 5 + [1] * 9 + [3] * 8)
    torch.testing.assert_close(b(batch.x, index, dim_size=5), a(batch.x, index, dim_size=5), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="ascending"):
        b(batch.x, index.flip(0))


@pytest.mark.parametrize("edge_dim", [None, 3])
def test_many_sets_of_features_on_one_graph(edge_dim):
    layer, edge_index = ours.GraphAttention(16, 4, heads=2, edge_dim=edge_dim), edges(20, 20, 70, "parallel")
    attr = () if edge_dim is None else (torch.randn(edge_index.shape[1], 3),)
    x = torch.randn(3, 20, 16)
    out, (_, weights) = layer(x, edge_index, *attr, return_attention_weights=True)
    each = [layer(one, edge_index, *attr, return_attention_weights=True) for one in x]
    torch.testing.assert_close(out, torch.stack([one for one, _ in each]))
    torch.testing.assert_close(weights, torch.stack([one for _, (_, one) in each]))
    other = layer((x, x[:, :13]), edge_index[:, edge_index[1] < 13], *(a[edge_index[1] < 13] for a in attr))
    torch.testing.assert_close(other, out[:, :13])


def test_layers_share_the_edges_of_a_batch():
    cache.clear()
    model, batch = theirs.GAT(16, 16, num_layers=3, v2=True), molecules((30, 20))
    assert set(ours.accelerate(model).changed) == {"convs.0", "convs.1", "convs.2"}
    model(batch.x, batch.edge_index)
    assert cache.EDGES_OF_LAYERS.info().entries == 1
    batch.edge_index[0, 0] = (batch.edge_index[0, 0] + 1) % 30
    expected = copy.deepcopy(model)
    cache.clear()
    torch.testing.assert_close(model(batch.x, batch.edge_index), expected(batch.x, batch.edge_index))


def test_neighbor_loader():
    data = Data(x=torch.randn(300, 16), edge_index=torch.randint(300, (2, 2000)))
    pytest.importorskip("torch_sparse") if not _samples() else None
    a, b = pair("GATv2Conv", 16, 4, heads=2, dtype=torch.float32)
    for batch in NeighborLoader(data, [5, 5], batch_size=64):
        torch.testing.assert_close(b(batch.x, batch.edge_index), a(batch.x, batch.edge_index), rtol=1e-5, atol=1e-5)


def _samples() -> bool:
    import torch_geometric.typing as installed

    return installed.WITH_PYG_LIB or installed.WITH_TORCH_SPARSE


# ---------------------------------------------------------------------------------------------------- accelerate


def test_accelerate_tells_what_it_changed_and_why_not():
    class Own(theirs.GATConv):
        pass

    metadata = (["a"], [("a", "to", "a")])
    model = torch.nn.ModuleList([
        theirs.TransformerConv(4, 4), Own(4, 4), theirs.GCNConv(4, 4), theirs.SuperGATConv(4, 4),
        theirs.TransformerConv(4, 4, aggr="max"), theirs.HGTConv(4, 4, metadata),
        theirs.GPSConv(4, theirs.GATConv(4, 4)), theirs.GPSConv(4, None, attn_type="performer"), torch.nn.Linear(4, 4),
    ])  # fmt: skip
    state = copy.deepcopy(model.state_dict())
    done = ours.accelerate(model)
    assert done.changed == {"0": "TransformerConv", "5": "HGTConv", "6": "GPSConv", "6.conv": "GATConv"}
    assert set(done.left) == {"1", "2", "3", "4", "7"}
    assert "GCNConv has no attention" in str(done)
    assert type(model[4]) is theirs.TransformerConv
    assert list(state) == list(model.state_dict())
    again = ours.accelerate(model)
    assert again.changed == {}
    assert str(ours.accelerate(theirs.GATConv(4, 4))) == "model: GATConv"


@pytest.mark.parametrize("kind", ["GAT", "GPS"])
def test_accelerated_models_train_as_before(kind):
    torch.manual_seed(0)
    model = theirs.GAT(16, 16, num_layers=2) if kind == "GAT" else theirs.GPSConv(16, theirs.GATConv(16, 16), 2)
    other, batch = copy.deepcopy(model), molecules()
    assert ours.accelerate(other).changed
    args = (batch.x, batch.edge_index) + ((batch.batch,) if kind == "GPS" else ())
    results = []
    for each in (model, other):
        optimizer = torch.optim.SGD(each.parameters(), 0.1)
        for _ in range(3):
            optimizer.zero_grad()
            each(*args).square().mean().backward()
            optimizer.step()
        results.append([p.detach() for p in each.parameters()])
    assert_same(*results, tolerance=1e-4)


# -------------------------------------------------------------------------------------------------------- errors


WRONG = [
    (lambda: ours.TransformerConv(8, 4)(torch.randn(5, 8), TWO, torch.randn(2, 3)), ValueError, "edge_dim=3"),
    (lambda: ours.TransformerConv(8, 4, edge_dim=3)(torch.randn(5, 8), TWO), ValueError, "needs the features of the"),
    (lambda: ours.GATv2Conv(8, 4)(torch.randn(5, 8), TWO, torch.randn(2, 3)), ValueError, "edge_dim=3"),
    (lambda: ours.GATConv(8, 4, edge_dim=3)(torch.randn(5, 8), TWO, torch.randn(2, 4)), ValueError, r"\(2, 4\)"),
    (lambda: ours.GATConv(8, 4, edge_dim=3)(torch.randn(5, 8), TWO, torch.randn(3, 3)), ValueError, "of 2 edges"),
    (lambda: ours.GATConv(8, 4)(torch.randn(5, 7), TWO), ValueError, r"the 8 channels .* \(5, 7\)"),
    (lambda: ours.TransformerConv((8, 6), 4)((torch.randn(5, 8), torch.randn(5, 5)), TWO), ValueError, r"x\[1\]"),
    (lambda: ours.GATConv(8, 4)(torch.randn(2, 5, 8), TWO), ValueError, "GraphAttention"),
    (lambda: ours.TransformerConv(8, 4)(torch.randn(5, 8), TWO + 4), IndexError, "from 0 to 4"),
    (lambda: ours.TransformerConv(8, 4)(torch.randn(5, 8), TWO - 1), IndexError, "-1"),
    (lambda: ours.GATConv((8, 8), 4, add_self_loops=False)(
        (torch.randn(5, 8), torch.randn(3, 8)), TWO, size=(5, 4)), ValueError, "size must be"),
    (lambda: ours.TransformerConv(8, 4)(torch.randn(5, 8), TWO.float()), ValueError, "integer"),
    (lambda: ours.TransformerConv(8, 4)(torch.randn(5, 8), TWO[0]), ValueError, "edge_index"),
    (lambda: ours.GraphAttention(8, 4)((torch.randn(2, 5, 8), torch.randn(3, 5, 8)), TWO), ValueError, "one B"),
    (lambda: ours.from_batch(torch.tensor([1, 0])), ValueError, "ascending"),
    (lambda: ours.from_batch(torch.tensor([[0, 1]])), ValueError, "batch must be"),
]  # fmt: skip
TWO = torch.tensor([[0, 1], [1, 2]])


@pytest.mark.parametrize("case", range(len(WRONG)))
def test_errors_name_the_argument_its_shape_and_the_remedy(case):
    run, kind, message = WRONG[case]
    with pytest.raises(kind, match=message):
        run()


def test_parallel_edges_come_from_copies_of_their_sources():
    columns = torch.tensor([[0, 1, 0, 0, 1], [2, 2, 2, 2, 0]])
    made = Edges.between(columns, 2, 3)
    assert made.copied is not None
    assert made.copied.tolist() == [0, 0]
    assert made.graph.size == (3, 4)
    values = torch.arange(5.0)[:, None]
    assert made.as_given(made.sorted(values)).equal(values)


def test_importing_attngraph_imports_no_pyg():
    code = "import sys, attngraph; assert 'torch_geometric' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_layer_that_was_explained_leaves_pyg_s_class_as_it_is():
    """Found: PyG wrote the `propagate` of its own class anew, and explained none of its layers any more."""
    x, edge_index = torch.randn(6, 8), torch.randint(6, (2, 20))
    for name in LAYERS:
        for module in (ours, theirs):
            layer, mask = getattr(module, name)(8, 4), torch.full((20,), 0.3, requires_grad=True)
            set_masks(layer, mask, edge_index)
            (gradient,) = torch.autograd.grad(layer(x, edge_index).sum(), mask, allow_unused=True)
            assert gradient is not None
            clear_masks(layer)
        assert "MessagePassing" in getattr(theirs, name)._orig_propagate.__qualname__


class Twice(theirs.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize(
    "linear", [torch.nn.Linear(3, 4), Twice(3, 4, bias=False), torch.nn.Sequential(theirs.Linear(3, 4))]
)
def test_what_stands_in_the_place_of_lin_edge_is_called(name, linear):
    layer = getattr(theirs, name)(8, 4, edge_dim=3)
    layer.lin_edge = linear
    x, edge_index, edge_attr = torch.randn(6, 8), torch.randint(6, (2, 20)), torch.randn(20, 3)
    expected = layer(x, edge_index, edge_attr)
    assert "more than a matrix" in str(ours.accelerate(layer))
    torch.testing.assert_close(layer(x, edge_index, edge_attr), expected)


def test_attention_of_a_class_of_its_own_is_called():
    class Thrice(torch.nn.MultiheadAttention):
        def forward(self, *args, **kwargs):
            out, weights = super().forward(*args, **kwargs)
            return 3 * out, weights

    layer = theirs.GPSConv(8, None, heads=2).eval()
    layer.attn = Thrice(8, 2, batch_first=True).eval()
    x = torch.randn(6, 8)
    expected = layer(x, torch.empty(2, 0, dtype=torch.int64))
    assert "forward() of its own" in str(ours.accelerate(layer))
    torch.testing.assert_close(layer(x, torch.empty(2, 0, dtype=torch.int64)), expected)


def test_hooks_in_the_blocks_of_a_set_transformer_are_called():
    layer, seen = ours.SetTransformerAggregation(8, heads=2), []
    for module in (layer.encoders[0].mab, layer.pma):
        module.register_forward_hook(lambda *_: seen.append(1))
    layer(torch.randn(5, 8), torch.tensor([0, 0, 1, 1, 1]))
    assert len(seen) == 2


@pytest.mark.parametrize("name", LAYERS)
def test_an_edge_index_brings_its_sizes(name):
    edges = torch.stack([torch.randint(20, (30,)), torch.randint(6, (30,))])
    x, layers = (torch.randn(20, 8, dtype=torch.float64), torch.randn(6, 5, dtype=torch.float64)), pair(name, (8, 5), 4)
    if name == "GATConv":
        layers = pair(name, (8, 5), 4, add_self_loops=False)
        plain, own = (layer((x[0], None), EdgeIndex(edges, sparse_size=(20, 6))) for layer in layers)
        torch.testing.assert_close(own, plain)
    for size in ((25, 6), (20, 9)):
        for layer in layers:
            with pytest.raises(ValueError):
                layer(x, EdgeIndex(edges, sparse_size=size))


def test_many_sets_of_features_tell_what_they_can_t():
    x, edge_index = torch.randn(3, 6, 8), torch.randint(6, (2, 20))
    with pytest.raises(ValueError, match="give edge_index as a tensor"):
        ours.GraphAttention(8, 4)(x, to_torch_coo_tensor(edge_index, size=6), return_attention_weights=True)
    with pytest.raises(ValueError, match="flow"):
        ours.GraphAttention(8, 4, flow="target_to_source")((x, x), edge_index)


def test_edge_features_of_no_numbers():
    x, edge_index = torch.randn(6, 8, dtype=torch.float64), torch.randint(6, (2, 20))
    plain, nothing = theirs.TransformerConv(8, 4, edge_dim=0).double(), torch.empty(20, 0, dtype=torch.float64)
    expected = plain(x, edge_index, nothing)
    ours.accelerate(plain)
    torch.testing.assert_close(plain(x, edge_index, nothing), expected)


X, EI, EA = torch.randn(6, 8), torch.randint(6, (2, 20)), torch.randn(20, 3)


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: ours.GATConv(8, 4, edge_dim=3)(X, EI + 5, EA), IndexError, "source nodes from 0 to 5"),
        (lambda: ours.GATv2Conv(8, 4, edge_dim=3)(X, EI - 5, EA), IndexError, "source nodes from 0 to 5"),
        (lambda: ours.TransformerConv((8, 5), 4)(X, EI), ValueError, "must be a pair"),
        (lambda: ours.GATConv(8, 4)(X.double(), EI), TypeError, "x must be of the dtype"),
        (lambda: ours.GATv2Conv(8, 4)(X.tolist(), EI), (TypeError, ValueError), "x must be a tensor"),
        (lambda: ours.GATv2Conv(8, 4, edge_dim=3)(X, EI, EA.double()), TypeError, "edge_attr must be of"),
        (lambda: ours.GATConv(8, 4)(X, EI, size=(6, 6, 1)), ValueError, "size must be"),
        (lambda: ours.GPSConv(8, None)(X, EI, torch.arange(5)), ValueError, "batch must be the graph"),
        (lambda: ours.SetTransformerAggregation(8)(X, torch.arange(5)), ValueError, "index must be the graph"),
        (lambda: ours.SetTransformerAggregation(8)(X, torch.arange(6), dim_size=2), ValueError, "6 or more"),
    ],
)  # fmt: skip
def test_a_call_that_fails_tells_which_argument_it_is(call, kind, message):
    with pytest.raises(kind, match=message):
        call()


def test_a_source_of_another_type_is_told():
    metadata = (["a", "p"], [("a", "w", "p"), ("p", "c", "p")])
    layer, x = ours.HGTConv(8, 4, metadata), {"a": torch.randn(10, 8), "p": torch.randn(5, 8)}
    edges = {("a", "w", "p"): torch.tensor([[10], [0]]), ("p", "c", "p"): torch.tensor([[1], [0]])}
    with pytest.raises(IndexError, match="source nodes of 'a' from 0 to 9"):
        layer(x, edges)

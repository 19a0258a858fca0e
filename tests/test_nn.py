"""The Transformer: its switches, its graphs, its compilation; against PyTorch's own modules where they do the same."""

import copy
import dataclasses
import re
import warnings

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import attngraph
from attngraph import (
    Beside,
    Causal,
    Disjoint,
    EdgeList,
    Full,
    PerHead,
    Prefix,
    Window,
    attend,
)
from attngraph.models import GPT
from attngraph.nn import (
    Attention,
    Block,
    FeedForward,
    Rotary,
    SinusoidalPositions,
    Transformer,
    TransformerConfig,
    rotate,
)
from attngraph.nn.embedding import TokenEmbedding
from attngraph.nn.positions import LearnedPositions

SMALL = {"embed_dim": 32, "num_layers": 2, "num_heads": 4}
POSITIONS = ("none", "learned", "sinusoidal", "rotary", "alibi", "relative")


def config(**switches):
    return TransformerConfig(**{**SMALL, "max_length": 64, **switches})


def shaken(module):
    """A module whose parameters are all random, so that none is hidden by its initialisation."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return module.double().eval()


def torch_layer(norm_first, activation):
    return nn.TransformerEncoderLayer(
        32, 4, 128, dropout=0.0, activation=activation, batch_first=True, norm_first=norm_first
    )


@pytest.mark.parametrize("order", ["pre", "post"])
@pytest.mark.parametrize(("activation", "causal"), [("relu", True), ("gelu", False)])
def test_a_stack_equals_torchs_encoder(order, activation, causal):
    ours = Transformer(
        config(position="none", norm_order=order, activation=activation, final_norm=order == "pre"),
        Causal() if causal else Full(),
    )
    final = nn.LayerNorm(32) if order == "pre" else None
    theirs = nn.TransformerEncoder(torch_layer(order == "pre", activation), 2, final, enable_nested_tensor=False)
    shaken(ours), shaken(theirs)
    for mine, layer in zip(ours.layers, theirs.layers, strict=True):
        attention = mine.attention
        weights = [attention.query, attention.key, attention.value]
        layer.self_attn.in_proj_weight.data = torch.cat([part.weight.data for part in weights])
        layer.self_attn.in_proj_bias.data = torch.cat([part.bias.data for part in weights])
        layer.self_attn.out_proj.load_state_dict(attention.out.state_dict())
        layer.linear1.load_state_dict(mine.feedforward.up.state_dict())
        layer.linear2.load_state_dict(mine.feedforward.down.state_dict())
        layer.norm1.load_state_dict(mine.attention_norm.state_dict())
        layer.norm2.load_state_dict(mine.feedforward_norm.state_dict())
    if final:
        theirs.norm.load_state_dict(ours.final_norm.state_dict())
    x = torch.randn(2, 9, 32, dtype=torch.float64)
    mask = ~Causal().mask(9, 9) if causal else None
    theirs.train()  # its inference path computes otherwise
    torch.testing.assert_close(ours(x), theirs(x, mask), rtol=0, atol=1e-10)


def test_a_memory_is_heard_as_torchs_decoder_hears_it():
    ours = shaken(Transformer(config(position="none", cross=True, activation="relu"), Causal()))
    layer = nn.TransformerDecoderLayer(32, 4, 128, 0.0, "relu", batch_first=True, norm_first=True)
    theirs = shaken(nn.TransformerDecoder(layer, 2, nn.LayerNorm(32)))
    for mine, layer in zip(ours.layers, theirs.layers, strict=True):
        for attention, other in ((mine.attention, layer.self_attn), (mine.cross, layer.multihead_attn)):
            parts = [attention.query, attention.key, attention.value]
            other.in_proj_weight.data = torch.cat([part.weight.data for part in parts])
            other.in_proj_bias.data = torch.cat([part.bias.data for part in parts])
            other.out_proj.load_state_dict(attention.out.state_dict())
        layer.linear1.load_state_dict(mine.feedforward.up.state_dict())
        layer.linear2.load_state_dict(mine.feedforward.down.state_dict())
        for norm, other in ((mine.attention_norm, layer.norm1), (mine.cross_norm, layer.norm2)):
            other.load_state_dict(norm.state_dict())
        layer.norm3.load_state_dict(mine.feedforward_norm.state_dict())
    theirs.norm.load_state_dict(ours.final_norm.state_dict())
    x, memory = torch.randn(2, 5, 32, dtype=torch.float64), torch.randn(2, 7, 32, dtype=torch.float64)
    expected = theirs(x, memory, tgt_mask=~Causal().mask(5, 5))
    torch.testing.assert_close(ours(x, memory=memory), expected, rtol=0, atol=1e-10)
    with pytest.raises(ValueError, match="needs a memory"):
        ours(x)


@pytest.mark.parametrize("position", POSITIONS)
def test_a_causal_model_never_hears_the_future(position):
    model = shaken(Transformer(config(position=position, relative_bidirectional=False), Causal()))
    x = torch.randn(1, 10, 32, dtype=torch.float64, requires_grad=True)
    for node in (0, 4, 9):
        (gradient,) = torch.autograd.grad(model(x)[0, node].sum(), x)
        assert (gradient[0, node + 1 :] == 0).all()
        assert (gradient[0, : node + 1] != 0).any(-1).all()


SWITCHES = [
    {"norm": "rms", "bias": (), "gated": True, "activation": "silu", "num_kv_heads": 2, "position": "rotary"},
    {"norm_order": "post", "embed_norm": True, "final_norm": False},
    {"bias": ("q", "v", "o", "ff", "norm"), "position": "sinusoidal"},
    {"head_dim": 5, "scale": 1.0, "position": "relative", "activation": "relu"},
    {"qk_norm": True, "position": "alibi", "activation": "squared_relu", "init": "zero"},
    {"activation": "quick_gelu", "hidden_dim": 40, "dropout": 0.1},
    {"activation": "gelu_tanh", "rotary_base": 500.0, "position": "rotary", "dropout": 0.5},
]


@pytest.mark.parametrize("switches", SWITCHES, ids=lambda switches: "-".join(map(str, switches.values())))
def test_every_switch_builds_a_model_whose_parameters_all_learn(switches):
    model = Transformer(config(**switches), [Causal(), PerHead([Causal(), Window(2, 0), Full(), Prefix(3)])])
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model(torch.randn(2, 12, 32)).square().sum().backward()
    # A bias of the keys adds the same to all scores of a query; softmax does not see it.
    without_gradient = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not [name for name in without_gradient if not name.endswith("key.bias")]


def test_biases_are_where_the_config_says():
    model = Transformer(config(bias=("q", "v", "o")), Full())
    attention = model.layers[0].attention
    assert attention.key.bias is None
    assert attention.query.bias is not None
    assert model.layers[0].feedforward.up.bias is None
    assert model.final_norm.bias is None


def test_rotary_scores_depend_on_the_distance_alone():
    rotary = Rotary(8)
    q, k = torch.randn(2, 1, 8, dtype=torch.float64)

    def turned(x, position):
        return rotate(x, *rotary(torch.tensor([position]), torch.float64))

    scores = [turned(q, i + 5) @ turned(k, i).T for i in (0, 3, 1000)]
    torch.testing.assert_close(scores[0], scores[1], rtol=0, atol=1e-12)
    torch.testing.assert_close(scores[0], scores[2], rtol=0, atol=1e-9)


def test_llama3_scaling_keeps_short_waves_and_stretches_long_ones():
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    length = torch.tensor(0)
    plain, scaled = (Rotary(128, 500_000.0, given).rope.frequencies(length) for given in (None, scaling))
    assert torch.equal(plain[:20], scaled[:20])
    torch.testing.assert_close(plain[-10:] / 8, scaled[-10:])
    assert ((scaled <= plain) & (scaled >= plain / 8 * 0.999)).all()


def test_positions_may_be_given():
    """Packed documents start anew at 0: the same as each alone."""
    for position in ("learned", "sinusoidal", "rotary"):
        model = shaken(Transformer(config(position=position), Causal()))
        x = torch.randn(1, 9, 32, dtype=torch.float64)
        packed = Disjoint([Causal().sized(4, 4), Causal().sized(5, 5)])
        positions = torch.cat([torch.arange(4), torch.arange(5)])
        for given in (positions, positions[None]):
            together = model(x, packed, positions=given)
            torch.testing.assert_close(together[:, :4], model(x[:, :4]), rtol=0, atol=1e-10)
            torch.testing.assert_close(together[:, 4:], model(x[:, 4:]), rtol=0, atol=1e-10)


def test_memory_beside_self_is_one_graph():
    """Memory | self as one list of keys equals attending to the concatenation."""
    layer = shaken(Attention(32, 4))
    x, memory = torch.randn(1, 5, 32, dtype=torch.float64), torch.randn(1, 3, 32, dtype=torch.float64)
    out = layer(x, Beside(Full().sized(None, 3), Causal()), torch.cat([memory, x], dim=1))
    q, k, v = layer.project(x, torch.cat([memory, x], dim=1))
    mask = torch.cat([torch.ones(5, 3, dtype=torch.bool), Causal().mask(5, 5)], dim=1)
    expected = nn.functional.scaled_dot_product_attention(q, k, v, mask)
    torch.testing.assert_close(out, layer.out(expected.transpose(1, 2).flatten(2)), rtol=0, atol=1e-12)


def test_graphs_differ_by_layer_head_and_call():
    x = torch.randn(1, 8, 32, dtype=torch.float64)
    local = Causal() & Window(1, 0)
    model = shaken(Transformer(config(), [local, Causal()]))
    same = copy.deepcopy(model)
    assert same.graphs == model.graphs
    torch.testing.assert_close(model(x), same(x, [local, Causal()]))
    assert not torch.allclose(model(x), model(x, Causal()))
    heads = PerHead([local, local, Causal(), Causal()])
    assert not torch.allclose(model(x, heads), model(x, local))
    arbitrary = EdgeList(torch.randint(0, 8, (2, 20)), 8)
    assert model(x, arbitrary).isfinite().all()


def test_no_module_builds_a_mask(monkeypatch):
    """Nothing in nn or models asks a graph for its mask or edges; layouts are built below `attend` alone."""
    graph = Causal() & Window(3, 0)
    model = GPT(config(position="alibi"), 17, graph)
    asked = []
    monkeypatch.setattr(attngraph.Graph, "mask", lambda *a, **k: asked.append("mask"))
    monkeypatch.setattr(attngraph.Graph, "edge_index", lambda *a, **k: asked.append("edge_index"))
    attended = []
    monkeypatch.setattr(attngraph.nn.attention, "attend", lambda q, k, v, graph, **_: attended.append(graph) or q)
    model(torch.randint(17, (1, 8)))
    assert attended == [graph] * 2
    assert asked == []


BY_LAYER_AND_HEAD = [Causal() & (Window(4, 0) | Prefix(2)), PerHead([Causal(), Window(2, 0)] * 2)]
COMPILED = [(position, graph) for position in POSITIONS for graph in (Causal(), BY_LAYER_AND_HEAD)]
FAST_TO_COMPILE = [("relative", BY_LAYER_AND_HEAD)]


@pytest.mark.parametrize(
    ("position", "graph"),
    [pytest.param(*case, marks=[] if case in FAST_TO_COMPILE else pytest.mark.slow) for case in COMPILED],
    ids=lambda value: value if isinstance(value, str) else "one" if isinstance(value, Causal) else "several",
)
def test_compiled_models_are_the_same_and_recompile_once_for_all_lengths(position, graph):
    import torch._dynamo as dynamo

    dynamo.reset()
    dynamo.utils.counters.clear()
    model = GPT(config(position=position), 17, graph)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for length in (8, 12, 16, 24):
        tokens = torch.randint(17, (2, length))
        torch.testing.assert_close(compiled(tokens), model(tokens), rtol=1e-5, atol=1e-5)
        compiled(tokens).sum().backward()
    assert dynamo.utils.counters["stats"]["unique_graphs"] <= 2


def test_inductor_compiles_a_model():
    """With generated code, forward and backward; needs a C++ compiler, as torch.compile on a CPU does."""
    model = GPT(config(position="rotary"), 17, Causal() & (Window(4, 0) | Prefix(2)))
    compiled, tokens = torch.compile(model, fullgraph=True), torch.randint(17, (2, 16))
    try:
        found = compiled(tokens)
    except torch._inductor.exc.InductorError as error:
        if "compiler" in str(error).lower():
            pytest.skip("no C++ compiler")
        raise
    torch.testing.assert_close(found, model(tokens), rtol=1e-4, atol=1e-4)


def test_autocast_reaches_attention():
    for switches in ({"qk_norm": True, "position": "rotary", "norm": "rms"}, {"position": "relative"}):
        model = GPT(config(**switches), 17, Causal() & Window(3, 0))
        tokens = torch.randint(17, (2, 16))
        with torch.autocast("cpu", torch.bfloat16):
            found = model(tokens)
        torch.testing.assert_close(found.float(), model(tokens), rtol=0, atol=0.05)
        found.float().sum().backward()


def test_tied_heads_share_their_weights():
    model = GPT(config(), 17, tied=True)
    assert model.head.weight is model.embedding.weight
    untied = GPT(config(), 17, tied=False)
    assert untied.head.weight is not untied.embedding.weight


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: config(norm="batch"), "norm must be one of 'layer', 'rms', 'none' (got 'batch')"),
        (lambda: config(position="where"), "position must be one of 'none', 'learned'"),
        (lambda: config(bias="ff"), "bias must be a list"),
        (lambda: config(num_heads=0), "num_heads must be 1 or more (got 0)"),
        (lambda: config(num_kv_heads=0), "num_kv_heads must be 1 or more (got 0)"),
        (lambda: Transformer(config(), PerHead([Full()] * 3)), "graph has 3 heads but the model 4"),
        (lambda: Transformer(config(), Full())(torch.zeros(1, 2, 32), memory_graph=Full()), "only with a memory"),
        (
            lambda: Transformer(config(position="alibi"), Full())(torch.zeros(1, 2, 32), positions=torch.arange(2)),
            "positions can't be given",
        ),
        (lambda: config(bias=("q", "x")), "bias must name q, k, v, o, ff or norm (got x)"),
        (lambda: config(max_length=None, position="learned"), "learned positions need max_length"),
        (lambda: Transformer(config(activation="tanh"), Full()), "activation must be one of"),
        (lambda: Transformer(config(num_heads=5, position="none"), Full()), "multiple of num_heads (got 32 and 5)"),
        (lambda: Transformer(config(num_kv_heads=3), Full()), "multiple of num_kv_heads (got 4 and 3)"),
        (lambda: Transformer(config(), [Full()] * 3), "one for each of 2 layers (got 3)"),
        (lambda: Transformer(config(position="rotary", head_dim=5), Full()), "an even head_dim (got 5)"),
        (lambda: SinusoidalPositions(7), "an even embed_dim (got 7)"),
        (lambda: rotate(torch.ones(3, 2), torch.ones(3, 1), torch.ones(3, 1)), "of the dimension of x, 2"),
        (lambda: FeedForward(4, 8, activation="x"), "activation must be one of"),
        (lambda: GPT(config(max_length=4), 17)(torch.zeros(1, 5, dtype=torch.int64)), "4 learned positions but got 5"),
    ],
)
def test_bad_input_is_an_error(make, message):
    with pytest.raises((TypeError, ValueError)) as error:
        make()
    assert message in str(error.value)


def test_gradients_flow_through_checkpointing():
    from torch.utils.checkpoint import checkpoint

    q, k, v = (torch.randn(1, 2, 8, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    graph = Causal() & Window(2, 0)
    plain = torch.autograd.grad(attend(q, k, v, graph).square().sum(), [q, k, v])
    again = checkpoint(lambda *sides: attend(*sides, graph), q, k, v, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(again.square().sum(), [q, k, v]), plain)


def test_an_embedding_begins_as_pytorchs_unless_a_model_says_otherwise():
    assert 0.9 < TokenEmbedding(100, 64).weight.std() < 1.1
    assert 0.018 < LearnedPositions(100, 64).weight.std() < 0.022
    assert 0.018 < GPT(config(), 100).embedding.weight.std() < 0.022


def test_a_block_is_used_and_checkpointed_by_itself():
    """Its arguments have names, so that `checkpoint` passes them on; the gradients are the same."""
    block = Block(config(dropout=0.0)).double()
    x = torch.randn(2, 9, config().embed_dim, dtype=torch.float64, requires_grad=True)
    options = {"graph": Causal(), "attention_mask": torch.ones(2, 9, dtype=torch.bool)}
    out = block(x, **options)
    again = checkpoint(block, x, use_reentrant=False, **options)
    assert torch.equal(out, again)
    wanted, found = (torch.autograd.grad(each.sum(), [x, *block.parameters()]) for each in (out, again))
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


def test_help_explains_every_switch():
    explained = set(re.findall(r"^        (\w+): ", TransformerConfig.__doc__, re.MULTILINE))
    assert explained == {field.name for field in dataclasses.fields(TransformerConfig)}


@pytest.mark.parametrize("kind", [GPT, Transformer], ids=lambda kind: kind.__name__)
def test_three_numbers_make_a_model(kind):
    settings = TransformerConfig(embed_dim=64, num_layers=2, num_heads=4)
    assert settings.position == "rotary"
    assert TransformerConfig(embed_dim=64, num_layers=2, num_heads=4, max_length=9).position == "learned"
    model = kind(settings, 65) if kind is GPT else kind(settings, Causal())
    assert model(torch.zeros(1, 7, dtype=torch.long) if kind is GPT else torch.zeros(1, 7, 64)).shape[:2] == (1, 7)


def test_a_plan_stands_where_a_graph_does(tmp_path):
    graph = Causal() & Window(3, 0)
    model, x = GPT(TransformerConfig(**SMALL), vocab_size=17, graph=graph), torch.arange(12)[None] % 17
    expected, state = model(x), model.state_dict()
    model.transformer.graphs = attngraph.plan(graph, 12, heads=4)
    torch.testing.assert_close(model(x), expected)
    assert str(graph) in str(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.load_state_dict(state)  # weights of the same graph
    model.save(tmp_path)
    assert GPT.load(tmp_path).transformer.graphs[0] == graph
    with pytest.raises(ValueError, match=r"which a cache does not continue: give its \.graph"):
        attngraph.KVCache(model, max_length=12)
    model.transformer.graphs = graph
    attention = model.transformer.layers[0].attention
    with pytest.raises(ValueError, match="a call with a cache needs a graph"):
        attention(torch.zeros(1, 12, 32), attngraph.plan(graph, 12, heads=4), cache=object())

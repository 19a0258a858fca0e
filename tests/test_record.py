"""What `record` keeps are the weights of attention: those of the reference, for every model, and no trace is left."""

import copy

import pytest
import torch
import transformers
from torch import nn

from attngraph import Batched, Causal, Full, Identity, PerHead, Prefix, Strided, Window, attend, hf, plan, record
from attngraph.models import GPT, DecisionTransformer, Encoder, EncoderDecoder, ViT
from attngraph.nn import Attention, Transformer, TransformerConfig

HEADS = PerHead([Causal(), Causal() & Window(2, 0), Causal() & Strided(3), Identity()])


def config(**switches):
    return TransformerConfig(**{"embed_dim": 32, "num_layers": 3, "num_heads": 4, "position": "rotary", **switches})


def gpt(**switches):
    torch.manual_seed(0)
    return GPT(config(**switches), 11, [Causal(), HEADS, Causal() & (Window(3, 0) | Prefix(1))]).double().eval()


TOKENS = torch.randint(11, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "switches", [{}, {"score": "additive"}, {"position": "alibi"}, {"num_kv_heads": 2}, {"normalize": "none"}]
)
def test_weights_are_those_of_the_reference(switches):
    model, seen = gpt(**switches), {}
    for name, module in model.named_modules():
        if isinstance(module, Attention):
            module.register_forward_pre_hook(
                lambda _, inputs, options, name=name: seen.update({name: (inputs, options)}), with_kwargs=True
            )
    with record(model) as recorded:
        logits = model(TOKENS)
    torch.testing.assert_close(logits, model(TOKENS))
    assert list(recorded) == [f"transformer.layers.{number}.attention" for number in range(3)]
    for number, (name, found) in enumerate(recorded.items()):
        (x, graph, *_), options = seen[name]
        layer = model.get_submodule(name)
        q, k, v = layer.project(x, x, options["rotary"])
        weights = attend(
            q, k, v, graph, bias=options["bias"], backend="reference", return_weights=True, **layer.scoring
        )[1]
        torch.testing.assert_close(found.weights, weights)
        assert found is recorded[number] is recorded[number - 3]
        assert (found.layer, found.graph, found.num_queries, found.num_keys) == (number, graph, 9, 9)
        assert torch.equal(found.edge_index, graph.edge_index(9, 9))


@pytest.mark.parametrize("mask", [None, torch.tensor([[1] * 9, [1] * 7 + [0] * 2])])
def test_graphs_of_the_entries_of_a_batch_are_one(mask):
    model, graphs = gpt(), [Causal().sized(9, 9), (Window(2, 1) | Prefix(1)).sized(9, 9)]
    with record(model) as recorded:
        model(TOKENS, Batched(graphs), attention_mask=mask)
    together = recorded[0]
    assert together.num_queries == together.num_keys == 18
    assert torch.equal(together.edge_index, Batched(graphs).edge_index())
    edges, weights = together.of(head=1)
    for entry, graph in enumerate(graphs):
        with record(model) as alone:
            model(TOKENS[entry : entry + 1], graph, attention_mask=None if mask is None else mask[entry : entry + 1])
        own_edges, own_weights = alone[0].of(head=1)
        own = edges[1] // 9 == entry
        assert torch.equal(edges[:, own] - 9 * entry, own_edges)
        torch.testing.assert_close(weights[own], own_weights)
    together.draw(head=1)


def test_a_layer_returns_its_weights():
    torch.manual_seed(0)
    layer, x, memory = Attention(8, 2).double(), torch.randn(2, 5, 8).double(), torch.randn(2, 7, 8).double()
    out, weights = layer(x, Full(), memory, return_weights=True)
    torch.testing.assert_close(out, layer(x, Full(), memory))
    assert weights.shape == (2, 2, 35)
    torch.testing.assert_close(weights.view(2, 2, 5, 7).sum(-1), torch.ones(2, 2, 5).double())
    assert layer(x[0], Causal(), return_weights=True)[1].shape == (2, 15)
    with record(layer) as recorded:
        layer(x[0], plan(Causal(), 5, 5, heads=2, dtype=torch.float64, return_weights=True))
    assert recorded[0].weights.shape == (1, 2, 15)
    assert recorded[0].graph == Causal()


def test_no_trace_is_left():
    model = gpt()
    before = [dict(vars(module)) for module in model.modules()]

    def is_as_before():
        return all(vars(module).keys() == old.keys() for module, old in zip(model.modules(), before, strict=True))

    with record(model) as outer:
        with record(model, layers=1, heads=3) as inner, torch.no_grad():
            model(TOKENS)
        assert not is_as_before()
        model(TOKENS[:1])
    assert is_as_before()
    assert (len(outer), len(inner)) == (3, 1)
    assert outer[1].weights.shape[:2] == (1, 4)  # its latest call
    assert inner[1].weights.shape[:2] == (2, 1)
    with pytest.raises(ValueError, match="tokens must be from 0 to 10"), record(model):
        model(TOKENS + 11)
    assert is_as_before()
    assert torch.equal(copy.deepcopy(model)(TOKENS), model(TOKENS))


def test_layers_and_heads_say_what_is_kept():
    model = gpt()
    with record(model, layers=[0, -1], heads=(2, 0)) as recorded:
        model(TOKENS)
    with record(model, layers="transformer.layers.2.attention", heads=1) as one:
        model(TOKENS)
    with record(model) as every:
        model(TOKENS)
    assert [each.layer for each in recorded.values()] == [0, 2]
    for each in recorded.values():
        assert each.heads == (2, 0)
        torch.testing.assert_close(each.weights, every[each.layer].weights[:, [2, 0]])
    torch.testing.assert_close(one[2].weights, every[2].weights[:, 1:2])
    assert one[2].weights.untyped_storage().nbytes() == one[2].weights.nbytes
    assert not every[0].weights.requires_grad


def test_weights_can_be_differentiated():
    model = gpt()
    with record(model, gradients=True) as recorded:
        model(TOKENS)
    recorded[2].weights.square().sum().backward()
    assert model.transformer.layers[0].attention.query.weight.grad.abs().sum() > 0


def test_every_attention_of_an_encoder_decoder_is_recorded():
    model = EncoderDecoder(config(num_layers=2), config(num_layers=2, cross=True), 11).eval()
    mask = torch.tensor([[True] * 9, [True] * 6 + [False] * 3])
    with record(model) as recorded:
        model(TOKENS, TOKENS[:, :4], attention_mask=mask)
    for number in range(2):
        assert recorded[f"encoder.layers.{number}.attention"].weights.shape == (2, 4, 81)
        assert recorded[f"decoder.layers.{number}.attention"].weights.shape == (2, 4, 10)
        cross = recorded[f"decoder.layers.{number}.cross"]
        assert (cross.num_queries, cross.num_keys) == (4, 9)
        weights = cross.weights.view(2, 4, 4, 9)
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 4))
        assert not weights[1, ..., 6:].any()
    with pytest.raises(KeyError, match=r"layer 1 has several.*encoder\.layers\.1\.attention, decoder"):
        recorded[1]
    edges, weights = cross.of(head=0, batch=1)
    assert edges.shape == (2, 4 * 6)
    torch.testing.assert_close(weights, cross.weights.view(2, 4, 4, 9)[1, 0, :, :6].flatten())


def test_every_model_is_recorded():
    images, states = torch.randn(2, 1, 4, 4), torch.randn(2, 5, 3)
    decision = DecisionTransformer(config(position="none"), state_dim=3, action_dim=2, max_time=9)
    beside = EncoderDecoder(config(), config(), 11)
    for model, inputs, keys in (
        (Encoder(config(), 11), (TOKENS,), 9),
        (ViT(config(position="none"), 3, image_size=4, patch_size=2, channels=1), (images,), 5),
        (decision, (states, torch.randn(2, 5, 2), torch.randn(2, 5, 1), torch.arange(5).expand(2, 5)), 15),
        (beside, (TOKENS, TOKENS[:, :4]), 13),
    ):
        with record(model) as recorded:
            model(*inputs)
        last = list(recorded.values())[-1]
        assert last.num_keys == keys
        torch.testing.assert_close(last.weights.sum(-1), torch.full((2, 4), float(last.num_queries)))


def test_padding_is_heard_by_nobody_and_not_drawn():
    model = gpt()
    alone = TOKENS[1:, :6]
    for padded, mask in (
        (torch.cat([alone, alone[:, :3]], 1), [True] * 6 + [False] * 3),
        (torch.cat([alone[:, :3], alone], 1), [False] * 3 + [True] * 6),
    ):
        with record(model) as recorded:
            model(torch.cat([TOKENS[:1], padded]), attention_mask=torch.tensor([[True] * 9, mask]))
        with record(model) as one:
            model(alone)
        for layer in range(3):
            for head in range(4):
                (edges, weights), (own, expected) = recorded[layer].of(head, batch=1), one[layer].of(head)
                assert torch.equal(edges, own + mask.index(True))  # nodes are numbered by their places in the input
                torch.testing.assert_close(weights, expected)


@pytest.mark.parametrize("graph", [Causal(), Causal().sized(9, 9)], ids=str)
def test_nodes_are_numbered_as_in_the_input(graph):
    """Of a batch that is padded in front, whether the graph counts from the first real node or not."""
    model = GPT(config(num_layers=1), 11, graph).eval()
    mask = torch.tensor([[True] * 9, [False] * 3 + [True] * 6, [False] * 9])
    with record(model) as recorded:
        model(torch.cat([TOKENS, TOKENS[:1]]), attention_mask=mask)
    for batch, first in enumerate([0, 3]):
        edges, _ = recorded[0].of(2, batch)
        assert torch.equal(edges, Causal().edge_index(9 - first) + first)
    assert recorded[0].of(2, 2)[0].shape == (2, 0)
    picture = recorded[0].draw(2, batch=1).axes[0].images[0].get_array()
    assert torch.equal(~torch.from_numpy(picture.mask), Causal().mask(9, 9) & mask[1] & mask[1, :, None])


@pytest.mark.parametrize("cross", [True, False])
def test_nodes_that_hear_a_memory_are_numbered_as_in_the_input(cross):
    model = Transformer(config(num_layers=1, cross=cross), Causal()).eval()
    x, memory, mask = torch.randn(2, 5, 32), torch.randn(2, 4, 32), torch.tensor([[True] * 5, [False] * 2 + [True] * 3])
    memory_mask = torch.tensor([[True] * 4, [False] + [True] * 3])
    with record(model) as recorded:
        model(x, attention_mask=mask, memory=memory, memory_attention_mask=memory_mask)
    heard = recorded["layers.0.cross" if cross else "layers.0.attention"]
    key, query = heard.of(0, 1)[0]
    assert set(key.tolist()) == ({1, 2, 3} if cross else {1, 2, 3, 4 + 2, 4 + 3, 4 + 4})
    if not cross:
        assert set(query.tolist()) == {2, 3, 4}
        own = key >= 4
        assert torch.equal(torch.stack([key[own] - 4, query[own]]), Causal().edge_index(3) + 2)
    with record(model) as recorded:  # and not moved
        model(x, memory=memory)
    assert recorded[heard.name].query_places is None


def test_a_sheet_has_names_and_an_empty_batch_no_picture():
    model = gpt()
    with record(model) as recorded:
        model(TOKENS)
    for sheet in (recorded.draw(labels=list("abcdefghi")), recorded[1].draw(labels=list("abcdefghi"))):
        for ax in sheet.axes:
            for axis in (ax.xaxis, ax.yaxis):
                assert {label.get_text() for label in axis.get_ticklabels()} <= set("abcdefghi")
                assert len(axis.get_ticklabels()) > 2
    with pytest.raises(ValueError, match="labels must name each of 9 nodes"):
        recorded.draw(labels=["a"])
    with record(model) as recorded:
        model(TOKENS[:0])
    with pytest.raises(ValueError, match="got an empty batch"):
        recorded[0].draw()
    assert "<img" not in recorded._repr_html_()


def test_heads_are_counted_as_layers_are():
    model = gpt()
    with record(model, heads=[1, -3, 1, -1]) as recorded:
        model(TOKENS)
    assert recorded[0].heads == (1, 3)
    assert recorded[0].weights.shape[1] == 2
    for wrong in (None, slice(0, 1), 1.0, True):
        with pytest.raises(TypeError, match="layer must be the number of a layer or the name of a module"):
            recorded[wrong]


def test_weights_that_are_not_finite_are_told():
    model = gpt()
    with torch.no_grad():
        model.transformer.layers[0].attention.query.weight.fill_(torch.nan)
    with record(model) as recorded:
        model(TOKENS)
    with pytest.raises(ValueError, match="weights must be finite"):
        recorded[0].draw(0)
    assert "<img" not in recorded[0]._repr_html_()


def test_heads_that_differ_have_their_own_edges():
    model = gpt()
    with record(model, layers=1) as recorded:
        model(TOKENS)
    for head, graph in enumerate(HEADS.graphs):
        edges, weights = recorded[1].of(head)
        assert torch.equal(edges, graph.edge_index(9, 9))
        torch.testing.assert_close(weights.sum(), torch.tensor(9.0).double())
    assert recorded[1].of(3)[1].eq(1).all()  # Identity


def test_weights_are_recorded_under_autocast_and_in_training():
    model = gpt(dropout=0.5).float().train()
    with torch.autocast("cpu", torch.bfloat16), record(model) as recorded:
        model(TOKENS)
    torch.testing.assert_close(recorded[0].weights.float().sum(-1), torch.full((2, 4), 9.0), atol=0.1, rtol=0)


def test_recording_does_not_change_which_weights_are_dropped():
    model = gpt(dropout=0.5).train()
    torch.manual_seed(3)
    expected = model(TOKENS)
    torch.manual_seed(3)
    with record(model):
        torch.testing.assert_close(model(TOKENS), expected)


@pytest.mark.parametrize("compiled", [lambda model: torch.compile(model, backend="eager"), "in place"])
def test_a_compiled_model_runs_uncompiled_meanwhile(compiled):
    model = gpt()
    expected = model(TOKENS)
    if compiled == "in place":
        model.compile(backend="eager")
        running = model
    else:
        running = compiled(model)
    running(TOKENS)
    with record(running) as recorded:
        torch.testing.assert_close(running(TOKENS), expected)
    assert list(recorded) == [f"transformer.layers.{number}.attention" for number in range(3)]
    torch.testing.assert_close(running(TOKENS), expected)


def test_recording_inside_a_compiled_function_is_refused():
    model = gpt()

    @torch.compile(backend="eager")
    def step(tokens):
        with record(model) as recorded:
            model(tokens)
        return recorded[0].weights

    with pytest.raises(RuntimeError, match=r"torch\.compile region"):
        step(TOKENS)


def test_what_is_not_there_is_told():
    model = gpt()
    with (
        pytest.raises(ValueError, match=r"model must have attngraph\.nn\.Attention in it \(got a Linear\)"),
        record(nn.Linear(2, 2)),
    ):
        pass
    for options, message in (
        ({"layers": 3}, r"layers must be among 0 … 2 or transformer\.layers\.0.* \(got 3\)"),
        ({"layers": -4}, r"layers must be among 0 … 2"),
        ({"layers": "transformer"}, r"layers must be among .* \(got 'transformer'\)"),
        ({"layers": []}, "layers must be at least one"),
        ({"heads": 4}, r"heads must be from -4 to 3 \(got 4\)"),
        ({"heads": []}, "heads must be at least one"),
    ):
        with pytest.raises(ValueError, match=message), record(model, **options):
            pass
    with record(model, layers=0, heads=1) as recorded:
        with pytest.raises(KeyError, match="nothing was recorded: run the model inside"):
            recorded[0]
        with pytest.raises(ValueError, match="nothing was recorded"):
            recorded.draw()
        model(TOKENS)
    with pytest.raises(KeyError, match=r"2 was not recorded, but transformer\.layers\.0\.attention"):
        recorded[2]
    with pytest.raises(ValueError, match=r"head must be one of those that were recorded, 1 \(got 0\)"):
        recorded[0].draw(0)
    with pytest.raises(ValueError, match=r"batch must be from 0 to 1 \(got 2\)"):
        recorded[0].draw(1, batch=2)


def test_memory_is_in_proportion_to_the_edges():
    model = GPT(config(num_layers=1), 11, Causal() & Window(1, 0)).eval()
    with torch.no_grad(), record(model) as recorded:
        model(torch.zeros(1, 4096, dtype=torch.int64))
    assert recorded[0].weights.shape == (1, 4, 2 * 4096 - 1)
    assert recorded[0].weights.untyped_storage().nbytes() < 4 * 4 * 2 * 4096 + 64


def dense(found):
    """The weights as matrices, (B, H, N, M)."""
    key, query = found.edge_index
    full = found.weights.new_zeros(*found.weights.shape[:2], found.num_queries, found.num_keys)
    full[..., query, key] = found.weights
    return full


def test_checkpoints_have_the_weights_of_transformers(tmp_path):
    torch.manual_seed(0)
    sizes = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=16, vocab_size=11)
    theirs = transformers.GPT2LMHeadModel(sizes).eval()
    theirs.set_attn_implementation("eager")
    theirs.save_pretrained(tmp_path)
    with torch.no_grad(), record(hf.load(tmp_path)) as recorded:
        hf.load(tmp_path)(TOKENS)
    assert not recorded  # another model ran
    model = hf.load(tmp_path)
    with torch.no_grad(), record(model) as recorded:
        model(TOKENS)
    for layer, expected in enumerate(theirs(TOKENS, output_attentions=True).attentions):
        torch.testing.assert_close(dense(recorded[layer]), expected)


def test_encoder_and_decoder_have_the_weights_of_transformers(tmp_path):
    torch.manual_seed(0)
    sizes = transformers.T5Config(
        d_model=32, d_kv=8, d_ff=16, num_layers=2, num_heads=4, vocab_size=11, decoder_start_token_id=0, dropout_rate=0
    )
    theirs = transformers.T5ForConditionalGeneration(sizes).eval()
    theirs.set_attn_implementation("eager")
    theirs.save_pretrained(tmp_path)
    model, mask = hf.load(tmp_path), torch.tensor([[1] * 9, [1] * 6 + [0] * 3])
    with torch.no_grad(), record(model) as recorded:
        model(TOKENS, TOKENS[:, :4], attention_mask=mask)
    found = theirs(
        input_ids=TOKENS, attention_mask=mask, decoder_input_ids=TOKENS[:, :4], output_attentions=True
    )  # fmt: skip
    for layer in range(2):
        encoder = dense(recorded[f"encoder.layers.{layer}.attention"])
        torch.testing.assert_close(encoder[0], found.encoder_attentions[layer][0])
        torch.testing.assert_close(encoder[1, :, :6], found.encoder_attentions[layer][1, :, :6])
        decoder = dense(recorded[f"decoder.layers.{layer}.attention"])
        torch.testing.assert_close(decoder, found.decoder_attentions[layer])
        cross = dense(recorded[f"decoder.layers.{layer}.cross"])
        torch.testing.assert_close(cross, found.cross_attentions[layer])

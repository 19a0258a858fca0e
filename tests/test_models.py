"""The classics differ in connectivity alone; padding is heard by nobody; what does not fit is an error that says so."""

import math

import pytest
import torch
from torch import nn

from attngraph import Beside, Causal, Documents, Empty, Full, Neighborhood, Prefix, Window, attend
from attngraph.kernels.merge import merge
from attngraph.models import GPT, DecisionTransformer, Encoder, EncoderDecoder, ViT
from attngraph.nn import Attention, PatchEmbedding, Rotary, Transformer, TransformerConfig


def config(**changes):
    return TransformerConfig(**{"embed_dim": 24, "num_layers": 2, "num_heads": 3, "max_length": 20, **changes})


def shaken(model):
    """With weights so large that a mistake shows."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter) + (parameter.ndim == 1))
    return model.double().eval()


def tokens(*shape, seed=0):
    return torch.randint(17, shape, generator=torch.Generator().manual_seed(seed))


def vectors(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_gpt_on_the_full_graph_is_an_encoder():
    """The same parts with the same weights: what makes the difference is the graph."""
    gpt, bert = shaken(GPT(config(), 17, Full())), shaken(Encoder(config(), 17))
    bert.embedding.load_state_dict(gpt.embedding.state_dict())
    bert.transformer.load_state_dict(gpt.transformer.state_dict())
    given = tokens(2, 9)
    x = gpt.transformer(gpt.embedding(given))
    close(bert(given), bert.head(x))
    bert.transformer.graphs = gpt.transformer.graphs = Causal()
    close(bert(given), bert.head(gpt.transformer(gpt.embedding(given))))
    assert not torch.allclose(x, gpt.transformer(gpt.embedding(given)))


@pytest.mark.parametrize("position", ["learned", "rotary", "relative", "alibi", "sinusoidal", "none"])
@pytest.mark.parametrize("graph", [Full(), Causal(), Causal() & Window(3, 0)], ids=str)
def test_padding_is_heard_by_nobody(graph, position):
    """Whatever it holds; and where it is at the end, a text has the same logits as alone."""
    model = shaken(GPT(config(position=position), 17, graph))
    given, mask = tokens(3, 9), torch.ones(3, 9, dtype=torch.bool)
    mask[0, 6:], mask[1, :3], mask[2, 4] = False, False, False
    found = model(given, attention_mask=mask)
    other = given.where(mask, (given + 5) % 17)
    close(found[mask], model(other, attention_mask=mask)[mask])
    close(found[0, :6], model(given[:1, :6])[0])
    assert not torch.allclose(found[0, :6], model(given)[0, :6]) or graph != Full()


def test_a_padding_mask_is_bool_or_zeros_and_ones():
    model = shaken(EncoderDecoder(config(position="rotary"), config(position="rotary"), 17))
    source, target = tokens(2, 9), tokens(2, 5, seed=1)
    of_source, of_target = torch.rand(2, 9) < 0.7, torch.rand(2, 5) < 0.7
    wanted = model(source, target, attention_mask=of_source, decoder_attention_mask=of_target)
    for dtype in (torch.int64, torch.int32, torch.uint8):
        masks = {"attention_mask": of_source.to(dtype), "decoder_attention_mask": of_target.to(dtype)}
        assert torch.equal(model(source, target, **masks), wanted)
    assert not torch.allclose(model(source, target), wanted)


def test_padding_of_other_models_is_heard_by_nobody():
    model = shaken(EncoderDecoder(config(position="relative", scale=1.0), config(position="relative", cross=True), 17))
    source, target, mask = tokens(2, 9), tokens(2, 5, seed=1), torch.ones(2, 9, dtype=torch.bool)
    mask[0, 6:] = False
    close(model(source, target, attention_mask=mask)[0], model(source[:1, :6], target[:1])[0])

    model = shaken(DecisionTransformer(config(), state_dim=4, action_dim=2, max_time=30))
    sides = vectors(2, 6, 4), vectors(2, 6, 2), vectors(2, 6, 1), torch.arange(6).expand(2, 6)
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[0, :2] = False
    close(model(*sides, attention_mask=mask)[0, 2:], model(*(side[:1, 2:] for side in sides))[0])

    model = shaken(DecisionTransformer(config(), num_states=17, num_actions=3, max_time=30))
    sides = tokens(2, 6), tokens(2, 6, seed=1) % 3, sides[2], sides[3]
    close(model(*sides, attention_mask=mask)[0, 2:], model(*(side[:1, 2:] for side in sides))[0])

    for pool in ("cls", "mean"):
        model = shaken(ViT(config(max_length=16 + (pool == "cls")), 5, image_size=8, patch_size=2, pool=pool))
        images, mask = vectors(2, 3, 8, 8), torch.ones(2, 16, dtype=torch.bool)
        mask[:, 3] = False
        changed = images.clone()
        changed[:, :, :2, 6:] += 1  # the fourth patch
        close(model(images, attention_mask=mask), model(changed, attention_mask=mask))
        assert not torch.allclose(model(images), model(changed))


@torch.no_grad()
def test_discrete_states_and_actions_are_the_vectors_of_one_of_so_many():
    """A vector for each is a linear map of a one among zeros; what comes are logits, without bounds."""
    chosen = shaken(DecisionTransformer(config(), num_states=17, num_actions=3, max_time=30))
    vectorial = shaken(DecisionTransformer(config(), state_dim=17, action_dim=3, max_time=30, bounded=False))
    state = {name: value for name, value in chosen.state_dict().items() if not name.startswith("embed_")}
    assert not vectorial.load_state_dict(state, strict=False).unexpected_keys
    for name in ("embed_state", "embed_action"):
        getattr(vectorial, name).weight.copy_(getattr(chosen, name).weight.T)
        getattr(vectorial, name).bias.zero_()
    vectorial.embed_return.load_state_dict(chosen.embed_return.state_dict())
    states, actions, returns = tokens(2, 6), tokens(2, 6, seed=1) % 3, vectors(2, 6, 1)
    times = torch.arange(6).expand(2, 6)
    hot = nn.functional.one_hot(states, 17).double(), nn.functional.one_hot(actions, 3).double()
    found = chosen(states, actions, returns, times)
    close(found, vectorial(*hot, returns, times))
    assert found.abs().max() > 1
    other = actions.clone()
    other[:, -1] = (other[:, -1] + 1) % 3  # what the last step is asked for can't be heard
    assert torch.equal(chosen(states, other, returns, times), found)


def test_a_packed_batch_is_one_bigger_graph():
    model = shaken(GPT(config(position="rotary"), 17))
    parts = [tokens(1, length, seed=length) for length in (3, 7, 5)]
    packed = model(torch.cat(parts, 1), Causal() & Documents([3, 7, 5]))
    close(packed, torch.cat([model(part) for part in parts], 1))


@torch.no_grad()
def test_memory_beside_oneself_is_the_merge_of_both():
    """One softmax over memory and self is what the two make together, by their lse."""
    layer = shaken(Attention(24, 3))
    x, memory = vectors(2, 5, 24), vectors(2, 7, 24, seed=1)
    q, k, v = layer.project(x, torch.cat([memory, x], dim=1))
    parts = [
        attend(q, k[:, :, some], v[:, :, some], graph, return_lse=True)
        for some, graph in ((slice(7), Full()), (slice(7, None), Causal()))
    ]
    out, lse = parts[0]
    merge(out, lse, *parts[1])
    found = layer(x, Beside(Full().sized(None, 7), Causal()), torch.cat([memory, x], dim=1))
    close(found, layer.out(out.transpose(1, 2).flatten(2)))


@pytest.mark.parametrize("position", ["none", "learned", "rotary"])
def test_both_forms_of_a_decoder_agree_where_nodes_hear_the_memory_alone(position):
    """A cross phase, after a phase in which nobody hears anything; and memory beside nobody."""
    bias = ("ff", "norm")
    crossing = shaken(Transformer(config(cross=True, position=position, bias=bias, num_layers=1), Empty()))
    beside = shaken(
        Transformer(config(position="none" if position == "rotary" else position, bias=bias, num_layers=1), Empty())
    )
    for name in ("attention", "attention_norm", "feedforward", "feedforward_norm"):
        source = crossing.layers[0].get_submodule(name.replace("attention", "cross"))
        beside.layers[0].get_submodule(name).load_state_dict(source.state_dict())
    beside.final_norm.load_state_dict(crossing.final_norm.state_dict())
    if position == "learned":
        beside.position.load_state_dict(crossing.position.state_dict())
    x, memory, mask = vectors(2, 5, 24), vectors(2, 7, 24, seed=1), torch.ones(2, 7, dtype=torch.bool)
    mask[1, 4:] = False
    for options in ({}, {"memory_attention_mask": mask}, {"memory_graph": Window(2, 2)}):
        normalised = beside.layers[0].attention_norm(memory)  # as the nodes are that it stands beside
        close(crossing(x, memory=normalised, **options), beside(x, memory=memory, **options))


def test_rotary_positions_go_on_from_those_of_the_memory():
    """So memory beside self is heard as the earlier part of one sequence."""
    model = shaken(Transformer(config(position="rotary", num_layers=1), Causal()))
    x = vectors(2, 9, 24)
    close(model(x)[:, 4:], model(x[:, 4:], memory=x[:, :4]))


def test_a_decoder_without_a_cross_phase_translates():
    model = shaken(EncoderDecoder(config(position="rotary"), config(position="rotary"), 17))
    source, target = tokens(2, 9), tokens(2, 5, seed=1)
    found = model(source, target)
    assert found.shape == (2, 5, 17)
    close(found[:, :3], model(source, target[:, :3]))
    assert not torch.allclose(found, model(tokens(2, 9, seed=3), target))


def test_a_vit_sees_patches_row_by_row():
    patches = PatchEmbedding((4, 6), (2, 3), 2, 24)
    images = torch.randn(3, 2, 4, 6)
    cut = nn.functional.unfold(images, (2, 3), stride=(2, 3)).transpose(1, 2)
    torch.testing.assert_close(patches(images), cut @ patches.project.weight.flatten(1).T + patches.project.bias)
    model = ViT(config(max_length=17), 5, image_size=8, patch_size=2, graph=Neighborhood((4, 4), 1))
    graph = model.transformer.graphs[0]
    assert graph.num_edges(17, 17) == Neighborhood((4, 4), 1).num_edges() + 2 * 16 + 1
    assert ViT(config(max_length=17), 5, image_size=8, patch_size=2).transformer.graphs == (Full(), Full())


def test_the_graph_may_be_changed_and_is_checked():
    model = GPT(config(), 17)
    model.transformer.graphs = [Causal() & Window(3, 0), Causal() & Prefix(2)]
    assert model.transformer.graphs == (Causal() & Window(3, 0), Causal() & Prefix(2))
    with pytest.raises(ValueError, match="one for each of 2 layers"):
        model.transformer.graphs = [Causal()] * 3
    assert len(model.transformer.graphs) == 2


def test_a_score_may_be_additive():
    layer = shaken(Attention(24, 3, score="additive"))
    x = vectors(2, 5, 24)
    q, k, v = layer.project(x, x)
    scores = (torch.tanh(q[:, :, :, None] + k[:, :, None]) * layer.score_weight[:, None, None]).sum(-1)
    weights = scores.masked_fill(~Causal().mask(5, 5), -torch.inf).softmax(-1)
    close(layer(x, Causal()), layer.out((weights @ v).transpose(1, 2).flatten(2)))


NORMALIZERS = {
    "softmax": lambda scores, heard: scores.masked_fill(~heard, -torch.inf).softmax(-1),
    "sigmoid": lambda scores, heard: scores.sigmoid() * heard,
    "none": lambda scores, heard: scores * heard,
    "relu": lambda scores, heard: scores.relu() * heard,
    "squared_relu": lambda scores, heard: scores.relu().square() * heard,
}


@pytest.mark.parametrize("normalize", NORMALIZERS)
def test_weights_are_what_the_normaliser_makes_of_scores(normalize):
    switches = {"normalize": normalize, "norm": "none", "scale": 0.3, "position": "none", "bias": (), "init": "zero"}
    model = shaken(Transformer(config(num_layers=1, **switches), Causal()))
    layer, x = model.layers[0].attention, vectors(2, 5, 24)
    q, k, v = layer.project(x, x)
    weights = NORMALIZERS[normalize](0.3 * q @ k.mT, Causal().mask(5, 5))
    said = layer.out((weights @ v).transpose(1, 2).flatten(2))
    close(layer(x, Causal()), said)
    close(layer(x, Causal(), return_weights=True)[1], weights[..., Causal().mask(5, 5)])
    close(model(x), x + said + model.layers[0].feedforward(x + said))  # without a norm


@pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn", "llama3", "longrope"])
@pytest.mark.parametrize("length", [5, 40])
def test_rotary_scalings_are_those_of_transformers(kind, length):
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = {
        "factor": 4.0, "original_max_position_embeddings": 16, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "short_factor": [1.0, 1.5, 2.0, 2.5], "long_factor": [3.0, 4.0, 5.0, 6.0], "rope_type": kind,
    }  # fmt: skip
    longest = 16 if kind == "dynamic" else 64
    theirs = transformers.LlamaConfig(
        hidden_size=16,
        num_attention_heads=2,
        max_position_embeddings=longest,
        rope_parameters={**scaling, "rope_theta": 1e4},
    )
    wanted, amplitude = ROPE_INIT_FUNCTIONS[kind](theirs, None, seq_len=length)
    rotary = Rotary(8, scaling=scaling)
    torch.testing.assert_close(rotary.rope.frequencies(torch.tensor(length)), wanted, rtol=1e-6, atol=0)
    assert rotary.rope.amplitude == pytest.approx(amplitude)
    cos, sin = rotary(torch.arange(length))
    torch.testing.assert_close(cos[-1, :4], (wanted * (length - 1)).cos() * amplitude)
    torch.testing.assert_close(sin[-1, 4:], (wanted * (length - 1)).sin() * amplitude)


def test_padding_of_the_source_takes_no_places():
    """Whether a decoder hears it in a phase of its own or beside itself, the answer is that without padding."""
    for cross in (False, True):
        model = shaken(EncoderDecoder(config(position="rotary"), config(position="rotary", cross=cross), 17))
        source, target, mask = tokens(2, 9), tokens(2, 5, seed=1), torch.ones(2, 9, dtype=torch.bool)
        mask[0, 6:] = False
        close(model(source, target, attention_mask=mask)[0], model(source[:1, :6], target[:1])[0])


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: GPT(config(), 17)(torch.tensor([[3, 17]])), ValueError, "tokens must be from 0 to 16"),
        (lambda: Encoder(config(), 17)(torch.tensor([[-1, 3]])), ValueError, "(got -1 … 3)"),
        (lambda: GPT(config(), 17)(torch.zeros(1, 3)), TypeError, "must be a tensor of integers"),
        (lambda: GPT(config(), 17)(tokens(1, 21)), ValueError, "20 learned positions but got 21 nodes"),
        (lambda: Encoder(config(), 17)(tokens(1, 3), types=tokens(1, 3)), ValueError, "only in a model with num_types"),
        (
            lambda: Encoder(config(), 17)(tokens(1, 3), attention_mask=torch.ones(1, 4).bool()), ValueError,
            "of shape (1, 3): True or 1 for real nodes (got shape (1, 4))",
        ),
        (
            lambda: Encoder(config(), 17)(tokens(1, 3), attention_mask=torch.ones(1, 3)), TypeError,
            "a tensor of bool, or of integers 0 and 1, of shape (1, 3): True or 1 for real nodes (got torch.float32)",
        ),
        (
            lambda: GPT(config(), 17)(tokens(1, 3), attention_mask=torch.tensor([[2, 1, 0]])), ValueError,
            "(got 0 … 2)",
        ),
        (lambda: GPT(config(), 17)(tokens(1, 3), attention_mask=[[1, 1, 1]]), TypeError, "(got a list)"),
        (
            lambda: EncoderDecoder(config(), config(cross=True), 17)(
                tokens(1, 3), tokens(1, 4), decoder_attention_mask=torch.ones(1, 3).bool()
            ),
            ValueError, "of shape (1, 4)",
        ),
        (
            lambda: Transformer(config(cross=True), Full())(
                torch.ones(1, 2, 24), memory=torch.ones(1, 3, 24), memory_attention_mask=torch.ones(1, 2).bool()
            ),
            ValueError, "memory_attention_mask must be",
        ),
        (lambda: ViT(config(), 5, image_size=9, patch_size=2), ValueError, "(got (9, 9) and (2, 2))"),
        (lambda: ViT(config(), 5, image_size=8, patch_size=2)(torch.ones(1, 1, 8, 8)), ValueError, "(B, 3, 8, 8)"),
        (lambda: ViT(config(), 5, image_size=8, patch_size=2, pool="max"), ValueError, "pool must be one of"),
        (lambda: EncoderDecoder(config(), config(embed_dim=48), 17), ValueError, "the same embed_dim (got 24 and 48)"),
        (lambda: EncoderDecoder(config(cross=True), config(), 17), ValueError, "must have cross=False"),
        (lambda: Transformer(config(cross=True), Full())(torch.ones(1, 2, 24)), ValueError, "needs a memory"),
        (lambda: Transformer(config(), Full())(torch.ones(1, 2, 24), memory_graph=Full()), ValueError, "with a memory"),
        (
            lambda: Transformer(config(position="alibi"), Full())(torch.ones(1, 2, 24), memory=torch.ones(1, 2, 24)),
            ValueError, "has no place in position='alibi'",
        ),
        (lambda: config(score="cosine"), ValueError, "score must be one of 'dot', 'additive'"),
        (lambda: config(normalize="cubed"), ValueError, "normalize must be one of 'softmax', 'sigmoid', 'none'"),
        (lambda: Attention(8, 2, normalize="cubed"), ValueError, "normalize must be one of 'softmax', 'sigmoid'"),
        (lambda: config(norm="batch"), ValueError, "norm must be one of 'layer', 'rms', 'none'"),
        (lambda: config(scale=(1.0,)), ValueError, "one for each of 2 layers (got 1)"),
        (lambda: Rotary(8, scaling={"rope_type": "yarn"}), ValueError, "needs factor, original_max_position"),
        (lambda: Rotary(8, scaling={"rope_type": "new"}), ValueError, "must be one of default, linear, dynamic"),
        (
            lambda: DecisionTransformer(config(), state_dim=4, action_dim=2, max_time=9)(
                torch.ones(1, 3, 4), torch.ones(1, 2, 2), torch.ones(1, 3, 1), tokens(1, 3)
            ),
            ValueError, "the same batch and number of steps",
        ),
        (
            lambda: DecisionTransformer(config(), num_states=5, num_actions=3, max_time=9)(
                tokens(1, 3) % 5, tokens(1, 2) % 3, torch.ones(1, 3, 1), torch.zeros(1, 3).long()
            ),
            ValueError, "as in (B, T), (B, T), (B, T, 1), (B, T) (got (1, 3), (1, 2), (1, 3, 1), (1, 3))",
        ),
        (
            lambda: DecisionTransformer(config(), num_states=5, num_actions=3, max_time=9)(
                tokens(1, 3) % 5, torch.full((1, 3), 3), torch.ones(1, 3, 1), torch.zeros(1, 3).long()
            ),
            ValueError, "actions must be from 0 to 2",
        ),
        (
            lambda: DecisionTransformer(config(), num_states=5, action_dim=3, max_time=9)(
                torch.ones(1, 3), torch.ones(1, 3, 3), torch.ones(1, 3, 1), torch.zeros(1, 3).long()
            ),
            TypeError, "states must be a tensor of integers (got torch.float32)",
        ),
        (
            lambda: DecisionTransformer(config(), state_dim=4, max_time=9),
            ValueError, "(got action_dim=None, num_actions=None)",
        ),
        (
            lambda: DecisionTransformer(config(), state_dim=4, num_states=4, action_dim=2, max_time=9),
            ValueError, "and not both (got state_dim=4, num_states=4)",
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_an_error(make, error, message):
    with pytest.raises(error) as raised:
        make()
    assert message in str(raised.value)


def test_models_compile_whole():
    for model, given in (
        (Encoder(config(), 17), {"attention_mask": torch.ones(2, 9, dtype=torch.int64)}),
        (GPT(config(position="rotary"), 17), {}),
    ):
        compiled = torch.compile(model.eval(), fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(tokens(2, 9), **given), model(tokens(2, 9), **given))


@pytest.mark.parametrize(
    ("model", "name", "named"),
    [
        (lambda: GPT(config(), 11), "graph", "set model.transformer.graphs"),
        (lambda: GPT(config(), 11), "graphs", "set model.transformer.graphs"),
        (lambda: EncoderDecoder(config(), config(cross=True), 11), "graphs", "set model.encoder.graphs, model.decoder"),
        (lambda: Transformer(config(), Causal()), "graph", "set `graphs`"),
    ],
)
def test_a_graph_that_would_not_be_used_is_told(model, name, named):
    with pytest.raises(AttributeError, match=named):
        setattr(model(), name, Causal())


def test_too_few_learned_positions_for_an_image_are_told_when_it_is_made():
    with pytest.raises(ValueError, match="max_length must be at least 17: 16 patches and CLS"):
        ViT(config(max_length=16), 5, image_size=8, patch_size=2)


@pytest.mark.parametrize(
    ("switches", "message"),
    [
        ({"max_length": 9, "rotary_base": 5e5}, "rotary_base and rotary_scaling are of rotary positions"),
        ({"max_length": None, "embed_dim": 36, "num_heads": 4}, r"need an even head_dim \(got 9\): give head_dim, or"),
        ({"dropout": 1.5}, "dropout must be a probability"),
        ({"dropout": math.nan}, "dropout must be a probability"),
        ({"norm_eps": -1.0}, "norm_eps must be a number of at least 0"),
        ({"norm_eps": math.nan}, "norm_eps must be a number of at least 0"),
        ({"num_heads": 4, "num_kv_heads": 3, "embed_dim": 32}, "multiple of num_kv_heads"),
    ],
)
def test_impossible_switches_are_told_when_they_are_given(switches, message):
    with pytest.raises(ValueError, match=message):
        config(**switches)

"""Packed = padded on the left = padded on the right = alone: in every model, with every kind of positions."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from modules import POSITIONS, SCALINGS, config

from attngraph import Causal, Disjoint, Documents, Full, Prefix, Window
from attngraph.models import GPT, DecisionTransformer, Encoder, EncoderDecoder, ViT
from attngraph.nn import LearnedPositions, Transformer

GIVEN = ("learned", "sinusoidal", "rotary", *SCALINGS)  # positions that can be given
SWITCHES = [{}, {"num_kv_heads": 1, "norm": "rms"}, {"norm_order": "post", "embed_norm": True, "final_norm": False}]
LENGTHS = st.lists(st.integers(1, 9), min_size=1, max_size=4)
TOLERANCE = {torch.float64: (1e-12, 1e-12), torch.float32: (4e-6, 5e-5)}  # of logits, of gradients: some roundings


def shaken(model, dtype):
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.15 * torch.randn_like(parameter) + (parameter.ndim == 1))
    return model.to(dtype).eval()


def tokens(length, seed):
    return torch.randint(17, (length,), generator=torch.Generator().manual_seed(seed))


def padded(rows, side):
    """Rows of different lengths as one tensor, with something in the padding; and which of it is real."""
    longest = max(map(len, rows))
    batch, mask = torch.full((len(rows), longest), 3), torch.zeros(len(rows), longest, dtype=torch.bool)
    for number, row in enumerate(rows):
        some = slice(longest - len(row), None) if side == "left" else slice(len(row))
        batch[number, some], mask[number, some] = row, True
    return batch, mask


def restarted(lengths):
    return torch.cat([torch.arange(length) for length in lengths])


def pack_of(position, lengths):
    """Where the frequencies depend on the length, a pack has one for all its documents."""
    return [max(lengths)] * len(lengths) if position in SCALINGS else lengths


def with_gradients(model, logits):
    """Logits of all real tokens, and what a loss of them gives the parameters."""
    parameters = list(model.parameters())
    loss = (logits * torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).view_as(logits)).sum()
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    return [logits, *(torch.zeros_like(p) if g is None else g for p, g in zip(parameters, gradients, strict=True))]


def assert_same(found, right, dtype):
    of_logits, of_gradients = TOLERANCE[dtype]
    for number, (one, other) in enumerate(zip(found, right, strict=True)):
        assert (one - other).abs().max() <= (of_gradients if number else of_logits) * max(1, other.abs().max())


def positions_if_they_can_be_given(position, lengths, name="positions"):
    return {name: restarted(lengths)} if position in GIVEN else {}


@pytest.mark.parametrize("position", [*POSITIONS, *SCALINGS])
@pytest.mark.parametrize(
    ("cls", "graph"),
    [(GPT, Causal()), (GPT, Causal() & Window(2, 0)), (Encoder, Full()), (GPT, Causal() & (Window(1, 0) | Prefix(2)))],
    ids=str,
)
@given(LENGTHS, st.sampled_from(SWITCHES), st.sampled_from([torch.float32, torch.float64]))
@settings(max_examples=max(3, settings().max_examples // 20))
def test_of_a_model_of_tokens(cls, graph, position, lengths, switches, dtype):
    lengths = pack_of(position, lengths)
    model = shaken(cls(config(position, **switches), 17, graph), dtype)
    rows = [tokens(length, seed) for seed, length in enumerate(lengths)]
    right = with_gradients(model, torch.cat([model(row[None])[0] for row in rows]))
    for side in ("left", "right"):
        batch, mask = padded(rows, side)
        assert_same(with_gradients(model, model(batch, attention_mask=mask)[mask]), right, dtype)
    where = positions_if_they_can_be_given(position, lengths)
    pack = Disjoint([graph.sized(length, length) for length in lengths])  # as `graph & Documents`, and of any graph
    packed = model(torch.cat(rows)[None], pack if "Prefix" in str(graph) else graph & Documents(lengths), **where)
    assert_same(with_gradients(model, packed[0]), right, dtype)


BESIDE = ("none", *GIVEN)  # a memory beside the nodes has no place in the others


@pytest.mark.parametrize(
    ("position", "cross"), [(each, True) for each in (*POSITIONS, *SCALINGS)] + [(each, False) for each in BESIDE]
)
@given(st.lists(st.tuples(st.integers(1, 7), st.integers(1, 7)), min_size=1, max_size=3), st.sampled_from(SWITCHES))
@settings(max_examples=max(3, settings().max_examples // 20))
def test_of_an_encoder_decoder(position, cross, lengths, switches):
    sources, targets = (pack_of(position, list(each)) for each in zip(*lengths, strict=True))
    dtype = torch.float64
    model = shaken(EncoderDecoder(config(position, **switches), config(position, cross=cross, **switches), 17), dtype)
    heard, said = ([tokens(n, seed) for seed, n in enumerate(each)] for each in (sources, targets))
    alone = [model(one[None], other[None])[0] for one, other in zip(heard, said, strict=True)]
    right = with_gradients(model, torch.cat(alone))
    for side in ("left", "right"):
        (source, real), (target, mask) = padded(heard, side), padded(said, side)
        found = model(source, target, attention_mask=real, decoder_attention_mask=mask)
        assert_same(with_gradients(model, found[mask]), right, dtype)
    model.encoder.graphs, model.decoder.graphs = Documents(sources), Causal() & Documents(targets)
    model.memory_graph = Disjoint([Full().sized(n, m) for n, m in zip(targets, sources, strict=True)])
    where = positions_if_they_can_be_given(position, sources)
    where |= positions_if_they_can_be_given(position, targets, "decoder_positions")
    if not cross and position in ("rotary", *SCALINGS):
        where["memory_positions"] = restarted(sources) - torch.tensor(sources).repeat_interleave(torch.tensor(sources))
    packed = model(torch.cat(heard)[None], torch.cat(said)[None], **where)
    assert_same(with_gradients(model, packed[0]), right, dtype)


@pytest.mark.parametrize("position", [*POSITIONS, *SCALINGS])
@given(st.lists(st.integers(1, 4), min_size=1, max_size=3))
@settings(max_examples=max(3, settings().max_examples // 20))
def test_of_a_decision_transformer(position, lengths):
    model = shaken(DecisionTransformer(config(position), state_dim=4, action_dim=2, max_time=30), torch.float64)
    chance = torch.Generator().manual_seed(0)
    rows = [
        [torch.randn(length, width, generator=chance, dtype=torch.float64) for width in (4, 2, 1)]
        + [torch.randint(30, (length,), generator=chance)]
        for length in lengths
    ]
    right = with_gradients(model, torch.cat([model(*(part[None] for part in row))[0] for row in rows]))
    for side in ("left", "right"):
        _, mask = padded([torch.zeros(length) for length in lengths], side)
        batch = [torch.ones(*mask.shape, *part.shape[1:], dtype=part.dtype) for part in rows[0]]
        for number, row in enumerate(rows):
            for whole, part in zip(batch, row, strict=True):
                whole[number, mask[number]] = part
        assert_same(with_gradients(model, model(*batch, attention_mask=mask)[mask]), right, torch.float64)


@pytest.mark.parametrize("position", [*POSITIONS, *SCALINGS])
def test_a_patch_keeps_its_place_whatever_is_masked(position):
    """What is not heard, in front or elsewhere, shifts nobody: the others hear each other as in the whole image."""
    for pool in ("cls", "mean"):
        model = shaken(
            ViT(config(position, max_length=16 + (pool == "cls")), 5, image_size=8, patch_size=2, pool=pool),
            torch.float64,
        )
        images, mask = torch.randn(2, 3, 8, 8, dtype=torch.float64), torch.ones(2, 16, dtype=torch.bool)
        mask[0, :3], mask[1, 5] = False, False
        nodes = torch.ones(2, 1, dtype=torch.bool)
        real = torch.cat([nodes, mask], 1) if pool == "cls" else mask
        x = model.patches(images)
        x = torch.cat([model.cls.expand(2, 1, -1), x], 1) if pool == "cls" else x
        for row in range(2):
            if not model.transformer.takes_positions:
                continue
            where = {"positions": torch.arange(x.shape[1])[real[row]]}
            some = model.transformer(x[row, real[row]][None], Full(), **where)[0]
            right = model.head(some[0] if pool == "cls" else some.mean(0))
            assert (model(images, attention_mask=mask)[row] - right).abs().max() < 1e-10


def test_a_hole_takes_its_place():
    """As in transformers' BERT: only padding in front takes none."""
    model = shaken(Encoder(config("learned"), 17), torch.float64)
    given_tokens, mask = tokens(9, 0)[None], torch.ones(1, 9, dtype=torch.bool)
    mask[0, 4] = False
    kept = [0, 1, 2, 3, 5, 6, 7, 8]
    alone = model(given_tokens[:, kept], positions=torch.tensor(kept))
    assert_same([model(given_tokens, attention_mask=mask)[:, kept]], [alone], torch.float64)


def test_positions_are_checked_by_value():
    model = shaken(GPT(config("learned", max_length=8), 17), torch.float64)
    pack = Documents([8, 6, 7])
    assert model(tokens(21, 0)[None], pack, positions=restarted([8, 6, 7])).isfinite().all()
    assert model(torch.zeros(1, 12, dtype=torch.int64), attention_mask=torch.arange(12)[None] >= 4).isfinite().all()
    padding_has_none = torch.tensor([[0, 1, 99, -1]])
    model(torch.zeros(1, 4, dtype=torch.int64), positions=padding_has_none, attention_mask=torch.tensor([[1, 1, 0, 0]]))


@pytest.mark.parametrize(
    ("positions", "error", "message"),
    [
        (torch.tensor([0, 5, 12]), ValueError, "positions must be from 0 to 7: the model has no others (got 0 … 12)"),
        (torch.tensor([-1, 5, 2]), ValueError, "positions must be from 0 to 7: the model has no others (got -1 … 5)"),
        (
            torch.arange(2),
            ValueError,
            "positions must be a tensor of integers of shape (3,) or (1, 3) (got shape (2,))",
        ),
        (torch.zeros(4, 3).long(), ValueError, "(got shape (4, 3))"),
        (
            torch.zeros(3),
            TypeError,
            "positions must be a tensor of integers of shape (3,) or (1, 3) (got torch.float32)",
        ),
        (torch.ones(3) > 0, TypeError, "(got torch.bool)"),
        ([0, 1, 2], TypeError, "(got a list)"),
    ],
)
def test_positions_that_do_not_fit_are_an_error(positions, error, message):
    model = GPT(config("learned", max_length=8), 17)
    with pytest.raises(error) as raised:
        model(torch.zeros(1, 3, dtype=torch.int64), positions=positions)
    assert message in str(raised.value)


def test_positions_have_a_value_of_any_integer_kind():
    model = shaken(GPT(config("learned"), 17), torch.float64)
    given_tokens = tokens(5, 0)[None]
    right = model(given_tokens)
    for dtype in (torch.uint8, torch.int16, torch.int32, torch.int64):
        assert torch.equal(model(given_tokens, positions=torch.arange(5, dtype=dtype)), right)
    assert LearnedPositions(4, 8)(torch.arange(4)).shape == (4, 8)


def test_positions_are_refused_where_they_would_not_be_read():
    x, memory = torch.zeros(1, 2, 24), torch.zeros(1, 3, 24)
    for position in ("none", "alibi", "relative"):
        with pytest.raises(ValueError, match="positions can't be given"):
            Transformer(config(position), Full())(x, positions=torch.arange(2))
    for model in (Transformer(config("rotary", cross=True), Full()), Transformer(config("learned"), Full())):
        with pytest.raises(ValueError, match="memory_positions are of use only"):
            model(x, memory=memory, memory_positions=torch.arange(3))
    with pytest.raises(ValueError, match="of use only with a memory"):
        Transformer(config("rotary"), Full())(x, memory_positions=torch.arange(3))


@pytest.mark.parametrize("position", [*POSITIONS, *SCALINGS])
@pytest.mark.parametrize("shape", [(2, 0), (0, 3)], ids=str)
def test_of_nothing_comes_nothing(position, shape):
    model = GPT(config(position), 17)
    nothing = torch.zeros(shape, dtype=torch.int64)
    for mask in (None, torch.ones(shape, dtype=torch.bool), torch.zeros(shape, dtype=torch.bool)):
        assert model(nothing, attention_mask=mask).shape == (*shape, 17)

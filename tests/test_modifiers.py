"""What is done to scores and weights (dropout, transforms, normalisers, sinks), on every backend, in all gradients."""

from functools import partial

import pytest
import torch
from graphs import GRAPHS
from test_attend import BACKWARD, FORWARD, biases, tensors

from attngraph import (
    Additive,
    Causal,
    Full,
    LeakyReLU,
    PerHead,
    Prefix,
    Random,
    SoftCap,
    Temperature,
    Window,
    attend,
    plan,
)
from attngraph.kernels.contract import Dropout
from attngraph.kernels.dropout import kept, philox
from attngraph.planning import steps

NORMALIZED = ("sigmoid", *(pytest.param(name, marks=pytest.mark.slow) for name in ("none", "relu", "squared_relu")))
TRANSFORMED = {"softcap": SoftCap(0.7), "leaky_relu": LeakyReLU(0.3)}
PADDING = torch.rand(2, 70, generator=torch.Generator().manual_seed(3)) < 0.7
every = pytest.mark.parametrize("case", GRAPHS, ids=lambda case: f"{str(case.graph)[:60]}-{case.n}x{case.m}")
some = pytest.mark.parametrize(
    "graph",
    [Causal() & Window(3, 0), Window(40, 3) | Prefix(2), PerHead([Full(), Causal(-1), Prefix(2), Random(3)])],
    ids=str,
)


def results(sides, graph, backend, learned=(), **options):
    """out, lse or weights where asked for, and the gradients of a loss that looks at all of them."""
    torch.manual_seed(11)
    found = attend(*sides, graph, backend=backend, **options)
    found = found if isinstance(found, tuple) else (found,)
    chance, loss = torch.Generator().manual_seed(2), 0
    for part in found:
        weight = torch.randn(part.shape, dtype=torch.float64, generator=chance)
        loss = loss + (part.masked_fill(part == -torch.inf, 0) * weight).sum()
    inputs = [*sides, *learned]
    return *found, *torch.autograd.grad(loss + 0 * sum(side.sum() for side in inputs), inputs)


def assert_all_equal(sides, graph, backends, learned=(), **options):
    expected = results(sides, graph, "reference", learned, **options)
    outs = len(expected) - len(sides) - len(learned)
    for backend in backends:
        found = results(sides, graph, backend, learned, **options)
        for place, (one, other) in enumerate(zip(found, expected, strict=True)):
            atol = FORWARD if place < outs else BACKWARD
            torch.testing.assert_close(one, other, rtol=0, atol=atol, msg=lambda text, b=backend: f"{b}: {text}")


# ----------------------------------------------------------------------------------------------------------- dropout


def test_random_numbers_are_those_of_the_paper():
    """The known answers that come with Random123, of Philox4x32-10."""
    ones = torch.tensor(0xFFFFFFFF)
    pi = [torch.tensor(word) for word in (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)]
    answers = {
        (0, (torch.tensor(0),) * 4): (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
        (-1, (ones,) * 4): (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
        (0x299F31D0A4093822, tuple(pi)): (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    }
    for (seed, counter), words in answers.items():
        assert tuple(map(int, philox(torch.tensor(seed), counter))) == words


@every
def test_every_backend_drops_the_same_weights(case):
    sides = tensors(case.n, case.m, heads=case.graph.heads or 4)
    assert_all_equal(
        sides, case.graph, ("edges", "dense", "tiles", "rows", "auto"), dropout_p=0.4, return_lse=True,
    )  # fmt: skip


@pytest.mark.share(5)
@some
@pytest.mark.parametrize("kind", ["alibi", "edges", "dense", "dense-keys"])
@pytest.mark.parametrize("score", [None, "softcap", pytest.param("leaky_relu", marks=pytest.mark.slow)])
def test_dropout_with_biases_padding_and_transforms(graph, kind, score):
    sides = tensors(70, 70)
    bias, learned = biases(kind, graph, 70, 70)
    options = {} if score is None else {"score": TRANSFORMED[score]}
    backends = ("edges", "tiles", "rows", "auto") if score else ("edges", "dense", "tiles", "rows", "auto")
    assert_all_equal(
        sides, graph, backends, (learned,), bias=bias, dropout_p=0.3, attention_mask=PADDING, return_lse=True, **options
    )


def test_dropout_drops_independently_with_its_probability():
    """Of 2 million weights: their share, and how often neighbours in each direction are dropped together."""
    heads, n, p = torch.arange(8)[:, None, None], torch.arange(512), 0.3
    dropped = ~kept(Dropout(p, torch.tensor(123456789)), torch.tensor(1), heads, n[:, None], n).double().bool()
    dropped = dropped.double()
    deviation = (p * (1 - p) / dropped.numel()) ** 0.5
    assert abs(dropped.mean() - p) < 5 * deviation
    for axis in range(3):
        for step in (1, 4, 16, 64):
            if step < dropped.shape[axis]:
                pairs = dropped * dropped.roll(step, axis)
                assert abs(pairs.mean() - p * p) < 5 * (p * p * (1 - p * p) / dropped.numel()) ** 0.5
    other = kept(Dropout(p, torch.tensor(123456790)), torch.tensor(1), heads, n[:, None], n).double()
    assert abs(((1 - other) * dropped).mean() - p * p) < 5 * deviation


def test_the_seed_is_drawn_from_torchs_generator_or_the_one_that_is_given():
    q, k, v = tensors(20, 20)
    torch.manual_seed(4)
    first, second = attend(q, k, v, Full(), dropout_p=0.5), attend(q, k, v, Full(), dropout_p=0.5)
    torch.manual_seed(4)
    assert torch.equal(attend(q, k, v, Full(), dropout_p=0.5), first)
    assert not torch.equal(first, second)
    state = torch.get_rng_state()
    own = [attend(q, k, v, Full(), dropout_p=0.5, generator=torch.Generator().manual_seed(9)) for _ in range(2)]
    assert torch.equal(*own)
    assert torch.equal(torch.get_rng_state(), state)
    attend(q, k, v, Full())
    assert torch.equal(torch.get_rng_state(), state)


def test_activation_checkpointing_drops_the_same_weights_again():
    q, k, v = tensors(70, 70)
    graph = Causal() & Window(9, 0)

    def gradients(run):
        torch.manual_seed(6)
        return torch.autograd.grad(run(q, k, v).square().sum(), [q, k, v])

    plain = gradients(lambda *sides: attend(*sides, graph, dropout_p=0.5))
    again = gradients(
        lambda *sides: torch.utils.checkpoint.checkpoint(
            lambda *inner: attend(*inner, graph, dropout_p=0.5), *sides, use_reentrant=False
        )
    )
    for one, other in zip(plain, again, strict=True):
        assert torch.equal(one, other)


def test_plans_of_several_parts_drop_what_the_reference_drops():
    """Tiles beside rows, and heads apart."""
    graph = Window(63, 0) | Random(2)
    sides = tensors(400, 400)
    for made in (graph, PerHead([graph, Causal(), graph, Random(4)])):
        expected = results(sides, made, "reference", dropout_p=0.2)
        cut = plan(made, 400, 400, heads=4, head_dim=4, dtype=torch.float64, dropout=True)
        found = results(sides, cut, "auto", dropout_p=0.2)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=BACKWARD)


# ------------------------------------------------------------------------------------------ transforms and normalisers


@every
@pytest.mark.parametrize("score", ["softcap", pytest.param("leaky_relu", marks=pytest.mark.slow)])
def test_transformed_scores_equal_the_reference(case, score):
    sides = tensors(case.n, case.m, heads=case.graph.heads or 4)
    assert_all_equal(sides, case.graph, ("edges", "tiles", "rows", "auto"), score=TRANSFORMED[score], return_lse=True)


@every
@pytest.mark.parametrize("normalize", NORMALIZED)
def test_normalisers_equal_the_reference(case, normalize):
    sides = tensors(case.n, case.m, heads=case.graph.heads or 4)
    assert_all_equal(sides, case.graph, ("edges", "tiles", "rows", "auto"), normalize=normalize)


@pytest.mark.share(2)
@some
@pytest.mark.parametrize("normalize", NORMALIZED)
@pytest.mark.parametrize("kind", ["alibi", "edges", "dense", "dense-keys"])
def test_normalisers_with_all_that_there_is(graph, normalize, kind):
    sides = tensors(70, 70)
    bias, learned = biases(kind, graph, 70, 70)
    for score in ("dot", SoftCap(0.7)):
        options = {"score": score, "bias": bias, "dropout_p": 0.3, "attention_mask": PADDING, "return_weights": True}
        assert_all_equal(sides, graph, ("edges", "tiles", "rows", "auto"), (learned,), normalize=normalize, **options)


def test_a_bias_of_the_queries_counts_where_weights_are_no_softmax():
    sides = tensors(30, 30)
    bias = torch.randn(1, 4, 30, 1, dtype=torch.float64).requires_grad_()
    for options in ({"normalize": "sigmoid"}, {"score": SoftCap(0.5)}):
        assert_all_equal(sides, Window(5, 2), ("edges", "tiles", "rows", "auto"), (bias,), bias=bias, **options)


def learned(*shape):
    return torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5)).add_(0.5).requires_grad_()


@pytest.mark.share(4)
@some
@pytest.mark.parametrize(
    "normalize", ["softmax", "squared_relu", torch.nn.functional.silu], ids=["softmax", "squared_relu", "silu"]
)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_scores_that_no_kernel_fuses_run_in_steps(graph, normalize, dropout_p):
    sides, weight, value, mask = tensors(40, 40), learned(4, 4), learned(4), PADDING[:, :40]
    bias, values = biases("alibi", graph, 40, 40)
    scores = {
        "additive": Additive(weight),
        "gatv2": LeakyReLU(0.1, of=Additive(weight, "leaky_relu")),
        "own activation": Additive(weight, torch.nn.functional.silu),
        "temperature": Temperature(value),
        "soft cap of a temperature": SoftCap(2.0, of=Temperature(value, of="additive")),
        "a function": lambda q_i, k_j: -(q_i - k_j).square().sum(-1),
    }
    for score in scores.values():
        options = {
            "normalize": normalize,
            "dropout_p": dropout_p,
            "return_weights": True,
            "attention_mask": mask,
        }
        own = [each for each in (weight, value, values) if each.requires_grad]
        assert_all_equal(sides, graph, ("edges", "steps", "auto"), own, score=score, bias=bias, **options)


@every
def test_sinks_take_weight_and_give_no_value(case):
    """As a softmax with one more column, written out; also for queries that hear nobody."""
    heads = case.graph.heads or 4
    q, k, v = tensors(case.n, case.m, heads=heads)
    sinks = learned(heads)
    mask = case.mask.expand(heads, case.n, case.m)
    group = heads // k.shape[1]
    scores = (q @ k.repeat_interleave(group, 1).mT * 4**-0.5).masked_fill(~mask, -torch.inf)
    with_sink = torch.cat([scores, sinks[:, None, None].expand(2, heads, case.n, 1)], -1)
    expected = with_sink.softmax(-1)[..., :-1] @ v.repeat_interleave(group, 1)
    inputs = [q, k, v, sinks]
    nothing = 0 * sum(each.sum() for each in inputs)
    gradients = torch.autograd.grad(expected.square().sum() + nothing, inputs, retain_graph=True)
    for backend in ("reference", "edges", "dense", "tiles", "rows", "auto"):
        out, lse = attend(q, k, v, case.graph, sinks=sinks, backend=backend, return_lse=True)
        torch.testing.assert_close(out, expected, rtol=0, atol=FORWARD)
        torch.testing.assert_close(lse, with_sink.logsumexp(-1), rtol=0, atol=FORWARD)
        found = torch.autograd.grad(out.square().sum() + nothing, inputs, retain_graph=True)
        for one, other in zip(found, gradients, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=BACKWARD)


# ----------------------------------------------------------------------------------------------------------- weights


@some
@pytest.mark.parametrize("backend", ["auto", "tiles", "rows", "dense", "edges"])
@pytest.mark.parametrize("at_once", [steps.MOST_NUMBERS, 0])
def test_reduced_weights_are_those_of_all_weights(graph, backend, at_once, monkeypatch):
    monkeypatch.setattr(steps, "MOST_NUMBERS", at_once)
    sides, sinks = tensors(60, 60), learned(4)
    key, query = graph.edge_index(60, 60)
    options = {"sinks": sinks, "attention_mask": PADDING[:, :60], "return_weights": True, "backend": backend}
    _, weights = attend(*sides, graph, **options)

    def summed(at, values):
        return values.new_zeros(2, 4, 60).index_add(2, at, values)

    expected = {
        "mean": weights.mean(1),
        "entropy": summed(query, -torch.xlogy(weights, weights)),
        "received": summed(key, weights),
    }
    for how, whole in expected.items():
        _, found = attend(*sides, graph, reduce=how, **options)
        torch.testing.assert_close(found, whole, rtol=0, atol=FORWARD)
        if how != "entropy":  # whose derivative has no limit at a weight of 0
            gradients = [torch.autograd.grad(part.square().sum(), [*sides[:2], sinks], retain_graph=True)
                         for part in (found, whole)]  # fmt: skip
            for one, other in zip(*gradients, strict=True):
                torch.testing.assert_close(one, other, rtol=0, atol=BACKWARD)


@some
def test_all_of_it_can_be_differentiated_again(graph):
    """The gradient of a gradient, against that of the reference."""
    weight = learned(4, 4)
    for options in (
        {"dropout_p": 0.3, "score": SoftCap(0.7)},
        {"normalize": "sigmoid", "dropout_p": 0.3},
        {"score": Additive(weight)},
        {"score": LeakyReLU(0.2), "return_weights": True},
    ):
        found = []
        for backend in ("reference", "auto"):
            sides = tensors(9, 9)
            torch.manual_seed(3)
            parts = attend(*sides, graph, backend=backend, **options)
            loss = sum(part.square().sum() for part in (parts if isinstance(parts, tuple) else (parts,)))
            first = torch.autograd.grad(loss, sides, create_graph=True)
            found.append(torch.autograd.grad(sum(each.square().sum() for each in first), sides))
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


# ---------------------------------------------------------------------------------------------------- plans and errors


def test_explain_shows_what_an_option_costs():
    made = plan(Causal() & Window(128, 0), 4096, 4096, heads=8)
    text = made.explain(dropout_p=0.1, score=SoftCap(50.0))
    assert "score 'softcap', dropout" in text
    assert "times as long as this plan's own call" in text
    assert "steps" in made.explain(score=Additive(torch.ones(64)))
    assert made.explain() == made.explain(dropout_p=0.0)


def test_a_call_that_costs_far_more_says_so_once():
    from attngraph import cache

    cache.WARNED.clear()
    q, k, v = torch.randn(3, 1, 8, 1024, 64)
    graph = Causal() & Window(128, 0)

    def distance(q_i, k_j):
        return -(q_i - k_j).square().sum(-1)

    with torch.no_grad(), pytest.warns(RuntimeWarning, match="score=a function is expected to take about .* times"):
        attend(q, k, v, graph, score=distance)
    attend(q, k, v, Causal() & Window(127, 0), score=distance)  # warnings are errors here: it has been said


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"generator": 3}, TypeError, "generator must be a torch.Generator"),
        ({"sinks": torch.zeros(3)}, ValueError, "sinks must be one number for each of the 4 heads"),
        ({"sinks": torch.zeros(4), "normalize": "sigmoid"}, ValueError, "sinks need normalize='softmax'"),
        ({"sinks": [0.0] * 4}, TypeError, "sinks must be a tensor"),
        ({"reduce": "mean"}, ValueError, "return_weights=True"),
        ({"reduce": "sum", "return_weights": True}, ValueError, "mean, entropy, received"),
        ({"reduce": "entropy", "return_weights": True, "normalize": "relu"}, ValueError, "no probabilities"),
        ({"score": Temperature(torch.ones(3))}, ValueError, "one value for each of 4 heads"),
        ({"normalize": "cubed"}, ValueError, "softmax, sigmoid, none, relu, squared_relu"),
    ],
)
def test_bad_options_say_what_was_required(options, error, message):
    q, k, v = tensors(9, 9)
    with pytest.raises(error, match=message):
        attend(q, k, v, Full(), **options)


@pytest.mark.parametrize("made", [partial(SoftCap, 1.0), LeakyReLU, partial(Temperature, torch.ones(()))])
@pytest.mark.parametrize(
    ("of", "error"), [(3, TypeError), (None, TypeError), (SoftCap, TypeError), ("cosine", ValueError)]
)
def test_what_is_no_score_is_told_where_it_is_given(made, of, error):
    with pytest.raises(error, match=r"of, the score of .*, must be a function or one of dot, additive \(got "):
        made(of=of)


@pytest.mark.parametrize(
    ("option", "error"),
    [({"score": 3}, TypeError), ({"score": "cosine"}, ValueError), ({"normalize": "cubed"}, ValueError)],
)
def test_plans_know_the_same_scores_and_normalisers(option, error):
    made = plan(Causal(), 9, 9)
    for run in (partial(plan, Causal(), 9, 9), made.explain):
        with pytest.raises(error, match="must be a function or one of"):
            run(**option)


@pytest.mark.parametrize(
    "options",
    [
        {"score": SoftCap(1.0)},
        {"normalize": "sigmoid"},
        {"score": "additive"},
        {"sinks": torch.zeros(4, dtype=torch.float64)},
        {"return_weights": True, "reduce": "entropy"},
    ],
    ids=lambda options: next(iter(options)),
)
def test_transforms_of_torch_func(options):
    q, k, v = (side.detach() for side in tensors(9, 9))
    graph = Causal() & Window(3, 0)

    def last(q, k=k, v=v):
        found = attend(q, k, v, graph, **options)
        return found[-1] if isinstance(found, tuple) else found

    def loss(q):
        return last(q).square().sum()

    wanted = torch.autograd.grad(loss(learned_q := q.clone().requires_grad_()), learned_q)[0]
    torch.testing.assert_close(torch.func.grad(loss)(q), wanted, rtol=0, atol=BACKWARD)
    torch.testing.assert_close(torch.func.jvp(loss, (q,), (q,))[1], (wanted * q).sum(), rtol=0, atol=BACKWARD)
    torch.testing.assert_close(torch.vmap(last)(q, k, v), last(q), rtol=0, atol=FORWARD)


@some
@pytest.mark.parametrize("normalize", ["sigmoid", "none", "relu", "squared_relu", torch.tanh], ids=[*"snrqt"])
@pytest.mark.parametrize("how", [None, "mean", "received"])
def test_weights_without_a_common_sum(graph, normalize, how):
    """Found: the pass from the lse was taken for them too."""
    sides = tensors(30, 30)
    options = {"normalize": normalize, "return_weights": True, "reduce": how}
    expected = results(sides, graph, "edges", normalize=normalize, return_weights=True)
    found = results(sides, graph, "auto", **options)
    if how is None:
        torch.testing.assert_close(found[1], expected[1], rtol=0, atol=FORWARD)
        torch.testing.assert_close(found[2], expected[2], rtol=0, atol=BACKWARD)
    elif how == "mean":
        torch.testing.assert_close(found[1], expected[1].mean(1), rtol=0, atol=FORWARD)
    else:
        key = graph.edge_index(30, 30)[0]
        received = expected[1].new_zeros(2, 4, 30).index_add(2, key, expected[1])
        torch.testing.assert_close(found[1], received, rtol=0, atol=FORWARD)


@pytest.mark.parametrize("backend", ["auto", "tiles", "rows", "dense", "edges"])
def test_no_sink_and_no_key_have_no_nan(backend):
    q, k, v = tensors(12, 12)
    sinks = torch.tensor([-torch.inf, 0.0, 1.0, -torch.inf], dtype=torch.float64, requires_grad=True)
    options = {"sinks": sinks, "attention_mask": torch.tensor([0, 5]), "backend": backend, "return_lse": True}
    out, lse = attend(q, k, v, Window(3, 0) - Window(1, 0), **options)
    loss = out.sum() + lse.masked_fill(lse == -torch.inf, 0).sum()
    for gradient in torch.autograd.grad(loss, [q, k, v, sinks]):
        assert gradient.isfinite().all()
    assert (out[0] == 0).all()


def test_lengths_are_a_mask_of_the_first_keys():
    q, k, v = tensors(9, 9)
    mask = torch.arange(9) < torch.tensor([[4], [9]])
    for dtype in (torch.int64, torch.int32):
        found = attend(q, k, v, Full(), attention_mask=torch.tensor([4, 9], dtype=dtype))
        assert torch.equal(found, attend(q, k, v, Full(), attention_mask=mask))
    for lengths, message in (([4, 10], "from 0 to 9"), ([-1, 3], "from 0 to 9"), ([4, 9, 9], "lengths")):
        with pytest.raises((ValueError, TypeError), match=message):
            attend(q, k, v, Full(), attention_mask=torch.tensor(lengths))


@pytest.mark.parametrize("backend", ["edges", "steps", "auto"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"score": lambda q_i, k_j: q_i * k_j}, "score must give one number for each"),
        ({"score": lambda q_i, k_j: (q_i * k_j).sum(-1)[0]}, "score must give one number for each"),
        ({"score": lambda q_i, k_j: None}, "score must give one number for each"),
        ({"normalize": lambda scores: scores.sum(-1)}, "normalize must give a weight for each score"),
        ({"score": Additive(torch.ones(7))}, "the weight of Additive must be"),
        ({"score": Additive(torch.ones(4, dtype=torch.int64))}, "the weight of Additive must be"),
    ],
)
def test_what_functions_give_is_checked(options, message, backend):
    with pytest.raises(ValueError, match=message):
        attend(*tensors(9, 9), Window(3, 0), backend=backend, **options)


@pytest.mark.parametrize("backend", ["reference", "edges", "steps"])
@pytest.mark.parametrize("batch", [2, 3])
def test_a_normaliser_may_have_numbers_of_its_own_for_each_head(backend, batch):
    q, k, v = torch.randn(3, batch, 2, 6, 8, dtype=torch.float64)
    slope = torch.randn(2, 1, dtype=torch.float64)
    found = attend(q, k, v, Causal(), normalize=lambda scores: torch.tanh(scores * slope), backend=backend)
    weights = torch.tanh(q @ k.mT * 8**-0.5 * slope[..., None]).tril()
    torch.testing.assert_close(found, weights @ v, atol=1e-12, rtol=1e-12)


def test_what_a_score_costs_is_told_by_what_makes_it():
    graph = Causal() & Window(128, 0)
    made = plan(graph, 4096, heads=8)

    def times(score):
        return float(made.explain(score=score).split("expected to take ")[1].split()[0])

    assert times(Temperature(torch.ones(8))) < 4
    assert times(SoftCap(5.0, of=LeakyReLU())) < 4
    assert 4 < times(Additive(torch.ones(64))) == times(SoftCap(5.0, of="additive")) < 30
    assert times(lambda q, k: (q * k).sum(-1)) > 50

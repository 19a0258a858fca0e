"""generate, stream, speculate: each row as if alone, with a cache or without; what transformers gives."""

import copy
import itertools
import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from modules import POSITIONS, SCALINGS, config
from scipy.stats import chisquare
from test_positions import LENGTHS, SWITCHES, padded, shaken, tokens
from torch import nn

from attngraph import (
    Causal,
    Full,
    PerHead,
    Prefix,
    Random,
    Strided,
    TopK,
    Window,
    generate,
    knn_graph,
    speculate,
    stream,
)
from attngraph.generation import DraftModel, PromptLookup, Proposal
from attngraph.generation.sampling import Sampling
from attngraph.models import GPT, EncoderDecoder
from attngraph.nn import TransformerConfig

NAN, INF = float("nan"), float("inf")
PROMPT = torch.zeros(2, 3, dtype=torch.int64)
GRAPHS = [
    Causal(), Causal() & Window(2, 0), Causal() & (Window(1, 0) | Prefix(2)), Causal() & (Strided(3) | Window(1, 0)),
    [Causal() & Window(3, 0), Causal()], PerHead([Causal(), Causal() & Window(2, 0), Causal() & Strided(2)]),
]  # fmt: skip


class Fixed(nn.Module):
    """The same logits whatever it is shown."""

    def __init__(self, logits):
        super().__init__()
        self.logits, self.inner = logits, nn.Dropout()
        self.inner.eval()

    def forward(self, tokens, attention_mask=None):
        assert not self.training
        return self.logits.expand(*tokens.shape, -1)


class Said(nn.Module):
    """What each row says, token after token, after a prompt of so many."""

    def __init__(self, rows, prompt):
        super().__init__()
        self.rows, self.prompt = torch.tensor(rows), prompt

    def forward(self, tokens):
        logits = nn.functional.one_hot(self.rows, 10).float().log()
        return logits[: len(tokens), tokens.shape[1] - self.prompt, None]


def gpt(position="rotary", graph=Causal(), **switches):  # noqa: B008  a graph is a value
    return shaken(GPT(config(position, **switches), 17, graph), torch.float64)


def translator(cross=True, **switches):
    return shaken(EncoderDecoder(config(**switches), config(cross=cross, **switches), 17), torch.float64)


def prompts(*lengths):
    return padded([tokens(length, seed) for seed, length in enumerate(lengths)], "left")


# ----------------------------------------------------------------------------------------- what there has always been


def test_tokens_are_drawn_by_the_settings():
    model, prompt = gpt(), torch.stack([tokens(4, seed) for seed in range(3)])
    greedy = generate(model, prompt, 8, temperature=0)
    assert greedy.shape == (3, 12)
    assert torch.equal(greedy[:, :4], prompt)
    for step in range(4, 12):
        assert torch.equal(model(greedy[:, :step])[:, -1].argmax(-1), greedy[:, step])
    for alike in ({"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}, {"temperature": 1e-9}):
        assert torch.equal(generate(model, prompt, 8, **alike), greedy)
    runs = [generate(model, prompt, 8, generator=torch.Generator().manual_seed(1)) for _ in range(2)]
    assert torch.equal(*runs)
    assert not torch.equal(runs[0], greedy)


def test_top_p_keeps_the_smallest_set():
    logits = torch.tensor([[0.5, 0.25, 0.15, 0.1]]).log()
    for kept, given_settings in {
        2: {"top_p": 0.7}, 3: {"top_p": 0.76}, 4: {"min_p": 0.19}, 1: {"top_k": 3, "top_p": 0.5}
    }.items():  # fmt: skip
        assert (Sampling(**given_settings).kept(logits) > -INF).sum() == kept


@pytest.mark.parametrize("wrap", [copy.copy, partial(torch.compile, backend="eager")], ids=["plain", "compiled"])
def test_generate_says_which_models_it_takes(wrap):
    model = wrap(EncoderDecoder(config(), config(cross=True), 17))
    with pytest.raises(
        TypeError, match=r"got a EncoderDecoder, whose forward is .*'target'\); give the source as source="
    ):
        generate(model, torch.zeros(1, 2).long(), 3)
    for other in (wrap(nn.Embedding(17, 17)), torch.fx.symbolic_trace(nn.Embedding(17, 17))):
        assert generate(other, torch.zeros(1, 2).long(), 3).shape == (1, 5)


@pytest.mark.parametrize("position", [*POSITIONS, *SCALINGS])
@given(LENGTHS, st.sampled_from(SWITCHES), st.integers(0, 5), st.sampled_from([None, 3, 8]))
@settings(max_examples=max(3, settings().max_examples // 20))
def test_a_prompt_is_continued_as_if_it_were_alone(position, lengths, switches, new, context):
    model = shaken(GPT(config(position, **switches), 17), torch.float64)
    rows = [tokens(length, seed) for seed, length in enumerate(lengths)]
    batch, mask = padded(rows, "left")
    how = {"context": context, "temperature": 0, "repetition_penalty": 1.3, "use_cache": position not in SCALINGS}
    found = generate(model, batch, new, attention_mask=mask, **how)
    assert torch.equal(found[:, : batch.shape[1]], batch)
    for row, continued in zip(rows, found, strict=True):
        alone = generate(model, row[None], new, **how)[0]
        assert torch.equal(continued[len(continued) - len(alone) :], alone)


@pytest.mark.parametrize("temperature", [0, 1.0])
@pytest.mark.parametrize("logits", [[0.0, NAN], [INF, 0.0], [-INF, -INF], [NAN, NAN]], ids=str)
def test_no_token_comes_of_logits_that_are_none(logits, temperature):
    model = Fixed(torch.tensor(logits))
    with pytest.raises(ValueError, match=r"logits must be finite .new token 1 got"):
        generate(model, PROMPT, 2, temperature=temperature)
    assert model.training  # as it was, with what is inside
    assert not model.inner.training


def test_a_model_is_left_as_it_was():
    model = Fixed(torch.tensor([0.0, 1.0]))
    generate(model, PROMPT, 2)
    assert (model.training, model.inner.training) == (True, False)


@pytest.mark.parametrize("temperature", [1e-40, 1e-6, 1e30])
def test_any_temperature_gives_tokens(temperature):
    found = generate(Fixed(torch.tensor([0.0, 50.0, -INF])), PROMPT, 4, temperature=temperature)
    assert (found[:, 3:] < 2).all()
    assert temperature > 1 or (found[:, 3:] == 1).all()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_tokens_of_any_integer_kind_are_continued(dtype):
    found = generate(Fixed(torch.arange(400.0)), PROMPT.to(dtype), 1, temperature=0)
    assert (found[:, -1] == 399).all()


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (TypeError, "tokens must be a tensor of integers (got torch.float32)", {"tokens": torch.zeros(1, 2)}),
        (TypeError, "tokens must be a tensor (got a list)", {"tokens": [[1, 2]]}),
        (TypeError, "(got torch.bool)", {"tokens": torch.ones(1, 2) > 0}),
        (ValueError, "at least one token each (got (1, 0))", {"tokens": torch.zeros(1, 0).long()}),
        (ValueError, "at least one token each (got (3,))", {"tokens": torch.zeros(3).long()}),
        (ValueError, "max_new_tokens must be 0 or more (got -1)", {"max_new_tokens": -1}),
        (TypeError, "max_new_tokens must be an int (got 1.5)", {"max_new_tokens": 1.5}),
        (ValueError, "context must be 1 or more (got 0)", {"context": 0}),
        (ValueError, "context must be 1 or more (got -3)", {"context": -3}),
        (ValueError, "temperature must be 0 or more (got -1.0)", {"temperature": -1.0}),
        (ValueError, "top_k must be 1 or more (got 0)", {"top_k": 0}),
        (ValueError, "top_p must be a probability above 0 (got 1.5)", {"top_p": 1.5}),
        (ValueError, "min_p must be a probability (got -0.1)", {"min_p": -0.1}),
        (ValueError, "repetition_penalty must be above 0 (got 0.0)", {"repetition_penalty": 0.0}),
        (
            ValueError,
            "stop must be a token, or a list of tokens and of lists of tokens, which are 0",
            {"stop": [3, -1]},
        ),
        (ValueError, "each of at least one (got an empty one)", {"stop": [3, []]}),
        (TypeError, "lists of tokens (got 'x' in it)", {"stop": ["x"]}),
        (TypeError, "source is of models with encode and decode (got a GPT)", {"source": PROMPT}),
        (ValueError, "source_attention_mask is of use only with a source", {"source_attention_mask": PROMPT}),
        (ValueError, "temperature must be 0 or more (got nan)", {"temperature": NAN}),
        (ValueError, "temperature must be 0 or more (got inf)", {"temperature": INF}),
        (ValueError, "top_p must be a probability above 0 (got nan)", {"top_p": NAN}),
        (TypeError, "top_k must be an int or None (got 2.0)", {"top_k": 2.0}),
        (ValueError, "pad prompts on the left", {"attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]])}),
        (ValueError, "of shape (2, 3)", {"attention_mask": torch.ones(2, 4).long()}),
        (ValueError, "8 learned positions, and would be shown 9 tokens: context=8 shows", {"max_new_tokens": 7}),
    ],
)
def test_what_can_not_be_continued_is_told_at_once(error, message, options):
    model = GPT(TransformerConfig(embed_dim=8, num_layers=1, num_heads=1, max_length=8), 17)
    for function in (generate, stream):  # at once, not when the first token is asked for
        with pytest.raises(error) as raised:
            function(**{"model": model, "tokens": PROMPT, "max_new_tokens": 2, **options})
        assert message in str(raised.value)


@pytest.mark.parametrize(
    ("message", "options"),
    [
        ("num_beams must be 1 or more (got 0)", {"num_beams": 0}),
        ("num_return_sequences must be at most num_beams=2 (got 3)", {"num_beams": 2, "num_return_sequences": 3}),
        ("length_penalty must be a finite number (got nan)", {"length_penalty": NAN}),
        ("top_k, min_p can't be given with num_beams=2", {"num_beams": 2, "top_k": 2, "min_p": 0.1}),
        ("temperature can't be given with num_beams=2", {"num_beams": 2, "temperature": 0.5}),
    ],
)
def test_beams_that_can_not_be_are_told(message, options):
    with pytest.raises(ValueError) as raised:
        generate(gpt(), PROMPT, 2, **options)
    assert message in str(raised.value)


def test_as_many_tokens_as_there_are_positions():
    """The last token that is sampled is shown to nobody; padding in front takes no places."""
    model = GPT(TransformerConfig(embed_dim=8, num_layers=1, num_heads=1, max_length=8), 17)
    assert generate(model, PROMPT, 6).shape == (2, 9)
    mask = torch.tensor([[0, 0, 1], [0, 1, 1]])
    assert generate(model, PROMPT, 7, attention_mask=mask).shape == (2, 10)
    assert generate(model, PROMPT, 12, context=8).shape == (2, 15)


def test_padding_has_not_been_said():
    model, prompt = Fixed(torch.tensor([1.0, 1.1, -9.0])), torch.tensor([[1, 0], [0, 1], [2, 2]])
    mask = torch.tensor([[0, 1], [0, 1], [1, 1]])
    for num_beams in (1, 2):
        how = {"attention_mask": mask, "temperature": 0, "repetition_penalty": 4.0, "num_beams": num_beams}
        assert generate(model, prompt, 1, **how)[:, 2].tolist() == [1, 0, 1]


# -------------------------------------------------------------------------------------------------- with a cache


@pytest.mark.share(5)
@pytest.mark.parametrize("context", [None, 7])
@pytest.mark.parametrize("graph", GRAPHS, ids=str)
@pytest.mark.parametrize("position", POSITIONS)
def test_a_cache_gives_what_all_anew_gives(position, graph, context):
    model, (batch, mask) = gpt(position, graph), prompts(5, 2, 4)
    for options in ({"temperature": 0}, {"generator": 3}, {"num_beams": 3, "stop": [2, [3, 3]]}):
        found = []
        for use_cache in (True, False):
            given_options = dict(options)
            if "generator" in options:
                given_options["generator"] = torch.Generator().manual_seed(3)
            found.append(
                generate(
                    model, batch, 9, attention_mask=mask, context=context, use_cache=use_cache, return_scores=True,
                    repetition_penalty=1.2, **given_options,
                )
            )  # fmt: skip
        assert torch.equal(found[0].tokens, found[1].tokens)
        torch.testing.assert_close(found[0].scores, found[1].scores)


def test_a_step_computes_the_new_token_alone():
    model, shown, scored = gpt(), [], []
    model.embedding.register_forward_hook(lambda module, args, out: shown.append(args[0].shape[1]))
    model.head.register_forward_hook(lambda module, args, out: scored.append(args[0].shape[1]))
    generate(model, PROMPT, 4)
    assert (shown, scored) == ([3, 1, 1, 1], [1] * 4)
    shown.clear(), scored.clear()
    generate(model, PROMPT, 4, context=4)
    assert (shown, scored) == ([3, 1, 4, 4], [1] * 4)
    shown.clear(), scored.clear()
    generate(model, PROMPT, 4, use_cache=False)
    assert (shown, scored) == ([3, 4, 5, 6], [1] * 4)


@pytest.mark.parametrize(
    ("graph", "message"),
    [(Full(), "must be causal"), (TopK(2) & Causal(), "use_cache=False"), (partial(knn_graph, k=1), "use_cache=False")],
    ids=["full", "chosen", "computed"],
)
def test_a_model_that_no_cache_serves_is_told_at_once(graph, message):
    model = GPT(config(), 17, graph).eval()
    for function in (generate, stream):
        with pytest.raises(ValueError, match=message):
            function(model, PROMPT, 2)
    assert generate(model, PROMPT, 2, use_cache=False).shape == (2, 5)


def test_a_graph_of_a_size_serves_as_many_tokens():
    model = gpt(graph=Causal() & Random(2).sized(8, 8))
    assert generate(model, PROMPT, 6).shape == (2, 9)
    with pytest.raises(ValueError, match="at least max_length=9 nodes"):
        generate(model, PROMPT, 7)


def test_a_compiled_model_is_continued():
    model = gpt()
    right = generate(model, PROMPT, 4, temperature=0)
    compiled = torch.compile(model, backend="eager")
    for use_cache in (True, False):
        assert torch.equal(generate(compiled, PROMPT, 4, temperature=0, use_cache=use_cache), right)


# -------------------------------------------------------------------------------------------------------- the end


def test_a_row_ends_and_is_filled_with_its_last_token():
    rows = [[1, 2, 3, 4, 5, 6], [2, 1, 3, 3, 4, 5], [4, 4, 4, 4, 1, 2]]
    model, prompt = Said(rows, 2), torch.full((3, 2), 9)
    ended = {
        3: [[1, 2, 3, 3, 3, 3], [2, 1, 3, 3, 3, 3], [4, 4, 4, 4, 1, 2]],
        (1, 4): [[1], [2, 1], [4]],
        ((1, 2), 3): [[1, 2, 2, 2, 2, 2], [2, 1, 3, 3, 3, 3], [4, 4, 4, 4, 1, 2]],
        ((9, 1),): rows,  # of new tokens alone
        (): rows,
        7: rows,
    }
    for stop, texts in ended.items():
        longest = max(map(len, texts))
        texts = torch.tensor([text + text[-1:] * (longest - len(text)) for text in texts])
        given_stop = stop if isinstance(stop, int) else [each if isinstance(each, int) else list(each) for each in stop]
        found, scores = generate(model, prompt, 6, temperature=0, stop=given_stop, return_scores=True)
        assert torch.equal(found[:, 2:], texts)
        assert torch.equal(
            torch.cat([prompt, torch.stack(list(stream(model, prompt, 6, stop=given_stop)), 1)], 1), found
        )
        assert not scores.any()


def test_what_a_row_gives_after_its_end_matters_to_nobody():
    class Ends(nn.Module):
        def forward(self, tokens):
            logits = torch.zeros(2, 1, 5)
            logits[0] = NAN if tokens.shape[1] > 3 else torch.tensor([0, 0, 9.0, 0, 0])
            logits[1, 0, 3] = 9
            return logits

    found, scores = generate(Ends(), PROMPT, 4, temperature=0, stop=2, return_scores=True)
    assert found[:, 3:].tolist() == [[2] * 4, [3] * 4]
    assert scores[0, 0] < 0
    assert not scores[0, 1:].any()
    with pytest.raises(ValueError, match="new token 2 got"):
        generate(Ends(), PROMPT, 4, temperature=0)


# --------------------------------------------------------------------------------------------------------- a stream


def test_a_stream_gives_each_token_when_it_is_made():
    model, batch = gpt(dropout=0.3).train(), PROMPT
    model.transformer.layers[0].eval()
    before = [module.training for module in model.modules()]
    calls = []
    model.embedding.register_forward_hook(lambda *_: calls.append(1))
    given_options = {"temperature": 0.7, "stop": 4}
    right = generate(model, batch, 6, generator=torch.Generator().manual_seed(1), **given_options)
    calls.clear()
    new = stream(model, batch, 6, generator=torch.Generator().manual_seed(1), **given_options)
    assert not calls
    for step, token in enumerate(new):
        assert torch.equal(token, right[:, 3 + step])
        assert len(calls) == step + 1
        assert torch.is_grad_enabled()
        assert [module.training for module in model.modules()] == before
    assert step == right.shape[1] - 4


def test_two_streams_of_a_model_do_not_meet():
    model = gpt()
    one, other = (stream(model, tokens(4, seed)[None], 6, temperature=0) for seed in (1, 2))
    both = list(zip(one, other, strict=True))
    for number, seed in enumerate((1, 2)):
        right = generate(model, tokens(4, seed)[None], 6, temperature=0)[0, 4:]
        assert torch.equal(torch.cat([each[number] for each in both]), right)


# ------------------------------------------------------------------------------------------------------------ chances


@pytest.mark.parametrize(
    "how",
    [{}, {"temperature": 0.7, "top_k": 5}, {"top_p": 0.8, "min_p": 0.1}, {"repetition_penalty": 1.5, "top_k": 9}],
    ids=str,
)
def test_tokens_come_as_often_as_they_should(how):
    """Pairs of tokens, drawn 8,000 times, by their exact distribution; and the scores are its logarithms."""
    model, prompt, draws = gpt(), tokens(4, 0)[None], 8000
    found, scores = generate(
        model, prompt.expand(draws, -1), 2, generator=torch.Generator().manual_seed(0), return_scores=True, **how
    )
    first = exact(model, prompt, how)[0]
    second = exact(model, torch.cat([prompt.expand(17, -1), torch.arange(17)[:, None]], 1), how)
    joint = first[:, None] * second
    pairs = found[:, 4] * 17 + found[:, 5]
    counts = pairs.bincount(minlength=289).double()
    expected = joint.flatten() * draws
    assert not counts[expected == 0].any()
    often = expected > 5
    counts = torch.cat([counts[often], counts[~often].sum()[None]])
    expected = torch.cat([expected[often], expected[~often].sum()[None]])
    if expected[-1] == 0:
        counts, expected = counts[:-1], expected[:-1]
    assert chisquare(counts, expected * counts.sum() / expected.sum()).pvalue > 1e-3
    torch.testing.assert_close(scores.double().sum(1), joint.flatten()[pairs].log(), atol=1e-4, rtol=1e-4)


def exact(model, texts, how):
    """The distribution of the next token, by its definition, one token after the other."""
    found = []
    for text in texts:
        with torch.no_grad():
            logits = model(text[None])[0, -1].float()
        penalty = how.get("repetition_penalty", 1.0)
        for token in set(text.tolist()):
            logits[token] = logits[token] * penalty if logits[token] < 0 else logits[token] / penalty
        logits = logits / how.get("temperature", 1.0)
        order = logits.argsort(descending=True).tolist()[: how.get("top_k", 17)]
        weights = {token: math.exp(logits[token]) for token in order}
        total, before, kept = sum(weights.values()), 0.0, {}
        for token, weight in weights.items():
            if before < how.get("top_p", 1.0) * total and weight >= how.get("min_p", 0.0) * weights[order[0]]:
                kept[token] = weight
            before += weight
        found.append(torch.tensor([kept.get(token, 0.0) / sum(kept.values()) for token in range(17)]))
    return torch.stack(found).double()


def test_the_distribution_is_that_of_transformers():
    process = pytest.importorskip("transformers.generation.logits_process")
    torch.manual_seed(0)
    logits, seen = 3 * torch.randn(6, 40), torch.randint(40, (6, 8))
    for temperature, top_k, top_p, min_p, penalty in itertools.product(
        (0.6, 1.0, 1.8), (None, 1, 12), (None, 0.3, 0.9), (None, 0.02, 0.4), (None, 1.4, 0.7)
    ):
        steps = [
            process.RepetitionPenaltyLogitsProcessor(penalty) if penalty else None,
            process.TemperatureLogitsWarper(temperature),
            process.TopKLogitsWarper(top_k) if top_k else None,
            process.TopPLogitsWarper(top_p) if top_p else None,
            process.MinPLogitsWarper(min_p) if min_p else None,
        ]
        theirs = process.LogitsProcessorList([each for each in steps if each is not None])(seen, logits.clone())
        sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=penalty)
        mask = torch.zeros(6, 40, dtype=torch.bool).scatter_(1, seen, True)
        torch.testing.assert_close(sampling.kept(sampling.penalized(logits, mask)).softmax(-1), theirs.softmax(-1))


def test_scores_of_the_likeliest_are_the_models():
    model, (batch, mask) = gpt(), prompts(5, 3)
    found, scores = generate(model, batch, 6, attention_mask=mask, temperature=0, return_scores=True)
    whole = model(found, attention_mask=nn.functional.pad(mask, (0, 6), value=True)).log_softmax(-1)
    right = whole[:, 4:-1].gather(2, found[:, 5:, None])[..., 0]
    torch.testing.assert_close(scores.double(), right, atol=1e-5, rtol=1e-5)
    assert generate(model, batch, 0, attention_mask=mask, return_scores=True).scores.shape == (2, 0)


# ------------------------------------------------------------------------------------------------------------- beams


@pytest.mark.parametrize("use_cache", [True, False])
def test_enough_beams_find_the_likeliest_text(use_cache):
    model = shaken(GPT(config(), 4), torch.float64)
    prompt = torch.tensor([[0, 1], [3, 2]])
    found, scores = generate(
        model, prompt, 4, num_beams=64, num_return_sequences=3, length_penalty=0.0, use_cache=use_cache,
        return_scores=True,
    )  # fmt: skip
    every = torch.cartesian_prod(*[torch.arange(4)] * 4)
    for row in range(2):
        texts = torch.cat([prompt[row].expand(256, -1), every], 1)
        likely = model(texts)[:, 1:-1].log_softmax(-1).gather(2, texts[:, 2:, None])[..., 0].sum(1)
        best = likely.topk(3)
        assert torch.equal(found[3 * row : 3 * row + 3], texts[best.indices])
        torch.testing.assert_close(scores[3 * row : 3 * row + 3].double(), best.values, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("stop", [None, 3, [3, [5, 5], [2, 7, 1]], list(range(12))], ids=str)
@pytest.mark.parametrize("length_penalty", [1.0, 3.0, -0.5])
def test_beams_of_a_row_are_its_own(stop, length_penalty):
    model, (batch, mask) = gpt("learned"), prompts(6, 2, 4)
    how = {
        "num_beams": 3, "stop": stop, "length_penalty": length_penalty, "repetition_penalty": 1.3,
        "num_return_sequences": 2, "return_scores": True,
    }  # fmt: skip
    found, scores = generate(model, batch, 7, attention_mask=mask, **how)
    for row, length in enumerate((6, 2, 4)):
        alone, own = generate(model, batch[row : row + 1, 6 - length :], 7, **how)
        both = slice(2 * row, 2 * row + 2)
        assert torch.equal(found[both, 6 - length : 6 - length + alone.shape[1]], alone)
        assert (found[both, 6 - length + alone.shape[1] :] == alone[:, -1:]).all()
        torch.testing.assert_close(scores[both], own)


def test_logits_that_are_none_end_a_search():
    class Breaks(nn.Module):
        def forward(self, tokens):
            return torch.full((*tokens.shape, 5), NAN if tokens.shape[1] > 4 else 0.0)

    with pytest.raises(ValueError, match="new token 3 got"):
        generate(Breaks(), PROMPT, 4, num_beams=2)


@pytest.mark.parametrize("num_beams", [1, 3])
def test_of_no_rows_come_none(num_beams):
    assert generate(gpt(), PROMPT[:0], 3, num_beams=num_beams).shape[0] == 0


# ---------------------------------------------------------------------------------------------------- transformers


DECODERS = [("gpt2", 4), ("llama", 8), ("qwen2", 3), ("t5", 3)]
CASES = [(family, number) for family, count in DECODERS for number in range(count)]
EVERY = [pytest.param(*case, marks=[] if case[1] < 2 else pytest.mark.slow) for case in CASES]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Their model and ours, by family and number; made once."""
    import test_hf

    from attngraph import hf

    made = {}

    def load(family, number):
        if (family, number) not in made:
            path = tmp_path_factory.mktemp(family)
            theirs = test_hf.theirs(family, number, path)
            theirs.generation_config.eos_token_id = None
            made[family, number] = theirs, hf.load(path)
        return made[family, number]

    return load


def both(theirs, ours, translates=False, *, count, num_beams=1, stop=None, cached=True, **how):
    """What either gives, with what follows the end cut off, and the scores of beams."""
    prompt = torch.randint(2, 37, (3, 5), generator=torch.Generator().manual_seed(3))
    right = theirs.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=count, do_sample=False, num_beams=num_beams,
        eos_token_id=stop, pad_token_id=0, use_cache=cached and not translates, return_dict_in_generate=True,
        output_scores=True, **({"decoder_start_token_id": 0} if translates else {}), **how,
    )  # fmt: skip
    how |= {"stop": stop, "num_beams": num_beams, "return_scores": True, "use_cache": cached, "temperature": 0}
    if not translates:
        found, begin = generate(ours, prompt, count, **how), 5
    else:
        found, begin = generate(ours, torch.zeros(3, 1, dtype=torch.int64), count, source=prompt, **how), 1
    ends = {stop} if isinstance(stop, int) else set(stop or ())

    def cut(row):
        return row[: next((place + 1 for place, token in enumerate(row) if token in ends), None)]

    texts = [[cut(row) for row in each[:, begin:].tolist()] for each in (found.tokens, right.sequences)]
    return texts, (found.scores, right.sequences_scores) if num_beams > 1 else None


@pytest.mark.parametrize(("family", "number"), EVERY)
def test_the_likeliest_tokens_are_those_of_transformers(checkpoint, family, number):
    theirs, ours = checkpoint(family, number)
    cached = (getattr(theirs.config, "rope_parameters", None) or {}).get("rope_type") not in ("dynamic", "longrope")
    for how in ({}, {"stop": [7, 9, 11]}, {"repetition_penalty": 1.3}):
        (found, right), _ = both(theirs, ours, family == "t5", count=10, cached=cached, **how)
        assert found == right


@pytest.mark.parametrize("num_beams", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("family", "number"), [("gpt2", 0), ("llama", 0), ("qwen2", 2), ("t5", 0), ("t5", 1)])
def test_beams_are_those_of_transformers(checkpoint, family, number, num_beams):
    theirs, ours = checkpoint(family, number)
    for how in (
        {}, {"stop": 7}, {"stop": [7, 9, 11], "length_penalty": 0.0}, {"stop": [7, 9, 11], "length_penalty": 2.0},
        {"stop": [7, 9], "repetition_penalty": 1.3},
    ):  # fmt: skip
        (found, right), scores = both(theirs, ours, family == "t5", count=8, num_beams=num_beams, **how)
        assert found == right
        torch.testing.assert_close(*scores, atol=2e-3, rtol=1e-3)


# -------------------------------------------------------------------------------------------------- encoder, decoder


@pytest.mark.parametrize("cross", [True, False])
def test_a_source_is_encoded_once_and_padding_is_not_heard(cross):
    model, (source, real), (target, mask) = translator(cross), prompts(7, 3, 5), prompts(2, 1, 2)
    encoded = []
    model.encoder.register_forward_hook(lambda *_: encoded.append(1))
    for how in ({"temperature": 0}, {"num_beams": 3, "stop": 4}):
        options = {"source": source, "source_attention_mask": real, "attention_mask": mask, **how}
        encoded.clear()
        found = generate(model, target, 6, **options)
        assert len(encoded) == 1
        assert torch.equal(found, generate(model, target, 6, use_cache=False, **options))
        for row, (heard, said) in enumerate(zip((7, 3, 5), (2, 1, 2), strict=True)):
            alone = generate(
                model, target[row : row + 1, 2 - said :], 6, source=source[row : row + 1, 7 - heard :], **how
            )
            assert torch.equal(found[row, 2 - said : 2 - said + alone.shape[1]], alone[0])


def test_a_source_of_another_batch_is_told():
    with pytest.raises(ValueError, match=r"source must have the batch of tokens, 2 \(got 3\)"):
        generate(translator(), PROMPT, 2, source=tokens(6, 0).view(3, 2))


# ------------------------------------------------------------------------------------------------------- speculation


REPEATED = torch.tensor([[1, 2, 3, 4, 5] * 4])


@pytest.mark.share(3)
@pytest.mark.parametrize("graph", GRAPHS, ids=str)
@pytest.mark.parametrize("position", ["rotary", "alibi", "relative", "none"])
def test_speculation_is_greedy(graph, position):
    model, small = gpt(position, graph), gpt(position, num_layers=1)
    wrong = lambda text, depth: Proposal([3, 4, 5, 6], [-1, -1, 0, 1]) if depth > 1 else Proposal([], [])  # noqa: E731
    for count in (1, 2, 30):
        right = generate(model, REPEATED[:, :7], count, temperature=0)
        for draft in (None, small, model, wrong, DraftModel(model, 40, branches=(2, 2))):
            assert torch.equal(speculate(model, REPEATED[:, :7], count, draft=draft), right)


def test_a_good_proposal_saves_passes():
    model, passes = gpt(), []
    right = generate(model, REPEATED, 40, temperature=0)
    hook = model.register_forward_hook(lambda *_: passes.append(1))
    assert torch.equal(speculate(model, REPEATED, 40, draft=lambda text, depth: _path(right, text, depth)), right)
    assert len(passes) == math.ceil(39 / 6) + 1
    hook.remove()
    assert torch.equal(speculate(model, REPEATED, 40, draft=DraftModel(copy.deepcopy(model), 60, (1,) * 5)), right)


def _path(right, text, depth):
    """The next five tokens, as they will be."""
    coming = right[0, len(text) : len(text) + min(5, depth)].tolist()
    return Proposal(coming, range(-1, len(coming) - 1))


def test_a_lookup_goes_on_as_the_text_did():
    lookup = PromptLookup(length=4, ngram=2)
    for text, proposed in {
        (7, 1, 2, 3, 9, 1, 2): [3, 9, 1, 2], (1, 2, 1, 2): [1, 2, 1, 2], (5, 5): [5, 5, 5, 5], (1, 2, 3): [], (1,): [],
        (4, 2, 8, 1, 2, 9, 2): [9, 2, 9, 2],
    }.items():  # fmt: skip
        assert lookup(torch.tensor(text), 10).tokens == proposed
        assert lookup(torch.tensor(text), 3).tokens == proposed[:3]


def test_speculation_ends_where_generate_does():
    model = gpt()
    whole = generate(model, REPEATED, 30, temperature=0)[0, 20:].tolist()
    for stop in ([whole[9]], [whole[4:7]], [[16, 16, 16, 16]]):
        right = generate(model, REPEATED, 30, temperature=0, stop=stop)
        for draft in (None, model):
            assert torch.equal(speculate(model, REPEATED, 30, stop=stop, draft=draft), right)


def test_what_can_not_be_speculated_is_told():
    model = gpt()
    for message, options in {
        "must be one text, of shape (1, N) (got (2, 3))": {"tokens": PROMPT},
        "max_new_tokens must be 0 or more": {"max_new_tokens": -1},
        "at least one token each": {"tokens": PROMPT[:1, :0]},
        "must be causal": {"model": gpt(graph=Full())},
    }.items():
        with pytest.raises(ValueError) as error:
            speculate(**{"model": model, "tokens": REPEATED, "max_new_tokens": 4, **options})
        assert message in str(error.value)
    assert torch.equal(speculate(model, REPEATED, 0), REPEATED)


def test_what_was_found_by_trying():
    """Fewer texts than asked for, tiny temperatures, drafts of other texts, what is counted in an error."""
    torch.manual_seed(0)
    model = GPT(TransformerConfig(embed_dim=16, num_layers=1, num_heads=2), 5).eval()
    prompt = torch.tensor([[1, 2, 3]])
    with pytest.raises(ValueError, match="at most the 5 texts that were found"):
        generate(model, prompt, 1, num_beams=6, num_return_sequences=6)
    assert generate(model, prompt, 0, num_beams=2, num_return_sequences=2).shape == (2, 3)
    found = generate(model, prompt, 4, temperature=1e-46)
    assert torch.equal(found, generate(model, prompt, 4, temperature=0))
    draft = DraftModel(model, max_length=40, branches=(9, 2))
    for text in (torch.arange(5), torch.arange(4), torch.arange(4).flip(0), torch.arange(7) % 5):
        alone = DraftModel(model, max_length=40, branches=(9, 2))
        assert draft(text, 2) == alone(text, 2)
    with pytest.raises(TypeError, match="draft must return a Proposal"):
        speculate(model, prompt, 9, draft=lambda text, depth: None)
    calls = []

    def broken(logits):
        calls.append(1)
        return logits if len(calls) < 2 else logits * torch.nan

    model.head.register_forward_hook(lambda *given: broken(given[-1]))
    with pytest.raises(ValueError, match="new token 2"):
        speculate(model, prompt, 9)

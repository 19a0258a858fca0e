"""unmask, drafts: what was given stays, masks go, draws are those of the model; the same seed writes the same text."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from modules import config
from scipy.stats import chisquare
from torch import nn

from attngraph import Causal, Full, Window, generate, unmask
from attngraph.generation import drafts
from attngraph.models import GPT, Encoder

MASK = 17  # beyond the tokens that are texts
NAN, INF = float("nan"), float("inf")


def model(graph=Full(), vocab_size=MASK + 1, dropout=0.0):  # noqa: B008  a graph is a value
    torch.manual_seed(0)
    made = GPT(config(dropout=dropout), vocab_size, graph)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter))
    return made


MODEL = model()


class Fixed(nn.Module):
    """The same logits of every token, whatever it is shown."""

    def __init__(self, logits):
        super().__init__()
        self.logits, self.calls = torch.tensor(logits), []

    def forward(self, tokens):
        self.calls.append(tokens.clone())
        return self.logits.expand(*tokens.shape, -1)


class Pairs(nn.Module):
    """The exact conditionals of two tokens of three values, whose joint probability is a table; 3 is the mask."""

    def __init__(self):
        super().__init__()
        table = torch.tensor([[8.0, 1.0, 1.0], [1.0, 5.0, 0.5], [0.5, 1.0, 9.0]])
        self.table = table / table.sum()

    def forward(self, tokens):
        rows = []
        for first, second in tokens.tolist():
            left = self.table.sum(1) if second == 3 else self.table[:, second]
            right = self.table.sum(0) if first == 3 else self.table[first]
            rows.append(torch.stack([left, right]).log())
        return torch.stack(rows)


OPTIONS = st.fixed_dictionaries({
    "steps": st.none() | st.integers(1, 12),
    "order": st.sampled_from(["random", "confidence"]),
    "remask": st.sampled_from([0.0, 0.3, 0.99]),
    "temperature": st.sampled_from([0.0, 0.7, 1.0]),
    "top_k": st.none() | st.just(3),
    "top_p": st.none() | st.just(0.8),
})  # fmt: skip


@given(st.integers(0, 3), st.integers(1, 9), st.floats(0, 1), OPTIONS, st.integers(0, 2**20))
@settings(max_examples=max(30, settings().max_examples // 2))
def test_what_is_given_stays_and_masks_go(batch, length, share, options, seed):
    """In every draft; what is kept only grows without remasking, and by the steps' schedule."""
    chance = torch.Generator().manual_seed(seed)
    tokens = torch.randint(MASK, (batch, length), generator=chance)
    masked = torch.rand(batch, length, generator=chance) < share
    tokens = tokens.masked_fill(masked, MASK)
    before = tokens.clone()
    made = list(drafts(MODEL, tokens, MASK, **options, generator=torch.Generator().manual_seed(seed)))
    found = unmask(MODEL, tokens, MASK, **options, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(tokens, before)
    assert torch.equal(found, made[-1].tokens if made else tokens)
    assert bool(made) == bool(masked.any())
    kept = ~masked
    for step, draft in enumerate(made, 1):
        assert torch.equal(draft.tokens[~masked], tokens[~masked])
        assert draft.tokens.min() >= 0
        assert draft.tokens.max() < MASK
        assert torch.equal((draft.kept & masked).sum(1), masked.sum(1) * step // len(made))
        assert options["remask"] or not (kept & ~draft.kept).any()
        kept = draft.kept
    assert kept.all()


@pytest.mark.parametrize("order", ["random", "confidence"])
@pytest.mark.parametrize("remask", [0.0, 0.5])
def test_each_draft_builds_on_what_was_kept_of_the_last(order, remask):
    """The model is shown what was kept, or less of it, and nothing else of the draft."""
    fixed = Fixed([0.0, 0.5, 1.0, 2.0])
    tokens = torch.full((2, 21), 9)
    tokens[:, 1] = 1
    made = list(drafts(fixed, tokens, 9, order=order, remask=remask, generator=torch.Generator().manual_seed(0)))
    assert len(made) == len(fixed.calls) == 20
    assert torch.equal(fixed.calls[0], tokens)
    taken_back = 0
    for draft, seen in zip(made, fixed.calls[1:], strict=False):
        shown = seen != 9
        assert not (shown & ~draft.kept).any()
        assert torch.equal(seen[shown], draft.tokens[shown])
        taken_back += int((draft.kept & ~shown).sum())
    assert (taken_back > 0) == (remask > 0)


def test_the_surest_are_kept_first():
    """By the probability of what was drawn, among the masked."""
    logits = torch.randn(1, 6, 5, generator=torch.Generator().manual_seed(0))

    class Of(nn.Module):
        def forward(self, tokens):
            return logits.expand(len(tokens), -1, -1)

    made = list(drafts(Of(), torch.full((2, 6), 5), 5, order="confidence", temperature=0))
    sure = logits[0].softmax(-1).amax(-1).argsort(descending=True).tolist()
    for step, draft in enumerate(made, 1):
        assert torch.equal(draft.tokens, logits.argmax(-1).expand(2, -1))
        assert set(draft.kept[0].nonzero().flatten().tolist()) == set(sure[:step])


def test_one_token_a_step_draws_from_the_joint_distribution():
    """The conditionals are exact, so the texts are; in a single step, each token has its marginal alone."""
    exact, count = Pairs(), 6000
    tokens, values = torch.full((count, 2), 3), range(3)
    for steps, expected in (
        (None, exact.table),
        (2, exact.table),
        (1, exact.table.sum(1, keepdim=True) * exact.table.sum(0, keepdim=True)),
    ):
        found = unmask(exact, tokens, 3, steps=steps, generator=torch.Generator().manual_seed(1))
        counts = [int((found == torch.tensor(pair)).all(1).sum()) for pair in itertools.product(values, values)]
        assert chisquare(counts, (count * expected).flatten().tolist(), sum_check=False).pvalue > 1e-3
    wrong = unmask(exact, tokens, 3, order="confidence", generator=torch.Generator().manual_seed(1))
    counts = [int((wrong == torch.tensor(pair)).all(1).sum()) for pair in itertools.product(values, values)]
    assert chisquare(counts, (count * exact.table).flatten().tolist(), sum_check=False).pvalue < 1e-3


def test_a_causal_model_of_masks_fills_the_last_token_as_generate_continues():
    causal = model(Causal()).eval()
    prompt = torch.randint(MASK, (3, 6), generator=torch.Generator().manual_seed(0))

    class Next(nn.Module):
        """At each place, what follows the one before it."""

        def forward(self, tokens):
            return causal(tokens).roll(1, dims=1)

    filled = unmask(Next(), nn.functional.pad(prompt, (0, 1), value=MASK), MASK, temperature=0)
    without = causal(prompt)[:, -1].detach()
    without[:, MASK] = -INF  # generate may draw the mask, unmask never does
    assert torch.equal(filled[:, -1], without.argmax(-1))
    assert torch.equal(filled[:, :-1], generate(causal, prompt, 1)[:, :-1])


def test_the_mask_is_never_drawn():
    assert not unmask(Fixed([0.0, 0.0, 50.0]), torch.full((4, 8), 2), 2).eq(2).any()
    assert unmask(Fixed([0.0, 0.0, 50.0]), torch.full((4, 8), 3), 3).eq(2).all()  # of models that have no logit for it


def test_padding_is_left_alone_and_heard_by_nobody():
    bert = Encoder(config(), MASK + 1).eval()
    short = torch.tensor([[3, MASK, 5, MASK]])
    padded = nn.functional.pad(short, (0, 3), value=MASK)
    mask = torch.arange(7)[None] < 4
    alone = unmask(bert, short, MASK, temperature=0, order="confidence")
    found = unmask(bert, padded, MASK, temperature=0, order="confidence", attention_mask=mask)
    assert torch.equal(found, nn.functional.pad(alone, (0, 3), value=MASK))
    assert torch.equal(unmask(bert, padded, MASK, attention_mask=mask.long(), temperature=0, order="confidence"), found)


def test_it_draws_without_dropout_and_leaves_the_mode_as_it_was():
    trained = model(dropout=0.5).train()
    again = model().eval()
    tokens = torch.full((2, 9), MASK)
    one, other = (unmask(each, tokens, MASK, generator=torch.Generator().manual_seed(0)) for each in (trained, again))
    assert torch.equal(one, other)
    assert all(part.training for part in trained.modules())


def test_tokens_of_any_kind_of_integer():
    tokens = torch.tensor([[1, 99], [99, 99]], dtype=torch.int16)
    found = unmask(model(Window(1, 1), 100), tokens, 99)
    assert found.dtype == torch.int64
    assert torch.equal(unmask(MODEL, tokens, MASK), tokens.long())  # nothing is masked


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: unmask(Fixed([NAN, 0.0]), PROMPT, 2), ValueError, "logits must be finite (step 1 got nan as the"),
        (lambda: unmask(Fixed([INF, 0.0]), PROMPT, 2), ValueError, "(step 1 got inf as the highest of a token)"),
        (lambda: unmask(Fixed([-INF, -INF, 3.0]), PROMPT, 2), ValueError, "(step 1 got -inf"),
        (lambda: unmask(nn.Flatten(0), PROMPT.float().long(), 2), ValueError, "model must give logits (B, N, V)"),
        (lambda: unmask(MODEL, PROMPT.float(), 2), TypeError, "tokens must be a tensor of integers"),
        (lambda: unmask(MODEL, PROMPT[0], 2), ValueError, "tokens must have shape (B, N)"),
        (lambda: unmask(MODEL, PROMPT, -1), ValueError, "mask_token"),
        (lambda: unmask(MODEL, PROMPT, 2, steps=0), ValueError, "steps"),
        (lambda: unmask(MODEL, PROMPT, 2, order="left"), ValueError, "order must be one of 'random', 'confidence'"),
        (lambda: unmask(MODEL, PROMPT, 2, remask=1.0), ValueError, "remask must be a share below 1 (got 1.0)"),
        (lambda: unmask(MODEL, PROMPT, 2, remask=NAN), ValueError, "remask must be a share below 1 (got nan)"),
        (lambda: drafts(MODEL, PROMPT, 2, top_p=0.0), ValueError, "top_p must be a probability above 0"),
        (lambda: drafts(MODEL, PROMPT, 2, attention_mask=PROMPT[0]), ValueError, "attention_mask must be"),
    ],
)
def test_what_does_not_fit_is_an_error(make, error, message):
    """At once, not when the first draft is asked for."""
    with pytest.raises(error) as raised:
        make()
    assert message in str(raised.value)


PROMPT = torch.full((2, 3), 2)

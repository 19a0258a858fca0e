"""The score of a query and a key, and how scores become weights: the two functions that make attention generic.

A score is what a pair makes of its vectors ("dot", `Additive`, a function), then elementwise functions after scale and
bias (`SoftCap`, `LeakyReLU`, `Temperature`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import NamedTuple, Union, get_args

import torch
from torch import Tensor
from torch.nn import functional

from attngraph.arguments import shown
from attngraph.kernels.contract import Normalizer, Transform

PairFunction = Callable[[Tensor, Tensor], Tensor]  # (..., D), (..., D) → (...)
Elementwise = Callable[[Tensor], Tensor]
Score = Union[str, PairFunction, "SoftCap", "LeakyReLU", "Temperature"]


# ---------------------------------------------------------------------------------------------- what a pair makes


def dot(q_i: Tensor, k_j: Tensor) -> Tensor:
    """q · k, of each pair."""
    return (q_i * k_j).sum(-1)


FUSED_ACTIVATIONS = ("tanh", "leaky_relu", "relu")
_KNOWN_ACTIVATIONS = {torch.tanh: "tanh", functional.tanh: "tanh", torch.relu: "relu", functional.relu: "relu"}


@dataclass(frozen=True, eq=False)
class Additive:
    """weight · activation(q + k): Bahdanau's attention with tanh, GATv2's with leaky ReLU. weight: (D,) or (H, D).

    The activation is "tanh", "relu", "leaky_relu" (with `negative_slope`, by default GATv2's), for which there are
    kernels, or an elementwise function, which runs over a part of the edges at a time.

    Bahdanau et al. 2015, section 3.1 (the projections of query and key stand outside); Brody et al. 2022, equation 7.
    """

    weight: Tensor
    activation: str | Elementwise = "tanh"
    negative_slope: float = 0.2

    def __post_init__(self):
        if not isinstance(self.weight, Tensor) or self.weight.ndim not in (1, 2):
            got = tuple(self.weight.shape) if isinstance(self.weight, Tensor) else type(self.weight).__name__
            raise TypeError(f"Additive takes a tensor, weight (D,) or (H, D) (got {got})")
        require_function("activation of Additive", self.activation, FUSED_ACTIVATIONS)
        _require_number("negative_slope", self.negative_slope)

    @property
    def fused(self) -> str | None:
        """The name of its activation, where there are kernels for it."""
        known = self.activation if isinstance(self.activation, str) else _KNOWN_ACTIVATIONS.get(self.activation)
        return known if known in FUSED_ACTIVATIONS else None

    def __call__(self, q_i: Tensor, k_j: Tensor) -> Tensor:
        """(B, H, E, D), (B, H, E, D) → (B, H, E)."""
        weight = self.weight if self.weight.ndim == 1 else self.weight[:, None]
        match self.fused:
            case "tanh":
                activated = torch.tanh(q_i + k_j)
            case "relu":
                activated = torch.relu(q_i + k_j)
            case "leaky_relu":
                activated = functional.leaky_relu(q_i + k_j, self.negative_slope)
            case _:
                assert not isinstance(self.activation, str)
                activated = self.activation(q_i + k_j)
        return (activated * weight).sum(-1)


PAIR_FUNCTIONS: dict[str, PairFunction] = {"dot": dot, "additive": lambda q_i, k_j: torch.tanh(q_i + k_j).sum(-1)}


# ------------------------------------------------------------------------------------- after the scale and the bias


@dataclass(frozen=True, eq=False)
class SoftCap:
    """cap · tanh(s / cap) of each score s: no score is above `cap` (Gemma 2, Gemma Team 2024, section 2).

    Of the score `of`, after `scale` and `bias`; as the two below.
    """

    cap: float
    of: Score = "dot"

    def __post_init__(self):
        _require_number("cap", self.cap)
        if not self.cap > 0:
            raise ValueError(f"cap of SoftCap must be above 0 (got {self.cap!r})")
        require_function("of, the score of SoftCap,", self.of, PAIR_FUNCTIONS)

    @property
    def transform(self) -> Transform:
        """As kernels take it."""
        return Transform("softcap", float(self.cap))

    def __call__(self, scores: Tensor, head: Tensor) -> Tensor:
        """Of scores, each of the head whose number is there."""
        return transformed(scores, self.transform)


@dataclass(frozen=True, eq=False)
class LeakyReLU:
    """s where s > 0, else negative_slope · s, of each score s: GAT's (Veličković et al. 2018, equation 3).

    GAT's score aᵀ[W x_i ‖ W x_j] is the dot product of (a₁ᵀW x_i, 1) and (1, a₂ᵀW x_j), two numbers for each node.
    """

    negative_slope: float = 0.2
    of: Score = "dot"

    def __post_init__(self):
        _require_number("negative_slope", self.negative_slope)
        require_function("of, the score of LeakyReLU,", self.of, PAIR_FUNCTIONS)

    @property
    def transform(self) -> Transform:
        """As kernels take it."""
        return Transform("leaky_relu", float(self.negative_slope))

    def __call__(self, scores: Tensor, head: Tensor) -> Tensor:
        """Of scores, each of the head whose number is there."""
        return transformed(scores, self.transform)


@dataclass(frozen=True, eq=False)
class Temperature:
    """s / value of each score s, with one value for each head, (H,), or for all, (); it may be learned."""

    value: Tensor
    of: Score = "dot"

    def __post_init__(self):
        if not (isinstance(self.value, Tensor) and self.value.is_floating_point() and self.value.ndim <= 1):
            got = tuple(self.value.shape) if isinstance(self.value, Tensor) else type(self.value).__name__
            raise TypeError(f"Temperature takes a tensor of floating-point numbers, value () or (H,) (got {got})")
        require_function("of, the score of Temperature,", self.of, PAIR_FUNCTIONS)

    transform = None

    def __call__(self, scores: Tensor, head: Tensor) -> Tensor:
        """Of scores, each of the head whose number is there."""
        value = self.value.to(scores.dtype)
        return scores / (value if value.ndim == 0 else value[head])


ScoreTransform = SoftCap | LeakyReLU | Temperature


def transformed(scores: Tensor, transform: Transform | None) -> Tensor:
    """An elementwise function of the scores."""
    if transform is None:
        return scores
    if transform.kind == "softcap":
        return transform.value * torch.tanh(scores / transform.value)
    return functional.leaky_relu(scores, transform.value)


def transform_slope(scores: Tensor, transform: Transform) -> Tensor:
    """Its derivative at the scores that it is given."""
    if transform.kind == "softcap":
        return 1 - torch.tanh(scores / transform.value) ** 2
    return torch.full_like(scores, transform.value).masked_fill_(scores > 0, 1)


class ScoreParts(NamedTuple):
    """A score taken apart: what a pair makes of its vectors, and the elementwise functions after scale and bias."""

    pair: str | PairFunction
    transforms: tuple[ScoreTransform, ...]

    @property
    def function(self) -> PairFunction:
        """What a pair makes."""
        return PAIR_FUNCTIONS[self.pair] if isinstance(self.pair, str) else self.pair

    @property
    def transform(self) -> Transform | None:
        """As kernels take it, of a score that is fused."""
        return self.transforms[0].transform if self.transforms else None


def parts_of(score: Score) -> ScoreParts:
    """A score taken apart."""
    transforms: list[ScoreTransform] = []
    while isinstance(score, ScoreTransform):
        transforms.insert(0, score)
        score = score.of
    return ScoreParts(score, tuple(transforms))


def score_name(score: Score) -> str:
    """A score in a `Call`, by which plans are kept: one of `SCORE_NAMES`, or what it costs like those of."""
    pair, transforms = parts_of(score)
    if pair == "additive" or (isinstance(pair, Additive) and pair.fused):
        return "additive"
    if pair != "dot":
        return ANY_FUNCTION
    if len(transforms) == 1 and (transform := transforms[0].transform) is not None:
        return transform.kind
    return TRANSFORMED if transforms else "dot"


ANY_FUNCTION = "a function"
TRANSFORMED = "a function of a dot product"
SCORE_NAMES = ("dot", "additive", "softcap", "leaky_relu")
FUSED_SCORES = ("dot", "softcap", "leaky_relu")
"""Those of which one kernel makes scores and weights."""


# ---------------------------------------------------------------------------------------------------- normalisers


NORMALIZERS: dict[str, Elementwise] = {
    "sigmoid": torch.sigmoid,
    "none": lambda score: score,
    "relu": torch.relu,
    "squared_relu": lambda score: torch.relu(score) ** 2,
}
NORMALIZER_NAMES: tuple[str, ...] = get_args(Normalizer)


def normalizer(normalize: str | Elementwise) -> Elementwise:
    """By name, or as given; "softmax", which is not elementwise, is none of them."""
    return NORMALIZERS[normalize] if isinstance(normalize, str) else normalize


def weights_and_slopes(scores: Tensor, normalize: str) -> tuple[Tensor, Tensor]:
    """Of an elementwise normaliser, the weights and their derivatives by the scores."""
    match normalize:
        case "sigmoid":
            weights = torch.sigmoid(scores)
            return weights, weights * (1 - weights)
        case "none":
            return scores, torch.ones_like(scores)
        case "relu":
            weights = torch.relu(scores)
            return weights, (scores > 0).to(scores.dtype)
        case "squared_relu":
            weights = torch.relu(scores)
            return weights * weights, 2 * weights
    raise AssertionError(normalize)


def require_function(name: str, given: object, names: Collection[str]) -> None:
    """Raise unless it is a function, such as a score is, or one that is known by name."""
    if given in names if isinstance(given, str) else callable(given) and not isinstance(given, type):
        return
    kind = ValueError if isinstance(given, str) else TypeError
    raise kind(f"{name} must be a function or one of {', '.join(names)} (got {shown(given)})")


def _require_number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise TypeError(f"{name} must be a finite number (got {shown(value)})")

"""The score of a query and a key, and how scores become weights: the two functions that make attention generic."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Score = Callable[[Tensor, Tensor], Tensor]  # (..., D), (..., D) → (...)
Normalizer = Callable[[Tensor], Tensor]  # elementwise


def dot(q_i: Tensor, k_j: Tensor) -> Tensor:
    """q · k, of each pair."""
    return (q_i * k_j).sum(-1)


@dataclass(frozen=True, eq=False)
class Additive:
    """weight · activation(q + k): Bahdanau's attention with tanh, GATv2's with leaky ReLU. weight: (D,) or (H, D).

    Bahdanau et al. 2015, section 3.1 (the projections of query and key stand outside); Brody et al. 2022, equation 7.
    """

    weight: Tensor
    activation: Callable[[Tensor], Tensor] = torch.tanh

    def __post_init__(self):
        if not isinstance(self.weight, Tensor) or self.weight.ndim not in (1, 2):
            got = tuple(self.weight.shape) if isinstance(self.weight, Tensor) else type(self.weight).__name__
            raise TypeError(f"Additive takes a tensor, weight (D,) or (H, D) (got {got})")
        if not callable(self.activation):
            raise TypeError(f"activation of Additive must be a function (got {type(self.activation).__name__})")

    def __call__(self, q_i: Tensor, k_j: Tensor) -> Tensor:
        """(B, H, E, D), (B, H, E, D) → (B, H, E)."""
        weight = self.weight if self.weight.ndim == 1 else self.weight[:, None]
        return (self.activation(q_i + k_j) * weight).sum(-1)


SCORES: dict[str, Score] = {"dot": dot, "additive": lambda q_i, k_j: torch.tanh(q_i + k_j).sum(-1)}
NORMALIZERS: dict[str, Normalizer] = {"sigmoid": torch.sigmoid, "none": lambda score: score}


def score_function(score: str | Score) -> Score:
    """By name, or as given."""
    return SCORES[score] if isinstance(score, str) else score


def normalizer(normalize: str | Normalizer) -> Normalizer:
    """By name, or as given; "softmax", which is not elementwise, is none of them."""
    return NORMALIZERS[normalize] if isinstance(normalize, str) else normalize

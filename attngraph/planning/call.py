"""What a call of `attend` asks for: everything that decides how it may run. Data only."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from attngraph.kernels.contract import BiasKind, Dropout, EdgeTerms
from attngraph.kernels.scoring import ANY_FUNCTION, NORMALIZER_NAMES, Elementwise, Score, ScoreParts, parts_of

Transform = Literal["torch.func", "forward-mode"]


class Call(NamedTuple):
    """The sizes and kinds of a call: what backends are asked about, and what a plan is kept for.

    The batch size is not among them: costs are those of one batch entry, and one plan serves every batch size.
    """

    num_queries: int
    num_keys: int
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    dtype: torch.dtype
    device: torch.device
    bias: BiasKind | None = None
    score: str = "dot"
    """Its name, or "a function"; see `scoring.score_name`."""
    normalize: str = "softmax"
    """Its name, or "a function"."""
    padding: bool = False
    """Whether an attention_mask leaves out keys."""
    dropout: bool = False
    return_weights: bool = False
    transform: Transform | None = None
    """A transform of torch.func, or forward-mode differentiation, that is at work."""
    compiled: bool = False
    """Whether torch.compile traces the call, or its tensors have no numbers."""
    part: bool = False
    """Whether the backend runs some of the edges or heads, beside others."""
    key_features: int = 0
    """The dimension of the features of edges that are added to keys; 0 where there are none."""
    value_features: int = 0
    """The same of values."""
    renumbered: bool = False
    """Whether dropout goes by other numbers of nodes than 0, 1, …: `contract.NodeNumbers`."""
    return_lse: bool = False
    """The last, as one plan serves both."""

    @property
    def number_bytes(self) -> int:
        """Bytes of a number of q."""
        return self.dtype.itemsize

    @property
    def mean_dim(self) -> float:
        """The dimension for which costs are known, as those of vectors whose keys and values have one dimension."""
        return (self.head_dim + self.key_features + self.value_dim + self.value_features) / 2

    @property
    def edge_features(self) -> bool:
        """Whether edges have features."""
        return bool(self.key_features or self.value_features)

    @property
    def after_scores(self) -> Call:
        """What is left once the scores of the edges are made, or their weights by a function: see `planning.steps`."""
        normalize = "none" if self.normalize == ANY_FUNCTION else self.normalize
        return self._replace(
            head_dim=0, key_features=0, bias="edge", score="dot", normalize=normalize, return_weights=False
        )


class Request(NamedTuple):
    """The options of a call that are numbers, functions or masks: what runs, not how."""

    scale: float
    score: Score = "dot"
    normalize: str | Elementwise = "softmax"
    dropout: Dropout | None = None
    return_lse: bool = False
    return_weights: bool = False
    attention_mask: Tensor | None = None
    """bool (B, M): False for keys that nobody hears."""
    edge_features: EdgeTerms | None = None

    @property
    def parts(self) -> ScoreParts:
        """The score taken apart."""
        return parts_of(self.score)

    @property
    def key_features(self) -> int:
        """As in a `Call`."""
        return 0 if self.edge_features is None else self.edge_features.key_dim

    @property
    def value_features(self) -> int:
        """The same of values."""
        return 0 if self.edge_features is None else self.edge_features.value_dim

    @property
    def generic(self) -> dict:
        """What the generic kernels take."""
        return {
            "attention_mask": self.attention_mask,
            "scale": self.scale,
            "score": self.score,
            "normalize": self.normalize,
            "dropout": self.dropout,
            "features": self.edge_features,
        }


def normalizer_name(normalize: str | Elementwise) -> str:
    """A normaliser in a `Call`."""
    return normalize if isinstance(normalize, str) and normalize in NORMALIZER_NAMES else ANY_FUNCTION

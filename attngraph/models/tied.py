"""Models that score tokens by the vectors that embed them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

from torch import nn

from attngraph.models.saved import Model


class Tied(Model):
    """A model whose embedding and scores may be one parameter, and stay one, whatever is done to the model.

    PyTorch makes two of one where it puts new parameters in the place of the old ones: in `to_empty`, and in
    `load_state_dict(…, assign=True)`.
    """

    tied: bool
    embedding: nn.Embedding

    def __init__(self, tied: bool):
        super().__init__()
        self.tied = tied
        self.register_load_state_dict_post_hook(Tied._tie)

    @property
    def scores(self) -> nn.Linear:
        """What makes logits."""
        raise NotImplementedError

    def _tie(self, *_: object) -> None:
        if self.tied:
            self.scores.weight = self.embedding.weight

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self._tie()
        return self

"""What a Transformer asks of a cache of keys and values; `attngraph.KVCache` answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor, nn

from attngraph.graph.base import Graph
from attngraph.graph.patterns import Tree


class CachedLayer(Protocol):
    """The keys and values of one layer."""

    @property
    def holds_all(self) -> bool:
        """Whether they are those of a memory, and there."""
        ...

    @property
    def turns(self) -> bool:
        """Whether it turns queries and keys by their positions itself."""
        ...

    @property
    def of_memory(self) -> CachedLayer:
        """Those of the phase that hears a memory."""
        ...

    def attend(
        self, q: Tensor, k: Tensor | None, v: Tensor | None, graph: Graph, *, bias: Any, attention_mask: Tensor | None,
        scoring: Any,
    ) -> Tensor:  # fmt: skip
        """As `attend`, of new nodes and all that is kept; k and v None where all is."""
        ...


class Cached(Protocol):
    """Those of all layers."""

    transformer: nn.Module
    """Whose they are."""
    length: int
    """How many nodes there are; 0 before the prompt."""

    @property
    def layers(self) -> Sequence[CachedLayer]:
        """One for each layer of the model."""
        ...

    def pieces(self, x: Tensor, tree: Tree | None) -> list[int]:
        """In how many calls new nodes are given."""
        ...

    def start(self, x: Tensor) -> tuple[Graph, ...]:
        """A prompt begins → the graphs of its layers."""
        ...

    def keep(
        self, x: Tensor, skipped: Tensor | None, mask: Tensor | None, memory: Tensor | None, memory_graph: Graph,
        memory_mask: Tensor | None,
    ) -> None:  # fmt: skip
        """A prompt ends."""
        ...

    def begin(self, x: Tensor, tree: Tree | None) -> None:
        """A call with new nodes begins."""
        ...

    def positions(self, x: Tensor) -> Tensor:
        """Those of its nodes."""
        ...

    def rotation(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin of these, where they are rotary."""
        ...

    def end(self, tree: Tree | None) -> None:
        """A call with new nodes ends."""
        ...

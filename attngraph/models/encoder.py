"""Encoder: embed → Transformer(Full()) → head. BERT hears both sides; nothing else distinguishes it from GPT."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from attngraph.arguments import checked, shown
from attngraph.graph.algebra import Full
from attngraph.graph.base import require_ints
from attngraph.models.tied import Tied
from attngraph.nn.computed import Graphs
from attngraph.nn.dropout import dropout
from attngraph.nn.embedding import TokenEmbedding
from attngraph.nn.feedforward import ACTIVATIONS
from attngraph.nn.padding import padding_mask
from attngraph.nn.transformer import Biases, Transformer, TransformerConfig


class TokenHead(nn.Module):
    """BERT's head: every node for itself once more, then scores of all tokens by the vectors that embed them."""

    @checked
    def __init__(self, config: TransformerConfig, vocab_size: int):
        super().__init__()
        self.dense = nn.Linear(config.embed_dim, config.embed_dim)
        self.activation = ACTIVATIONS[config.activation]
        self.norm = nn.LayerNorm(config.embed_dim, config.norm_eps)
        self.scores = nn.Linear(config.embed_dim, vocab_size)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """No token is likelier than others."""
        nn.init.normal_(self.scores.weight, std=0.02)
        nn.init.zeros_(self.scores.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., embed_dim) → (..., vocab_size)."""
        return self.scores(self.norm(self.activation(self.dense(x))))


class ClassHead(nn.Module):
    """Scores of classes: of every node, or of a whole sequence, whose first node is mapped once more, as BERT does."""

    @checked
    def __init__(self, config: TransformerConfig, num_classes: int, classify: Literal["sequence", "tokens"]):
        super().__init__()
        require_ints(1, num_classes=num_classes)
        self.dropout = config.dropout
        self.pool = nn.Linear(config.embed_dim, config.embed_dim) if classify == "sequence" else None
        self.scores = nn.Linear(config.embed_dim, num_classes)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """No class is likelier than others."""
        nn.init.normal_(self.scores.weight, std=0.02)
        nn.init.zeros_(self.scores.bias)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, N, embed_dim) → (B, num_classes), or of every node (B, N, num_classes); the mask (B, N) is True for real
        nodes, the first of which stands for the sequence.
        """
        if self.pool is not None:
            if x.ndim != 3 or not x.shape[1]:
                wanted = "a sequence is classified by its first token: a batch of sequences of at least one is required"
                raise ValueError(f"{wanted} (got vectors of shape {tuple(x.shape)})")
            first = x[:, 0] if mask is None else x.take_along_dim(mask.int().argmax(1)[:, None, None], 1)[:, 0]
            x = self.pool(first).tanh()
        return self.scores(dropout(x, self.dropout, self.training))


class Encoder(Tied):
    """A model of tokens that hear each other as the graph says (Devlin et al. 2019): to predict those that were masked,
    or to classify sequences or tokens.

    Args:
        config: the Transformer's switches.
        vocab_size: number of tokens.
        graph: who hears whom; one for all layers or one for each.
        num_types: kinds of tokens, such as those of the first and of the second sentence; 0: none.
        tied: the head scores tokens by the vectors that embed them.
        num_classes: the head scores as many classes instead; 0: it scores tokens.
        classify: what belongs to a class: the whole sequence, or each of its tokens.

    >>> from attngraph.nn import TransformerConfig
    >>> config = TransformerConfig(embed_dim=64, num_layers=2, num_heads=4, position="rotary")
    >>> Encoder(config, vocab_size=65)(torch.randint(65, (2, 10))).shape
    torch.Size([2, 10, 65])
    >>> Encoder(config, vocab_size=65, num_classes=3)(torch.randint(65, (2, 10))).shape
    torch.Size([2, 3])
    >>> Encoder(config, vocab_size=65, num_classes=3, classify="tokens")(torch.randint(65, (2, 10))).shape
    torch.Size([2, 10, 3])
    """

    @checked
    def __init__(
        self,
        config: TransformerConfig,
        vocab_size: int,
        graph: Graphs = Full(),  # noqa: B008  a graph is a value
        *,
        num_types: int = 0,
        tied: bool = True,
        num_classes: int = 0,
        classify: Literal["sequence", "tokens"] = "sequence",
    ):
        super().__init__(tied and not num_classes)
        require_ints(0, num_types=num_types, num_classes=num_classes)
        self.config, self.vocab_size, self.classify = config, vocab_size, classify
        self.embedding = TokenEmbedding(vocab_size, config.embed_dim)
        self.types = TokenEmbedding(num_types, config.embed_dim, "types") if num_types else None
        self.transformer = Transformer(config, graph)
        self.head = ClassHead(config, num_classes, classify) if num_classes else TokenHead(config, vocab_size)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Embeddings; its other parts have their own."""
        for table in (self.embedding, self.types):
            if table is not None:
                nn.init.normal_(table.weight, std=0.02)
        self._tie()

    def _arguments(self):
        return {
            "config": self.config,
            "vocab_size": self.vocab_size,
            "num_types": 0 if self.types is None else self.types.num_embeddings,
            "tied": self.tied,
            "num_classes": self.head.scores.out_features if isinstance(self.head, ClassHead) else 0,
            "classify": self.classify,
        }

    @property
    def scores(self) -> nn.Linear:
        """What makes logits."""
        return self.head.scores

    def forward(
        self,
        tokens: Tensor,
        graph: Graphs | None = None,
        *,
        bias: Biases = None,
        positions: Tensor | None = None,
        attention_mask: Tensor | None = None,
        types: Tensor | None = None,
    ) -> Tensor:
        """tokens int64 (B, N) → logits (B, N, vocab_size); of classes, (B, num_classes) or (B, N, num_classes).

        `graph` and `bias` are as in `Transformer`. `attention_mask`, bool or integers 0 and 1, (B, N), is True or 1 for
        real tokens; `positions`, integers (N,) or (B, N), are by default counted from each row's first real token;
        `types`, int64 (B, N), are the kinds of the tokens, by default 0.
        """
        x = self.embedding(tokens)
        if types is not None and not isinstance(types, Tensor):
            raise TypeError(f"types must be a tensor of integers (got {shown(types)})")
        if types is not None and types.shape != tokens.shape:
            raise ValueError(f"types must have the shape of tokens, {tuple(tokens.shape)} (got {tuple(types.shape)})")
        if self.types is not None:
            x = x + self.types(torch.zeros_like(tokens) if types is None else types)
        elif types is not None:
            raise ValueError("types are of use only in a model with num_types")
        mask = padding_mask("attention_mask", attention_mask, x)
        x = self.transformer(x, graph, bias=bias, positions=positions, attention_mask=mask)
        return self.head(x, mask) if isinstance(self.head, ClassHead) else self.head(x)

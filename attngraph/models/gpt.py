"""GPT: embed → Transformer(Causal()) → head."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from attngraph.graph.base import Graph
from attngraph.graph.patterns import Causal
from attngraph.nn.embedding import TokenEmbedding
from attngraph.nn.transformer import Transformer, TransformerConfig


class GPT(nn.Module):
    """A language model: what it hears, and so what it may predict from, is its graph (Radford et al. 2019).

    Args:
        config: the Transformer's switches.
        vocab_size: number of tokens.
        graph: who hears whom; one for all layers or one for each. A graph that hears the future does not predict it.
        tied: the head reads tokens with the vectors that embed them (Press & Wolf 2017).

    >>> from attngraph.nn import TransformerConfig
    >>> config = TransformerConfig(embed_dim=64, num_layers=2, num_heads=4, position="rotary")
    >>> model = GPT(config, vocab_size=65, graph=Causal() & (Window(16, 0) | Prefix(2)))
    >>> model(torch.randint(65, (2, 10))).shape
    torch.Size([2, 10, 65])
    """

    def __init__(
        self,
        config: TransformerConfig,
        vocab_size: int,
        graph: Graph | Sequence[Graph] = Causal(),  # noqa: B008  a graph is a value
        *,
        tied: bool = True,
    ):
        super().__init__()
        self.config, self.vocab_size, self.tied = config, vocab_size, tied
        self.embedding = TokenEmbedding(vocab_size, config.embed_dim)
        self.transformer = Transformer(config, graph)
        self.head = nn.Linear(config.embed_dim, vocab_size, bias=False)
        nn.init.normal_(self.embedding.weight, std=0.02)
        nn.init.normal_(self.head.weight, std=0.02)
        if config.init == "zero":
            nn.init.zeros_(self.head.weight)
            nn.init.normal_(self.embedding.weight, std=0.5)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(
        self, tokens: Tensor, graph: Graph | Sequence[Graph] | None = None, *, attention_mask: Tensor | None = None
    ) -> Tensor:
        """tokens int64 (B, N) → logits (B, N, vocab_size).

        `attention_mask`, bool or integers 0 and 1, (B, N), is True or 1 for real tokens.
        """
        return self.head(self.transformer(self.embedding(tokens), graph, attention_mask=attention_mask))

"""GPT: embed → Transformer(Causal()) → head."""

from __future__ import annotations

from torch import Tensor, nn

from attngraph.arguments import checked
from attngraph.graph.patterns import Causal, Tree
from attngraph.models.tied import Tied
from attngraph.nn.cached import Cached
from attngraph.nn.computed import Graphs
from attngraph.nn.embedding import TokenEmbedding
from attngraph.nn.transformer import Biases, Transformer, TransformerConfig


class GPT(Tied):
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

    @checked
    def __init__(
        self,
        config: TransformerConfig,
        vocab_size: int,
        graph: Graphs = Causal(),  # noqa: B008  a graph is a value
        *,
        tied: bool = True,
    ):
        super().__init__(tied)
        self.config, self.vocab_size = config, vocab_size
        self.embedding = TokenEmbedding(vocab_size, config.embed_dim)
        self.transformer = Transformer(config, graph)
        self.head = nn.Linear(config.embed_dim, vocab_size, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Embedding and head; after the Transformer has its own."""
        nn.init.normal_(self.embedding.weight, std=0.02)
        nn.init.normal_(self.head.weight, std=0.02)
        if self.config.init == "zero":
            nn.init.zeros_(self.head.weight)
            nn.init.normal_(self.embedding.weight, std=0.5)
        self._tie()

    def _arguments(self):
        return {"config": self.config, "vocab_size": self.vocab_size, "tied": self.tied}

    @property
    def scores(self) -> nn.Linear:
        """What makes logits."""
        return self.head

    def forward(
        self,
        tokens: Tensor,
        graph: Graphs | None = None,
        *,
        bias: Biases = None,
        positions: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: Cached | None = None,
        tree: Tree | None = None,
        logits_to_keep: int | None = None,
    ) -> Tensor:
        """tokens int64 (B, N) → logits (B, N, vocab_size), or of the last `logits_to_keep` alone.

        `graph` and `bias` are as in `Transformer`. `attention_mask`, bool or integers 0 and 1, (B, N), is True or 1 for
        real tokens. `positions`, integers (N,) or (B, N), are by default counted from each row's first real token; in a
        pack, each document begins at 0:

        >>> from attngraph.nn import TransformerConfig
        >>> config = TransformerConfig(embed_dim=64, num_layers=2, num_heads=4, position="learned", max_length=6)
        >>> pack, graph = torch.randint(65, (1, 10)), Causal() & Documents([6, 4])
        >>> positions = torch.cat([torch.arange(6), torch.arange(4)])
        >>> GPT(config, vocab_size=65)(pack, graph, positions=positions).shape
        torch.Size([1, 10, 65])

        `cache`, a `KVCache`, and `tree` are as in `Transformer`: tokens are those after the ones that it holds.
        """
        x = self.transformer(
            self.embedding(tokens),
            graph,
            bias=bias,
            positions=positions,
            attention_mask=attention_mask,
            cache=cache,
            tree=tree,
        )
        return self.head(x if logits_to_keep is None else x[:, -logits_to_keep:])

"""Encoder–decoder: two Transformers, of which the second also hears what the first has made of the source."""

from __future__ import annotations

from torch import Tensor, nn

from attngraph.arguments import checked
from attngraph.graph.algebra import Full
from attngraph.graph.base import Graph
from attngraph.graph.patterns import Causal, Tree
from attngraph.models.tied import Tied
from attngraph.nn.cached import Cached
from attngraph.nn.computed import Graphs
from attngraph.nn.embedding import TokenEmbedding
from attngraph.nn.padding import padding_mask
from attngraph.nn.told import by_layer, tell_graphs
from attngraph.nn.transformer import Biases, Transformer, TransformerConfig


class EncoderDecoder(Tied):
    """From a source to a target, token by token (Vaswani et al. 2017; T5; Whisper).

    Args:
        encoder: the switches of the Transformer of the source.
        decoder: those of the target's: with `cross`, it hears the memory in a phase of its own; without, the memory
            beside the earlier targets, in one: `Beside(memory, self)`.
        vocab_size: number of target tokens, and of source tokens where `source` is not given.
        source: what makes vectors of the source; by default the embedding of the target's tokens, shared.
        encoder_graph, decoder_graph: who hears whom in either.
        memory_graph: who, in the decoder, hears which node of the memory; by default all.
        tied: the head scores tokens by the vectors that embed them.
        logit_scale: factor of the last vectors; T5's head, which is tied, takes 1/√embed_dim.

    >>> from attngraph.nn import TransformerConfig
    >>> encoder = TransformerConfig(embed_dim=64, num_layers=2, num_heads=4, position="sinusoidal")
    >>> decoder = TransformerConfig(embed_dim=64, num_layers=2, num_heads=4, position="sinusoidal", cross=True)
    >>> model = EncoderDecoder(encoder, decoder, vocab_size=65)
    >>> model(torch.randint(65, (2, 12)), torch.randint(65, (2, 7))).shape
    torch.Size([2, 7, 65])
    """

    @checked
    def __init__(
        self,
        encoder: TransformerConfig,
        decoder: TransformerConfig,
        vocab_size: int,
        *,
        source: nn.Module | None = None,
        encoder_graph: Graphs = Full(),  # noqa: B008  a graph is a value
        decoder_graph: Graphs = Causal(),  # noqa: B008
        memory_graph: Graph | None = None,
        tied: bool = True,
        logit_scale: float = 1.0,
    ):
        super().__init__(tied)
        if encoder.embed_dim != decoder.embed_dim:
            given = f"{encoder.embed_dim} and {decoder.embed_dim}"
            raise ValueError(f"encoder and decoder must have the same embed_dim (got {given})")
        if encoder.cross:
            raise ValueError("the encoder hears no memory: its config must have cross=False")
        self.vocab_size, self.memory_graph, self.logit_scale = vocab_size, memory_graph, logit_scale
        self.embedding = TokenEmbedding(vocab_size, decoder.embed_dim)
        self.source = source
        self.encoder = Transformer(encoder, encoder_graph)
        self.decoder = Transformer(decoder, decoder_graph)
        self.head = nn.Linear(decoder.embed_dim, vocab_size, bias=False)
        self.reset_parameters()
        tell_graphs(self, "_memory_graphs")

    def reset_parameters(self) -> None:
        """Embedding and head; its other parts have their own."""
        for table in (self.embedding, self.head):
            nn.init.normal_(table.weight, std=0.02)
        self._tie()

    def _arguments(self):
        return {
            "encoder": self.encoder.config,
            "decoder": self.decoder.config,
            "vocab_size": self.vocab_size,
            "source": self.source,
            "memory_graph": self.memory_graph,
            "tied": self.tied,
            "logit_scale": self.logit_scale,
        }

    def extra_repr(self) -> str:
        """What `print(model)` says of it."""
        return f"memory_{by_layer(self._memory_graphs)}"

    @property
    def _memory_graphs(self) -> tuple[Graph, ...]:
        return (Full() if self.memory_graph is None else self.memory_graph,)

    @property
    def scores(self) -> nn.Linear:
        """What makes logits."""
        return self.head

    def forward(
        self,
        source: Tensor,
        target: Tensor,
        *,
        bias: Biases = None,
        positions: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_bias: Biases = None,
        decoder_positions: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        memory_positions: Tensor | None = None,
    ) -> Tensor:
        """source int64 (B, M), or what the source's embedding takes; target int64 (B, N) → logits (B, N, vocab_size).

        `bias` of the source and `decoder_bias` of the target are as in `Transformer`.
        `attention_mask` (B, M) of the source and `decoder_attention_mask` (B, N) of the target, bool or integers 0 and
        1, are True or 1 for real tokens; `positions` of the source and `decoder_positions` of the target, integers,
        are by default counted from each row's first real token; `memory_positions` (M,) or (B, M) are those of the
        source in a decoder that hears it beside itself, where by default it ends at -1.
        """
        return self.decode(
            self.encode(source, bias=bias, positions=positions, attention_mask=attention_mask),
            target,
            attention_mask=attention_mask,
            decoder_bias=decoder_bias,
            decoder_positions=decoder_positions,
            decoder_attention_mask=decoder_attention_mask,
            memory_positions=memory_positions,
        )

    def encode(
        self,
        source: Tensor,
        *,
        bias: Biases = None,
        positions: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """The memory: (B, M, embed_dim)."""
        x = (self.source or self.embedding)(source)
        return self.encoder(x, bias=bias, positions=positions, attention_mask=attention_mask)

    def decode(
        self,
        memory: Tensor,
        target: Tensor,
        *,
        attention_mask: Tensor | None = None,
        decoder_bias: Biases = None,
        decoder_positions: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        memory_positions: Tensor | None = None,
        cache: Cached | None = None,
        tree: Tree | None = None,
        logits_to_keep: int | None = None,
    ) -> Tensor:
        """The logits of targets that hear this memory, of which `attention_mask` (B, M) says what is real.

        With a `cache`, a `KVCache`, targets are those after the ones that it holds, and the memory is heard as the
        first call gave it. Of the last `logits_to_keep` targets alone where that is given.
        """
        x = self.embedding(target)
        mask = padding_mask("decoder_attention_mask", decoder_attention_mask, x)
        goes_on = cache is not None and cache.length > 0  # which has the memory
        x = self.decoder(
            x,
            bias=decoder_bias,
            positions=decoder_positions,
            attention_mask=mask,
            memory=None if goes_on else memory,
            memory_graph=None if goes_on else self.memory_graph,
            memory_positions=memory_positions,
            memory_attention_mask=None if goes_on else attention_mask,
            cache=cache,
            tree=tree,
        )
        x = x if logits_to_keep is None else x[:, -logits_to_keep:]
        return self.head(x * self.logit_scale)

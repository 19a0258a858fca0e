"""Decision Transformer: returns, states and actions in turn → Transformer(Causal()) → the next action."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from attngraph.arguments import checked
from attngraph.graph.base import require_ints
from attngraph.graph.patterns import Causal
from attngraph.models.saved import Model
from attngraph.nn.checks import require_vectors
from attngraph.nn.computed import Graphs
from attngraph.nn.embedding import TokenEmbedding
from attngraph.nn.padding import padding_mask
from attngraph.nn.transformer import Biases, Transformer, TransformerConfig


class DecisionTransformer(Model):
    """What to do next, given what was done, seen, and is still hoped for (Chen et al. 2021).

    Every time step is three nodes: the return to go, the state, the action. Their place in the sequence is told by the
    time step alone.

    Args:
        config: the Transformer's switches.
        state_dim, action_dim: numbers of a state and of an action.
        max_time: number of time steps that have a vector.
        graph: who hears whom.
        bounded: actions lie between -1 and 1.

    >>> from attngraph.nn import TransformerConfig
    >>> config = TransformerConfig(embed_dim=64, num_layers=2, num_heads=1, position="none")
    >>> model = DecisionTransformer(config, state_dim=5, action_dim=2, max_time=100)
    >>> states, actions, returns = torch.randn(3, 7, 5), torch.randn(3, 7, 2), torch.randn(3, 7, 1)
    >>> model(states, actions, returns, torch.arange(7).expand(3, 7)).shape
    torch.Size([3, 7, 2])
    """

    @checked
    def __init__(
        self,
        config: TransformerConfig,
        *,
        state_dim: int,
        action_dim: int,
        max_time: int,
        graph: Graphs = Causal(),  # noqa: B008  a graph is a value
        bounded: bool = True,
    ):
        super().__init__()
        require_ints(1, state_dim=state_dim, action_dim=action_dim)
        self.config, self.bounded = config, bounded
        self.time = TokenEmbedding(max_time, config.embed_dim, "timesteps")
        self.embed_return = nn.Linear(1, config.embed_dim)
        self.embed_state = nn.Linear(state_dim, config.embed_dim)
        self.embed_action = nn.Linear(action_dim, config.embed_dim)
        self.norm = nn.LayerNorm(config.embed_dim)
        self.transformer = Transformer(config, graph)
        self.head = nn.Linear(config.embed_dim, action_dim)

    def _arguments(self):
        return {
            "config": self.config,
            "state_dim": self.embed_state.in_features,
            "action_dim": self.embed_action.in_features,
            "max_time": self.time.num_embeddings,
            "bounded": self.bounded,
        }

    def forward(
        self,
        states: Tensor,
        actions: Tensor,
        returns: Tensor,
        timesteps: Tensor,
        *,
        bias: Biases = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """states (B, T, state_dim), actions (B, T, action_dim), returns to go (B, T, 1), timesteps int64 (B, T) → the
        action to take at each step, (B, T, action_dim).

        `attention_mask`, bool or integers 0 and 1, (B, T), is True or 1 for real time steps. `bias`, as in
        `Transformer`, is of the nodes, three a step.
        """
        require_vectors("states", states, self.embed_state.in_features)
        require_vectors("actions", actions, self.embed_action.in_features)
        require_vectors("returns", returns, 1)
        sides = states, actions, returns
        if isinstance(timesteps, Tensor) and {side.shape[:-1] for side in sides} != {timesteps.shape}:
            shapes = ", ".join(str(tuple(side.shape)) for side in (*sides, timesteps))
            raise ValueError(
                "states, actions, returns and timesteps must have the same batch and number of steps, as in "
                f"(B, T, state_dim), (B, T, action_dim), (B, T, 1), (B, T) (got {shapes})"
            )
        time = self.time(timesteps)
        mask = padding_mask("attention_mask", attention_mask, time)
        parts = self.embed_return(returns) + time, self.embed_state(states) + time, self.embed_action(actions) + time
        x = self.norm(torch.stack(parts, dim=2).flatten(1, 2))  # return, state, action; return, state, …
        if mask is not None:
            mask = mask.repeat_interleave(3, dim=1)
        positions = None
        if self.config.position == "learned":  # checkpoints have them, all nodes the first
            positions = torch.zeros(x.shape[1], dtype=torch.int64, device=x.device)
        x = self.transformer(x, bias=bias, positions=positions, attention_mask=mask)
        actions = self.head(x[:, 1::3])  # what each state leads to
        return actions.tanh() if self.bounded else actions

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
    time step alone. States are vectors, or one of so many; actions too, whose logits are then the output.

    Args:
        config: the Transformer's switches.
        state_dim: numbers of a state; or
        num_states: how many states there are, of which each has a vector that is learned.
        action_dim: numbers of an action; or
        num_actions: how many actions there are, of which each has a vector and a logit.
        max_time: number of time steps that have a vector.
        graph: who hears whom.
        bounded: the numbers of actions lie between -1 and 1; logits never are.

    Raises ValueError unless one of `state_dim` and `num_states`, and one of `action_dim` and `num_actions` is given.

    >>> from attngraph.nn import TransformerConfig
    >>> config = TransformerConfig(embed_dim=64, num_layers=2, num_heads=1, position="none")
    >>> model = DecisionTransformer(config, state_dim=5, action_dim=2, max_time=100)
    >>> states, actions, returns = torch.randn(3, 7, 5), torch.randn(3, 7, 2), torch.randn(3, 7, 1)
    >>> model(states, actions, returns, torch.arange(7).expand(3, 7)).shape
    torch.Size([3, 7, 2])

    On a grid of 16 places with 4 directions; which action is the last does not matter, as it is what is asked for:

    >>> model = DecisionTransformer(config, num_states=16, num_actions=4, max_time=100)
    >>> states, actions = torch.randint(16, (3, 7)), torch.randint(4, (3, 7))
    >>> model(states, actions, returns, torch.arange(7).expand(3, 7)).softmax(-1).shape
    torch.Size([3, 7, 4])
    """

    @checked
    def __init__(
        self,
        config: TransformerConfig,
        *,
        state_dim: int | None = None,
        num_states: int | None = None,
        action_dim: int | None = None,
        num_actions: int | None = None,
        max_time: int,
        graph: Graphs = Causal(),  # noqa: B008  a graph is a value
        bounded: bool = True,
    ):
        super().__init__()
        state_size = _only("state_dim", state_dim, "num_states", num_states)
        action_size = _only("action_dim", action_dim, "num_actions", num_actions)
        self.config, self.bounded = config, bounded
        self.time = TokenEmbedding(max_time, config.embed_dim, "timesteps")
        self.embed_return = nn.Linear(1, config.embed_dim)
        self.embed_state = _embedding("states", state_size, num_states is not None, config.embed_dim)
        self.embed_action = _embedding("actions", action_size, num_actions is not None, config.embed_dim)
        self.norm = nn.LayerNorm(config.embed_dim)
        self.transformer = Transformer(config, graph)
        self.head = nn.Linear(config.embed_dim, action_size)

    def _arguments(self):
        states, actions = self.embed_state, self.embed_action
        return {
            "config": self.config,
            "state_dim": states.in_features if isinstance(states, nn.Linear) else None,
            "num_states": states.num_embeddings if isinstance(states, TokenEmbedding) else None,
            "action_dim": actions.in_features if isinstance(actions, nn.Linear) else None,
            "num_actions": actions.num_embeddings if isinstance(actions, TokenEmbedding) else None,
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

        Of `num_states`, states are int64 (B, T); of `num_actions`, actions are, and what comes is logits
        (B, T, num_actions). `attention_mask`, bool or integers 0 and 1, (B, T), is True or 1 for real time steps.
        `bias`, as in `Transformer`, is of the nodes, three a step.
        """
        require_vectors("returns", returns, 1)
        state, action = _embedded("states", states, self.embed_state), _embedded("actions", actions, self.embed_action)
        sides = state, action, returns
        if isinstance(timesteps, Tensor) and {side.shape[:-1] for side in sides} != {timesteps.shape}:
            shapes = ", ".join(str(tuple(side.shape)) for side in (states, actions, returns, timesteps))
            wanted = ", ".join(
                f"(B, T, {name}_dim)" if isinstance(embed, nn.Linear) else "(B, T)"
                for name, embed in (("state", self.embed_state), ("action", self.embed_action))
            )
            raise ValueError(
                "states, actions, returns and timesteps must have the same batch and number of steps, as in "
                f"{wanted}, (B, T, 1), (B, T) (got {shapes})"
            )
        time = self.time(timesteps)
        mask = padding_mask("attention_mask", attention_mask, time)
        parts = self.embed_return(returns) + time, state + time, action + time
        x = self.norm(torch.stack(parts, dim=2).flatten(1, 2))  # return, state, action; return, state, …
        if mask is not None:
            mask = mask.repeat_interleave(3, dim=1)
        positions = None
        if self.config.position == "learned":  # checkpoints have them, all nodes the first
            positions = torch.zeros(x.shape[1], dtype=torch.int64, device=x.device)
        x = self.transformer(x, bias=bias, positions=positions, attention_mask=mask)
        actions = self.head(x[:, 1::3])  # what each state leads to
        return actions.tanh() if self.bounded and isinstance(self.embed_action, nn.Linear) else actions


def _only(dim_name: str, dim: int | None, num_name: str, num: int | None) -> int:
    """The one of two sizes that is given."""
    if dim is not None and num is None:
        require_ints(1, **{dim_name: dim})
        return dim
    if num is not None and dim is None:
        require_ints(1, **{num_name: num})
        return num
    raise ValueError(
        f"{dim_name}, for vectors of so many numbers, or {num_name}, for one of so many, must be given, and not both "
        f"(got {dim_name}={dim}, {num_name}={num})"
    )


def _embedding(what: str, size: int, discrete: bool, embed_dim: int) -> nn.Linear | TokenEmbedding:
    """What makes vectors of states or actions."""
    return TokenEmbedding(size, embed_dim, what) if discrete else nn.Linear(size, embed_dim)


def _embedded(name: str, given: Tensor, embed: nn.Module) -> Tensor:
    """States or actions as vectors, (B, T, embed_dim)."""
    if isinstance(embed, nn.Linear):
        require_vectors(name, given, embed.in_features)
    elif isinstance(given, Tensor) and given.ndim != 2:
        raise ValueError(f"{name} must be a tensor of integers of shape (B, T) (got shape {tuple(given.shape)})")
    return embed(given)

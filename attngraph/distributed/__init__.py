"""Attention on a graph over many devices: `distribute` it, and the same `attend` takes own rows in, own rows out."""

from attngraph.distributed.distribute import distribute
from attngraph.distributed.exchange import CommunicationError
from attngraph.distributed.partition import Partition
from attngraph.distributed.sharded import ShardedPlan
from attngraph.distributed.strategies import Strategies, Strategy, compare_strategies

__all__ = [
    "CommunicationError", "Partition", "ShardedPlan", "Strategies", "Strategy", "compare_strategies", "distribute",
]  # fmt: skip

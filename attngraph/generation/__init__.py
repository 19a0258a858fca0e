"""Decoding from language models."""

from attngraph.generation.kv_cache import KVCache
from attngraph.generation.sampling import generate

__all__ = ["KVCache", "generate"]

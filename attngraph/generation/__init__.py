"""Decoding from language models."""

from attngraph.generation.decoding import Scored, generate, stream
from attngraph.generation.kv_cache import KVCache

__all__ = ["KVCache", "Scored", "generate", "stream"]

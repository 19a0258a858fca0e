"""Decoding from language models."""

from attngraph.generation.decoding import Scored, generate, stream
from attngraph.generation.kv_cache import KVCache
from attngraph.generation.speculative import DraftModel, PromptLookup, Proposal, speculate

__all__ = ["DraftModel", "KVCache", "PromptLookup", "Proposal", "Scored", "generate", "speculate", "stream"]

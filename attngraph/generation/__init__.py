"""Decoding from language models."""

from attngraph.generation.decoding import Scored, generate, stream
from attngraph.generation.kv_cache import KVCache
from attngraph.generation.masked import Filled, drafts, unmask
from attngraph.generation.speculative import DraftModel, PromptLookup, Proposal, speculate

__all__ = [
    "DraftModel",
    "Filled",
    "KVCache",
    "PromptLookup",
    "Proposal",
    "Scored",
    "drafts",
    "generate",
    "speculate",
    "stream",
    "unmask",
]

"""Decoding from language models."""

from attngraph.generation.sampling import generate

__all__ = ["generate"]

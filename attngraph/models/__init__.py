"""The classics, a screenful each: embed → Transformer(graph) → head."""

from attngraph.models.gpt import GPT

__all__ = ["GPT"]

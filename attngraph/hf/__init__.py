"""Hugging Face: pretrained models as models of this library, whose graph can then be changed."""

from attngraph.hf.checkpoints import load, save

__all__ = ["load", "save"]

"""Hugging Face: any model run on a graph; and pretrained models as models of this library."""

from attngraph.hf.checkpoints import load, save
from attngraph.hf.connecting import connect, disconnect
from attngraph.hf.modules import attention_modules

__all__ = ["attention_modules", "connect", "disconnect", "load", "save"]

"""The classics, a screenful each: embed → Transformer(graph) → head."""

from attngraph.models.decision import DecisionTransformer
from attngraph.models.encoder import Encoder
from attngraph.models.encoder_decoder import EncoderDecoder
from attngraph.models.gpt import GPT
from attngraph.models.saved import Model
from attngraph.models.vit import ViT

__all__ = ["GPT", "DecisionTransformer", "Encoder", "EncoderDecoder", "Model", "ViT"]

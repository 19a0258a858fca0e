"""The families of pretrained models, by their model_type.

A family differs from the others in its switches and in its graph; the rest is names.
"""

from __future__ import annotations

from attngraph.hf.decoders import DECISION, GPT2, LLAMA, MISTRAL, PHI3, QWEN2, QWEN3
from attngraph.hf.encoders import BERT, BERT_SEQUENCES, BERT_TOKENS, DISTILBERT, ROBERTA, VIT
from attngraph.hf.family import Family
from attngraph.hf.sequences import BART, T5, WHISPER

FAMILIES: dict[str, tuple[Family, ...]] = {
    "gpt2": (GPT2,),
    "bert": (BERT, BERT_SEQUENCES, BERT_TOKENS),
    "roberta": (ROBERTA,),
    "distilbert": (DISTILBERT,),
    "vit": (VIT,),
    "t5": (T5,),
    "bart": (BART,),
    "whisper": (WHISPER,),
    "llama": (LLAMA,),
    "mistral": (MISTRAL,),
    "qwen2": (QWEN2,),
    "qwen3": (QWEN3,),
    "phi3": (PHI3,),
    "decision_transformer": (DECISION,),
}

"""Modules: communicate (`Attention`), compute (`FeedForward`), and both in turn (`Transformer`)."""

from attngraph.nn.attention import Attention
from attngraph.nn.embedding import AudioEmbedding, PatchEmbedding, TokenEmbedding
from attngraph.nn.feedforward import FeedForward
from attngraph.nn.heaviest import Heaviest
from attngraph.nn.mel import LogMelSpectrogram
from attngraph.nn.pooling import pool
from attngraph.nn.positions import (
    AlibiPositions,
    LearnedPositions,
    RelativePositions,
    Rotary,
    SinusoidalPositions,
    rotate,
)
from attngraph.nn.random_walks import random_walk_positions
from attngraph.nn.recording import Recorded, Recording
from attngraph.nn.transformer import Block, Transformer, TransformerConfig

__all__ = [
    "AlibiPositions",
    "Attention",
    "AudioEmbedding",
    "Block",
    "FeedForward",
    "Heaviest",
    "LearnedPositions",
    "LogMelSpectrogram",
    "PatchEmbedding",
    "Recorded",
    "Recording",
    "RelativePositions",
    "Rotary",
    "SinusoidalPositions",
    "TokenEmbedding",
    "Transformer",
    "TransformerConfig",
    "pool",
    "random_walk_positions",
    "rotate",
]

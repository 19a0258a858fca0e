"""ViT: patches → Transformer(Full()) → class. The graph may follow the image's own grid."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, cast

import torch
from torch import Tensor, nn

from attngraph.arguments import checked
from attngraph.graph.algebra import Full
from attngraph.graph.base import Graph, require_ints
from attngraph.models.saved import Model
from attngraph.nn.computed import Graphs, OneGraph, is_one
from attngraph.nn.embedding import PatchEmbedding
from attngraph.nn.padding import padding_mask
from attngraph.nn.transformer import Biases, Transformer, TransformerConfig


class ViT(Model):
    """An image as a graph of its patches (Dosovitskiy et al. 2021).

    Args:
        config: the Transformer's switches; the number of learned positions, max_length, is that of all nodes.
        num_classes: how many logits.
        image_size, patch_size: in pixels; one number for squares, or (height, width).
        channels: numbers of a pixel.
        graph: which patches hear which, row by row; one for all layers or one for each. With `pool="cls"` a node that
            hears and is heard by all patches is put in front; a function is given that node too, the first.
        pool: what is classified: the CLS node, or the mean of the patches.

    >>> from attngraph import Neighborhood
    >>> from attngraph.nn import TransformerConfig
    >>> config = TransformerConfig(embed_dim=64, num_layers=2, num_heads=4, max_length=17)
    >>> model = ViT(config, num_classes=10, image_size=8, patch_size=2, channels=1, graph=Neighborhood((4, 4), 1))
    >>> model(torch.randn(3, 1, 8, 8)).shape
    torch.Size([3, 10])
    """

    @checked
    def __init__(
        self,
        config: TransformerConfig,
        num_classes: int,
        *,
        image_size: int | tuple[int, int],
        patch_size: int | tuple[int, int],
        channels: int = 3,
        graph: Graphs = Full(),  # noqa: B008  a graph is a value
        pool: Literal["cls", "mean"] = "cls",
    ):
        super().__init__()
        if pool not in ("cls", "mean"):
            raise ValueError(f"pool must be cls or mean (got {pool!r})")
        require_ints(1, num_classes=num_classes)
        self.config, self.pool = config, pool
        self.patches = PatchEmbedding(_pair(image_size), _pair(patch_size), channels, config.embed_dim)
        self.cls = nn.Parameter(torch.empty(config.embed_dim)) if pool == "cls" else None
        graphs = [graph] if is_one(graph) else list(cast(Sequence, graph))
        if pool == "cls":
            graphs = [_with_cls(each, self.num_patches) for each in graphs]
        nodes = self.num_patches + (pool == "cls")
        if config.position == "learned" and (config.max_length or 0) < nodes:
            what = f"{self.num_patches} patches" + (" and CLS" if pool == "cls" else "")
            raise ValueError(f"max_length must be at least {nodes}: {what} (got {config.max_length})")
        self.transformer = Transformer(config, graphs[0] if is_one(graph) else graphs)
        self.head = nn.Linear(config.embed_dim, num_classes)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """What is its own, the vector of CLS."""
        if self.cls is not None:
            nn.init.normal_(self.cls, std=0.02)

    def _arguments(self):
        return {
            "config": self.config,
            "num_classes": self.head.out_features,
            "image_size": self.patches.image_size,
            "patch_size": self.patches.patch_size,
            "channels": self.patches.channels,
            "pool": self.pool,
        }

    @property
    def num_patches(self) -> int:
        """How many nodes an image has, without CLS."""
        return self.patches.grid[0] * self.patches.grid[1]

    def forward(
        self,
        images: Tensor,
        graph: Graphs | None = None,
        *,
        bias: Biases = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """images (B, channels, height, width) → logits (B, num_classes).

        `graph` and `bias`, as in `Transformer`, are of all nodes, CLS first; `attention_mask`, bool or integers 0 and
        1, (B, patches), is False or 0 for patches that are not to be heard.
        """
        x = self.patches(images)
        mask = padding_mask("attention_mask", attention_mask, x)
        if self.cls is not None:
            x = torch.cat([self.cls.expand(len(x), 1, -1), x], dim=1)
            mask = mask if mask is None else torch.cat([torch.ones_like(mask[:, :1]), mask], dim=1)
        places = torch.arange(x.shape[1], device=x.device)  # in the image, whatever is to be heard
        positions = places if self.transformer.takes_positions else None
        x = self.transformer(x, graph, bias=bias, positions=positions, attention_mask=mask)
        if self.cls is None:
            weight = torch.ones_like(x[..., :1]) if mask is None else mask[..., None].to(x.dtype)
            return self.head((x * weight).sum(-2) / weight.sum(-2).clamp(min=1))
        return self.head(x[:, 0])


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    pair = (size, size) if isinstance(size, int) else tuple(size)
    if len(pair) != 2:
        raise ValueError(f"image_size and patch_size are a number, or (height, width) (got {size!r})")
    return pair


def _with_cls(graph: OneGraph, patches: int) -> OneGraph:
    """The graph of the patches and a CLS node in front."""
    return (
        graph if graph == Full() or not isinstance(graph, Graph) else graph.sized(patches, patches).with_global_nodes(1)
    )

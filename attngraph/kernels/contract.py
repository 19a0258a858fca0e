"""What passes between layouts and kernels: a bias as kernels take it, and the protocols of the layouts they read."""

from __future__ import annotations

from typing import Literal, NamedTuple

from torch import Tensor

BiasKind = Literal["offset", "edge", "dense"]


class ScoreBias(NamedTuple):
    """What is added to the scores, after the scale.

    | kind | values | added to the score of query i and key j |
    |---|---|---|
    | "offset" | (H or 1, N + M - 1) | values[h, j - i + N - 1] |
    | "edge" | (B or 1, H or 1, E) | values[b, h, e], e the number of the edge in edge_index order |
    | "dense" | (B or 1, H or 1, N or 1, M) | values[b, h, i, j] |
    """

    kind: BiasKind
    values: Tensor

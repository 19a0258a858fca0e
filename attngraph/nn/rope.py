"""The frequencies of rotary positions, and how they are changed to read longer texts than were trained on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from attngraph.arguments import checked


class Rope:
    """base^(-2i/D) for i < D/2, scaled; and the amplitude of the turned vectors.

    Computed in float32 and in this order, as pretrained models were.
    """

    BY_LENGTH = ("dynamic", "longrope")  # the frequencies depend on how long the text is

    @checked
    def __init__(self, head_dim: int, base: float = 10000.0, scaling: Mapping[str, Any] | None = None):
        self.head_dim, self.base, self.scaling = head_dim, base, dict(scaling or {})
        self.kind = self.scaling.get("rope_type", self.scaling.get("type", "" if self.scaling else "default"))
        if not isinstance(self.kind, str) or self.kind not in RULES:
            raise ValueError(f"rope_type of a rotary scaling must be one of {', '.join(RULES)} (got {self.kind!r})")
        if not 1 < base < math.inf:
            raise ValueError(f"the base of rotary positions must be above 1 (got {base})")
        if self.kind == "dynamic" and head_dim == 2:
            raise ValueError("a rotary scaling of rope_type 'dynamic' needs a head_dim of 4 or more (got 2)")
        rule, needed = RULES[self.kind]
        missing = [name for name in needed if self.scaling.get(name) is None]
        if missing:
            raise ValueError(f"a rotary scaling of rope_type {self.kind!r} needs {', '.join(missing)}")
        for name in ("factor", TRAINED):
            value = self.scaling.get(name)
            number = value if isinstance(value, int | float) and not isinstance(value, bool) else 0
            if name in needed and not 0 < number < 1e18:
                raise ValueError(f"{name} of a rotary scaling must be a number above 0 (got {value!r})")
        for name in ("short_factor", "long_factor"):
            if name in needed and len(self.scaling[name]) != head_dim // 2:
                raise ValueError(f"{name} must have {head_dim // 2} numbers (got {len(self.scaling[name])})")
        self.rule = rule
        self.amplitude = _amplitude(self.kind, self.scaling)

    @property
    def meaning(self) -> dict[str, Any] | None:
        """The scaling without what its kind does not read, or has by default; None where nothing is scaled."""
        if self.kind == "default":
            return None
        needed, defaults = RULES[self.kind][1], DEFAULTS.get(self.kind, {})
        changed = [name for name, default in defaults.items() if self.scaling.get(name, default) != default]
        return {"rope_type": self.kind, **{name: self.scaling[name] for name in (*needed, *changed)}}

    def frequencies(self, length: Tensor) -> Tensor:
        """Radians for each position, (D/2,); or (..., D/2) for texts of these lengths, where they make a difference."""
        return self.rule(self, self.scaling, length)

    def plain(self, device: torch.device, base: float | Tensor | None = None) -> Tensor:
        """As they are without scaling; of several bases (..., 1), those of each."""
        exponent = torch.arange(0, self.head_dim, 2, device=device).float() / self.head_dim
        return 1.0 / (self.base if base is None else base) ** exponent


def _default(rope: Rope, given: Mapping[str, Any], length: Tensor) -> Tensor:
    return rope.plain(length.device)


def _linear(rope: Rope, given: Mapping[str, Any], length: Tensor) -> Tensor:
    """All positions closer together (Chen et al. 2023)."""
    return rope.plain(length.device) / given["factor"]


def _dynamic(rope: Rope, given: Mapping[str, Any], length: Tensor) -> Tensor:
    """A base that grows with the text, beyond the length that was trained on (bloc97 and emozilla 2023)."""
    trained = given["original_max_position_embeddings"]
    stretch = given["factor"] * length.clamp(min=trained).float() / trained - (given["factor"] - 1)
    return rope.plain(length.device, rope.base * stretch[..., None] ** (rope.head_dim / (rope.head_dim - 2)))


def _yarn(rope: Rope, given: Mapping[str, Any], length: Tensor) -> Tensor:
    """Slow turns stretched, fast ones kept, between them a ramp (Peng et al. 2023)."""
    dim, trained = rope.head_dim, given["original_max_position_embeddings"]

    def pair_with_rotations(rotations: float) -> float:
        return dim * math.log(trained / (rotations * 2 * math.pi)) / (2 * math.log(rope.base))

    low = pair_with_rotations(given.get("beta_fast") or 32)
    high = pair_with_rotations(given.get("beta_slow") or 1)
    if given.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = ((torch.arange(dim // 2, device=length.device).float() - low) / (high - low or 0.001)).clamp(0, 1)
    plain = rope.plain(length.device)
    return plain / given["factor"] * ramp + plain * (1 - ramp)


def _longrope(rope: Rope, given: Mapping[str, Any], length: Tensor) -> Tensor:
    """A factor of its own for each frequency, others for long texts (Ding et al. 2024)."""
    short, long = (
        torch.tensor(given[name], dtype=torch.float32, device=length.device) for name in ("short_factor", "long_factor")
    )
    is_long = length[..., None] > given["original_max_position_embeddings"]
    return rope.plain(length.device) / torch.where(is_long, long, short)


def _llama3(rope: Rope, given: Mapping[str, Any], length: Tensor) -> Tensor:
    """Long wavelengths stretched, smoothly between two bounds (Llama 3.1, 2024)."""
    low, high, factor = given["low_freq_factor"], given["high_freq_factor"], given["factor"]
    frequencies = rope.plain(length.device)
    turns = given["original_max_position_embeddings"] * frequencies / (2 * math.pi)  # over the original context
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * ((1 - smooth) / factor + smooth)


def _amplitude(kind: str, given: Mapping[str, Any]) -> float:
    if kind not in ("yarn", "longrope"):
        return 1.0
    if given.get("attention_factor") is not None:
        return given["attention_factor"]
    factor = given["factor"]
    if kind == "longrope":
        trained = given["original_max_position_embeddings"]
        return math.sqrt(1 + math.log(factor) / math.log(trained)) if factor > 1 else 1.0

    def scaled(mscale: float) -> float:
        return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0

    mscale, mscale_all_dim = given.get("mscale"), given.get("mscale_all_dim")
    return scaled(mscale) / scaled(mscale_all_dim) if mscale and mscale_all_dim else scaled(1.0)


TRAINED = "original_max_position_embeddings"
RULES = {
    "default": (_default, ()),
    "linear": (_linear, ("factor",)),
    "dynamic": (_dynamic, ("factor", TRAINED)),
    "yarn": (_yarn, ("factor", TRAINED)),
    "longrope": (_longrope, ("factor", "long_factor", "short_factor", TRAINED)),
    "llama3": (_llama3, ("factor", "low_freq_factor", "high_freq_factor", TRAINED)),
}
DEFAULTS = {  # of what a rule reads and does not need
    "yarn": {
        "attention_factor": None, "mscale": None, "mscale_all_dim": None,
        "beta_fast": 32, "beta_slow": 1, "truncate": True,
    },
    "longrope": {"attention_factor": None},
}  # fmt: skip

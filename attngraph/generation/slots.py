"""The slots of a running cache: what is in them, what new queries hear of it, and attention over them."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from attngraph.attention import attend
from attngraph.bias import Alibi, RelativeBias
from attngraph.generation.schedule import Schedule
from attngraph.graph.algebra import Full
from attngraph.graph.patterns import Tree
from attngraph.kernels.scoring import Elementwise, normalizer
from attngraph.nn.attention import Scoring
from attngraph.nn.positions import Rotary, rotate

SPARSE = 4  # where queries hear so many times fewer keys than there are slots, the keys are gathered

Nodes = int | Tensor
"""The number of the next node: of all rows, or of each, (B,)."""


class Step(NamedTuple):
    """What the new nodes of a call hear."""

    write: int | Tensor | None
    """The first of the slots that their keys take one after the other; that of each row (B,); or None: beside the
    slots, until it is known which of them stay."""
    used: int
    """So many slots are read, from the first on."""
    mask: Tensor | None = None
    """Added to the scores of the slots, and of keys beside: (B | 1, H | 1, T, keys)."""
    heard: Tensor | None = None
    """The slots that are heard, int64 (E,), where they are few."""
    rotary: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None
    """What turns the queries and the keys, where these are kept as they are."""


class Track:
    """Which key is in which slot, while a cache runs; of all layers and heads whose graph is the same.

    Args:
        schedule: the slots of the graph's keys.
        heads: the query heads whose graph it is; None for all.
        brings_keys: whether new nodes bring keys, or all are of the memory.
        rotary: what turns keys by their place among those kept; None where they are turned already.
    """

    def __init__(self, schedule: Schedule, heads: tuple[int, ...] | None, brings_keys: bool, rotary: Rotary | None):
        self.schedule, self.heads, self.brings_keys, self.rotary = schedule, heads, brings_keys, rotary
        self.nodes: Nodes = 0
        self.count = 0
        self.tree: Tree | None = None
        self._step: Step | None = None
        self.rows: Tensor | None = None  # (B, slots): the key in each, -1 for none; of rows of a batch that differ
        self._keys = np.full(schedule.capacity, -1)  # the same of rows that are alike, of keys before `_known`
        self._known = 0

    # ------------------------------------------------------------------------------------------- which keys are where

    def start(self, real: Tensor | None, nodes: Nodes, batch: int, count: int, device: torch.device) -> None:
        """After a prompt with so many keys, of which some may be padding, real (B, keys): who has which slots."""
        if real is None and isinstance(nodes, int):
            return
        slots, last = self.schedule.tensors(device)
        keys = torch.arange(count, device=device)
        stays = last[keys] >= (nodes[:, None] if isinstance(nodes, Tensor) else nodes)
        stays = stays.expand(batch, count) if real is None else stays & real
        row, key = stays.nonzero().unbind(1)
        self.rows = torch.full((batch, self.schedule.capacity), -1, device=device)
        self.rows[row, slots[key]] = key

    def prompt(self, nodes: Nodes, count: int, device: torch.device) -> tuple[Tensor | None, Tensor, Tensor]:
        """Of a prompt's keys those that stay, row by row where rows differ: the row, key and slot of each."""
        slots, last = self.schedule.tensors(device)
        if self.rows is None:
            key = (last[:count] >= nodes).nonzero()[:, 0]
            return None, key, slots[key]
        row, slot = (self.rows >= 0).nonzero().unbind(1)
        return row, self.rows[row, slot], slot

    def begin(self, nodes: Nodes, count: int, tree: Tree | None = None) -> None:
        """A call with so many new nodes begins."""
        self.nodes, self.count, self.tree, self._step = nodes, count, tree, None

    def step(self, bias: Alibi | RelativeBias | None, like: Tensor) -> Step:
        """What the new nodes hear, found once for all layers of the call."""
        if self._step is None:
            self._step = self._of_rows(bias, like) if self.rows is not None else self._alike(bias, like)
        return self._step

    def commit(self, path: Tensor | None) -> tuple[Tensor | None, Tensor, Tensor]:
        """The new nodes, or of a tree those of a path, are part of the text: the row, number and slot of each key that
        is kept; no row where all are alike."""
        if self.rows is None:
            assert isinstance(self.nodes, int)
            count = self.count if path is None else len(path)
            first = self.schedule.memory + self.nodes
            keys = np.arange(first, first + count)
            alive = torch.from_numpy(self.schedule.last[keys] >= self.nodes + count)
            chosen = torch.arange(count) if path is None else path
            return None, chosen[alive], torch.from_numpy(self.schedule.slots[keys])[alive]
        slots, last = self.schedule.tensors(self.rows.device)
        nodes = self._new_nodes(self.rows.device).expand(len(self.rows), self.count)
        row, new = (last[nodes + self.schedule.memory] > nodes[:, -1:]).nonzero().unbind(1)
        key = nodes[row, new] + self.schedule.memory
        self.rows[row, slots[key]] = key
        return row, new, slots[key]

    @property
    def is_beside(self) -> bool:
        """Whether the new keys have no slots yet."""
        assert self._step is not None
        return self._step.write is None

    @property
    def write(self) -> int:
        """The first of the slots that new keys have taken one after the other."""
        assert self._step is not None
        assert isinstance(self._step.write, int)
        return self._step.write

    def reorder(self, index: Tensor) -> None:
        """The rows with these numbers, in their place."""
        if self.rows is not None:
            self.rows = self.rows[index]

    # --------------------------------------------------------------------------------------- what the new nodes hear

    def _alike(self, bias: Alibi | RelativeBias | None, like: Tensor) -> Step:
        """In rows that are alike."""
        assert isinstance(self.nodes, int)
        node, schedule = self.nodes, self.schedule
        write, used = self._place()
        is_plain = self.count == 1 and self.tree is None and bias is None and self.rotary is None
        if is_plain and write is not None and schedule.is_whole[node]:
            return Step(write, used)
        keys = torch.from_numpy(self._held(node)[:used])
        new = self._new_nodes(torch.device("cpu")) + schedule.memory
        if not self.brings_keys:
            pass
        elif write is None:
            keys = torch.cat([keys, new])
        else:
            assert isinstance(write, int)
            keys = keys.clone()
            keys[write : write + self.count] = new
        keys = keys.to(like.device)
        queries = self._new_nodes(like.device)
        degree = int(schedule.degrees[:, node].max())
        allowed = self._allowed(queries[:, None], keys[None], write)
        rotary = None if self.rotary is None else self._turned(queries, keys, like)
        few = self.count == 1 and bias is None and rotary is None and self.brings_keys and schedule.graph.heads is None
        if few and write is not None and 0 <= degree * SPARSE <= used and allowed.any():
            return Step(write, used, heard=allowed[0].nonzero()[:, 0])
        added = None if bias is None else self._bias(bias, queries[:, None], keys[None] - schedule.memory)
        mask = _mask(allowed, added, like)
        return Step(write, used, mask.view(1, -1, *mask.shape[-2:]), rotary=rotary)

    def _of_rows(self, bias: Alibi | RelativeBias | None, like: Tensor) -> Step:
        """In rows of which each has come to another node, or has padding of its own."""
        assert self.rows is not None
        queries, keys, write = self._new_nodes(self.rows.device), self.rows, None
        queries = queries.expand(len(keys), self.count)
        if self.brings_keys:
            new = queries + self.schedule.memory
            if self.count == 1:
                write = self.schedule.tensors(keys.device)[0][new[:, 0]]
                keys.scatter_(1, write[:, None], new)
            else:
                keys = torch.cat([keys, new], dim=1)
        allowed = self._allowed(queries[:, :, None], keys[:, None], write)
        rotary = None if self.rotary is None else self._turned(queries, keys, like)
        added = None
        if bias is not None:
            added = self._bias(bias, queries[:, :, None], keys[:, None] - self.schedule.memory)
        mask = _mask(allowed, added, like)
        mask = mask[:, None] if mask.ndim == 3 else mask.transpose(0, 1)
        return Step(write, self.rows.shape[1], mask, rotary=rotary)

    def _place(self) -> tuple[int | None, int]:
        """The first slot of the new keys, None where they would be in the place of others that are still heard; and
        how many slots are read."""
        assert isinstance(self.nodes, int)
        node, count, schedule = self.nodes, self.count, self.schedule
        if not self.brings_keys:
            return 0, schedule.capacity
        first = schedule.memory + node
        slots = schedule.slots[first : first + count]
        if count == 1 and self.tree is None:
            return int(slots[0]), int(schedule.used[node])
        used = int(schedule.used[node - 1]) if node else schedule.memory
        free = len(slots) == count and bool((slots == slots[0] + np.arange(count)).all())
        if free:
            there = self._held(node)[slots]
            free = not (schedule.last[there[there >= 0]] >= node).any()
        return (int(slots[0]), max(used, int(slots[-1]) + 1)) if free else (None, used)

    def _held(self, node: int) -> np.ndarray:
        """The key in each slot when a node comes: of keys one after the other, the last is there."""
        upto = min(self.schedule.memory + node, self.schedule.num_keys)
        if upto < self._known:  # it began anew
            self._keys[:], self._known = -1, 0
        new = np.arange(self._known, upto)
        self._keys[self.schedule.slots[new]] = new
        self._known = upto
        return self._keys

    def _new_nodes(self, device: torch.device) -> Tensor:
        """The numbers of the new nodes, (T,) or (B, T): of a tree, those of its levels."""
        step = torch.arange(self.count, device=device) if self.tree is None else depths(self.tree).to(device)
        return self.nodes[:, None] + step if isinstance(self.nodes, Tensor) else self.nodes + step

    def _allowed(self, queries: Tensor, keys: Tensor, write: int | Tensor | None) -> Tensor:
        """Which queries hear which keys, -1 for none: bool (…, T, keys), heads first where they differ."""
        allowed = self.schedule.graph.contains(queries, keys.clamp(min=0)) & (keys >= 0)
        if self.tree is not None and self.brings_keys:
            first = allowed.shape[-1] - self.count if write is None else write
            assert isinstance(first, int)
            allowed[..., first : first + self.count] &= self.tree.mask(device=allowed.device)
        return allowed

    def _bias(self, bias: Alibi | RelativeBias, queries: Tensor, keys: Tensor) -> Tensor:
        """What it adds to the scores of these heads: (H, …, T, keys)."""
        found = bias.at(queries, keys)
        return found if self.heads is None else found[list(self.heads)]

    def _turned(self, queries: Tensor, keys: Tensor, like: Tensor) -> Any:
        """cos and sin of the queries and of the keys, by their places among the keys that are kept."""
        assert self.rotary is not None
        last = self.schedule.tensors(keys.device)[1]
        kept = (keys >= 0) & (last[keys.clamp(min=0)] >= queries[..., :1])
        order = keys.where(kept, len(last)).argsort(-1).argsort(-1)
        dtype = torch.promote_types(like.dtype, torch.float32)
        count = kept.sum(-1, keepdim=True) - self.count
        step = torch.arange(self.count, device=keys.device)
        return self.rotary(count + step, dtype), self.rotary(order, dtype)


class HeadGroup:
    """The keys and values of the heads of a layer whose graph is one: (B, heads, slots, D)."""

    def __init__(self, track: Track, kv_heads: tuple[int, ...] | None):
        self.track, self.kv_heads = track, kv_heads
        self.keys = self.values = torch.empty(0)
        self.beside: tuple[Tensor, Tensor] | None = None  # new keys and values without a slot

    def attend(self, q: Tensor, k: Tensor | None, v: Tensor | None, bias: Any, scoring: Scoring) -> Tensor:
        """q (B, H, T, D), k and v (B, Hkv, T, ·) of the new nodes, None in a memory → (B, H, T, Dv)."""
        write, used, mask, heard, rotary = self.track.step(bias, q)
        if k is not None and v is not None:
            self._put(k, v, write)
        keys, values = self.keys.narrow(2, 0, used), self.values.narrow(2, 0, used)
        if heard is not None:
            keys, values = keys.index_select(2, heard), values.index_select(2, heard)
        elif self.beside is not None:
            keys, values = torch.cat([keys, self.beside[0]], dim=2), torch.cat([values, self.beside[1]], dim=2)
        if rotary is not None:
            q, keys = rotate(q, *rotary[0]), rotate(keys, *rotary[1])
        normalize = scoring.get("normalize", "softmax")
        if "score" in scoring:
            options = {**scoring, "normalize": of_slots(normalize)}
            return cast(Tensor, attend(q, keys, values, Full(), bias=mask, **options))
        return over_slots(q, keys, values, mask, scoring.get("scale"), normalize)

    def _put(self, k: Tensor, v: Tensor, write: int | Tensor | None) -> None:
        """The new keys and values in their slots."""
        self.beside = None
        if write is None:
            self.beside = k, v
        elif isinstance(write, int):
            self.keys.narrow(2, write, k.shape[2]).copy_(k)
            self.values.narrow(2, write, k.shape[2]).copy_(v)
        else:
            row = torch.arange(len(write), device=write.device)
            self.keys[row, :, write], self.values[row, :, write] = k[:, :, 0], v[:, :, 0]

    def keep_prompt(self, k: Tensor, v: Tensor, nodes: Nodes) -> None:
        """What of a prompt's keys and values, of all heads of the layer, is still to be heard."""
        k, v = (side if self.kv_heads is None else side[:, list(self.kv_heads)] for side in (k, v))
        row, key, slot = self.track.prompt(nodes, k.shape[2], k.device)
        with torch.inference_mode(False):  # which would not let them be written to outside of it
            shape = *k.shape[:2], self.track.schedule.capacity
            self.keys, self.values = (
                torch.zeros(*shape, side.shape[3], dtype=side.dtype, device=side.device) for side in (k, v)
            )
        for kept, side in ((self.keys, k), (self.values, v)):
            if row is None:
                kept.index_copy_(2, slot, side.index_select(2, key))
            else:
                kept[row, :, slot] = side[row, :, key]

    def commit(self, path: Tensor | None, row: Tensor | None, new: Tensor, slot: Tensor) -> None:
        """New keys and values, or of a tree those of a path, in the slots that they have from now on."""
        if self.beside is not None:
            new, slot = new.to(self.keys.device), slot.to(self.keys.device)
            for kept, side in zip((self.keys, self.values), self.beside, strict=True):
                if row is None:
                    kept.index_copy_(2, slot, side.index_select(2, new))
                else:
                    kept[row, :, slot] = side[row, :, new]
            self.beside = None
        elif path is not None:
            write = self.track.write
            for kept in (self.keys, self.values):
                kept[:, :, write : write + len(path)] = kept.index_select(2, path.to(kept.device) + write)


def of_slots(normalize: str) -> str | Elementwise:
    """A normaliser of scores that are -inf where there is no edge, of which "none" too is to make a weight of 0."""
    return (lambda scores: scores.where(scores > -torch.inf, 0)) if normalize == "none" else normalize


def over_slots(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None, normalize: str = "softmax"
) -> Tensor:
    """normalize(scale · q kᵀ + mask) v of few queries: those of the heads that share a key head are queries of one."""
    heads, count = q.shape[1:3]
    shared = heads // k.shape[1]
    if shared > 1:
        q = q.unflatten(1, (-1, shared)).flatten(2, 3)
        if mask is not None and mask.shape[1] > 1:
            mask = mask.unflatten(1, (-1, shared)).flatten(2, 3)
        elif mask is not None and count > 1:
            mask = mask.repeat(1, 1, shared, 1)
    if normalize == "softmax":
        out = scaled_dot_product_attention(q, k, v, mask, scale=scale)
    else:
        out = _weighted(q, k, v, mask, scale, normalizer(of_slots(normalize)))
    return out if shared == 1 else out.unflatten(2, (shared, count)).flatten(1, 2)


def _weighted(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None, weights_of: Elementwise
) -> Tensor:
    """Of scores that each are a weight by themselves, in float32 or more."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    scores = (q.to(dtype) @ k.to(dtype).mT) * (q.shape[-1] ** -0.5 if scale is None else scale)
    return (weights_of(scores if mask is None else scores + mask) @ v.to(dtype)).to(v.dtype)


def _mask(allowed: Tensor, bias: Tensor | None, like: Tensor) -> Tensor:
    """-inf where there is no edge, else the bias or 0, each (H, …, T, keys) or without heads."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    zero = torch.zeros((), dtype=dtype, device=like.device) if bias is None else bias.to(dtype)
    return torch.where(allowed, zero, -torch.inf)


def depths(tree: Tree) -> Tensor:
    """How many ancestors each node of a tree has, int64 (N,)."""
    return tree.in_degrees() - 1

"""Which weights are dropped: a pure function of (seed, batch, head, query, key), the same in every kernel.

No mask is stored: forward and backward passes, backends and the parts of a plan compute it where they need it. Numbers
come from the counter-based generator Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3";
the constants are theirs):

    key      (seed mod 2³², seed / 2³²)
    counter  (key // 64 · 16 + key mod 16, query, batch, head)
    word     key // 16 mod 4, of the four that a counter gives

so that sixteen counters serve the 64 keys of a tile. A weight is dropped where its word is below p · 2³²; the others
are divided by 1 - p.
"""

from __future__ import annotations

from torch import Tensor

from attngraph.kernels.contract import Dropout

MULTIPLIER_A, MULTIPLIER_B = 0xD2511F53, 0xCD9E8D57
WEYL_A, WEYL_B = 0x9E3779B9, 0xBB67AE85
ROUNDS = 10
LOW = 0xFFFFFFFF


def threshold(p: float) -> int:
    """The words below which weights are dropped, p · 2³²."""
    return min(round(p * 2**32), LOW)


def keep_factor(p: float) -> float:
    """What the weights that are kept are multiplied by."""
    return 1 / (1 - p)


def kept(dropout: Dropout, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """Which weights are kept: int64 numbers that broadcast to one shape → bool of that shape.

    Queries and keys are those at hand; they count by the numbers that `Dropout.nodes` gives them.
    """
    if dropout.nodes is not None:
        query, key = dropout.nodes.queries[query], dropout.nodes.keys[key]
    words = philox(dropout.seed.to(key.device), (key // 64 * 16 + key % 16, query, batch, head))
    lane, word = key // 16 % 4, words[0]
    for number in (1, 2, 3):
        word = word.where(lane != number, words[number])
    return word >= threshold(dropout.p)


def philox(seed: Tensor, counter: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four words of 32 bits for each counter; all int64, the words and the counters below 2³²."""
    key_0, key_1 = seed & LOW, (seed >> 32) & LOW
    c0, c1, c2, c3 = counter
    for _ in range(ROUNDS):
        # Products pass 2⁶³ and wrap, which leaves their bits right.
        product_0, product_2 = c0 * MULTIPLIER_A, c2 * MULTIPLIER_B
        c0, c1 = (product_2 >> 32) & LOW ^ c1 ^ key_0, product_2 & LOW
        c2, c3 = (product_0 >> 32) & LOW ^ c3 ^ key_1, product_0 & LOW
        key_0, key_1 = (key_0 + WEYL_A) & LOW, (key_1 + WEYL_B) & LOW
    return c0, c1, c2, c3

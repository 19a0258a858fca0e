"""What `attend` costs over bare scaled_dot_product_attention, where it calls just that: Causal and Full.

    python -m benchmarks.overhead

The goal is at most 1.02 times its time at N = 1024, H = 8, D = 64, forward and forward + backward.
"""

from __future__ import annotations

import argparse

import torch
from torch.nn.functional import scaled_dot_product_attention

from attngraph import Causal, Full, attend
from benchmarks.measure import paired, record, spread


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=60)
    repeats = parser.parse_args().repeats
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 8, 1024, 64, requires_grad=True) for _ in range(3))
    upstream = torch.randn(1, 8, 1024, 64)

    def forward(attention):
        with torch.no_grad():
            return attention()

    def both(attention):
        return torch.autograd.grad(attention(), (q, k, v), upstream)

    figures = {}
    print(f"{'':24} {'attend / SDPA':>22} {'attend, ms':>24} {'SDPA, ms':>24}")
    for graph in (Causal(), Full()):

        def ours(graph=graph):
            return attend(q, k, v, graph)

        def theirs(causal=str(graph) == "Causal()"):
            return scaled_dot_product_attention(q, k, v, is_causal=causal)

        assert torch.allclose(ours(), theirs(), atol=1e-6)
        for name, phase in (("forward", forward), ("forward + backward", both)):
            found = paired(lambda: phase(ours), lambda: phase(theirs), repeats)  # noqa: B023  called at once
            figures[f"{graph} {name}"] = found
            columns = spread(found["ratio"]), spread(found["ours_ms"], 2), spread(found["theirs_ms"], 2)
            print(f"{graph!s:9}{name:15} {columns[0]:>22} {columns[1]:>24} {columns[2]:>24}")
    print(f"median (quartiles) of {repeats} pairs; recorded in {record('overhead', figures)}")


if __name__ == "__main__":
    main()

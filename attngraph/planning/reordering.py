"""Another order of the nodes, in which the edges of a graph lie closer together."""

from __future__ import annotations

import torch
from torch import Tensor

SAMPLED_NODES, STEPS = 7, 3  # from which it is estimated how far edges reach in any order


def bandwidth_order(query: Tensor, key: Tensor, n: int) -> Tensor:
    """The nodes so ordered that neighbours lie close: reverse Cuthill–McKee (George & Liu 1981), as SciPy has it."""
    import numpy as np
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import reverse_cuthill_mckee

    ones = np.ones(len(query), dtype=np.int8)
    matrix = coo_array((ones, (query.cpu().numpy(), key.cpu().numpy())), shape=(n, n))
    order = reverse_cuthill_mckee((matrix + matrix.T).tocsr(), symmetric_mode=True)
    return torch.from_numpy(order.astype(np.int64)).to(query.device)


def typical_band(start: Tensor, key: Tensor) -> int:
    """About how far apart the ends of edges lie at least, whatever the order of the nodes: of a square graph.

    What some node reaches in r steps, if these are s nodes, lies within r times the bandwidth on either side of it: so
    that is at least s / 2r (Chvátalová 1975). The middle of that of some nodes; the edges of query i are
    key[start[i]] … key[start[i + 1] - 1].
    """
    n, found = len(start) - 1, []
    for node in torch.linspace(0, n - 1, min(n, SAMPLED_NODES)).long().tolist():
        reached = torch.zeros(n, dtype=torch.bool)
        reached[node], least = True, 0
        for steps in range(1, STEPS + 1):
            nodes = reached.nonzero()[:, 0]
            degree = start[nodes + 1] - start[nodes]
            edges = torch.arange(int(degree.sum())) - (degree.cumsum(0) - degree - start[nodes]).repeat_interleave(
                degree
            )
            reached[key[edges]] = True
            least = max(least, int(reached.sum()) // (2 * steps))
        found.append(least)
    return sorted(found)[len(found) // 2]

"""Another order of the nodes, in which the edges of a graph lie closer together."""

from __future__ import annotations

import torch
from torch import Tensor


def bandwidth_order(query: Tensor, key: Tensor, n: int) -> Tensor:
    """The nodes so ordered that neighbours lie close: reverse Cuthill–McKee (George & Liu 1981), as SciPy has it."""
    import numpy as np
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import reverse_cuthill_mckee

    ones = np.ones(len(query), dtype=np.int8)
    matrix = coo_array((ones, (query.cpu().numpy(), key.cpu().numpy())), shape=(n, n))
    order = reverse_cuthill_mckee((matrix + matrix.T).tocsr(), symmetric_mode=True)
    return torch.from_numpy(order.astype(np.int64)).to(query.device)

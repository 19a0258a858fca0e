"""The fewest nodes of a bipartite graph of which every edge has one."""

from __future__ import annotations

import torch
from torch import Tensor

from attngraph.planning.backends.base import INSTALLED


def minimum_vertex_cover(row: Tensor, column: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Which rows and which columns: bool (rows,) and (columns,), from edges int64 (E,), each once.

    By a maximum matching (Hopcroft and Karp 1973, in SciPy) and König's theorem (1931): with Z all that alternating
    paths reach from rows without a partner, the cover is the rows outside of Z and the columns in it. Without SciPy,
    the smaller side. The same whatever the order of the edges.
    """
    if not INSTALLED["scipy"]:
        return torch.full((rows,), rows < columns), torch.full((columns,), rows >= columns)
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import maximum_bipartite_matching

    code = (row * columns + column).sort().values
    row, column = code // columns, code % columns
    start = torch.searchsorted(row, torch.arange(rows + 1))
    adjacency = csr_array((torch.ones(len(row)).numpy(), column.numpy(), start.numpy()), shape=(rows, columns))
    partner = torch.from_numpy(maximum_bipartite_matching(adjacency, perm_type="column")).long()
    row_of = torch.full((columns,), -1)
    row_of[partner[partner >= 0]] = (partner >= 0).nonzero()[:, 0]
    reached, found = partner < 0, torch.zeros(columns, dtype=torch.bool)
    frontier = reached.nonzero()[:, 0]
    while len(frontier):
        count = start[frontier + 1] - start[frontier]
        before = torch.cumsum(count, 0) - count
        edge = torch.repeat_interleave(start[frontier] - before, count) + torch.arange(int(count.sum()))
        new = column[edge].unique()
        new = new[~found[new]]
        found[new] = True
        frontier = row_of[new]  # each has a partner, or the matching were no maximum
        frontier = frontier[~reached[frontier]]
        reached[frontier] = True
    return ~reached, found

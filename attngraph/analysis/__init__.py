"""Questions about graphs, before anything runs: who is reached, does the future leak, what is it going to cost."""

from attngraph.analysis.causality import Leak, is_causal, leak_path, leaks
from attngraph.analysis.costs import Compared, Cost, compare, cost, last_reader, peak_alive
from attngraph.analysis.layers import FAR as FAR
from attngraph.analysis.layers import stack as stack
from attngraph.analysis.reach import diameter, growth, path, reach, receptive_field
from attngraph.analysis.structure import Bottlenecks, bottlenecks, components

__all__ = [
    "Bottlenecks",
    "Compared",
    "Cost",
    "Leak",
    "bottlenecks",
    "compare",
    "components",
    "cost",
    "diameter",
    "growth",
    "is_causal",
    "last_reader",
    "leak_path",
    "leaks",
    "path",
    "peak_alive",
    "reach",
    "receptive_field",
]

"""Graphs of other libraries in and out: PyG, networkx, SciPy, dense masks, FlexAttention."""

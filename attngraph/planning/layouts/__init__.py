"""A graph as kernels read it: tiles, compressed rows, or all pairs."""

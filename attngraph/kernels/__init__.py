"""Layout and tensors in, tensors out. Each file is one strategy; none chooses, validates or knows models."""

"""Sparse drafters: SparseGPT and its baselines."""

"""A model as a graph."""

"""Drafters made out of your own language model, and lossless decoding with them."""

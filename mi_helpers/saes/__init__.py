"""Sparse autoencoders and transcoders: train, measure, read."""

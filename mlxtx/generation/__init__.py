"""Sampling, the token loop, stop strings, sessions and beam search."""

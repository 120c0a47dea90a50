"""Losses as functions: arrays in, a scalar out. The theory of each is in docs/losses.md."""

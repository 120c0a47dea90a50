"""Pallas programs for accelerators. Each computes what a plain form in another package computes."""

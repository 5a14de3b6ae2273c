"""Saving and loading pruned pipelines."""

"""Benchmarks: what pruning, scanning and recovering cost."""

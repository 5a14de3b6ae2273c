"""Measuring pipelines: samples, fidelity to dense, alignment, Fréchet distance, FLOPs."""

"""Numerics of Optimal Brain Surgeon pruning, torch only; values in, values out, nothing of the caller's is changed.

Conventions. A layer computes ``y = W x`` with W of shape (rows, columns) = (outputs, inputs); its statistics are
``H = Σ α_t x xᵀ / Σ α_t n`` of shape (columns, columns), float32 (OBS-Diff 2510.06751 eq. 5; constant factors of H
change neither masks nor updates). Solvers compute in float32 and cast back to the dtype of the weight at the border.
"""

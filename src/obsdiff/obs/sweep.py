"""The OBS sweep of SparseGPT and OBS-Diff: columns left to right, each error pushed onto the columns to its right."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from obsdiff.obs.pattern import NM, Pattern, Unstructured
from obsdiff.obs.select import count_each, drop_lowest, drop_lowest_nm, split_count

BLOCK = 128  # columns whose scores are compared jointly, as published; also those between two large products
SUB_BLOCK = 32  # columns updated one by one before the rest of the block sees them in one product
ROWS = 4096  # solved for together, each a matrix of a sub-block's columns: 16 MiB


def sweep(
    weights: Sequence[Tensor],
    factor: Tensor,
    patterns: Sequence[Pattern],
    compared: int = BLOCK,
    even: bool = True,
    at_once: bool | None = None,
) -> list[tuple[Tensor, Tensor]]:
    """Prune layers that read the same input with one factor.

    Dropping weight i of a row costs ``w_i² / U_ii²``; the error ``e = w_i / U_ii`` is compensated by
    ``w_j −= e U_ij`` for all j > i (SparseGPT 2301.00774 alg. 1; OBS-Diff eq. 2 in fixed column order), where
    ``U = R⁻¹``. All changes together are ``Δ = −E U``, that is ``Δ R = −E``: what earlier columns do to a block follows
    from their changes and R alone, and only the diagonal blocks of R are ever inverted.
    Unstructured: the lowest scores of each ``compared`` columns of a layer go, all rows jointly, at counts (see
    ``even``) that add up to the request. N:M: at the start of each group of M columns, from the weights as updated so
    far.

    Args:
        weights: Float32 (rows_k, columns) each, not changed.
        factor: Upper R with ``H = R Rᵀ``, from :func:`obsdiff.obs.linalg.upper_factor`.
        patterns: One per layer, unstructured or N:M.
        compared: Columns whose scores are compared jointly, from the weights as updated so far.
        even: All stretches of ``compared`` columns lose the same share, as published; otherwise each loses as many
            as it holds of the layer's lowest ``w_i² H_ii``, what dropping them costs uncompensated.
        at_once: Columns whose choice is made together by one triangular solve in place of one after the other
            (:func:`eliminate`); None: on a CUDA device, where each operation is a launch.

    Returns:
        Per layer the pruned weight (float32) and the mask (True = kept).
    """
    rows = [len(weight) for weight in weights]
    columns = factor.shape[0]
    group = math.lcm(*(pattern.m for pattern in patterns if isinstance(pattern, NM)))
    sub_block = group * max(1, SUB_BLOCK // group)
    block = sub_block * max(1, BLOCK // sub_block)
    compared = sub_block * max(1, compared // sub_block)
    work = torch.cat([weight.T for weight in weights], dim=1).contiguous()  # (columns, rows): a column is contiguous
    # diag H, of some rows at a time: a square of the whole would be held
    power = None if even else torch.cat([some.square().sum(dim=1) for some in factor.split(BLOCK)])
    counts = [
        _counts(weight, pattern, compared, power)
        for weight, pattern in zip(work.split(rows, dim=1), patterns, strict=True)
    ]
    change = torch.empty_like(work)  # Δᵀ of the columns that are done
    pivots = torch.zeros_like(work)  # R_ii where a weight goes, 0 where it stays: work · pivots are the errors
    parts = list(zip(work.split(rows, dim=1), pivots.split(rows, dim=1), patterns, strict=True))
    nm_parts = [(part, part[2].m) for part in parts if isinstance(part[2], NM)]
    diagonal = factor.diagonal()[:, None]
    at_once = factor.is_cuda if at_once is None else at_once
    chosen = math.gcd(*(m for _, m in nm_parts)) or sub_block  # columns between two choices
    errors = torch.zeros_like(work[:block])
    # views of single columns, made once: the innermost loop is bound by their number, not by arithmetic
    work_at, pivots_at, errors_at = work.unbind(), pivots.unbind(), errors.unbind()

    def drop(part: tuple[Tensor, Tensor, Pattern], span: slice, count: int) -> None:
        """Choose what goes of the columns ``span`` of one layer, from its weights as they are now."""
        weight, pivot, pattern = part
        scores = (weight[span] * diagonal[span]).square()
        gone = drop_lowest_nm(scores.T, pattern).T if isinstance(pattern, NM) else drop_lowest(scores, count)
        pivot[span] = gone * diagonal[span]

    for start in range(0, columns, block):
        end = min(start + block, columns)
        size = end - start
        dense = work[start:end].clone()
        identity = torch.eye(size, dtype=factor.dtype, device=factor.device)
        local = torch.linalg.solve_triangular(factor[start:end, start:end], identity, upper=True)  # U's diagonal block
        if start > 0:
            work[start:end].addmm_(local.T, factor[:start, start:end].T @ change[:start], alpha=-1)
        local_at = local.unbind()
        for first in range(0, size, sub_block):
            last = min(first + sub_block, size)
            if (start + first) % compared == 0:
                for part, goals in zip(parts, counts, strict=True):
                    if goals:
                        at = slice(start + first, min(start + first + compared, columns))
                        drop(part, at, goals[at.start // compared])
            for i in range(first, last, chosen):
                for part, m in nm_parts:
                    if (start + i) % m == 0:
                        drop(part, slice(start + i, start + i + m), 0)
                until = min(i + chosen, last)
                if at_once:
                    at = slice(start + i, start + last)
                    errors[i:until] = eliminate(work[at], pivots[at], local[i:last, i:last], until - i)
                    continue
                for j in range(i, until):
                    error = torch.mul(work_at[start + j], pivots_at[start + j], out=errors_at[j])
                    if j + 1 < last:
                        work[start + j + 1 : start + last].addr_(local_at[j][j + 1 : last], error, alpha=-1)
            if last < size:
                work[start + last : end].addmm_(local[first:last, last:].T, errors[first:last], alpha=-1)
        work[start:end].mul_(pivots[start:end] == 0)  # exact zeros
        torch.sub(work[start:end], dense, out=change[start:end])

    del change
    kept = pivots == 0
    return [
        (part.T.contiguous(), mask.T.contiguous())
        for part, mask in zip(work.split(rows, dim=1), kept.split(rows, dim=1), strict=True)
    ]


def eliminate(work: Tensor, pivots: Tensor, factor: Tensor, count: int) -> Tensor:
    """Prune the first ``count`` columns, whose choice is made, of all rows at once.

    One after the other their errors are ``e_i = p_i (w_i − Σ_{k<i} e_k U_ki)``, ``p_i`` being ``R_ii`` where the weight
    goes and 0 where it stays: for each row ``(I + P Ûᵀ) e = P w``, ``Û`` the part of U above its diagonal.

    Args:
        work: Weights before any of these columns is pruned, (columns, rows); becomes what the errors leave of them.
        pivots: p, (columns, rows).
        factor: U of these columns, (columns, columns).
        count: Of columns to prune.

    Returns:
        Their errors, (count, rows).
    """
    errors = []
    for weight, pivot in zip(work[:count].split(ROWS, dim=1), pivots[:count].split(ROWS, dim=1), strict=True):
        lower = pivot.T[:, :, None] * factor[:count, :count].T  # a solve for a unit diagonal reads what is below it
        wanted = (weight * pivot).T[:, :, None]
        errors.append(torch.linalg.solve_triangular(lower, wanted, upper=False, unitriangular=True)[..., 0].T)
    found = torch.cat(errors, dim=1)
    work[1:].addmm_(factor[:count, 1:].triu().T, found, alpha=-1)  # Û: a column changes those after it
    return found


def _counts(weight: Tensor, pattern: Pattern, compared: int, power: Tensor | None) -> list[int]:
    """How many weights each stretch of ``compared`` columns gives up; empty for N:M.

    Args:
        weight: (columns, rows).
        power: diag H, (columns,), to share the layer's count by ``w_i² H_ii``; None: evenly.
    """
    if not isinstance(pattern, Unstructured):
        return []
    columns, rows = weight.shape
    starts = range(0, columns, compared)
    if power is None:
        ends = [min(start + compared, columns) * rows for start in starts]
        return [
            split_count(pattern.ratio, weight.numel(), at * rows, end) for at, end in zip(starts, ends, strict=True)
        ]
    gone = drop_lowest(weight.square().mul_(power[:, None]), round(pattern.ratio * weight.numel()))
    return count_each(gone.split(compared))

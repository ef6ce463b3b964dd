"""INT4 and INT2 with error feedback: GPTQ (Frantar et al., arXiv 2210.17323), for MatMulNBits.

Columns are rounded one after the other; the error of each is compensated in those that are not
rounded yet, weighted by the inverse Hessian of the layer's input. The blocks with the largest
inputs come first, and within each block the columns with the largest inputs: blocks stay intact, as
MatMulNBits requires (GPTQModel calls this order group-aware).
"""

from __future__ import annotations

import torch

from dash_onnx.exporters.quantize.blockwise import Bits, Quantized, concatenate, packed, row_groups

_DAMPING = 0.01  # fraction of the mean diagonal; the paper's value
_LAZY = 128  # columns whose updates to later columns are applied in one product
_COLUMNS = 1024  # columns of a triangular matrix inverted at a time
_SHRINK = {4: (1.0, 0.6, 9), 2: (1.0, 0.4, 13)}  # clipping factors tried per block: from, to, count


def gptq(weight: torch.Tensor, hessian: torch.Tensor, block_size: int, bits: Bits = 4) -> Quantized:
    """Quantizes a weight to INT4 or INT2 with a zero point per block.

    Args:
        weight: `[N, K]`, any float dtype.
        hessian: `[K, K]` float32, sum of x x^T over calibration tokens; runs on its device.
        block_size: divides K.
        bits: 4 or 2.
    """
    order = _order(hessian.diagonal(), block_size)
    hessian = hessian[order][:, order]
    importance, inverse = hessian.diagonal(), _inverse_cholesky(hessian)
    # Rows are independent of each other.
    shared = order, importance, inverse, block_size, bits
    parts = (_rounded(rows, *shared) for rows in row_groups(weight))
    return concatenate(parts, len(weight))


def _order(importance: torch.Tensor, block_size: int) -> torch.Tensor:
    """Columns `[K]` in the order in which they are rounded; those of a block are neighbours."""
    blocks = importance.view(-1, block_size)
    inside = blocks.argsort(1, descending=True)
    inside += torch.arange(len(blocks), device=blocks.device)[:, None] * block_size
    return inside[blocks.sum(1).argsort(descending=True)].flatten()


def _rounded(
    weight: torch.Tensor,
    order: torch.Tensor,
    importance: torch.Tensor,
    inverse: torch.Tensor,
    block_size: int,
    bits: Bits,
) -> Quantized:
    w = weight.to(inverse).T[order]  # [K, N]: a column of the weight is a row in memory
    columns, rows = w.shape
    levels = torch.empty_like(w)
    scales = w.new_empty(columns // block_size, rows)
    zeros = torch.empty_like(scales)
    width = max(_LAZY // block_size, 1) * block_size
    for start in range(0, columns, width):
        stop = min(start + width, columns)
        part, inv = w[start:stop], inverse[start:stop, start:stop]
        errors = torch.empty_like(part)
        for column in range(stop - start):
            if column % block_size == 0:
                block = slice(column, column + block_size)
                grid = _best_grid(part[block], importance[start:stop][block], bits)
                index = order[start + column] // block_size
                scales[index], zeros[index] = scale, zero = grid
            value = part[column]
            level = (value / scale + zero).round_().clamp_(0, 2**bits - 1)
            levels[order[start + column]] = level
            error = (value - (level - zero) * scale) / inv[column, column]
            part[column:].addr_(inv[column, column:], error, alpha=-1)
            errors[column] = error
        w[stop:] -= inverse[start:stop, stop:].T @ errors
    return packed(levels.T, scales.T.contiguous(), zeros.T, bits, block_size)


def _inverse_cholesky(hessian: torch.Tensor) -> torch.Tensor:
    """Upper Cholesky factor of the inverse of the damped Hessian.

    With H = R R^T, R upper triangular, it is the inverse of R: half the work and memory of
    inverting H. R is the lower factor of H read backwards. The matrices of a wide MLP determine the
    peak memory of an export, so each is freed as soon as the next exists.
    """
    damped = hessian.flip(0, 1)
    diagonal = damped.diagonal()
    diagonal += _DAMPING * diagonal.mean() + 1e-12
    try:
        factor = torch.linalg.cholesky(damped)
    except torch.linalg.LinAlgError:  # rounding made it indefinite
        factor = torch.linalg.cholesky(damped.double())
    del damped, diagonal
    _invert_lower(factor)
    return factor.float().flip(0, 1)


def _invert_lower(factor: torch.Tensor) -> None:
    """Inverts a lower triangular matrix `[K, K]` in place, from the last block of columns back."""
    size = len(factor)
    for start in reversed(range(0, size, _COLUMNS)):
        stop = min(start + _COLUMNS, size)
        corner, below = factor[start:stop, start:stop], factor[stop:, start:stop]
        identity = torch.eye(stop - start, dtype=factor.dtype, device=factor.device)
        corner.copy_(torch.linalg.solve_triangular(corner, identity, upper=False))
        below.copy_(-(factor[stop:, stop:] @ below) @ corner)


def _best_grid(
    block: torch.Tensor, importance: torch.Tensor, bits: Bits
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point `[N]` of a block `[block_size, N]` with the least weighted error.

    Clipping the range slightly is worse for outliers and better for all other weights.
    """
    low, high = block.amin(0).clamp(max=0), block.amax(0).clamp(min=0)
    best = torch.full_like(low, torch.inf)
    best_scale, best_zero = torch.ones_like(low), torch.zeros_like(low)
    top = 2**bits - 1
    for shrink in torch.linspace(*_SHRINK[bits]).tolist():
        scale = ((high - low) * shrink / top).clamp(min=1e-9)
        zero = (-low * shrink / scale).round().clamp(0, top)
        level = (block / scale).add_(zero).round_().clamp_(0, top)
        error = importance @ level.sub_(zero).mul_(scale).sub_(block).square_()
        better = error < best
        best = torch.where(better, error, best)
        best_scale = torch.where(better, scale, best_scale)
        best_zero = torch.where(better, zero, best_zero)
    return best_scale, best_zero

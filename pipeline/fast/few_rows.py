"""Projections and norms of the few rows that decoding has."""

import functools
import math
import time

import torch
import torch.nn.functional as F
from torch import nn

FEW_ROWS = 8
# Matrices that the measurement of `sharing_pays_from` tries, (out, in).
TRIED = ((128, 128), (512, 256), (1024, 1024), (2048, 2048))


class QuickLinear(nn.Linear):
    """`nn.Linear`, shared out among the processor's cores when a few rows are decoded.

    A token that is decoded reads every weight once and hardly computes. `F.linear` reads with one
    core; as a batch of products, one a core, each core reads its own part. 512 × 256, two cores
    with a path to memory each: 1 row 39 → 22 µs; two that share one path: 13 → 22. So a process
    measures first from which size on it pays.
    """

    def forward(self, x):
        few = x.numel() <= FEW_ROWS * x.shape[-1] and not torch.is_grad_enabled()
        if few and self.bias is None and x.device.type == "cpu":
            return shared_linear(x, self.weight)
        return F.linear(x, self.weight, self.bias)


def shared_linear(x, weight):
    """`F.linear(x, weight)`, as one product a core where that is faster: (..., in) → (..., out)."""
    cores, (out, width) = torch.get_num_threads(), weight.shape
    fits = out % cores == 0 and x.shape[-1] == width and x.dtype == weight.dtype
    if cores == 1 or not fits or weight.numel() < sharing_pays_from(cores, x.numel() > width):
        return F.linear(x, weight)
    return in_parts(x, weight, cores)


def in_parts(x, weight, cores):
    """`F.linear(x, weight)` as one product a core."""
    out, width = weight.shape
    rows = x.reshape(1, -1, width).expand(cores, -1, -1)
    parts = torch.bmm(rows, weight.view(cores, out // cores, width).transpose(1, 2))
    return parts.transpose(0, 1).reshape(*x.shape[:-1], out)


@functools.cache
def sharing_pays_from(cores, several):
    """Numbers in a matrix from which `in_parts` is faster, for one row or `several`: measured once.

    In some hundredths of a second; infinity if it is for none of the sizes tried.
    """
    with torch.inference_mode():
        for out, width in TRIED:
            weights = torch.ones(max(1, 2**22 // (out * width)), out, width)  # more than a cache
            rows, alone, shared = torch.ones(3 if several else 1, width), math.inf, math.inf
            for _ in range(3):  # the least counts: the first are slow
                alone = min(alone, seconds(F.linear, rows, weights))
                shared = min(shared, seconds(in_parts, rows, weights, cores))
            if shared < 0.9 * alone:
                return out * width
    return math.inf


def seconds(product, rows, weights, *cores):
    start = time.perf_counter()
    for weight in weights:
        product(rows, weight, *cores)
    return time.perf_counter() - start


class QuickNorm(nn.RMSNorm):
    """`nn.RMSNorm` in the precision of its weight; a single row goes by one dot product.

    One product takes the place of seven small operations: a token that is decoded passes 17 norms
    in the default model, 1.15 → 1.08 ms a pass.
    """

    def forward(self, x):
        x = x.to(self.weight.dtype)
        one_row = x.numel() == self.weight.numel() and not torch.is_grad_enabled()
        if one_row and x.device.type == "cpu" and x.dtype == torch.float32:
            row = x.reshape(-1)
            mean_square = row.dot(row).item() / len(row)
            eps = torch.finfo(x.dtype).eps if self.eps is None else self.eps
            return (x * self.weight).mul_((mean_square + eps) ** -0.5)
        return super().forward(x)

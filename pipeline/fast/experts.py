"""Quick experts: few tokens go choice by choice; many tokens take two products for all experts."""

import torch
import torch.nn.functional as F

from moe_coded import Experts
from pipeline.fast.few_rows import shared_linear
from quantization_coded import ExpertList

# Up to so many choices (tokens · A), nothing is sorted. With A = 2, a pass of the whole model takes
# 1.23 ms for one token, and 1.42 grouped. For three tokens, it takes 1.91 and 1.99.
FEW_CHOICES = 6


def by_choice(experts, x_MD, routing):
    """`Experts.grouped` token by token. It runs each chosen expert in turn and sorts nothing."""
    weights_MA = routing.weights if routing.kept is None else routing.weights * routing.kept
    outputs = [
        experts.expert(e, x)
        for x, chosen in zip(x_MD, routing.indices.tolist(), strict=True)
        for e in chosen
    ]
    outputs_MAD = torch.stack(outputs).unflatten(0, weights_MA.shape)
    return (weights_MA.to(x_MD.dtype).unsqueeze(1) @ outputs_MAD).squeeze(1)


class ByChoice:
    """A mixin for classes of experts. On a CPU, a few choices go one by one."""

    def grouped(self, x_MD, routing):
        few = 0 < routing.indices.numel() <= FEW_CHOICES
        if few and x_MD.device.type == "cpu":
            return by_choice(self, x_MD, routing)
        return super().grouped(x_MD, routing)


def grouped_linear(rows, weights, ends):
    """`F.linear` of each expert on its own rows: (rows, in), (E, out, in), (E,) → (rows, out).

    `ends` (int32) says where each expert's run of rows ends. PyTorch's kernel takes all experts in
    one call if all numbers have one dtype and a row has a multiple of 16 bytes. Otherwise, each
    expert takes a product of its own.
    """
    if torch.is_autocast_enabled(rows.device.type):  # autocast does not know the kernel
        precision = torch.get_autocast_dtype(rows.device.type)
        rows, weights = rows.to(precision), weights.to(precision)
    size, narrow = rows.element_size(), rows.element_size() <= 4 and not rows.is_mps
    whole = all(width * size % 16 == 0 for width in weights.shape[1:])
    if narrow and whole and rows.dtype == weights.dtype:
        return F.grouped_mm(rows, weights.transpose(-2, -1), offs=ends)
    runs = rows.tensor_split(ends.tolist()[:-1])
    return torch.cat([F.linear(run, weight) for run, weight in zip(runs, weights, strict=True)])


class QuickExperts(ByChoice, Experts):
    """`Experts`. A few tokens go by choice, and all cores share a matrix; many go grouped."""

    def expert(self, e, x):
        gate, up = shared_linear(x, self.gate_up_proj[e]).chunk(2, dim=-1)
        return shared_linear(F.silu(gate) * up, self.down_proj[e])

    def by_runs(self, rows, lengths_E):
        ends_E = lengths_E.cumsum(0).to(torch.int32)
        gate, up = grouped_linear(rows, self.gate_up_proj, ends_E).chunk(2, dim=-1)
        return grouped_linear(F.silu(gate) * up, self.down_proj, ends_E)


class QuickExpertList(ByChoice, ExpertList):
    """`ExpertList`. A few tokens go by choice."""

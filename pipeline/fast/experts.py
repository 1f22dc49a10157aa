"""Experts of a few tokens, choice by choice."""

import torch
import torch.nn.functional as F

from moe_coded import Experts
from pipeline.fast.few_rows import shared_linear
from quantization_coded import ExpertList

# Choices (tokens · A) up to which nothing is sorted. A = 2, the whole model: one token 1.23 ms
# against 1.42 grouped, three 1.91 against 1.99.
FEW_CHOICES = 6


def by_choice(experts, x_MD, routing):
    """`Experts.grouped` token by token: only the experts that a token chose, nothing to sort."""
    weights_MA = routing.weights if routing.kept is None else routing.weights * routing.kept
    outputs = [
        experts.expert(e, x)
        for x, chosen in zip(x_MD, routing.indices.tolist(), strict=True)
        for e in chosen
    ]
    outputs_MAD = torch.stack(outputs).unflatten(0, weights_MA.shape)
    return (weights_MA.to(x_MD.dtype).unsqueeze(1) @ outputs_MAD).squeeze(1)


class ByChoice:
    """Mixed into a class of experts: few choices on a CPU go one by one."""

    def grouped(self, x_MD, routing):
        few = 0 < routing.indices.numel() <= FEW_CHOICES
        if few and x_MD.device.type == "cpu":
            return by_choice(self, x_MD, routing)
        return super().grouped(x_MD, routing)


class QuickExperts(ByChoice, Experts):
    """`Experts`, by choice for a few tokens, whose matrices all cores share."""

    def expert(self, e, x):
        gate, up = shared_linear(x, self.gate_up_proj[e]).chunk(2, dim=-1)
        return shared_linear(F.silu(gate) * up, self.down_proj[e])


class QuickExpertList(ByChoice, ExpertList):
    """`ExpertList`, by choice for a few tokens."""

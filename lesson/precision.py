"""What must not be rounded, although autocast, or a cast of the model, rounds what is around it."""

import torch
from torch import nn


class RMSNorm(nn.RMSNorm):
    """`nn.RMSNorm` in its weight's precision: under autocast its input comes in a lower one."""

    def forward(self, x):
        return super().forward(x.to(self.weight.dtype))


def linear_in_fp32(x, weight):
    """`F.linear(x, weight)` in FP32, whatever x and the weight are: under autocast, too."""
    with torch.autocast(x.device.type, enabled=False):
        return nn.functional.linear(x.float(), weight.float())

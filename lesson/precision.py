"""Operations that stay precise where autocast, or a cast of the model, lowers the precision."""

import torch
from torch import nn


class RMSNorm(nn.RMSNorm):
    """`nn.RMSNorm` in the precision of its weight. Under autocast its input has a lower one."""

    def forward(self, x):
        return super().forward(x.to(self.weight.dtype))


def linear_in_fp32(x, weight):
    """`F.linear(x, weight)` in FP32, for any types of x and the weight, even under autocast."""
    with torch.autocast(x.device.type, enabled=False):
        return nn.functional.linear(x.float(), weight.float())

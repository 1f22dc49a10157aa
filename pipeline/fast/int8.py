"""8-bit products on a CPU: `quick_int8` makes layers multiply by PyTorch's integer kernels.

The plain twins are `quantization_coded.IntegerLinear`, which dequantises its codes at each call,
and `w8a8_product`, which adds up whole numbers in FP32. One row times 4,096 × 4,096 in INT8 is 4.5
times as fast as in FP32 (benchmarks/quantization.py).
"""

import torch

from lesson import int_mm_is_exact
from quantization_coded import (
    IntegerLinear,
    W8A8Linear,
    absmax_quantize,
    llm_int8_product,
    w8a8_product,
)


def quick_int8(model):
    """Makes a model's INT8 and W8A8 layers multiply by the kernels. Returns the model."""
    for layer in may_round(model):
        # The kernel reads 16 numbers at a time. With other widths, it would read past a row's end.
        whole_rows = layer.group_size == layer.in_features and layer.in_features % 16 == 0
        if layer.bits == 8 and whole_rows:
            layer.__class__ = QuickInt8Linear
    for layer in model.modules():
        if type(layer) is W8A8Linear:
            layer.__class__ = QuickW8A8Linear
    return model


def may_round(model):
    """The model's plain integer layers whose inputs and outputs a kernel may round to BF16.

    These are all but MLA's `kv_b_proj`. The absorbed path feeds it other inputs than the expanded
    path, and rounding them would make the two disagree.
    """
    plain = [(name, m) for name, m in model.named_modules() if type(m) is IntegerLinear]
    return [layer for name, layer in plain if not name.endswith("kv_b_proj")]


class QuickInt8Linear(IntegerLinear):
    """An `IntegerLinear` of 8 bits with a scale for each row. Its kernel reads the codes directly.

    Inputs, outputs and scales are BF16, and sums FP32. So it differs from its twin by rounding.
    """

    def product(self, rows):
        if rows.device.type != "cpu" or rows.dtype == torch.float64:
            return super().product(rows)
        rows = rows.bfloat16().contiguous()
        return torch._weight_int8pack_mm(rows, self.codes, self.scale[:, 0])


class QuickW8A8Linear(W8A8Linear):
    """`W8A8Linear` that multiplies by `integer_product`."""

    def product(self, rows):
        operands, threshold = (rows, self.codes, self.scale), self.outlier_threshold
        if threshold is None:
            return integer_product(*operands)
        return llm_int8_product(*operands, threshold, product=integer_product)


def integer_product(x, codes, scale):
    """`w8a8_product` with sums in INT32 by `torch._int_mm`, where this is right.

    `torch._int_mm` is wrong for a single column, and on processors that are too old.
    """
    if x.device.type != "cpu" or x.shape[1] == 1 or not int_mm_is_exact():
        return w8a8_product(x, codes, scale)
    x_codes, x_scale = absmax_quantize(x.float(), dim=-1)
    return torch._int_mm(x_codes, codes.T) * (x_scale * scale.T)

"""INT4 weights for PyTorch's kernel: `pack_int4` packs the codes of phase 8's layers for it.

The plain twin is `quantization_coded.IntegerLinear`, which dequantises its codes at each call. The
kernel reads the codes as they are. Its inputs, outputs and scales are BF16, and its sums FP32. So
the two differ by the rounding of BF16. The kernel needs the codes in an order that depends on the
processor. Memory holds only that order. State dicts, and layers on another device, hold the plain
codes. One row times 4,096 × 4,096 is 11 times as fast as in FP32 (benchmarks/quantization.py).
"""

import torch

from pipeline.fast.int8 import may_round
from quantization_coded import IntegerLinear, pack_bits, unpack_bits

GROUPS = (32, 64, 128, 256)  # so many numbers may share a scale in the kernel


def pack_int4(model):
    """Packs the codes of all INT4 layers that the kernel can take. Returns the model.

    It may be called again, for instance after layers got new codes. On the meta device, a layer is
    packed as soon as it is loaded.
    """
    for layer in may_round(model):
        if layer.bits == 4 and layer.out_features % 16 == 0 and layer.group_size in GROUPS:
            layer.__class__ = PackedInt4Linear
    for layer in model.modules():
        if isinstance(layer, PackedInt4Linear):
            layer.pack()
    return model


class PackedInt4Linear(IntegerLinear):
    """An `IntegerLinear` of 4 bits that multiplies by PyTorch's kernel.

    If it is packed, `scale` is (groups, out, 2), the kernel's pairs of scale and zero. If it is
    plain, `scale` is (out, groups). It is plain on other devices, and from `fill` to `pack`.
    """

    def is_packed(self):
        return self.scale.dim() == 3

    def pack(self):
        """Plain → packed, on a CPU."""
        if self.is_packed() or self.codes.device.type != "cpu":
            return
        codes, scale_GO = unpack_bits(self.codes, 4, self.in_features).int() + 8, self.scale.T
        self.codes = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
        self.scale = torch.stack((scale_GO, torch.zeros_like(scale_GO)), dim=-1)

    def unpack(self):
        """Packed → plain."""
        if self.is_packed():
            codes, scale = self.codes_and_scale()
            self.codes, self.scale = pack_bits(codes, 4), scale

    def codes_and_scale(self):
        """The plain ones. The codes are the kernel's product with unit vectors at scale 1."""
        if not self.is_packed():
            return super().codes_and_scale()
        pairs = torch.ones_like(self.scale)
        pairs[..., 1] = 0
        unit_vectors = torch.eye(self.in_features, dtype=torch.bfloat16)
        codes = self.kernel_product(unit_vectors, pairs).T.to(torch.int8)
        return codes, self.scale[..., 0].T.contiguous()

    def kernel_product(self, rows, pairs):
        return torch.ops.aten._weight_int4pack_mm_for_cpu(rows, self.codes, self.group_size, pairs)

    def product(self, rows):
        if self.is_packed() and rows.dtype != torch.float64:
            return self.kernel_product(rows.bfloat16().contiguous(), self.scale)
        return super().product(rows)

    def _apply(self, function, recurse=True):
        self.unpack()
        super()._apply(function, recurse)
        self.pack()
        return self

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        codes, scale = self.codes_and_scale()
        destination[f"{prefix}codes"], destination[f"{prefix}scale"] = pack_bits(codes, 4), scale

    def _load_from_state_dict(self, *arguments):
        self.unpack()
        super()._load_from_state_dict(*arguments)
        self.pack()

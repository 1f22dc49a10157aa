"""A pass over a finished model that makes it quicker on a CPU. It computes the same functions.

`speed_up(model)` replaces the lessons' plain layers by quicker ones. It changes no parameter and no
name, so state dicts stay plain. Each quicker piece names its plain twin. The thresholds are all in
this folder, each with its measurement.

Two pieces are for training: `head_loss`, and attention by two products.
"""

from torch import nn

from mla_coded import MultiHeadLatentAttention, RMSNorm
from moe_coded import Experts
from pipeline.fast.attention import EXPAND_FROM, product_attention, quickest_attention
from pipeline.fast.experts import QuickExpertList, QuickExperts, grouped_linear
from pipeline.fast.few_rows import QuickLinear, QuickNorm, shared_linear
from pipeline.fast.head import ChunkedHeadLoss, decoding_head, head_loss
from pipeline.fast.int4 import pack_int4
from pipeline.fast.int8 import quick_int8
from pipeline.fast.rotary import QuickRotary
from quantization_coded import ExpertList
from rope_coded import RotaryEmbedding

__all__ = [
    "EXPAND_FROM",
    "ChunkedHeadLoss",
    "QuickExpertList",
    "QuickExperts",
    "QuickLinear",
    "QuickNorm",
    "QuickRotary",
    "decoding_head",
    "grouped_linear",
    "head_loss",
    "pack_int4",
    "product_attention",
    "quick_int8",
    "quickest_attention",
    "shared_linear",
    "speed_up",
]

QUICKER = {  # plain twin → quicker class, with the same parameters
    nn.Linear: QuickLinear,
    nn.RMSNorm: QuickNorm,
    RMSNorm: QuickNorm,
    Experts: QuickExperts,
    ExpertList: QuickExpertList,
    RotaryEmbedding: QuickRotary,
}


def speed_up(model):
    """Gives a `CausalLM` quicker layers and returns it. It may be called again.

    The model may be a copy, or on the meta device. In FP32, logits, gradients and texts stay the
    same to 1e-5. INT8 and INT4 weights go through kernels that round to BF16.
    """
    for module in model.modules():
        module.__class__ = QUICKER.get(type(module), type(module))
        if isinstance(module, MultiHeadLatentAttention):
            module.attend = quickest_attention
    return pack_int4(quick_int8(model))

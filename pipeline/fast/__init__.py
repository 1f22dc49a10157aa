"""Speed as a pass over a finished model: the same functions, quicker on a CPU.

`speed_up(model)` puts quicker layers in the place of the lessons' plain ones, without touching a
parameter or a name: state dicts stay plain. Each quicker piece names its plain twin. Thresholds
stand here only, each with what was measured.

Training has two pieces of its own: `head_loss`, and attention by two products.
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
    """The model itself with quicker layers; it may be called again, on the meta device, on copies.

    model: a `CausalLM`. Logits, gradients and texts in FP32 stay the same to 1e-5;
    INT8 and INT4 weights go through kernels that round to BF16.
    """
    for module in model.modules():
        module.__class__ = QUICKER.get(type(module), type(module))
        if isinstance(module, MultiHeadLatentAttention):
            module.attend = quickest_attention
    return pack_int4(quick_int8(model))

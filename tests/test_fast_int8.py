"""8-bit products by kernels: equal to phase 8's plain layers, plain in state dicts."""

import copy
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mla_coded import MultiHeadLatentAttention
from moe_coded import MixtureOfExperts, SwiGLU, TopKRouter, TransformerBlock
from mtp_coded import CausalLM, small_language
from pipeline.fast import int8, quick_int8, speed_up
from pipeline.fast.int8 import QuickInt8Linear, QuickW8A8Linear
from quantization_coded import SCHEMES, IntegerLinear, W8A8Linear, quantize_model

EVERY_SCHEME = pytest.mark.parametrize("scheme", SCHEMES)
KINDS = {
    "int8": lambda *sizes: IntegerLinear(*sizes),
    "w8a8": lambda *sizes: W8A8Linear(*sizes),
    "llm_int8": lambda *sizes: W8A8Linear(*sizes, outlier_threshold=6.0),
}
EVERY_KIND = pytest.mark.parametrize("kind", KINDS)


def small():
    """A model with a dense layer, experts and an MTP module."""

    def block(feed_forward):
        return TransformerBlock(MultiHeadLatentAttention(64, 4, 32, 16, 8, 16), feed_forward)

    def experts():
        return MixtureOfExperts(64, 64, TopKRouter(64, 4, 2), n_shared_experts=1)

    model = CausalLM(32, 64, [block(SwiGLU(64, 128)), block(experts())], [block(experts())])
    model.init_weights(0.1)
    return model.eval()


def calibration(sequences=8, length=32):
    return small_language(sequences * length, seed=3).view(sequences, length)


def plain_and_quick(kind, width=64, out=48):
    plain = KINDS[kind](width, out).fill_nearest(torch.randn(out, width))
    return plain, quick_int8(copy.deepcopy(plain))


# One layer
@EVERY_KIND
@pytest.mark.parametrize("sizes", [(64, 48), (33, 7), (40, 16), (96, 17), (256, 112), (128, 1)])
@pytest.mark.parametrize("rows", [1, 5, 40])
def test_kernel_and_reference_give_the_same(kind, sizes, rows):
    plain, quick = plain_and_quick(kind, *sizes)
    x = torch.randn(rows, sizes[0])
    x[0, 3] = 50.0
    # the kernel rounds inputs and outputs to BF16, 8 bits; W8A8 sums integers
    tolerance = 2**-7 if kind == "int8" else 1e-5
    assert (quick(x) - plain(x)).norm() <= tolerance * plain(x).norm()


def test_the_kernels_are_used():
    plain, quick = plain_and_quick("int8")
    x = torch.randn(5, 64)
    assert type(quick) is QuickInt8Linear and not torch.equal(quick(x), plain(x))
    assert type(plain_and_quick("w8a8")[1]) is QuickW8A8Linear
    assert quick_int8(quick) is quick and type(quick) is QuickInt8Linear


def test_layers_that_the_kernel_cannot_take_stay_plain():
    layers = [IntegerLinear(40, 16), IntegerLinear(64, 48, group_size=32),
              IntegerLinear(64, 48, bits=4), nn.ModuleDict({"kv_b_proj": IntegerLinear(64, 48)})]
    for layer in layers:
        kinds = [type(module) for module in layer.modules()]
        assert [type(module) for module in quick_int8(layer).modules()] == kinds


@EVERY_KIND
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_casts_leave_codes_and_scales_alone(kind, dtype):
    _, layer = plain_and_quick(kind)
    x, layer.bias = torch.randn(3, 64), torch.randn(48)
    expected, before = layer(x), {name: b.clone() for name, b in layer.state_dict().items()}
    layer.to(dtype)
    for name, buffer in layer.state_dict().items():
        assert buffer.dtype == before[name].dtype and torch.equal(buffer, before[name])
    output = layer(x.to(dtype))
    assert output.dtype == dtype
    assert (output.float() - expected).norm() < 0.02 * expected.norm()
    if dtype == torch.float64 and kind == "int8":  # the BF16 kernel is not for FP64
        exact = F.linear(x.double(), layer.weight.double(), layer.bias.double())
        torch.testing.assert_close(output, exact)


@EVERY_KIND
def test_inputs_that_are_not_contiguous_and_no_tokens(kind):
    _, layer = plain_and_quick(kind)
    for x in (torch.randn(64, 3).T, torch.randn(3, 128)[:, 64:], torch.randn(2, 64, 3).mT):
        torch.testing.assert_close(layer(x), layer(x.contiguous()))
        torch.testing.assert_close(layer(x.bfloat16()), layer(x.contiguous().bfloat16()))
    assert layer(x[:0]).shape == (0, 3, 48) and layer(x[0, 0]).shape == (48,)


@EVERY_KIND
@pytest.mark.parametrize("size", [1.0, 1e-3])
def test_the_input_gets_the_gradient_of_the_weight_that_the_layer_stands_for(kind, size):
    _, layer = plain_and_quick(kind)
    x, upstream = torch.randn(3, 64, requires_grad=True), torch.randn(3, 48) * size
    layer(x).backward(upstream)
    torch.testing.assert_close(x.grad, upstream @ layer.weight)


# torch._int_mm
def test_a_single_column_is_multiplied_right():
    x, weight = torch.randn(5, 1), torch.randn(32, 1)
    output = quick_int8(W8A8Linear(1, 32).fill_nearest(weight))(x)
    torch.testing.assert_close(output, x @ weight.T, rtol=0.01, atol=1e-3)


@pytest.mark.parametrize("kind", ["w8a8", "llm_int8"])
def test_int_mm_is_used_where_it_is_exact(monkeypatch, kind):
    (_, layer), x = plain_and_quick(kind), torch.randn(4, 64)
    expected = layer(x)
    monkeypatch.setattr(torch, "_int_mm", lambda a, b: 1 / 0)
    for exact, used in ((True, pytest.raises(ZeroDivisionError)), (False, nullcontext())):
        monkeypatch.setattr(int8, "int_mm_is_exact", lambda exact=exact: exact)
        with used:
            torch.testing.assert_close(layer(x), expected)


def test_an_overflowing_int_mm_is_found_out(monkeypatch):
    right = torch._int_mm
    int8.int_mm_is_exact.cache_clear()
    assert isinstance(int8.int_mm_is_exact(), bool)
    for product, exact in ((lambda a, b: (a.long() @ b.long()).int(), True),
                           (lambda a, b: right(a, b).clamp(max=2**15 * 16), False)):
        monkeypatch.setattr(torch, "_int_mm", product)
        int8.int_mm_is_exact.cache_clear()
        assert int8.int_mm_is_exact() == exact
    monkeypatch.undo()
    int8.int_mm_is_exact.cache_clear()


# Whole models
@EVERY_SCHEME
def test_the_reference_gives_the_same_model(scheme):
    plain, ids = quantize_model(small(), scheme, calibration()), calibration(2, 12)
    quick, reference = speed_up(plain.copy()), plain(ids)
    # BF16 inputs and outputs of the kernels; W8A8 rounds what the kernels of before gave it
    assert (quick(ids) - reference).norm() < 0.1 * reference.norm()
    for name, tensor in plain.state_dict().items():
        assert torch.equal(quick.state_dict()[name], tensor)


@EVERY_SCHEME
def test_absorbed_and_expanded_read_the_same_kv_b_proj(scheme):
    quick = speed_up(quantize_model(small(), scheme, calibration()))
    for block in quick.blocks():
        attention, hidden = copy.deepcopy(block.self_attn), torch.randn(2, 9, 64)
        attention.o_proj = nn.Identity()  # what is compared is what kv_b_proj made
        for path in ("absorbed", "naive", "einsum"):
            torch.testing.assert_close(
                attention(hidden, path=path), attention(hidden), atol=1e-5, rtol=1e-4
            )

"""INT4 weights in the kernel's order: equal to phase 8's plain layers, smaller, plain in files."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import quantization_coded
from mla_coded import MultiHeadLatentAttention
from moe_coded import MixtureOfExperts, SwiGLU, TopKRouter, TransformerBlock
from mtp_coded import CausalLM, Sampling, small_language
from pipeline import decoding
from pipeline.fast import speed_up
from pipeline.fast.int4 import PackedInt4Linear, pack_int4
from pipeline.released import quantized_skeleton
from quantization_coded import (
    SCHEMES,
    IntegerLinear,
    dequantize,
    matrix_bytes,
    quantize_model,
    round_nearest,
    unpack_bits,
)

INT4_SCHEMES = pytest.mark.parametrize("scheme", ["int4", "gptq4", "awq4"])


def layer_of(width=64, out=48, group_size=32, packed=True):
    layer = IntegerLinear(width, out, bits=4, group_size=group_size)
    layer.fill_nearest(torch.randn(out, width))
    return pack_int4(layer) if packed else layer


def small(width=64, latent=32, inner=64):
    """A model with a dense layer and experts, all of whose widths the kernel takes."""

    def block(feed_forward):
        attention = MultiHeadLatentAttention(
            width, num_attention_heads=4, kv_lora_rank=latent, qk_nope_head_dim=16,
            qk_rope_head_dim=16, v_head_dim=16,
        )
        return TransformerBlock(attention, feed_forward)

    experts = MixtureOfExperts(width, inner, TopKRouter(width, 4, 2), n_shared_experts=1)
    model = CausalLM(32, width, [block(SwiGLU(width, inner)), block(experts)])
    model.init_weights(0.1)
    return model.eval()


def calibration(sequences=8, length=32):
    return small_language(sequences * length, seed=3).view(sequences, length)


def packed_layers(model):
    return [m for m in model.modules() if isinstance(m, PackedInt4Linear) and m.is_packed()]


def assert_same_state(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor, theirs[name]), name


# One layer
@pytest.mark.parametrize("group_size", [32, 64, 128, 256])
@pytest.mark.parametrize("out", [16, 48, 112])
@pytest.mark.parametrize("rows", [1, 5, 40])
def test_packed_and_plain_give_the_same(group_size, out, rows):
    plain = layer_of(256, out, group_size, packed=False)
    packed, x = pack_int4(copy.deepcopy(plain)), torch.randn(rows, 256)
    assert packed.is_packed() and not torch.equal(packed(x), plain(x))  # the kernel is used
    # it rounds inputs and outputs to BF16, 8 bits
    assert (packed(x) - plain(x)).norm() <= 2**-7 * plain(x).norm()


@pytest.mark.parametrize(
    "options",
    [dict(out=40), dict(width=96, group_size=96), dict(group_size=16)],
)
def test_layers_that_the_kernel_cannot_take_stay_plain(options):
    layer = layer_of(**options)
    assert type(layer) is IntegerLinear
    three = pack_int4(IntegerLinear(64, 48, bits=3, group_size=32))
    assert type(three) is type(pack_int4(IntegerLinear(64, 48, group_size=32))) is IntegerLinear


def test_the_kernels_order_is_undone_exactly():
    weight = torch.randn(112, 256)
    layer = IntegerLinear(256, 112, bits=4, group_size=64).fill_nearest(weight)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    codes, scale = round_nearest(weight, 4, 64)
    pack_int4(layer)
    assert layer.is_packed() and torch.equal(layer.weight, dequantize(codes, scale))
    state = layer.state_dict()
    assert_same_state(state, before)
    assert all(tensor.is_contiguous() for tensor in state.values())  # as files need them
    assert torch.equal(unpack_bits(state["codes"], 4, 256), codes)
    assert layer.is_packed()
    layer.unpack()
    assert torch.equal(layer.codes, before["codes"]) and torch.equal(layer.scale, scale)


def test_loading_plain_codes_fills_a_packed_layer():
    layer, x = layer_of(), torch.randn(3, 64)
    for assign in (False, True):
        fresh = layer_of()
        assert not torch.equal(fresh(x), layer(x))
        fresh.load_state_dict(layer.state_dict(), assign=assign)
        assert fresh.is_packed() and torch.equal(fresh(x), layer(x))
    with pytest.raises(RuntimeError, match=r"size mismatch for codes: .*\[48, 64\]"):
        layer.load_state_dict(layer_of(128).state_dict())
    assert layer.is_packed() and torch.equal(fresh(x), layer(x))


def test_copies_and_a_second_call_change_nothing():
    layer, x = layer_of(), torch.randn(3, 64)
    expected, codes = layer(x), layer.codes
    assert pack_int4(layer) is layer and layer.codes is codes
    for other in (copy.deepcopy(layer), pack_int4(copy.deepcopy(layer))):
        assert torch.equal(other(x), expected)
        other.fill_nearest(torch.randn(48, 64))
    assert torch.equal(layer(x), expected)


def test_new_codes_are_served_at_once_and_packed_by_the_next_call():
    layer, x, weight = layer_of(), torch.randn(3, 64), torch.randn(48, 64)
    expected = IntegerLinear(64, 48, bits=4, group_size=32).fill_nearest(weight)(x)
    layer.fill_nearest(weight)
    torch.testing.assert_close(layer(x), expected)
    pack_int4(layer)
    assert layer.is_packed() and (layer(x) - expected).norm() <= 2**-7 * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_casts_leave_codes_and_scales_alone(dtype):
    layer, x = layer_of(), torch.randn(3, 64)
    layer.bias = torch.randn(48)
    expected, before = layer(x), {name: b.clone() for name, b in layer.state_dict().items()}
    layer.to(dtype)
    assert layer.is_packed()
    assert_same_state(layer.state_dict(), before)
    output = layer(x.to(dtype))
    assert output.dtype == dtype
    assert (output.float() - expected).norm() < 0.02 * expected.norm()
    if dtype == torch.float64:  # the kernel is not for FP64
        exact = F.linear(x.double(), layer.weight.double(), layer.bias.double())
        torch.testing.assert_close(output, exact)


def test_a_layer_on_another_device_is_plain():
    layer = layer_of()
    meta = copy.deepcopy(layer).to("meta")
    plain = IntegerLinear(64, 48, bits=4, group_size=32)
    assert not meta.is_packed() and meta.codes.is_meta
    for name, tensor in meta.state_dict().items():
        assert tensor.is_meta and tensor.shape == plain.state_dict()[name].shape
    meta.load_state_dict(layer.state_dict(), assign=True)
    x = torch.randn(3, 64)
    assert meta.is_packed() and torch.equal(meta(x), layer(x))


def test_inputs_that_are_not_contiguous_and_no_tokens():
    layer = layer_of()
    for x in (torch.randn(64, 3).T, torch.randn(3, 128)[:, 64:], torch.randn(2, 64, 3).mT):
        torch.testing.assert_close(layer(x), layer(x.contiguous()))
        torch.testing.assert_close(layer(x.bfloat16()), layer(x.contiguous().bfloat16()))
    assert layer(x[:0]).shape == (0, 3, 48) and layer(x[0, 0]).shape == (48,)


def test_the_input_gets_the_gradient_of_the_weight_that_the_layer_stands_for():
    layer, x, upstream = layer_of(), torch.randn(3, 64, requires_grad=True), torch.randn(3, 48)
    output = layer(x)
    torch.testing.assert_close(output.detach(), layer(x.detach()))
    output.backward(upstream)
    torch.testing.assert_close(x.grad, upstream @ layer.weight)


@pytest.mark.performance
def test_only_the_packed_form_is_in_memory():
    layer = layer_of(256, 48, 128)
    assert layer.weight_bytes() == 48 * (128 + 2 * 4)  # scale and zero
    held = sum(t.nbytes for t in vars(layer).values() if torch.is_tensor(t))
    assert held + sum(buffer.nbytes for buffer in layer.buffers()) == layer.weight_bytes()
    layer.unpack()
    assert layer.weight_bytes() == 48 * (128 + 2 * 2)


# Whole models
@INT4_SCHEMES
def test_a_packed_model_is_its_plain_twin(scheme):
    plain = quantize_model(small(), scheme, calibration())
    packed, ids = speed_up(plain.copy()), calibration(2, 12)
    names = {type(m).__name__ for m in plain.modules()}
    assert "PackedInt4Linear" not in names and not packed_layers(plain)
    # all but kv_b_proj: absorbed and expanded must read the same numbers
    linears = [m for m in packed.modules() if isinstance(m, IntegerLinear)]
    kept = [block.self_attn.kv_b_proj for block in packed.blocks()]
    assert len(packed_layers(packed)) == len(linears) - len(kept)
    assert all(type(layer) is IntegerLinear for layer in kept)
    assert_same_state(packed.state_dict(), plain.state_dict())
    exact = plain(ids)
    assert (packed(ids) - exact).norm() < 0.1 * exact.norm()  # the kernels' BF16
    assert torch.equal(speed_up(packed)(ids), packed(ids))
    assert torch.equal(speed_up(packed.copy())(ids), packed(ids))
    reference = packed.copy()
    for layer in packed_layers(reference):
        layer.unpack()
    torch.testing.assert_close(reference(ids), exact, rtol=1e-4, atol=1e-5)


@INT4_SCHEMES
def test_absorbed_and_expanded_read_the_same_numbers(scheme):
    packed = speed_up(quantize_model(small(), scheme, calibration()))
    for block in packed.blocks():
        attention, hidden = copy.deepcopy(block.self_attn), torch.randn(2, 9, 64)
        attention.o_proj = nn.Identity()
        expanded = attention(hidden)
        for path in ("absorbed", "naive"):
            torch.testing.assert_close(
                attention(hidden, path=path), expanded, atol=1e-5, rtol=1e-4
            )


def test_quantising_calibrates_on_what_the_packed_blocks_compute(monkeypatch):
    model, packed_before, right = small(), [], quantization_coded.input_statistics
    plain = quantize_model(model, "gptq4", calibration())

    def watched(quantized, *arguments):
        packed_before.append(len(packed_layers(quantized)))
        return right(quantized, *arguments)

    monkeypatch.setattr(quantization_coded, "input_statistics", watched)
    monkeypatch.setattr(CausalLM, "prepared", speed_up)
    packed = quantize_model(model, "gptq4", calibration())
    assert packed_before == [0, 5] and len(packed_layers(packed)) > 5
    state, other = plain.state_dict(), packed.state_dict()
    assert all(torch.equal(state[name], other[name]) for name in state if "layers.0" in name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_models_generate(dtype):
    packed = speed_up(quantize_model(small(), "int4")).to(dtype)
    ids = torch.stack([small_language(5, seed=5), small_language(5, seed=6)])
    text = decoding.complete(packed, ids, 6, Sampling()).ids
    assert text.shape == (2, 11) and torch.equal(text[:, :5], ids)
    assert torch.equal(decoding.complete(speed_up(packed.copy()), ids, 6, Sampling()).ids, text)


def test_a_skeleton_on_the_meta_device_is_filled_from_plain_codes():
    plain, ids = quantize_model(small(), "int4"), calibration(2, 12)
    packed = speed_up(plain.copy())
    with torch.device("meta"):
        skeleton = speed_up(quantized_skeleton(small(), SCHEMES["int4"]))
    assert not packed_layers(skeleton)
    skeleton.load_state_dict(plain.state_dict(), assign=True)
    assert len(packed_layers(skeleton)) == len(packed_layers(packed))
    assert torch.equal(skeleton(ids), packed(ids))


@pytest.mark.performance
@INT4_SCHEMES
def test_bytes_of_a_packed_model(scheme):
    quantized = quantize_model(small(width=256, latent=128, inner=128), scheme, calibration(2, 16))
    packed = speed_up(quantized)
    stored, before = matrix_bytes(packed)
    held = sum(
        tensor.nbytes for name, tensor in packed.layers.named_buffers()
        if "gate.e_score" not in name
    )
    assert packed_layers(packed) and stored == held <= 0.15 * before

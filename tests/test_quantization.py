"""Phase 8: number formats, layers, calibration methods, whole models, QAT, FP8 training, cache."""

import copy
import dataclasses
import functools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import quantization_coded as q
from mla_coded import MultiHeadLatentAttention
from moe_coded import Experts, Routing, expert_balance_loss
from mtp_coded import CausalLM, Sampling, small_language, train_small
from multihead_attention_coded import RowStore
from pipeline import decoding
from quantization_coded import (
    SCHEMES,
    Fp8Linear,
    InputStatistics,
    IntegerLinear,
    QuantizedLatentCache,
    QuantizedLinear,
    Scheme,
    W8A8Linear,
    absmax_quantize,
    block_dequantize,
    block_quantize,
    convert_qat,
    float8_grid,
    gptq,
    gptq_by_inverses,
    in_groups,
    matrix_bytes,
    output_error,
    pack_bits,
    prepare_fp8_training,
    prepare_qat,
    quantize_cache,
    quantize_model,
    round_nearest,
    round_to_grid,
    tile_rounded,
    unpack_bits,
    zero_point_quantize,
)
from rope_coded import RotaryEmbedding, RotaryLatentAttention

EVERY_SCHEME = pytest.mark.parametrize("scheme", SCHEMES)
FLOATS = pytest.mark.parametrize(
    ("grid", "dtype"), [((4, 3), torch.float8_e4m3fn), ((5, 2), torch.float8_e5m2)],
    ids=["E4M3", "E5M2"],
)


def rotary_attention(width=64):
    return RotaryLatentAttention(
        width, num_attention_heads=4, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=8,
        v_head_dim=16, q_lora_rank=32, rotary=RotaryEmbedding(8),
    )


def small(depth=1, width=64):
    """A model with a dense layer, experts, rotary positions and an MTP module."""

    def block(feed_forward):
        return q.TransformerBlock(rotary_attention(width), feed_forward)

    def experts():
        return q.MixtureOfExperts(width, 64, q.TopKRouter(width, 4, 2), n_shared_experts=1)

    blocks = [block(q.SwiGLU(width, 128)), block(experts())]
    model = CausalLM(32, width, blocks, [block(experts()) for _ in range(depth)])
    model.init_weights(0.1)
    return model.eval()


def generated(model, ids, new_tokens, **options):
    """By the production form: preallocated caches, drafts, prompts in chunks."""
    return decoding.complete(model, ids, new_tokens, Sampling(), **options).ids


@functools.cache
def trained_model():
    """The demonstration's model, trained; tests take copies."""
    torch.manual_seed(0)
    model = q.small_quantizable_model()
    train_small(model, 120, 0.0, "cpu")
    return model


def calibration(sequences=8, length=32):
    return small_language(sequences * length, seed=3).view(sequences, length)


def correlated(rows, width, decay=-2.0, dtype=torch.float32):
    mixing = torch.randn(width, width, dtype=dtype) * torch.logspace(0, decay, width, dtype=dtype)
    return torch.randn(rows, width, dtype=dtype) @ mixing


def statistics_of(x):
    statistics = InputStatistics(x.shape[-1])
    statistics.add(x)
    return statistics


# Integers
def test_absmax_by_hand_rounds_ties_to_even():
    codes, scale = absmax_quantize(torch.tensor([0.5, 1.5, -2.5, 3.5, 0.4, 127.0]))
    assert scale.item() == 1.0
    assert codes.tolist() == [0, 2, -2, 4, 0, 127] and codes.dtype == torch.int8


def test_four_numbers_by_hand():
    """The example in the docstring of `absmax_quantize`."""
    x = torch.tensor([0.1, -0.5, 1.2, 3.5])
    codes, scale = absmax_quantize(x, 4)
    assert scale.item() == 0.5 and codes.tolist() == [0, -1, 2, 7]
    codes, scale = absmax_quantize(x[:3], 4)
    assert scale.item() == pytest.approx(0.17, abs=0.005) and codes[0] == 1


def test_double_precision_numbers_are_rounded_as_they_are():
    x = torch.tensor([0.5 + 1e-12, 0.5, 127.0], dtype=torch.float64)
    assert absmax_quantize(x)[0].tolist() == [1, 0, 127]


def test_the_grid_is_symmetric_and_ends_at_the_largest_number():
    x = torch.tensor([[-8.0, 1.0, 3.0], [0.3, 0.1, -0.1]])
    for bits, limit in ((8, 127), (4, 7), (3, 3), (2, 1)):
        codes, scale = absmax_quantize(x, bits, dim=-1)
        assert codes[0, 0] == -limit and codes[1, 0] == limit
        torch.testing.assert_close(scale[:, 0], torch.tensor([8.0, 0.3]) / limit)


@pytest.mark.comparison
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_int8_rows_are_those_of_quantize_per_channel():
    weight = torch.randn(48, 100)
    codes, scale = absmax_quantize(weight, dim=-1)
    zeros = torch.zeros(48, dtype=torch.long)
    theirs = torch.quantize_per_channel(weight, scale.flatten(), zeros, 0, torch.qint8)
    # theirs multiplies by 1/scale: a number within rounding of a tie may go to the other side
    assert ((codes - theirs.int_repr()).abs().sum() <= 1) and theirs.int_repr().min() >= -127
    torch.testing.assert_close(codes * scale, theirs.dequantize(), atol=scale.max().item(), rtol=0)


@pytest.mark.comparison
@pytest.mark.filterwarnings("ignore")  # PyTorch calls its own way deprecated
def test_zero_point_is_that_of_torchs_observer():
    x = torch.rand(1000) * 3 - 1
    observer = torch.ao.quantization.MinMaxObserver(dtype=torch.quint8)
    observer(x)
    their_scale, their_zero = observer.calculate_qparams()
    codes, scale, zero = zero_point_quantize(x)
    torch.testing.assert_close(scale, their_scale[0])
    assert zero.item() == their_zero.item()
    theirs = torch.quantize_per_tensor(x, scale.item(), zero.item(), torch.quint8).int_repr()
    assert (codes.int() - theirs.int()).abs().sum() <= 1
    error = ((codes.float() - zero) * scale - x).abs().max()
    assert error <= scale * 0.51


def test_a_zero_point_in_two_bits_by_hand():
    codes, scale, zero = zero_point_quantize(torch.tensor([-1.0, 0.4, 0.6, 2.0]), 2)
    assert (scale, zero, codes.tolist()) == (1.0, 1, [0, 1, 2, 3])
    # −1.5 and 1.5 steps: the zero point is rounded to 2, and the largest number would be code 4
    codes, scale, zero = zero_point_quantize(torch.tensor([-1.0, 1.0]), 2)
    assert (zero, codes.tolist()) == (2, [0, 3])
    torch.testing.assert_close(scale, torch.tensor(2 / 3))


def test_zero_is_exact_with_a_zero_point_wherever_the_numbers_lie():
    for x in (torch.tensor([2.0, 3.0]), torch.tensor([-5.0, -1.0]), torch.tensor([-1.0, 2.0])):
        codes, scale, zero = zero_point_quantize(x)
        assert ((codes.float() - zero) * scale - x).abs().max() <= scale * 0.51
        codes, scale, zero = zero_point_quantize(torch.cat([x, torch.zeros(1)]))
        assert codes[-1] == zero


def test_rows_of_zeros_come_back_exactly():
    x = torch.stack([torch.zeros(64), torch.randn(64)])
    for bits in (8, 4):
        codes, scale = absmax_quantize(x, bits, dim=-1)
        assert codes[0].eq(0).all() and scale.isfinite().all() and (scale != 0).all()
    codes, scale, zero = zero_point_quantize(x, dim=-1)
    assert (codes[0].float() - zero[0]).mul(scale[0]).eq(0).all() and (scale != 0).all()
    assert tile_rounded(x)[0].eq(0).all() and tile_rounded(x).isfinite().all()


@pytest.mark.parametrize("dim", [None, 0, -1])
def test_error_is_at_most_half_a_step(dim):
    x = torch.randn(40, 96) * torch.logspace(-3, 2, 96)
    codes, scale = absmax_quantize(x, 8, dim)
    assert ((codes * scale - x).abs() <= scale * 0.5001).all()
    shape = {None: (), 0: (1, 96), -1: (40, 1)}[dim]
    assert scale.shape == shape


def test_a_bf16_scale_is_rounded_before_the_codes_are_chosen():
    x = torch.randn(16, 64)
    codes, scale = absmax_quantize(x, 4, -1, torch.bfloat16)
    assert scale.dtype == torch.bfloat16
    best = (x / scale.float()).round().clamp(-7, 7)
    assert torch.equal(codes.float(), best)


def test_groups_that_do_not_divide_are_refused():
    assert in_groups(torch.zeros(2, 96), 32).shape == (2, 3, 32)
    assert in_groups(torch.zeros(2, 96), None).shape == (2, 1, 96)
    assert in_groups(torch.zeros(2, 96), 1).shape == (2, 96, 1)
    for size in (64, 0, -32):
        with pytest.raises(ValueError, match=f"group_size={size} must divide the row of 96 numb"):
            in_groups(torch.zeros(2, 96), size)


def test_rounding_and_clipping_make_up_the_whole_error():
    x, largest = torch.randn(5000), 1.5
    rounding, clipping = q.rounding_and_clipping(x, 4, largest)
    scale = largest / 7
    whole = (x - (x / scale).round().clamp(-7, 7) * scale).square().mean().item()
    assert rounding + clipping == pytest.approx(whole)
    assert q.rounding_and_clipping(x, 4, x.abs().max())[1] == 0
    parts = q.rounding_and_clipping(torch.tensor([-3.0, 0.0]), 4, 1.5)  # −3 becomes −1.5
    torch.testing.assert_close(torch.stack(parts), torch.tensor([0.0, 1.5**2 / 2]))


# Floats
@FLOATS
def test_every_bit_pattern_is_on_the_grid(grid, dtype):
    patterns = torch.arange(128, dtype=torch.uint8).view(dtype).float()
    finite = patterns[patterns.isfinite()]
    assert torch.equal(float8_grid(*grid), finite)
    assert finite.max() == torch.finfo(dtype).max
    if grid == (4, 3):
        steps = float8_grid(*grid).diff()
        assert steps[finite[:-1] == 1.0].item() == 1 / 8
        assert set(steps[finite[:-1] >= 256].tolist()) == {32.0}


@FLOATS
def test_nearest_on_the_grid_is_pytorchs_cast(grid, dtype):
    values = float8_grid(*grid)
    midpoints = (values[1:] + values[:-1]) / 2
    x = torch.cat([torch.randn(5000) * 50, torch.randn(5000) * 1e-4, midpoints, -midpoints, values])
    assert torch.equal(round_to_grid(x, values), x.to(dtype).float())
    beyond = torch.tensor([1e6, -1e6])
    assert torch.equal(round_to_grid(beyond, values), values[-1] * beyond.sign())


def test_fp8_numbers_lie_on_the_float_grid_and_not_on_an_integer_one():
    x = torch.randn(64, 128) * torch.logspace(-2, 2, 128)
    codes, scale = block_quantize(x, 1)
    assert codes.dtype == torch.float8_e4m3fn
    grid = float8_grid(4, 3)
    assert torch.isin(codes.float().abs(), grid).all()
    assert torch.equal(block_dequantize(codes, scale, 1), codes.float() * scale)
    # Integers would lose the small numbers of a tile; E4M3 keeps three bits of each.
    small = torch.full((1, 128), 0.05)
    small[0, 0] = 448.0
    assert (tile_rounded(small)[0, 1:] / 0.05 - 1).abs().max() < 2**-4


@pytest.mark.parametrize("shape", [(128, 128), (200, 300), (1, 1), (130, 64)])
def test_fp8_blocks_come_back_within_half_a_unit(shape):
    weight = torch.randn(shape) * 3
    codes, scale = block_quantize(weight, 128)
    assert scale.shape == (math.ceil(shape[0] / 128), math.ceil(shape[1] / 128))
    assert codes.untyped_storage().nbytes() == weight.numel()  # nothing of the padding is kept
    spread = scale.repeat_interleave(128, 0)[: shape[0]].repeat_interleave(128, 1)[:, : shape[1]]
    sizes = (weight / spread).abs()
    unit = torch.exp2(sizes.clamp(min=2**-6).log2().floor() - 3) * spread
    error = (block_dequantize(codes, scale, 128) - weight).abs()
    assert (error <= unit * 0.5 * (1 + 1e-5)).all()  # 1e-5: the scale itself is rounded
    assert (codes.float().abs() <= 448).all()


def test_the_stored_scale_multiplies_and_belongs_to_its_block():
    weight = torch.ones(256, 384)
    weight[128:, 256:] = 100.0
    codes, scale = block_quantize(weight, 128)
    expected = torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, 100.0]]) / 448
    torch.testing.assert_close(scale, expected)
    assert codes.float().eq(448).all()
    torch.testing.assert_close(block_dequantize(codes, scale, 128), weight)


def test_tiny_blocks_give_no_nan():
    x = torch.logspace(-45, -36, 500)[:, None].expand(500, 128)
    assert tile_rounded(x).isfinite().all() and (tile_rounded(x) <= 2 * x).all()


def test_tiles_of_activations_do_not_share_a_scale():
    x = torch.randn(2, 3, 256)
    x[..., :128] *= 1e4
    rounded = tile_rounded(x)
    torch.testing.assert_close(rounded[..., 128:], tile_rounded(x[..., 128:]))
    assert (rounded[..., 128:] - x[..., 128:]).abs().max() < 0.2
    torch.testing.assert_close(tile_rounded(x[:1]), rounded[:1])  # nor do tokens


# Packing
def test_nibbles_by_hand():
    packed = pack_bits(torch.tensor([[-8, 7, 0]], dtype=torch.int8), 4)
    assert packed.tolist() == [[0b1111_0000, 0b0000_1000]] and packed.dtype == torch.uint8


@pytest.mark.parametrize("bits", range(2, 8))
@pytest.mark.parametrize("count", [1, 8, 13, 576])
def test_packed_codes_come_back(bits, count):
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (3, 2, count)).to(torch.int8)
    packed = pack_bits(codes, bits)
    assert packed.shape == (3, 2, math.ceil(count * bits / 8))
    assert torch.equal(unpack_bits(packed, bits, count), codes)


# Layers
@pytest.mark.parametrize("sizes", [(64, 48), (33, 7), (96, 17), (128, 1)])
@pytest.mark.parametrize("group_size", [None, 32])
@pytest.mark.parametrize("rows", [1, 5, 40])
def test_a_layer_multiplies_by_the_matrix_that_it_stands_for(sizes, group_size, rows):
    width, out = sizes
    group_size = group_size if width % 32 == 0 else None
    x, weight = torch.randn(rows, width), torch.randn(out, width)
    layer = IntegerLinear(width, out, group_size=group_size).fill_nearest(weight)
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight))
    layer = W8A8Linear(width, out).fill_nearest(weight)
    codes, scale = absmax_quantize(x, dim=-1)
    torch.testing.assert_close(layer(x), F.linear(codes * scale, layer.weight))


def test_shapes_that_do_not_fit_a_layer_are_refused():
    layer = IntegerLinear(64, 48, bits=4, group_size=32)
    codes, scale = round_nearest(torch.randn(48, 64), 4)
    with pytest.raises(ValueError, match=r"must be \(48, 64\) and \(48, 2\), got"):
        layer.fill(codes, scale)
    with pytest.raises(ValueError, match="group_size=48 must divide the row of 64"):
        IntegerLinear(64, 48, group_size=48)
    for bits in (1, 9, 4.0):
        for call in (lambda b: IntegerLinear(64, 48, bits=b), lambda b: absmax_quantize(scale, b),
                     lambda b: zero_point_quantize(scale, b)):
            with pytest.raises(ValueError, match=f"bits={bits} must be from 2 to 8"):
                call(bits)


def test_half_precision_inputs_are_rounded_in_full():
    for dtype, size in ((torch.float16, 1e-6), (torch.bfloat16, 1.0)):
        x = (torch.randn(8, 64) * size).to(dtype)
        codes, scale = absmax_quantize(x, dim=-1)
        steps = x.float().abs().amax(dim=-1, keepdim=True) / 127
        assert ((codes * scale - x.float()).abs() <= steps * 0.501).all()
        codes, scale, zero = zero_point_quantize(x)
        assert (((codes.float() - zero) * scale - x.float()).abs() <= scale * 0.501).all()
        blocks, wanted = block_quantize(x, 2, 32), block_quantize(x.float(), 2, 32)
        for part, in_full in zip(blocks, wanted, strict=True):
            assert part.dtype == in_full.dtype and torch.equal(part.float(), in_full.float())


@pytest.mark.parametrize("kind", ["int8", "int4", "w8a8", "llm_int8", "fp8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_casts_leave_codes_and_scales_alone(kind, dtype):
    weight, x = torch.randn(48, 64), torch.randn(3, 64)
    layer = layers_of(64, 48)[kind].fill_nearest(weight)
    layer.bias = torch.randn(48)
    expected, before = layer(x), {name: b.clone() for name, b in layer.state_dict().items()}
    layer.to(dtype)
    for name, buffer in layer.state_dict().items():
        assert buffer.dtype == before[name].dtype
        assert torch.equal(buffer.float(), before[name].float())
    output = layer(x.to(dtype))
    assert output.dtype == dtype
    assert (output.float() - expected).norm() < 0.02 * expected.norm()
    if dtype == torch.float64 and kind in ("int8", "int4"):
        exact = F.linear(x.double(), layer.weight.double(), layer.bias.double())
        torch.testing.assert_close(output, exact)


def layers_of(width, out):
    return {
        "int8": IntegerLinear(width, out),
        "int4": IntegerLinear(width, out, bits=4, group_size=32),
        "int3": IntegerLinear(width, out, bits=3),
        "w8a8": W8A8Linear(width, out),
        "llm_int8": W8A8Linear(width, out, outlier_threshold=6.0),
        "fp8": Fp8Linear(width, out),
    }


@pytest.mark.parametrize("kind", ["int8", "int4", "w8a8", "llm_int8", "fp8"])
def test_inputs_that_are_not_contiguous(kind):
    layer = layers_of(64, 48)[kind].fill_nearest(torch.randn(48, 64))
    for x in (torch.randn(64, 3).T, torch.randn(3, 128)[:, 64:], torch.randn(2, 64, 3).mT):
        torch.testing.assert_close(layer(x), layer(x.contiguous()))
        torch.testing.assert_close(layer(x.bfloat16()), layer(x.contiguous().bfloat16()))


def test_a_single_column_is_multiplied_right():
    x, weight = torch.randn(5, 1), torch.randn(32, 1)
    output = W8A8Linear(1, 32).fill_nearest(weight)(x)
    torch.testing.assert_close(output, x @ weight.T, rtol=0.01, atol=1e-3)


@pytest.mark.parametrize("kind", ["int8", "int4", "w8a8", "llm_int8", "fp8"])
@pytest.mark.parametrize("size", [1.0, 1e-3])
def test_the_input_gets_the_gradient_of_the_weight_that_the_layer_stands_for(kind, size):
    layer = layers_of(64, 48)[kind].fill_nearest(torch.randn(48, 64))
    x = torch.randn(3, 64, requires_grad=True)
    upstream = torch.randn(3, 48) * size
    layer(x).backward(upstream)
    torch.testing.assert_close(x.grad, upstream @ layer.weight)


@pytest.mark.parametrize("kind", ["int8", "int4", "int3", "w8a8", "llm_int8", "fp8"])
def test_shapes_bias_and_no_tokens(kind):
    weight, bias = torch.randn(48, 64), torch.randn(48)
    layer = layers_of(64, 48)[kind].fill_nearest(weight)
    x = torch.randn(2, 3, 64)
    without = layer(x)
    layer.bias = bias
    torch.testing.assert_close(layer(x), without + bias)
    assert layer(x).shape == (2, 3, 48) and layer(x[0, 0]).shape == (48,)
    assert layer(x[:0]).shape == (0, 3, 48)
    assert (without - F.linear(x, weight)).norm() < 0.35 * F.linear(x, weight).norm()


@pytest.mark.parametrize("make", [IntegerLinear, W8A8Linear, Fp8Linear])
def test_a_layer_that_waits_for_its_weights_gives_zeros(make):
    layer = make(64, 48, bias=True)
    assert layer(torch.randn(3, 64)).eq(0).all() and layer.weight.eq(0).all()
    assert make(64, 48).bias is None and make(64, 48).input_scale is None
    if make is not Fp8Linear:
        smoothed = make(64, 48, scaled_input=True)
        assert smoothed.input_scale.dtype == torch.bfloat16 and smoothed.input_scale.eq(1).all()


def test_biases_are_kept():
    model = small(depth=0)
    biased = MultiHeadLatentAttention(64, 4, 32, 16, 8, 16, q_lora_rank=32, attention_bias=True)
    nn.init.normal_(biased.o_proj.bias)
    model.layers[0].self_attn = biased
    for scheme in SCHEMES:
        quantized = quantize_model(model, scheme, calibration())
        layer = quantized.layers[0].self_attn.o_proj
        assert torch.equal(layer.bias, biased.o_proj.bias)
        assert not list(layer.parameters())  # nothing in it is trained


def test_input_scale_divides_the_input_and_the_weight_that_others_read():
    weight, sigma = torch.randn(48, 64), torch.rand(64) + 0.5
    codes, scale = round_nearest(weight * sigma, 8)
    layer = IntegerLinear(64, 48).fill(codes, scale, sigma.bfloat16())
    x = torch.randn(3, 64)
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight))
    assert (layer.weight - weight).abs().max() < 0.05


# W8A8 and LLM.int8()
def test_integer_product_by_hand():
    layer = W8A8Linear(3, 2).fill_nearest(torch.tensor([[1.27, -0.5, 0.0], [0.0, 2.54, 1.0]]))
    # weight steps 0.01 and 0.02, rounded to BF16; input steps 0.1 and 1
    output = layer(torch.tensor([[12.7, -1.0, 0.2], [127.0, 3.0, 5.0]]))
    rows = [[127, -10, 2], [127, 3, 5]]
    columns = [[127, -50, 0], [0, 127, 50]]
    steps = torch.tensor([0.01, 0.02]).bfloat16().tolist()
    expected = [
        [sum(a * b for a, b in zip(row, column, strict=True)) * s * t
         for column, t in zip(columns, steps, strict=True)]
        for row, s in zip(rows, (0.1, 1.0), strict=True)
    ]
    torch.testing.assert_close(output, torch.tensor(expected))


def test_one_number_of_a_product_by_hand():
    """The example in the docstring of `w8a8_product`."""
    x, row = torch.tensor([[12.7, -1.0, 0.2]]), torch.tensor([[1.27, -0.5, 0.0]])
    codes, scale = absmax_quantize(row, dim=-1)
    assert codes.tolist() == [[127, -50, 0]] and scale.item() == pytest.approx(0.01)
    assert absmax_quantize(x)[0].tolist() == [[127, -10, 2]]
    assert q.w8a8_product(x, codes, scale).item() == pytest.approx(16.629)


def test_each_row_of_inputs_has_its_own_scale():
    layer = W8A8Linear(64, 48).fill_nearest(torch.randn(48, 64))
    x = torch.randn(4, 64)
    alone = layer(x[:1])
    x[1:] *= 1000
    torch.testing.assert_close(layer(x)[:1], alone)


def test_outlier_columns_are_found_in_every_input_and_never_rounded():
    weight = torch.randint(-127, 128, (48, 64)).float()
    weight[:, 0] = 127.0  # steps of 1: the codes are the weights
    layer = W8A8Linear(64, 48, outlier_threshold=6.0).fill_nearest(weight)
    for column in (5, 40):  # another column each time
        for largest in (6.0, -77.77):  # the threshold itself counts
            x = torch.randint(0, 2, (3, 64)) * 2.0 - 1  # ±1: codes ±127, exact
            x[:, column] = torch.tensor([0.0123, largest, 0.0])  # the whole column, also if small
            torch.testing.assert_close(layer(x), F.linear(x, weight), rtol=1e-5, atol=1e-2)
            product = q.llm_int8_product(x, layer.codes, layer.scale)
            torch.testing.assert_close(layer(x), product)
    x = torch.full((1, 64), 5.999)
    x[0, 1] = -1.0
    rounded = absmax_quantize(x, dim=-1)
    expected = F.linear(rounded[0] * rounded[1], weight)
    torch.testing.assert_close(layer(x), expected, atol=1e-2, rtol=0)  # sums of 64 of ±762
    assert (F.linear(x, weight) - expected).abs().max() > 0.1


def test_outliers_do_not_stretch_the_grid_of_the_others():
    weight, x = torch.randn(48, 64), torch.randn(8, 64)
    mixed = W8A8Linear(64, 48, outlier_threshold=6.0).fill_nearest(weight)
    plain = W8A8Linear(64, 48).fill_nearest(weight)
    with_outlier = x.clone()
    with_outlier[:, 9] = 500.0
    without = x.clone()
    without[:, 9] = 0.0
    outlier_alone = 500.0 * mixed.weight[:, 9]
    torch.testing.assert_close(
        mixed(with_outlier) - outlier_alone, plain(without), atol=2e-3, rtol=1e-4
    )  # 2e-3: cancellation next to outputs of about 1,000


@pytest.mark.performance
def test_outlier_columns_take_no_second_copy():
    weight = torch.randn(256, 256)
    mixed = W8A8Linear(256, 256, outlier_threshold=6.0).fill_nearest(weight)
    assert mixed.weight_bytes() == W8A8Linear(256, 256).fill_nearest(weight).weight_bytes()
    assert mixed.weight_bytes() == 256 * 256 + 2 * 256


def test_few_large_columns_break_absmax_and_neither_llm_int8_nor_smoothquant():
    weight, x = torch.randn(256, 256) / 16, torch.randn(64, 256)
    columns = [3, 77, 200]
    x[:, columns] *= 60
    others = torch.ones(256, dtype=torch.bool)
    others[columns] = False
    size = F.linear(x[:, others], weight[:, others]).norm()
    sigma = q.smoothquant_smoothing(weight, x.abs().amax(dim=0))
    outputs = {
        "rows": W8A8Linear(256, 256).fill_nearest(weight)(x),
        "mixed": W8A8Linear(256, 256, outlier_threshold=6.0).fill_nearest(weight)(x),
        "smooth": W8A8Linear(256, 256).fill_nearest(weight * sigma)(x / sigma),
    }
    errors = {name: ((y - F.linear(x, weight)).norm() / size) for name, y in outputs.items()}
    assert errors["rows"] > 0.15 and errors["mixed"] < 0.06 and errors["smooth"] < 0.06


def test_smoothing_by_hand():
    weight = torch.tensor([[2.0, -0.5, 0.0, 1.0], [-1.0, 0.1, 0.0, 4.0]])
    largest = torch.tensor([8.0, 50.0, 3.0, 0.0])
    scale = q.smoothquant_smoothing(weight, largest)
    torch.testing.assert_close(scale, torch.tensor([2.0, 10.0, 1.0, 1.0]))
    assert q.smoothquant_smoothing(weight, largest, alpha=1.0)[1] == 50.0
    floor = torch.tensor([10.0, 1e-6, 10.0, 10.0])  # a column that calibration hardly saw
    assert q.smoothquant_smoothing(weight, floor, alpha=1.0)[1] == pytest.approx(floor.mean() / 10)


# FP8 layers
def test_fp8_layer_rounds_both_sides():
    weight, x = torch.randn(200, 300), torch.randn(5, 300)
    layer = Fp8Linear(300, 200)
    layer.codes, layer.weight_scale_inv = block_quantize(weight, 128)
    expected = F.linear(tile_rounded(x), block_dequantize(*block_quantize(weight, 128), 128))
    torch.testing.assert_close(layer(x), expected)
    layer.rounds_input = False
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight))


@pytest.mark.comparison
def test_blocks_of_one_row_are_what_pytorch_multiplies():
    x, weight = torch.randn(16, 64), torch.randn(48, 64)
    sides = [block_quantize(side, 1, 64) for side in (x, weight)]
    expected = F.linear(*(block_dequantize(*side, 1, 64) for side in sides))
    (codes, scale), (weight_codes, weight_scale) = sides
    by_row = F.ScalingType.RowWise
    theirs = F.scaled_mm(codes, weight_codes.T, scale, by_row, weight_scale.T, by_row,
                         output_dtype=torch.float32)
    torch.testing.assert_close(theirs, expected, atol=1e-4, rtol=1e-4)


# GPTQ and AWQ
@pytest.mark.parametrize("way", [gptq_by_inverses, lambda *a, **o: gptq(*a, **o)[0]])
def test_one_gptq_column_by_hand(way):
    """The example in the docstring of `gptq_by_inverses`."""
    weight = torch.tensor([[0.4, 1.4, 3.0]])
    hessian = torch.tensor([[1.0, 0.8, 0.0], [0.8, 1.0, 0.0], [0.0, 0.0, 1.0]])
    inverse = torch.linalg.inv(hessian)
    assert (inverse[0, 1] / inverse[0, 0]).item() == pytest.approx(-0.8)
    codes, (nearest, scale) = way(weight, hessian, 3, dampening=0.0), round_nearest(weight, 3)
    assert scale.item() == 1.0
    assert codes.tolist() == [[0, 2, 3]] and nearest.tolist() == [[0, 1, 3]]
    assert output_error(weight, codes.float(), hessian) == pytest.approx(0.136)
    assert output_error(weight, nearest.float(), hessian) == pytest.approx(0.576)


@pytest.mark.parametrize("group_size", [None, 16])
@pytest.mark.parametrize("bits", [3, 4])
def test_gptq_is_its_naive_reference(bits, group_size):
    x, weight = correlated(256, 48, dtype=torch.float64), torch.randn(20, 48, dtype=torch.float64)
    naive = gptq_by_inverses(weight, x.T @ x, bits, group_size)
    for columns in (128, 16, 7):
        codes, _ = gptq(weight, x.T @ x, bits, group_size, columns, activation_order=False)
        assert torch.equal(codes, naive)


def test_activation_order_is_a_permutation_of_the_columns():
    x, weight = correlated(256, 48, dtype=torch.float64), torch.randn(20, 48, dtype=torch.float64)
    hessian = x.T @ x
    order = hessian.diagonal().argsort(descending=True)
    sorted_codes, _ = gptq(
        weight[:, order], hessian[order][:, order], 3, activation_order=False
    )
    codes, _ = gptq(weight, hessian, 3)
    assert torch.equal(codes[:, order], sorted_codes)
    assert not torch.equal(codes, gptq(weight, hessian, 3, activation_order=False)[0])


@pytest.mark.parametrize("activation_order", [True, False])
def test_gptq_beats_rounding_in_random_layers_with_correlated_inputs(activation_order):
    better = 0
    for seed in range(100):
        torch.manual_seed(seed)
        width, rows = 16 * int(torch.randint(2, 7, ())), 32 + int(torch.randint(64, ()))
        x, weight = correlated(4 * width, width, -1.0), torch.randn(rows, width)
        hessian = x.T @ x
        codes, scale = gptq(weight, hessian, 4, activation_order=activation_order)
        plain, _ = round_nearest(weight, 4)
        error, plain_error = (
            output_error(weight, c * scale.float(), hessian) for c in (codes, plain)
        )
        better += error < plain_error
    assert better >= 95


def test_gptq_is_rounding_when_inputs_are_uncorrelated():
    basis = torch.linalg.qr(torch.randn(200, 64, dtype=torch.float64))[0]
    x = basis * torch.logspace(-1, 2, 64, dtype=torch.float64)
    weight = torch.randn(32, 64, dtype=torch.float64)
    hessian = torch.diag((x.T @ x).diagonal())
    for group_size in (None, 16):
        codes, scale = gptq(weight, hessian, 4, group_size)
        plain, plain_scale = round_nearest(weight, 4, group_size)
        assert torch.equal(codes, plain) and torch.equal(scale, plain_scale)


def test_gptq_of_an_expert_that_saw_nothing_is_rounding():
    weight = torch.randn(20, 48)
    codes, _ = gptq(weight, torch.zeros(48, 48), 4)
    assert torch.equal(codes, round_nearest(weight, 4)[0])


def test_dampening_adds_a_share_of_the_mean_diagonal():
    hessian = torch.tensor([[5.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    expected = torch.tensor([[5.2, 1.0, 0.0], [1.0, 1.2, 0.0], [0.0, 0.0, 1.2]])  # the mean is 2
    torch.testing.assert_close(q.dampened(hessian, 0.1), expected)


def test_gptq_bears_fewer_inputs_than_columns():
    x, weight = torch.randn(3, 64), torch.randn(32, 64)
    x[:, 10] = 0.0
    codes, scale = gptq(weight, x.T @ x, 4)
    plain, _ = round_nearest(weight, 4)
    errors = [output_error(weight, c * scale.float(), x.T @ x) for c in (codes, plain)]
    assert errors[0] < errors[1]


def test_output_error_is_the_norm_over_the_inputs():
    x, weight, other = torch.randn(30, 16), torch.randn(8, 16), torch.randn(8, 16)
    expected = (x @ (weight - other).T).square().sum().item()
    assert output_error(weight, other, x.T @ x) == pytest.approx(expected, rel=1e-4)


def test_statistics_by_hand():
    statistics = InputStatistics(2)
    for rows in ([[0.5, -0.25], [-0.125, 0.0]], torch.zeros(0, 2), [[[0.25, 0.5]]]):
        statistics.add(torch.as_tensor(rows))
    assert statistics.hessian.tolist() == [[0.328125, 0.0], [0.0, 0.3125]]
    assert statistics.largest.tolist() == [0.5, 0.5]
    assert statistics.total.tolist() == [0.875, 0.75]
    statistics = statistics_of(torch.ones(257, 1).bfloat16())  # BF16 has no 257
    assert statistics.hessian.item() == statistics.total.item() == 257
    assert all(part.is_meta for part in vars(InputStatistics(2, "meta")).values())
    statistics.add(torch.ones(3, 1, requires_grad=True))
    assert not any(part.requires_grad for part in vars(statistics).values())


def test_awq_is_never_worse_than_rounding_on_what_it_saw_and_better_with_large_inputs():
    x, weight = torch.randn(256, 64), torch.randn(48, 64)
    x[:, :4] *= 20
    statistics = statistics_of(x)
    sigma = q.awq_smoothing(weight, statistics, 3)
    assert sigma[:4].min() > sigma[4:].max()

    def error(sigma):
        codes, scale = round_nearest(weight * sigma, 3)
        return output_error(weight, codes * scale.float() / sigma, statistics.hessian)

    assert error(sigma) < 0.8 * error(torch.ones(64))
    sizes = statistics.total / statistics.total.mean()
    assert error(sigma) == pytest.approx(min(error(sizes ** (i / 20)) for i in range(21)))


@pytest.mark.parametrize(("sizes", "alpha"), [((1, 9, 0), 1), ((1, 3, 0), 0)])
@pytest.mark.parametrize("unit", [1.0, 1e-15])
def test_awq_tries_the_powers_from_0_to_1(sizes, alpha, unit):
    """In 3 bits, 0.1 beside 3 is rounded to 0 unless it is scaled up by 5: 9¹ does, 3¹ does not."""
    weight, x = torch.tensor([[3.0, 0.1, 0.5]]), unit * torch.diag(torch.tensor(sizes).float())
    sigma = q.awq_smoothing(weight, statistics_of(x), 3, steps=1)
    of_mean = 3 * torch.tensor(sizes) / sum(sizes)
    expected = of_mean.clamp(min=1e-4) ** alpha  # the last column was never seen
    torch.testing.assert_close(sigma, expected)


def test_awq_without_inputs_is_rounding():
    sigma = q.awq_smoothing(torch.randn(8, 16), InputStatistics(16), 4)
    assert torch.equal(sigma, torch.ones(16))


def test_statistics_are_those_of_what_each_layer_reads():
    model, ids = small(), calibration(4, 12)
    listed = q.listed_experts(copy.deepcopy(model))
    linears = q.linears_of(listed.layers[0])
    statistics = q.input_statistics(listed, ids, linears, batch_size=3)
    x = model.layers[0].input_layernorm(model.embed_tokens(ids)).flatten(0, 1)
    for name in ("self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa"):
        torch.testing.assert_close(statistics[name].hessian, x.T @ x, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(statistics[name].largest, x.abs().amax(dim=0))
        torch.testing.assert_close(statistics[name].total, x.abs().sum(dim=0))
    linears = q.linears_of(listed.layers[1])
    statistics = q.input_statistics(listed, ids, linears)
    # each expert sees its own tokens: the traces of their Hessians are those of the choices
    traces = [statistics[f"mlp.experts.gate_up_proj.{e}"].hessian.trace() for e in range(4)]
    shared = statistics["mlp.shared_experts.gate_up_proj"].hessian.trace()
    torch.testing.assert_close(sum(traces), 2 * shared, rtol=1e-4, atol=1e-4)
    assert not listed.layers[0].self_attn.q_a_proj._forward_pre_hooks  # the hooks are gone


# Whole models
@EVERY_SCHEME
def test_every_matrix_is_quantised_and_nothing_else(scheme):
    model = small()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    quantized = quantize_model(model, scheme, calibration())
    assert quantized.quantization == dataclasses.asdict(SCHEMES[scheme])
    assert not any(isinstance(m, QuantizedLinear) for m in model.modules())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])  # the argument is untouched
    for block in quantized.blocks():
        assert not any(isinstance(m, nn.Linear) for m in block.modules())
    kept = {name for name, _ in quantized.named_parameters()}
    assert kept == {
        name for name in dict(model.named_parameters())
        if "norm" in name or "gate.weight" in name or "embed" in name or "lm_head" in name
        or "eh_proj" in name
    }
    for name in kept:
        assert torch.equal(quantized.get_parameter(name), model.get_parameter(name))
    experts = quantized.layers[1].mlp.experts
    assert len(experts.gate_up_proj) == len(experts.down_proj) == 4
    ids = calibration(2, 12)
    exact, rounded = model(ids), quantized(ids)
    assert not rounded.requires_grad
    share = 0.6 if SCHEMES[scheme].bits == 4 else 0.2  # random weights: nothing forgives 4 bits
    assert (rounded - exact).norm() < share * exact.norm()
    assert not torch.equal(rounded, exact)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_each_scheme_fills_its_layers_by_its_own_method(scheme):
    model = small(depth=0)
    layer = quantize_model(model, scheme, calibration()).layers[0].self_attn.q_a_proj
    linear = model.layers[0].self_attn.q_a_proj
    statistics = InputStatistics(64)
    with torch.no_grad():
        statistics.add(model.layers[0].input_layernorm(model.embed_tokens(calibration())))
    weight, sigma = linear.weight.detach(), None
    if scheme == "awq4":
        sigma = q.awq_smoothing(weight, statistics, 4, 64).bfloat16()
    if scheme == "smoothquant":
        sigma = q.smoothquant_smoothing(weight, statistics.largest).bfloat16()
    if sigma is not None:
        assert torch.equal(layer.input_scale, sigma) and sigma.unique().numel() > 1
        expected = round_nearest(weight * sigma, layer.bits, layer.group_size)
    elif scheme == "gptq4":
        expected = gptq(weight, statistics.hessian, 4, 64)
    elif scheme == "fp8":
        assert torch.equal(layer.weight, block_dequantize(*block_quantize(weight, 128), 128))
        return
    else:
        expected = round_nearest(weight, layer.bits, layer.group_size)
    if sigma is None:
        assert layer.input_scale is None
    codes = layer.codes if layer.bits == 8 else unpack_bits(layer.codes, 4, 64)
    # GPTQ's Hessian is summed in another order: a code may sit on the edge
    assert (codes != expected[0]).float().mean() <= (0.01 if scheme == "gptq4" else 0)
    assert torch.equal(layer.scale, expected[1])
    assert (layer.outlier_threshold if scheme in ("w8a8", "llm_int8") else None) == (
        6.0 if scheme == "llm_int8" else None
    )


@EVERY_SCHEME
def test_the_quantised_layers_stand_for_their_weight(scheme):
    """A model that holds the dequantised weights in FP32 says the same, activations aside."""
    model = small()
    quantized = quantize_model(model, scheme, calibration())
    plain = q.listed_experts(copy.deepcopy(model))
    for mine, theirs in zip(quantized.blocks(), plain.blocks(), strict=True):
        for name, linear in q.linears_of(theirs).items():
            linear.weight = nn.Parameter(mine.get_submodule(name).weight)
    ids = calibration(2, 12)
    exact, got = plain(ids), quantized(ids)
    tolerance = 1e-4 if SCHEMES[scheme].layer == "weights" else 0.1
    assert (got - exact).norm() < tolerance * exact.norm()


@EVERY_SCHEME
def test_absorbed_and_expanded_read_the_same_kv_b_proj(scheme):
    quantized = quantize_model(small(), scheme, calibration())
    for block in quantized.blocks():
        attention = copy.deepcopy(block.self_attn)
        attention.o_proj = nn.Identity()  # what is compared is what kv_b_proj made
        hidden = torch.randn(2, 9, 64)
        expanded = attention(hidden)
        for path in ("absorbed", "naive", "einsum"):
            torch.testing.assert_close(
                attention(hidden, path=path), expanded, atol=1e-5, rtol=1e-4
            )
        latents = torch.randn(5, 32)
        rebuilt = F.linear(latents, attention.kv_b_proj.weight)
        torch.testing.assert_close(attention.kv_b_proj(latents), rebuilt, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("scheme", ["int8", "gptq4", "awq4", "fp8"])
def test_cached_generation_is_the_full_pass(scheme):
    quantized = quantize_model(small(), scheme, calibration())
    ids = small_language(9, seed=5)[None]
    text = quantized.generate(ids, 12)
    for length in range(9, 21):
        logits = quantized(text[:, :length])[0, -1]
        assert logits[text[0, length]] >= logits.max() - 1e-4
    drafted = generated(quantized, ids, 12, speculative=True)
    assert torch.equal(drafted, text)


@EVERY_SCHEME
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_models_of_other_precisions_generate(scheme, dtype):
    ids = small_language(9, seed=5)[None]
    for model in (quantize_model(small().to(dtype), scheme, calibration()),
                  quantize_model(small(), scheme, calibration()).to(dtype)):
        assert generated(model, ids, 4, speculative=True).shape == (1, 13)
        assert model(ids).dtype == dtype and model(ids, path="absorbed").dtype == dtype


def test_models_prepared_for_fp8_training_are_quantised_like_others():
    model = small()
    trained = prepare_fp8_training(prepare_fp8_training(model))
    ids = calibration(2, 12)
    for scheme in ("fp8", "int8"):
        expected = quantize_model(model, scheme)(ids)
        torch.testing.assert_close(quantize_model(trained, scheme)(ids), expected)
    rounded = prepare_qat(trained, "int8")
    torch.testing.assert_close(convert_qat(rounded)(ids), expected)
    frozen = prepare_fp8_training(small().requires_grad_(False))
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    model = prepare_fp8_training(small(depth=0))
    model(ids[:1, :3]).sum().backward()  # few tokens go expert by expert, one row each
    assert model.layers[0].mlp.down_proj.weight.grad.isfinite().all()


def test_a_model_straight_from_a_training_pass_is_copied():
    model, ids, routed = small(depth=0), calibration(2, 12), []
    model.layers[1].mlp.balance_loss = functools.partial(expert_balance_loss, alpha=0.01)
    loss = q.next_token_loss(model.train()(ids, routed=routed), ids)
    assert not quantize_model(model, "int8").training  # for inference
    (loss + sum(r.balance_loss() for r in routed)).backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    for prepare in (lambda m: quantize_model(m, "int8"), lambda m: prepare_qat(m, "int8"),
                    prepare_fp8_training):
        assert prepare(model)(ids).isfinite().all()
    assert model.training and routed[0].layer is model.layers[1].mlp
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, gradients[name])


@EVERY_SCHEME
def test_bf16_weights_are_rounded_in_full(scheme):
    linear = nn.Linear(64, 48).bfloat16().requires_grad_(False)
    statistics = statistics_of(correlated(256, 64))
    got, wanted = (
        dict(q.quantized_linear(each, SCHEMES[scheme], "layer", statistics).named_buffers())
        for each in (linear, copy.deepcopy(linear).float())
    )
    assert got.keys() == wanted.keys()
    assert all(torch.equal(got[name].float(), wanted[name].float()) for name in got)


def test_qat_of_a_bf16_model_trains_the_weights_that_it_converts_to():
    rounded = prepare_qat(small().bfloat16(), "int8")
    real = convert_qat(rounded)
    fake = rounded.layers[0].self_attn.q_b_proj.weight
    held = real.layers[0].self_attn.q_b_proj.weight
    assert torch.equal(fake, held.bfloat16())


@pytest.mark.parametrize("scheme", ["w8a8", "llm_int8", "smoothquant", "int4"])
def test_kernels_generate(scheme):
    quantized = quantize_model(small(), scheme, calibration())
    ids = torch.cat([small_language(5, seed=5)[None], small_language(5, seed=6)[None]])
    text = generated(quantized, ids, 6, speculative=True)
    assert text.shape == (2, 11) and torch.equal(text[:, :5], ids)


@pytest.mark.parametrize("dispatch", ["dense", "loop", "grouped"])
def test_quantised_experts_agree_in_every_dispatch(dispatch):
    quantized = quantize_model(small(), "int4")
    layer = quantized.layers[1].mlp
    x = torch.randn(2, 7, 64)
    torch.testing.assert_close(
        layer(x, dispatch=dispatch), layer(x, dispatch="dense"), atol=1e-6, rtol=1e-4
    )
    torch.testing.assert_close(layer.experts.expert(2, x)[1], layer.experts.expert(2, x[1]))
    one = Routing(torch.ones(3, 1), torch.full((3, 1), 2), torch.rand(3, 4))
    torch.testing.assert_close(  # every token on one expert, three without any
        getattr(layer.experts, dispatch)(x[0, :3], one), layer.experts.expert(2, x[0, :3])
    )


@pytest.mark.parametrize("scheme", SCHEMES)
def test_an_expert_without_calibration_tokens_is_rounded_all_the_same(scheme):
    model = small()
    model.layers[1].mlp.gate.e_score_correction_bias.copy_(torch.tensor([9.0, 9.0, 0.0, 0.0]))
    quantized = quantize_model(model, scheme, calibration())
    weight = model.layers[1].mlp.experts.down_proj[3]
    rounded = quantized.layers[1].mlp.experts.down_proj[3].weight
    assert rounded.isfinite().all() and (rounded - weight).norm() < 0.15 * weight.norm()
    assert quantized(calibration(2, 8)).isfinite().all()


@pytest.mark.performance
@pytest.mark.parametrize("scheme", ["int8", "llm_int8", "w8a8", "smoothquant"])
def test_eight_bits_from_width_64_on(scheme):
    def block(feed_forward):
        return q.TransformerBlock(MultiHeadLatentAttention(64, 4, 64, 16, 8, 16), feed_forward)

    experts = q.MixtureOfExperts(64, 64, q.TopKRouter(64, 4, 2), n_shared_experts=1)
    model = CausalLM(32, 64, [block(q.SwiGLU(64, 64)), block(experts)])
    stored, before = matrix_bytes(quantize_model(model, scheme, calibration(2, 16)))
    assert stored <= 0.27 * before


@pytest.mark.performance
@pytest.mark.parametrize(
    ("scheme", "limit"), [("int8", 0.27), ("llm_int8", 0.27), ("w8a8", 0.27), ("smoothquant", 0.27),
                          ("int4", 0.15), ("gptq4", 0.15), ("awq4", 0.15), ("fp8", 0.27)],
)
def test_bytes_of_the_matrices_are_counted_and_small(scheme, limit):
    def block(feed_forward):
        return q.TransformerBlock(MultiHeadLatentAttention(256, 4, 128, 32, 16, 32), feed_forward)

    experts = q.MixtureOfExperts(256, 128, q.TopKRouter(256, 4, 2), n_shared_experts=1)
    model = CausalLM(32, 256, [block(q.SwiGLU(256, 128)), block(experts)])
    quantized = quantize_model(model, scheme, calibration(2, 16))
    stored, before = matrix_bytes(quantized)
    matrices = [p for name, p in model.layers.named_parameters() if p.dim() > 1]
    assert (
        before == 4 * sum(p.numel() for p in matrices) - 4 * model.layers[1].mlp.gate.weight.numel()
    )
    held = sum(
        tensor.nbytes for name, tensor in quantized.layers.named_buffers()
        if "gate.e_score" not in name
    )
    assert stored == held and stored <= limit * before
    layers = [m for m in quantized.modules() if isinstance(m, QuantizedLinear)]
    assert min(layer.in_features for layer in layers) >= 64
    for layer in layers if SCHEMES[scheme].layer == "weights" else []:
        group_size = min(layer.in_features, 128) if layer.bits == 4 else layer.in_features
        assert layer.scale.shape == (layer.out_features, layer.in_features // group_size)


@pytest.mark.performance
def test_bytes_of_one_layer_by_hand():
    weight = torch.randn(48, 256)
    smoothed = IntegerLinear(256, 48, bias=True, scaled_input=True)  # the bias is not in the matrix
    assert smoothed.weight_bytes() == 48 * (256 + 2) + 2 * 256
    assert IntegerLinear(256, 48).fill_nearest(weight).weight_bytes() == 48 * (256 + 2)
    four = IntegerLinear(256, 48, bits=4, group_size=128).fill_nearest(weight)
    assert four.weight_bytes() == 48 * (128 + 2 * 2)
    assert 8 * four.weight_bytes() / weight.numel() == 4.125
    three = IntegerLinear(256, 48, bits=3).fill_nearest(weight)
    assert three.weight_bytes() == 48 * (96 + 2)
    assert Fp8Linear(300, 257).weight_bytes() == 257 * 300 + 4 * 3 * 3


def test_groups_fit_the_row():
    auto = Scheme(bits=4, group_size="auto")
    assert [auto.groups(width) for width in (256, 192, 96, 100)] == [128, 64, 32, 100]
    assert Scheme(bits=4).groups(96) == 96 and Scheme(bits=4, group_size=16).groups(96) == 16
    assert Scheme(group_size=1).groups(96) == 1


def test_schemes_are_shared_so_nobody_changes_them():
    with pytest.raises(dataclasses.FrozenInstanceError):
        SCHEMES["int8"].bits = 4


@pytest.mark.parametrize("bits", [2, 3, 5, 6, 7])
def test_other_widths_of_codes_work(bits):
    model, ids = small(), calibration(2, 12)
    errors = [
        (quantize_model(model, Scheme(bits=b))(ids) - model(ids)).norm() for b in (bits, bits + 1)
    ]
    assert errors[1] < errors[0]


def unreadable():
    model = small()
    with torch.no_grad():
        model.embed_tokens.weight[calibration()[0, 5]] = math.nan
    return model


def overflowing():
    """Finite weights, and an infinite input in one column of the layer after them."""
    model = small()
    with torch.no_grad():
        model.layers[0].mlp.gate_up_proj.weight[5] = 1e38
        model.layers[0].mlp.gate_up_proj.weight[128 + 5] = 1e38
    return model


def poisoned(value):
    model = small()
    with torch.no_grad():
        model.layers[1].mlp.experts.down_proj[2, 0, 0] = value
    return model


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: quantize_model(small(), ["int8"]), r"scheme=\['int8'\] must be one of"),
        (lambda: quantize_model(small(), "int5"), "scheme='int5' must be one of int8, llm_int8"),
        (lambda: quantize_model(nn.Linear(2, 2), "int8"), "must be a CausalLM, got Linear"),
        (lambda: quantize_model(small(), "gptq4"), "method 'gptq' needs calibration"),
        (lambda: quantize_model(small(), "awq4"), "method 'awq' needs calibration"),
        (lambda: quantize_model(small(), "smoothquant"), "method 'smooth' needs calibration"),
        (lambda: quantize_model(small(), "gptq4", torch.zeros(5, dtype=torch.long)),
         r"calibration must be token ids \(B, T\) .* got \(5,\)"),
        (lambda: quantize_model(small(), "gptq4", torch.zeros(5, 1, dtype=torch.long)), "T ≥ 2"),
        (lambda: quantize_model(small(), "gptq4", torch.zeros(0, 5, dtype=torch.long)), "B ≥ 1"),
        (lambda: quantize_model(small(), "gptq4", torch.zeros(2, 5)), "must be integers"),
        (lambda: quantize_model(small(), "gptq4", torch.full((2, 5), 32)), "token id 32 is not"),
        (lambda: quantize_model(small(), "gptq4", "text"), "calibration must be .* got str"),
        (lambda: quantize_model(poisoned(math.nan), "int8"),
         r"block 1 mlp.experts.down_proj.2: the weights hold NaN or infinite"),
        (lambda: quantize_model(unreadable(), "gptq4", calibration()),
         "self_attn.q_a_proj: NaN or infinite inputs while reading the calibration"),
        (lambda: quantize_model(overflowing(), "gptq4", calibration()),
         "mlp.down_proj: NaN or infinite inputs while reading the calibration"),
        (lambda: quantize_model(poisoned(math.inf), "fp8"), "hold NaN or infinite"),
        (lambda: quantize_model(quantize_model(small(), "int8"), "int4"), "quantised already"),
        (lambda: quantize_model(prepare_qat(small(), "int8"), "int8"), "prepared for QAT"),
        (lambda: quantize_model(small(), Scheme(bits=4, group_size=48)),
         r"block 0 self_attn.q_a_proj: group_size=48 must divide 64"),
        (lambda: Scheme(bits=9), "bits=9 must be from 2 to 8"),
        (lambda: Scheme(bits=1), "bits=1 must be from 2 to 8"),
        (lambda: Scheme(group_size=0), "group_size=0 must be a number above 0"),
        (lambda: Scheme("w8a8", bits=4), "takes bits=8 and group_size=None"),
        (lambda: Scheme("llm_int8", method="gptq"), "'gptq' is for layer='weights'"),
        (lambda: Scheme("weights", method="smooth"), "'smooth' is for layer='w8a8'"),
        (lambda: Scheme("int8"), "layer=int8 must be one of"),
        (lambda: Scheme(method="best"), "method=best must be one of"),
        (lambda: prepare_qat(small(), "gptq4"), "QAT is for schemes that round weights to nearest"),
        (lambda: prepare_qat(small(), "w8a8"), "QAT is for schemes"),
        (lambda: prepare_qat(prepare_qat(small(), "int4"), "int4"), "prepared for QAT"),
        (lambda: prepare_qat(small(), Scheme(bits=4, group_size=48)), "must divide the row of 64"),
        (lambda: convert_qat(small()), "was not prepared by prepare_qat"),
        (lambda: prepare_fp8_training(quantize_model(small(), "int8")), "quantised already"),
        (lambda: quantize_cache(small(), 9), "bits=9 must be from 2 to 8"),
        (lambda: quantize_cache(small(), 0), "bits=0 must be from 2 to 8"),
    ],
)
def test_mistakes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_rows_of_zeros_in_a_model_stay_zero():
    model = small()
    with torch.no_grad():
        model.layers[0].mlp.down_proj.weight[5] = 0.0
    for scheme in SCHEMES:
        layer = quantize_model(model, scheme, calibration()).layers[0].mlp.down_proj
        assert layer.weight[5].eq(0).all() and layer.weight.isfinite().all()
        assert layer(torch.randn(3, 128))[:, 5].eq(0).all()


def test_calibrated_blocks_see_the_rounded_blocks_before_them(monkeypatch):
    seen = []
    right = q.input_statistics

    def watched(model, ids, linears):
        seen.append(
            [isinstance(b.self_attn.o_proj, QuantizedLinear) for b in model.blocks()]
        )
        return right(model, ids, linears)

    monkeypatch.setattr(q, "input_statistics", watched)
    quantize_model(small(), "gptq4", calibration())
    assert seen == [[False] * 3, [True, False, False], [True, True, False]]


@pytest.mark.integration
def test_gptq_costs_a_trained_model_less_than_rounding():
    model = trained_model().copy()
    base = q.held_out_loss(model.eval())
    ids = calibration(64, 64)
    losses = {
        method: q.held_out_loss(quantize_model(model, Scheme(bits=3, method=method), ids))
        for method in ("nearest", "gptq")
    }
    assert losses["gptq"] - base < 0.5 * (losses["nearest"] - base)
    assert abs(q.held_out_loss(quantize_model(model, "int8")) / base - 1) < 0.005
    assert abs(q.held_out_loss(quantize_model(model, "fp8")) / base - 1) < 0.0025


# QAT
@pytest.mark.parametrize("scheme", ["int8", "int4", Scheme(bits=3)])
def test_qat_sees_the_weights_that_the_integer_layers_hold(scheme):
    model = small()
    rounded = prepare_qat(model, scheme)
    real = convert_qat(rounded)
    for fake_block, real_block in zip(rounded.blocks(), real.blocks(), strict=True):
        for name in ("self_attn.q_b_proj", "self_attn.kv_b_proj", "self_attn.o_proj"):
            fake = fake_block.get_submodule(name).weight
            assert torch.equal(fake, real_block.get_submodule(name).weight)
    fake = rounded.layers[1].mlp.experts.gate_up_proj
    real_experts = real.layers[1].mlp.experts.gate_up_proj
    assert torch.equal(fake, torch.stack([expert.weight for expert in real_experts]))
    ids = calibration(2, 12)
    torch.testing.assert_close(rounded(ids), real(ids), atol=1e-4, rtol=1e-4)
    # absorption reads the rounded kv_b_proj, too
    torch.testing.assert_close(rounded(ids, path="absorbed"), rounded(ids), atol=1e-4, rtol=1e-4)


def test_qat_gradient_goes_straight_through():
    weight = torch.randn(8, 64, requires_grad=True)
    upstream = torch.randn(8, 64)
    rounded = q.FakeQuantize(Scheme(bits=4, group_size=32))(weight)
    rounded.backward(upstream)
    assert torch.equal(weight.grad, upstream)
    codes, scale = absmax_quantize(weight.detach().view(8, 2, 32), 4, -1, torch.bfloat16)
    assert torch.equal(rounded, (codes * scale.float()).view(8, 64))


def test_qat_trains_every_matrix_and_leaves_its_argument_alone():
    model = small(depth=0)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rounded = prepare_qat(model, "int4")
    train_small(rounded, 2, 0.0, "cpu")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    names = [name for name, _ in rounded.named_parameters()]
    assert sum("parametrizations" in name for name in names) == 2 * 5 + 2 + 4
    for name, parameter in rounded.named_parameters():
        assert parameter.grad is not None, name
        if name.endswith("original"):
            old = before[name.replace("parametrizations.", "").removesuffix(".original")]
            assert not torch.equal(parameter, old)
    assert not any("gate.parametrizations" in n or "lm_head.p" in n for n in names)


@pytest.mark.integration
def test_qat_recovers_what_rounding_costs():
    model = trained_model().copy()
    scheme = Scheme(bits=2)
    control, rounded = copy.deepcopy(model), prepare_qat(model, scheme)
    for trained in (control, rounded):
        train_small(trained, 60, 0.0, "cpu", seed=1, rate=1e-3)
    unrounded = q.held_out_loss(control)
    lost = q.held_out_loss(quantize_model(control, scheme)) - unrounded
    left = q.held_out_loss(convert_qat(rounded)) - unrounded
    assert left < 0.5 * lost


# FP8 training
def test_fp8_training_rounds_the_operands_of_all_three_products():
    x = torch.randn(2, 100, 200, requires_grad=True)
    weight = torch.randn(150, 200, requires_grad=True)
    upstream = torch.randn(2, 100, 150)
    output = q.Fp8Product.apply(x, weight)
    output.backward(upstream)
    rows, gradient = x.detach().flatten(0, 1), upstream.flatten(0, 1)
    blocks = block_dequantize(*block_quantize(weight.detach(), 128), 128)
    torch.testing.assert_close(output.flatten(0, 1), tile_rounded(rows) @ blocks.T)
    torch.testing.assert_close(x.grad.flatten(0, 1), tile_rounded(gradient) @ blocks)
    # the sum over tokens: tiles of 128 tokens in either factor
    expected = tile_rounded(gradient.T.contiguous()) @ tile_rounded(rows.T.contiguous()).T
    torch.testing.assert_close(weight.grad, expected)
    exact = gradient.T @ rows
    assert 0.005 < (weight.grad - exact).norm() / exact.norm() < 0.06


def test_fp8_training_reaches_every_matrix_and_no_other():
    model = prepare_fp8_training(small())
    linears = [m for block in model.blocks() for m in q.linears_of(block).values()]
    assert all(type(linear) is q.Fp8TrainingLinear for linear in linears) and len(linears) > 20
    assert type(model.lm_head) is nn.Linear and type(model.mtp[0].eh_proj) is nn.Linear
    assert not any(
        isinstance(m, Experts) and not isinstance(m, q.ExpertList) for m in model.modules()
    )
    model.layers[1].mlp.gate.e_score_correction_bias.copy_(torch.tensor([9.0, 9.0, 0.0, 0.0]))
    with torch.autocast("cpu", torch.bfloat16):  # leaves the rounded products alone
        loss = q.next_token_loss(model(calibration(2, 16)), calibration(2, 16))
        linear, x = model.layers[0].mlp.down_proj, torch.randn(2, 128)
        expected = tile_rounded(x) @ block_dequantize(*block_quantize(linear.weight, 128), 128).T
        torch.testing.assert_close(linear(x), expected.float(), atol=1e-2, rtol=1e-2)
        assert linear(x).dtype == torch.float32
    loss.backward()  # two experts without a token
    assert all(
        linear.weight.grad.isfinite().all() for linear in q.linears_of(model.layers[0]).values()
    )


@pytest.mark.integration
def test_fp8_training_follows_the_training_in_fp32():
    losses = []
    for prepare in (lambda model: model, prepare_fp8_training):
        torch.manual_seed(0)
        losses.append(train_small(prepare(q.small_quantizable_model()), 60, 0.0, "cpu")[0])
    assert losses[0] != losses[1] and abs(losses[1] / losses[0] - 1) < 0.01


# The latent cache
@pytest.mark.performance
@pytest.mark.parametrize(("bits", "size"), [(8, 112 + 4), (6, 84 + 4), (4, 56 + 4)])
def test_bytes_of_the_cache_with_their_scales(bits, size):
    for store in (RowStore, functools.partial(decoding.PreallocatedRows, 20)):
        cache = QuantizedLatentCache(store, bits=bits, latent_width=96)
        cache.append(torch.randn(3, 5, 112))
        assert cache.used_bytes() == 3 * 5 * size


def test_cached_numbers_are_within_half_a_step_and_parts_have_their_own_scale():
    memory = torch.randn(2, 7, 40)
    memory[..., 32:] *= 100
    for bits in (8, 6):
        cache = QuantizedLatentCache(bits=bits, latent_width=32)
        back = cache.append(memory)
        for part, exact in ((back[..., :32], memory[..., :32]), (back[..., 32:], memory[..., 32:])):
            step = exact.abs().amax(dim=-1, keepdim=True) / (2 ** (bits - 1) - 1)
            # half a step, or what the BF16 scale cuts off the largest
            assert ((part - exact).abs() <= step * (0.51 + 2 ** (bits - 10))).all()
    assert QuantizedLatentCache(bits=8, latent_width=40).append(memory).shape == memory.shape
    assert not cache.append(memory.requires_grad_()).requires_grad  # rounding has no gradient


STORES = pytest.mark.parametrize(
    "store", [RowStore, functools.partial(decoding.PreallocatedRows, 9)], ids=["plain", "room"]
)


@STORES
def test_cache_appends_and_rolls_back(store):
    memory = torch.randn(2, 9, 40)
    whole = QuantizedLatentCache(bits=6, latent_width=32).append(memory)
    cache = QuantizedLatentCache(store, bits=6, latent_width=32)
    cache.append(memory[:, :4])
    assert cache.length == 4
    torch.testing.assert_close(cache.append(memory[:, 4:6]), whole[:, :6])
    cache.truncate(2)
    torch.testing.assert_close(cache.append(memory[:, 2:9]), whole)
    cache.truncate(3)
    assert cache.length == 3
    torch.testing.assert_close(cache.append(memory[:, 3:5]), whole[:, :5])
    with pytest.raises(ValueError, match="truncate"):
        cache.truncate(6)


def test_each_row_of_a_batch_goes_on_from_its_own_length():
    memory, room = torch.randn(2, 9, 40), functools.partial(decoding.PreallocatedRows, 9)
    whole = QuantizedLatentCache(bits=6, latent_width=32).append(memory)
    cache = QuantizedLatentCache(room, bits=6, latent_width=32)
    cache.append(memory[:, :6])
    cache.truncate(torch.tensor([3, 5]))
    ragged = cache.append(torch.stack([memory[0, 3:4], memory[1, 5:6]]))
    torch.testing.assert_close(ragged[0, :4], whole[0, :4])
    torch.testing.assert_close(ragged[1, :6], whole[1, :6])


@pytest.mark.parametrize("bits", [8, 6])
def test_generation_with_a_quantised_cache(bits):
    model = quantize_cache(small(), bits)
    assert model.cache_bits == bits
    for block in model.blocks():  # those of the MTP modules as well
        cache = block.self_attn.new_cache()
        assert (type(cache), cache.bits, cache.latent_width) == (QuantizedLatentCache, bits, 32)
    ids = small_language(9, seed=5)[None]
    text = model.generate(ids, 12)
    assert torch.equal(generated(model, ids, 12, speculative=True), text)
    assert torch.equal(generated(model, ids, 12, prefill_chunk=2), text)
    caches = model.new_caches()
    assert all(isinstance(cache, QuantizedLatentCache) for cache in caches)
    # one pass through the caches sees what token by token saw
    logits = model(text[:, :-1], caches=caches)
    pieces, caches = [], model.new_caches()
    for token in text[:, :-1].split(1, dim=1):
        pieces.append(model(token, caches=caches, path="absorbed"))
    torch.testing.assert_close(torch.cat(pieces, dim=1), logits, atol=1e-4, rtol=1e-4)
    assert not torch.equal(logits, model(text[:, :-1]))
    assert (logits - model(text[:, :-1])).norm() < 0.1 * logits.norm()
    quantize_cache(model, None)
    torch.testing.assert_close(model(text, caches=model.new_caches()), model(text))


@pytest.mark.integration
def test_script(check_script):
    check_script("quantization_coded.py", ["--bits", 9], "--bits=9 must be from 2 to 4")

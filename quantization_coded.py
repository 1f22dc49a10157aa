"""Phase 8: quantisation, a model in fewer bits and what it costs.

A weight does not need 32 bits. Rounded to one of 255 values it takes a quarter of the bytes, and to
one of 15 values an eighth. Decoding mostly waits for weights, so it can get as much faster
(benchmarks/quantization.py measures it). Few bits are not the problem. Numbers that share a scale
share a grid, and one large number makes this grid coarse for all of them. Part 1 is about one
matrix: which numbers share a scale (those of a tensor, row, group or tile), what to do with large
numbers (LLM.int8(), SmoothQuant), and how to round so that errors cancel (GPTQ, AWQ). Part 2 is
about a model. It puts a rounded layer in the place of each linear one, by one of eight schemes.
Then it trains with rounded weights, trains in FP8, and quantises the latent cache.

    absmax        q = round(x / s),  s = max|x| / (2^(bits−1) − 1),      x̂ = s q
    W8A8          y_ij = s_i t_j Σ_k q_ik p_jk,  x̂ = s q,  ŵ = t p       (integers inside the sum)
    LLM.int8()    columns with an |x| ≥ 6 apart, in high precision, the others as W8A8
    GPTQ          round column i; w_j −= (w_i − ŵ_i) [H⁻¹]_ij / [H⁻¹]_ii for j > i
                  with H = X Xᵀ of the columns from i on
    AWQ           Ŵ = round(σ W) / σ,  σ_j = mean|X_j|^α,  α by search
    SmoothQuant   x Wᵀ = (x / σ)(σ W)ᵀ,  σ_j = max|X_j|^α / max|W_j|^(1−α),  α = ½
    FP8 (V3)      E4M3, 1×128 tiles of x and 128×128 blocks of W, s = max|·| / 448
    QAT           forward ŵ, backward ∂w = ∂ŵ                            (straight-through)

Papers: Dettmers et al., LLM.int8() (2022, arXiv:2208.07339); Frantar et al., GPTQ (2023,
arXiv:2210.17323); Lin et al., AWQ (2024, arXiv:2306.00978); Xiao et al., SmoothQuant (2023,
arXiv:2211.10438); DeepSeek-V3 (2024, arXiv:2412.19437), section 3.3; Bengio et al. (2013,
arXiv:1308.3432) for the straight-through estimator. DeepSeek-V2 (2024, arXiv:2405.04434) reports a
KV cache of 6 bits and does not say how it is made.
Simplified: the smoothing σ is applied to the input of a layer; the papers fold it into the norm
before it. LLM.int8() multiplies outlier columns by 16-bit weights; here these come from the INT8
codes. FP8 products are emulated: rounded to FP8 and multiplied in FP32.
Before: phases 1 to 6. Reading 52 minutes, running seconds.

Dimensions: B batch · T query positions · S key positions · D model width · C KV latent · R rotary
part · M tokens (B·T) · E routed experts · F expert hidden width · W vocabulary.

Run:  python quantization_coded.py [--bits 3] [--steps 150]
"""

import functools
import math
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import nn

from lesson import check_settings, demonstration, flag, require, require_shape, setting, surgery
from lesson.bits import joined_bytes, nonzero, packed_bytes, parted_bytes, unpacked_bytes
from lesson.checks import check_count, entry_of
from lesson.surgery import linears_of
from mla_coded import LatentCache, MultiHeadLatentAttention
from moe_coded import Experts, MixtureOfExperts, SwiGLU, TopKRouter, TransformerBlock
from mtp_coded import CausalLM, next_token_loss, small_language, train_small
from multihead_attention_coded import RowStore


# %% Part 1, one matrix. Integers: who shares a scale
def absmax_quantize(x, bits=8, dim=None, scale_dtype=torch.float32):
    """Rounds to symmetric integers: x ≈ codes · scale. The largest number is the grid's last code.

    Four numbers in 4 bits, codes from −7 to 7:

        x      (0.1, −0.5, 1.2, 3.5)     scale 3.5 / 7 = 0.5
        codes  (  0,   −1,   2,   7)     x / scale, rounded
        x̂      (  0, −0.5, 1.0, 3.5)     without 3.5 the scale would be 0.17, and 0.1 would survive

    dim: the dimension along which numbers share a scale: −1 one scale a row, 0 one a column, None
    one for all; `in_groups(x, size)` and −1 one a group. Ties go to the even code.

    Returns: codes (int8, within ±(2^(bits−1) − 1)) and scale (x's shape, 1 along `dim`), rounded to
        `scale_dtype` before the codes are chosen. All-zero x comes back exactly.
    """
    x = x if x.dtype == torch.float64 else x.float()
    largest = x.abs().amax() if dim is None else x.abs().amax(dim, keepdim=True)
    scale = nonzero((largest / largest_code(bits)).to(scale_dtype))
    return nearest_codes(x, scale, bits), scale


def nearest_codes(x, scale, bits):
    limit = largest_code(bits)
    return (x / scale).round_().clamp_(-limit, limit).to(torch.int8)


def largest_code(bits):
    """The end of the symmetric grid, 2^(bits−1) − 1."""
    require(type(bits) is int and 2 <= bits <= 8, f"bits={bits!r} must be from 2 to 8")
    return 2 ** (bits - 1) - 1


def in_groups(x, group_size):
    """(..., width) → (..., width / group_size, group_size); None: the whole row is one group."""
    width = x.shape[-1]
    size = width if group_size is None else group_size
    fits = size >= 1 and width % size == 0
    require(fits, f"group_size={size} must divide the row of {width} numbers")
    return x.unflatten(-1, (-1, size))


def round_nearest(weight, bits, group_size=None):
    """Each weight to its nearest code: codes (..., out, in) and BF16 scale (..., out, groups)."""
    codes, scale = absmax_quantize(in_groups(weight, group_size), bits, -1, torch.bfloat16)
    return codes.flatten(-2), scale.squeeze(-1)


def dequantize(codes, scale):
    """Ŵ (..., out, in), FP32, from codes of that shape and scale (..., out, groups)."""
    groups = codes.float().unflatten(-1, (scale.shape[-1], -1))
    return groups.mul_(scale.float().unsqueeze(-1)).flatten(-2)


def zero_point_quantize(x, bits=8, dim=None):
    """Asymmetric integers, for numbers that lie to one side: x ≈ (codes − zero) · scale.

    Returns: codes and zero (uint8, 0 … 2^bits − 1) and scale. The range always includes 0, which
        is represented exactly.
    """
    limit, x = 2 * largest_code(bits) + 1, x.float()
    options = dict() if dim is None else dict(dim=dim, keepdim=True)
    low, high = x.amin(**options).clamp(max=0), x.amax(**options).clamp(min=0)
    scale = nonzero((high - low) / limit)
    zero = (-low / scale).round().clamp(0, limit)
    codes = ((x / scale).round() + zero).clamp(0, limit)
    return codes.to(torch.uint8), scale, zero.to(torch.uint8)


def rounding_and_clipping(x, bits, largest):
    """Mean squared error of a grid that ends at `largest`: (of what lies within, of the rest)."""
    scale = largest / largest_code(bits)
    error = (x - nearest_codes(x, scale, bits) * scale) ** 2
    inside = x.abs() <= largest
    return (error * inside).mean().item(), (error * ~inside).mean().item()


# %% Packing: codes of 2 to 7 bits in bytes, no bit wasted
def pack_bits(codes, bits):
    """Signed codes (..., n), int8 → bytes (..., ⌈n · bits / 8⌉), uint8; the first code lowest.

    Codes are stored as code + 2^(bits−1). INT4: two to a byte, the first in the low half:
    [−8, 7] → 0b1111_0000. 6 bits: four codes in three bytes. 8 bits: the codes as they are.
    """
    return codes if bits == 8 else packed_bytes(codes + 2 ** (bits - 1), bits)


def unpack_bits(packed, bits, count):
    """The inverse of `pack_bits`: bytes (..., ⌈count · bits / 8⌉) → codes (..., count), int8."""
    if bits == 8:
        return packed.view(torch.int8)
    return unpacked_bytes(packed, bits, count).view(torch.int8) - 2 ** (bits - 1)


# %% Floating point in 8 bits: every number has a step of its own
def float8_grid(exponent_bits, mantissa_bits):
    """All finite numbers ≥ 0 of an 8-bit float, in the order of their bit patterns.

    E4M3 gives up infinity for range: only the last pattern is NaN, so it ends at 448. E5M2 keeps
    the whole last exponent for infinity and NaN, as IEEE does, and ends at 57,344. From 1 to 2,
    E4M3 goes in steps of 1/8, from 256 on in steps of 32: always an eighth of the power of two
    (down to 1/64; below, the steps stay 1/512).
    """
    bias = 2 ** (exponent_bits - 1) - 1
    values = []
    for exponent in range(2**exponent_bits):
        for mantissa in range(2**mantissa_bits):
            fraction = mantissa / 2**mantissa_bits
            subnormal = fraction * 2.0 ** (1 - bias)
            values.append(subnormal if exponent == 0 else (1 + fraction) * 2.0 ** (exponent - bias))
    not_finite = 1 if exponent_bits == 4 else 2**mantissa_bits
    return torch.tensor(values[:-not_finite])


def round_to_grid(x, grid):
    """The naive reference of a cast: each number's nearest on the grid (values ≥ 0, mirrored).

    Halfway between two: the one whose bit pattern is even. Beyond the end: the end.
    """
    size = x.abs().clamp(max=grid[-1].item())
    above = torch.searchsorted(grid, size).clamp(min=1)
    below = above - 1
    to_above, to_below = grid[above] - size, size - grid[below]
    up = (to_above < to_below) | ((to_above == to_below) & (above % 2 == 0))
    return torch.where(up, grid[above], grid[below]).copysign(x)


E4M3_MAX = 448.0


def block_quantize(x, rows, columns=128):
    """x (R, C) → E4M3 codes (R, C) and FP32 scales, one a block: (⌈R/rows⌉, ⌈C/columns⌉).

    V3 takes blocks of 1×128 for activations and 128×128 for weights. As in the released files, the
    scale *multiplies* the codes although its name there is `weight_scale_inv`.
    """
    height, width = x.shape
    padded = F.pad(x.float(), (0, -width % columns, 0, -height % rows))
    blocks = padded.unflatten(1, (-1, columns)).unflatten(0, (-1, rows))
    scale = nonzero(blocks.abs().amax(dim=(1, 3), keepdim=True) / E4M3_MAX)
    # In blocks so small that the scale itself is rounded, a code may come out above 448: clamped.
    codes = (blocks / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return codes.flatten(2).flatten(0, 1)[:height, :width].contiguous(), scale[:, 0, :, 0]


def block_dequantize(codes, scale, rows, columns=128):
    """The FP32 matrix (R, C) that `block_quantize` stands for."""
    height, width = codes.shape
    spread = scale.repeat_interleave(rows, 0)[:height].repeat_interleave(columns, 1)[:, :width]
    return codes.float() * spread


def tile_rounded(x, columns=128):
    """x (..., C) rounded to E4M3 in tiles of 1×128, in FP32."""
    flat = x.flatten(0, -2)
    return block_dequantize(*block_quantize(flat, 1, columns), 1, columns).view_as(x)


# %% Outliers: a few large inputs, and the product that rounds all others
def w8a8_product(x, codes, scale):
    """x Ŵᵀ with integers inside the sum: y_ij = s_i t_j Σ_k q_ik p_jk.

    A row x = (12.7, −1.0, 0.2) has the codes (127, −10, 2) and the step 0.1, a row w of the matrix
    (1.27, −0.5, 0.0) has (127, −50, 0) and 0.01:

        y = 0.1 · 0.01 · (127 · 127 + 10 · 50 + 2 · 0) = 0.001 · 16,629 = 16.629

    x (M, in), each row rounded as it comes; codes (out, in), scale (out, 1). FP32 adds up whole
    numbers without error as far as 2²⁴, 1,040 products of 127 · 127. Kernels take INT32, which is
    where the time is won: pipeline/fast.
    """
    x_codes, x_scale = absmax_quantize(x.float(), dim=-1)
    sums = F.linear(x_codes.float(), codes.float())
    return sums * (x_scale * scale.T)


def llm_int8_product(x, codes, scale, threshold=6.0, product=w8a8_product):
    """LLM.int8(): columns in which some |x| reaches the threshold are multiplied in high precision.

    They are looked for in every input, so the output of a token depends a little on the other
    tokens of its batch. The outliers are never rounded; their weights come from the INT8 codes, so
    that no second copy is kept. `product` multiplies all other columns.
    """
    outliers = (x.abs() >= threshold).any(dim=0)
    ordinary = product(x.masked_fill(outliers, 0.0), codes, scale)
    columns = outliers.nonzero().squeeze(1)
    return ordinary + F.linear(x[:, columns].float(), dequantize(codes[:, columns], scale))


# %% Rounding that looks at the inputs: GPTQ
class InputStatistics:
    """What calibration leaves of a layer's inputs, all one needs for GPTQ, AWQ and SmoothQuant."""

    def __init__(self, width, device=None):
        self.hessian = torch.zeros(width, width, device=device)  # Σ x xᵀ
        self.largest = torch.zeros(width, device=device)  # max |x_j|
        self.total = torch.zeros(width, device=device)  # Σ |x_j|

    def add(self, x):
        rows = x.detach().reshape(-1, len(self.total)).float()
        if len(rows):
            self.hessian += rows.T @ rows
            self.largest = torch.maximum(self.largest, rows.abs().amax(dim=0))
            self.total += rows.abs().sum(dim=0)


def output_error(weight, rounded, hessian):
    """‖(W − Ŵ) X‖², summed over all inputs seen: tr((W − Ŵ) H (W − Ŵ)ᵀ)."""
    difference = weight - rounded
    return ((difference @ hessian) * difference).sum().item()


def gptq_by_inverses(weight, hessian, bits, group_size=None, dampening=0.01):
    """The naive reference of `gptq`: a new inverse of what is left of H after each column.

    One column by hand: 3 bits, dampening 0, one row, three input columns, two of them alike:

        W = (0.4, 1.4, 3.0)     H = (1.0 0.8 0.0)     scale = 3.0 / 3 = 1
                                    (0.8 1.0 0.0)
                                    (0.0 0.0 1.0)

    Column 0 is rounded to 0, an error of 0.4. [H⁻¹]_01 / [H⁻¹]_00 = −0.8, so column 1 becomes
    1.4 + 0.8 · 0.4 = 1.72 and is rounded to 2: it makes up for column 0. Column 2 has nothing to
    do with them and stays 3. The codes (0, 2, 3) have an output error of 0.136; rounded to nearest
    they would be (0, 1, 3), with an error of 0.576.
    """
    codes, scale = round_nearest(weight, bits, group_size)
    weight, scale = weight.clone(), scale_of_each(weight, scale)
    hessian = dampened(hessian.to(weight.dtype), dampening)
    for i in range(weight.shape[1]):
        inverse = torch.linalg.inv(hessian[i:, i:])
        codes[:, i] = nearest_codes(weight[:, i], scale[:, i], bits)
        error = weight[:, i] - codes[:, i] * scale[:, i]
        weight[:, i:] -= error[:, None] * inverse[0] / inverse[0, 0]
    return codes


def gptq(
    weight, hessian, bits, group_size=None, columns_at_a_time=128, dampening=0.01,
    activation_order=True,
):
    """Rounds column by column and lets the columns not yet rounded make up for each error.

    The rows of one Cholesky factor U of H⁻¹ (H⁻¹ = Uᵀ U) hold all that the inverses above would
    tell: [H⁻¹]_ij / [H⁻¹]_ii = U_ij / U_ii. A few columns at a time are finished, then all later
    ones corrected at once. Scales are those of the weights as they came, so groups stay together
    when `activation_order` takes the columns with the largest inputs first.

    weight (out, in); hessian Σ x xᵀ (in, in); dampening: share of the mean of H's diagonal that is
    added to it. Returns codes (out, in) and BF16 scale (out, groups).
    """
    codes, scale = round_nearest(weight, bits, group_size)
    column_scale, weight = scale_of_each(weight, scale), weight.clone()
    hessian = dampened(hessian.double(), dampening)
    width = weight.shape[1]
    order = torch.arange(width, device=weight.device)
    if activation_order:
        order = hessian.diagonal().argsort(descending=True, stable=True)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian[order][:, order]))
    upper = torch.linalg.cholesky(inverse, upper=True).to(weight.dtype)
    weight, column_scale, codes = weight[:, order], column_scale[:, order], codes[:, order]
    for start in range(0, width, columns_at_a_time):
        end = min(start + columns_at_a_time, width)
        errors = torch.zeros_like(weight[:, start:end])
        for i in range(start, end):
            codes[:, i] = nearest_codes(weight[:, i], column_scale[:, i], bits)
            rounded = codes[:, i] * column_scale[:, i]
            errors[:, i - start] = (weight[:, i] - rounded) / upper[i, i]
            weight[:, i:end] -= errors[:, i - start, None] * upper[i, i:end]
        weight[:, end:] -= errors @ upper[start:end, end:]
    return codes[:, order.argsort()], scale


def scale_of_each(weight, scale):
    """A scale for each weight: (out, groups) → (out, in), in the precision of the weights."""
    return scale.to(weight.dtype).repeat_interleave(weight.shape[1] // scale.shape[1], dim=1)


def dampened(hessian, dampening):
    """H + λI; a column that never had an input counts as independent of the others."""
    diagonal = hessian.diagonal()
    unused = (diagonal == 0).to(hessian.dtype)
    return hessian + torch.diag(unused + dampening * diagonal.mean())


# %% Scaling before rounding: AWQ and SmoothQuant
def awq_smoothing(weight, statistics, bits, group_size=None, steps=20):
    """The smoothing σ = mean|X_j|^α; of α = 0, 1/steps, … 1 the one that moves outputs least.

    Weights that meet large inputs are scaled up before rounding, so that they lose less; α = 0 is
    plain rounding.
    """
    size = statistics.total / statistics.total.mean().clamp(min=1e-12)
    best, best_error = None, math.inf
    for step in range(steps + 1):
        smoothing = size.clamp(min=1e-4) ** (step / steps)
        rounded = dequantize(*round_nearest(weight * smoothing, bits, group_size)) / smoothing
        error = output_error(weight, rounded, statistics.hessian)
        if error < best_error:
            best, best_error = smoothing, error
    return best


def smoothquant_smoothing(weight, largest_input, alpha=0.5):
    """SmoothQuant's smoothing σ (in,): moves large inputs into the weights, half way at α = ½.

    Inputs up to 8 meet weights up to 2: σ = 8^½ / 2^½ = 2, and both then end at 4.
    A column small in the few inputs that an expert saw need not stay so: max|X_j| counts as a
    tenth of the columns' mean at least. A column of zeros has σ = 1.
    """
    largest_weight = weight.abs().amax(dim=0)
    unused, floor = largest_input == 0, largest_input.mean() / 10
    largest_input = largest_input.clamp(min=floor)
    smoothing = largest_input**alpha / largest_weight.clamp(min=1e-12) ** (1 - alpha)
    return torch.where(unused | (largest_weight == 0), 1.0, smoothing)


# %% Part 2, a model. Layers that hold rounded weights and nothing else
def straight_through(exact, rounded):
    """`rounded` in the forward pass; in the backward pass the gradient goes to `exact`.

    Rounding is a staircase: its gradient is zero almost everywhere, and nothing would be learnt.
    """
    return exact + (rounded - exact).detach()


class QuantizedLinear(surgery.TypesKept):
    """y = (x / input_scale) Ŵᵀ + bias, (..., in) → (..., out). The subclasses say what Ŵ is.

    `input_scale` is the smoothing σ, not a grid's step, or None. `weight` is the FP32 matrix that
    the layer stands for, worked out at each call: MLA's absorption reads it and sees what the layer
    does. A cast changes neither codes nor scales.
    """

    refusal = "quantised already"

    def __init__(self, in_features, out_features, bias=False, scaled_input=False):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        smoothing = torch.ones(in_features, dtype=torch.bfloat16) if scaled_input else None
        self.hold(bias=torch.zeros(out_features) if bias else None, input_scale=smoothing)

    def rounded_weight(self):
        """Ŵ (out, in), FP32."""
        raise NotImplementedError

    def product(self, rows):
        """(M, in) → (M, out), without smoothing and bias: dequantise, then multiply."""
        return F.linear(rows, self.rounded_weight().to(rows.dtype))

    @property
    def weight(self):
        rounded = self.rounded_weight()
        return rounded if self.input_scale is None else rounded / self.input_scale

    def forward(self, x):
        if not x.numel():  # an expert without tokens
            return x.new_zeros(*x.shape[:-1], self.out_features)
        rows = x.reshape(-1, self.in_features)
        if self.input_scale is not None:
            rows = (rows / self.input_scale).to(x.dtype)
        output = self.product(rows.detach()).to(x.dtype)
        if rows.requires_grad:
            exact = F.linear(rows, self.rounded_weight().to(x.dtype))
            output = straight_through(exact, output)
        if self.bias is not None:
            output = output + self.bias.to(x.dtype)
        return output.view(*x.shape[:-1], self.out_features)

    def weight_bytes(self):
        """What stands for the matrix: codes, scales and smoothing."""
        return sum(b.nbytes for name, b in self.named_buffers() if name != "bias")


class IntegerLinear(QuantizedLinear):
    """Weights in 2 to 8 bits, one BF16 scale a row or group; inputs stay as they are.

    A scale for 128 weights adds an eighth of a bit to each: INT4 takes 4.125 bits a weight.
    Codes and scales are dequantised, then multiplied. pipeline/fast has kernels for 8 and 4 bits
    that read the codes as they are: half the point of fewer bits is that fewer bytes are read.
    """

    def __init__(
        self, in_features, out_features, bias=False, scaled_input=False, bits=8, group_size=None
    ):
        super().__init__(in_features, out_features, bias, scaled_input)
        self.bits, self.group_size = bits, group_size or in_features
        codes, scale = round_nearest(torch.zeros(out_features, in_features), bits, group_size)
        self.hold(codes=pack_bits(codes, bits), scale=scale)

    def fill(self, codes, scale, smoothing=None):
        """codes (out, in), int8; scale (out, groups), BF16; smoothing (in,), BF16."""
        got, rows = (tuple(codes.shape), tuple(scale.shape)), self.out_features
        want = (rows, self.in_features), (rows, self.in_features // self.group_size)
        require(got == want, f"codes and scale must be {want[0]} and {want[1]}, got {got}")
        self.codes = pack_bits(codes, self.bits)
        self.scale, self.input_scale = scale, smoothing
        return self

    def fill_nearest(self, weight):
        """weight (out, in), rounded to nearest."""
        return self.fill(*round_nearest(weight, self.bits, self.group_size))

    def codes_and_scale(self):
        """codes (out, in), int8, and scale (out, groups), BF16."""
        return unpack_bits(self.codes, self.bits, self.in_features), self.scale

    def rounded_weight(self):
        return dequantize(*self.codes_and_scale())


class W8A8Linear(IntegerLinear):
    """INT8 rows of weights times INT8 rows of inputs; with `outlier_threshold`, LLM.int8()."""

    def __init__(self, *sizes, outlier_threshold=None, **options):
        super().__init__(*sizes, **options)
        self.outlier_threshold = outlier_threshold

    def product(self, rows):
        if self.outlier_threshold is None:
            return w8a8_product(rows, self.codes, self.scale)
        return llm_int8_product(rows, self.codes, self.scale, self.outlier_threshold)


class Fp8Linear(QuantizedLinear):
    """E4M3 weights in blocks of 128×128, inputs rounded to E4M3 in tiles of 1×128 (V3, 3.3).

    V3 multiplies FP8 by FP8. Its GPUs keep few bits of a long sum, so every 128 products their sum
    is added to an FP32 number; here both are dequantised first and all sums are FP32.
    `rounds_input=False` leaves the inputs alone.
    """

    def __init__(self, in_features, out_features, bias=False, rounds_input=True):
        super().__init__(in_features, out_features, bias)
        self.rounds_input = rounds_input
        codes, scale = block_quantize(torch.zeros(out_features, in_features), 128)
        self.hold(codes=codes, weight_scale_inv=scale)

    def fill_nearest(self, weight):
        """weight (out, in), rounded in its blocks."""
        self.codes, self.weight_scale_inv = block_quantize(weight, 128)
        return self

    def rounded_weight(self):
        return block_dequantize(self.codes, self.weight_scale_inv, 128)

    def product(self, rows):
        return super().product(tile_rounded(rows).to(rows.dtype) if self.rounds_input else rows)


# %% Schemes: what is done to every matrix of a model
LAYERS = ("weights", "w8a8", "llm_int8", "fp8")
METHODS = {"nearest": LAYERS, "smooth": ("w8a8",), "gptq": ("weights",), "awq": ("weights",)}


@dataclass(frozen=True)
class Scheme:
    """What `quantize_model` does to every matrix.

    layer: what is rounded, and the layer that holds it.

        "weights"   the weights; inputs stay as they are         `IntegerLinear`
        "w8a8"      the inputs, too, a scale a row               `W8A8Linear`
        "llm_int8"  all but the columns with large inputs        `W8A8Linear` with a threshold
        "fp8"       weights in blocks and inputs in tiles        `Fp8Linear`

    bits: of the weights. group_size: numbers of a row that share a scale; None: the row; "auto":
    128, 64 or 32, the largest that divides the row, or else the row. method: how weights are
    rounded, each for some of the layers.
    """

    layer: str = setting("weights", choices=LAYERS)
    bits: int = 8
    group_size: int | str | None = None
    method: str = setting("nearest", choices=METHODS)

    def __post_init__(self):
        check_settings(self)
        largest_code(self.bits)
        check_count("auto", group_size=self.group_size)
        fits, fitting = (self.bits, self.group_size) == (8, None), METHODS[self.method]
        require(fits or self.layer == "weights",
                f"layer={self.layer!r} takes bits=8 and group_size=None")
        require(self.layer in fitting, f"method={self.method!r} is for layer={fitting[0]!r}")

    def groups(self, width):
        """Numbers that share a scale in rows of `width`; "auto": 256 → 128, 96 → 32, 100 → 100."""
        if self.group_size == "auto":
            return next((size for size in (128, 64, 32) if width % size == 0), width)
        return self.group_size or width


SCHEMES = {
    "int8": Scheme(),
    "llm_int8": Scheme("llm_int8"),
    "w8a8": Scheme("w8a8"),
    "smoothquant": Scheme("w8a8", method="smooth"),
    "int4": Scheme(bits=4, group_size="auto"),
    "gptq4": Scheme(bits=4, group_size="auto", method="gptq"),
    "awq4": Scheme(bits=4, group_size="auto", method="awq"),
    "fp8": Scheme("fp8"),
}


# %% From a model to its quantised copy: every `nn.Linear` gives way to its layer
def quantize_model(model, scheme, calibration=None):
    """A quantised copy for inference; the argument is untouched.

    Rounded are the matrices of attention and of dense, shared and routed feed-forward, also those
    in the blocks of the MTP modules. Embedding, head, router, norms and `eh_proj` stay as they are.
    Each matrix is the weight of an `nn.Linear`: block by block they give way to rounded layers.

    model: a `CausalLM` that is neither quantised nor prepared for QAT. scheme: a name in `SCHEMES`
    or a `Scheme`. calibration: token ids (B, T), for methods that look at inputs: each block is
    rounded to the inputs that it gets from the rounded blocks before it.
    """
    scheme, copied = entry_of(SCHEMES, scheme=scheme), surgery.changeable_copy(model, CausalLM)
    quantized = listed_experts(copied).eval().requires_grad_(False)
    calibrates = scheme.method != "nearest"
    if calibrates:
        needed = f"method {scheme.method!r} needs calibration: calibration must be token ids"
        require_shape(calibration, needed, B=1, T=len(model.mtp) + 1)
    for number, block in enumerate(quantized.blocks()):
        linears, statistics = linears_of(block), {}
        if calibrates:  # by what the rounded blocks before it will really compute
            statistics = input_statistics(quantized.prepared(), calibration, linears)
        for name, linear in linears.items():
            full_name, seen = f"block {number} {name}", statistics.get(name)
            block.set_submodule(name, quantized_linear(linear, scheme, full_name, seen))
    quantized.quantization = asdict(scheme)
    return quantized.prepared()


class ExpertList(Experts):
    """`Experts` with an `nn.Linear` for each expert's matrix.

    Every expert is rounded for itself: it has its own large weights, and sees only the inputs that
    the router sends it, so GPTQ, AWQ and SmoothQuant find another answer for each.
    """

    def expert(self, e, x):
        gate, up = self.gate_up_proj[e](x).chunk(2, dim=-1)
        return self.down_proj[e](F.silu(gate) * up)

    grouped = Experts.loop


def listed_experts(model):
    """The model itself, its experts now an `ExpertList` in the same memory."""
    return surgery.matrices_apart(model, Experts, ExpertList)


@torch.no_grad()
def input_statistics(model, calibration, linears, batch_size=8):
    """{name: `InputStatistics`} of {name: linear} while the model reads calibration ids (B, T)."""
    statistics = {name: InputStatistics(linear.in_features, linear.weight.device)
                  for name, linear in linears.items()}
    with surgery.inputs_watched({linears[name]: seen.add for name, seen in statistics.items()}):
        for ids in calibration.split(batch_size):
            model.mtp_hidden_states(model.hidden_states(ids), ids)
    for name, seen in statistics.items():
        finite = seen.hessian.isfinite().all()
        require(finite, f"{name}: NaN or infinite inputs while reading the calibration text")
    return statistics


def quantized_linear(linear, scheme, name, statistics=None):
    """The layer that replaces `linear`, filled; `statistics` of its inputs, if the method asks.

    Rounding to nearest and GPTQ give codes at once; AWQ and SmoothQuant first find a σ that the
    weights are multiplied by and the inputs will be divided by.
    """
    weight, width = linear.weight.detach().float(), linear.in_features
    require(weight.isfinite().all(), f"{name}: the weights hold NaN or infinite numbers")
    size = scheme.groups(width)
    require(width % size == 0, f"{name}: group_size={size} must divide {width}")
    layer = empty_layer(linear, scheme, name)
    if linear.bias is not None:
        layer.bias = linear.bias.detach()
    if scheme.method == "gptq":
        return layer.fill(*gptq(weight, statistics.hessian, layer.bits, layer.group_size))
    if layer.input_scale is None:
        return layer.fill_nearest(weight)
    if scheme.method == "smooth":
        smoothing = smoothquant_smoothing(weight, statistics.largest)
    else:
        smoothing = awq_smoothing(weight, statistics, layer.bits, layer.group_size)
    smoothing = smoothing.bfloat16()
    rounded = round_nearest(weight * smoothing, layer.bits, layer.group_size)
    return layer.fill(*rounded, smoothing)


def empty_layer(linear, scheme, name):
    """The layer that replaces the `linear` of this name, yet to be filled.

    MLA's absorbed path feeds `kv_b_proj` other inputs than the expanded path; rounding them would
    make the two disagree. So only its weights are rounded, never its inputs.
    """
    sizes = linear.in_features, linear.out_features, linear.bias is not None
    absorbed = name.endswith("kv_b_proj")
    if scheme.layer == "fp8":
        return Fp8Linear(*sizes, rounds_input=not absorbed)
    if scheme.layer == "weights" or absorbed:
        return IntegerLinear(*sizes, scaled_input=scheme.method == "awq", bits=scheme.bits,
                             group_size=scheme.groups(linear.in_features))
    return W8A8Linear(*sizes, scaled_input=scheme.method == "smooth",
                      outlier_threshold=6.0 if scheme.layer == "llm_int8" else None)


def matrix_bytes(model):
    """(bytes of the quantised matrices with all their scales, bytes of the same in FP32)."""
    layers = [m for m in model.modules() if isinstance(m, QuantizedLinear)]
    numbers = sum(layer.in_features * layer.out_features for layer in layers)
    return sum(layer.weight_bytes() for layer in layers), 4 * numbers


# %% Training with rounded weights
class FakeQuantize(nn.Module):
    """Weights (..., out, in) → the same as the integer layer will hold them.

    What training moves stays exact: many small steps add up until a weight falls on the next code.
    """

    refusal = "prepared for QAT: convert_qat makes it integer"

    def __init__(self, scheme):
        super().__init__()
        self.scheme = scheme

    def forward(self, weight):
        groups = self.scheme.groups(weight.shape[-1])
        rounded = dequantize(*round_nearest(weight, self.scheme.bits, groups))
        return straight_through(weight, rounded.to(weight.dtype))


def prepare_qat(model, scheme):
    """A copy that trains with rounded weights: `int8`, `int4`, or a `Scheme` that rounds so.

    Whoever reads a weight, be it MLA's absorption, gets it rounded; the optimizer moves the number
    behind it.
    """
    scheme = entry_of(SCHEMES, scheme=scheme)
    fits = (scheme.layer, scheme.method) == ("weights", "nearest")
    require(fits, "QAT is for schemes that round weights to nearest: int8 and int4")
    model = surgery.changeable_copy(model, CausalLM)
    for block in model.blocks():
        surgery.read_matrices_through(FakeQuantize(scheme), block, (nn.Linear, Experts))
    return model


def convert_qat(model):
    """The integer model (a copy) that `prepare_qat`'s model has been trained to be."""
    schemes = [module.scheme for module in model.modules() if isinstance(module, FakeQuantize)]
    require(schemes, "the model was not prepared by prepare_qat")
    return quantize_model(surgery.without_parametrizations(model.copy()), schemes[0])


# %% A training step in FP8
class Fp8Product(torch.autograd.Function):
    """y = x Wᵀ whose three products all take rounded operands, as V3 trains (figure 6).

    Forward  y = ⌊x⌉ ⌊W⌉ᵀ, input gradient ∂x = ⌊∂y⌉ ⌊W⌉, weight gradient ∂W = ⌊∂yᵀ⌉ ⌊xᵀ⌉ᵀ: tiles of
    1×128 lie along the dimension that is summed over, in the last product along the tokens.
    """

    @staticmethod
    def forward(context, x, weight):
        context.save_for_backward(x, weight)
        rounded = block_dequantize(*block_quantize(weight, 128), 128)
        return F.linear(tile_rounded(x), rounded)

    @staticmethod
    def backward(context, gradient):
        x, weight = context.saved_tensors
        rounded = block_dequantize(*block_quantize(weight, 128), 128)
        gradient_rows, rows = (t.reshape(-1, t.shape[-1]) for t in (gradient, x))
        weight_gradient = tile_rounded(gradient_rows.T) @ tile_rounded(rows.T).T
        return tile_rounded(gradient) @ rounded, weight_gradient


class Fp8TrainingLinear(nn.Linear):
    """A linear whose master weights stay FP32 and whose products run in simulated FP8."""

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            output = Fp8Product.apply(x.float(), self.weight)
        return output if self.bias is None else output + self.bias


def prepare_fp8_training(model):
    """A copy that trains in simulated FP8; embedding, head, router and norms do not.

    Neither does the attention operator, as in V3; the projections around it do.
    """
    model = listed_experts(surgery.changeable_copy(model, CausalLM))
    for block in model.blocks():
        for linear in linears_of(block).values():
            linear.__class__ = Fp8TrainingLinear
    return model


# %% The latent cache in 8 bits or fewer, no bit wasted
class QuantizedLatentCache(LatentCache):
    """A `LatentCache` of packed integers and two BF16 scales a token: latent and rotary key apart.

    Attention reads dequantised numbers, those of the newest token included. V2-sized, 6 bits: 576
    numbers in 432 + 4 bytes, which are one row of the store.
    """

    def __init__(self, store=RowStore, *, bits, latent_width):
        super().__init__(store)
        self.bits, self.latent_width = bits, latent_width

    def append(self, memory):
        """(B, new, C + R) → all so far, dequantised, (B, S, C + R)."""
        width, C = memory.shape[-1], self.latent_width
        widths = [C, width - C] if width > C else [C]
        parts = memory.detach().split(widths, dim=-1)
        rounded = [round_nearest(part, self.bits) for part in parts]
        codes, scales = (torch.cat(part, dim=-1) for part in zip(*rounded, strict=True))
        stored = pack_bits(codes, self.bits), scales
        packed, scales = parted_bytes(self.rows.append(joined_bytes(*stored)), *stored)
        codes = unpack_bits(packed, self.bits, width).split(widths, dim=-1)
        scales = scales.to(memory.dtype).split(1, dim=-1)
        return torch.cat([code * scale for code, scale in zip(codes, scales, strict=True)], dim=-1)


def quantize_cache(model, bits):
    """The model itself, from now on with latent caches of `bits` (2 to 8; None: as they were)."""
    largest_code(8 if bits is None else bits)  # refuses others
    for attention in (block.self_attn for block in model.blocks()):
        options = dict(bits=bits, latent_width=attention.kv_lora_rank)
        smaller = functools.partial(QuantizedLatentCache, **options)
        attention.new_cache = LatentCache if bits is None else smaller
    model.cache_bits = bits
    return model


# %% The demonstration. Part 1: one matrix
def relative_error(got, want):
    return ((got - want).norm() / want.norm()).item()


def show_shared_scales(demo):
    """Who shares a scale, what a zero point is for, and where the error comes from."""
    x = torch.randn(256, 256, device=demo.device)
    x[:, 7] *= 30  # one large column
    views = {"tensor": (x, None), "row": (x, -1), "column": (x, 0),
             "group of 32": (in_groups(x, 32), -1)}
    errors = {}
    for name, (view, dim) in views.items():
        codes, scale = absmax_quantize(view, 8, dim)
        errors[name] = relative_error((codes * scale).view_as(x)[:, 64:], x[:, 64:])
    figures = ", ".join(f"{name} {error:.4f}" for name, error in errors.items())
    demo.note("INT8, one column 30 × the others; error of columns 64…255 by who shares a scale:")
    demo.note(f"    {figures}")
    demo.check("it matters who shares a scale with the large ones", "(256, 256)",
               " > ".join(errors), sorted(errors, key=errors.get, reverse=True) == list(errors))
    one_sided = torch.rand(64, 64, device=demo.device) + 0.5
    codes, scale, zero = zero_point_quantize(one_sided)
    asymmetric = relative_error((codes.float() - zero) * scale, one_sided)
    codes, scale = absmax_quantize(one_sided)
    symmetric = relative_error(codes * scale, one_sided)
    demo.check("numbers to one side: a zero point helps", "(64, 64)",
               f"error {symmetric:.4f} → {asymmetric:.4f}", asymmetric < symmetric)
    normal = torch.randn(100_000, device=demo.device)
    demo.note("INT4 of a normal distribution, squared error from rounding + from clipping:")
    for share in (1.0, 0.75, 0.5, 0.3):
        largest = share * normal.abs().max()
        rounding, clipping = rounding_and_clipping(normal, 4, largest)
        demo.note(f"    grid to {largest:.2f}: {rounding:.5f} + {clipping:.5f} = "
                  f"{rounding + clipping:.5f}")


def show_formats(demo):
    """What the 8-bit floats are, what FP8 loses in blocks, and how codes are packed."""
    for name, bits, dtype in (("E4M3", (4, 3), torch.float8_e4m3fn),
                              ("E5M2", (5, 2), torch.float8_e5m2)):
        grid, numbers = float8_grid(*bits), torch.randn(10_000) * 20
        same = torch.equal(round_to_grid(numbers, grid), numbers.to(dtype).float())
        demo.check(f"{name}: PyTorch's cast is nearest on the grid", f"{len(grid)} numbers ≥ 0",
                   f"smallest {grid[1]:.2g}, largest {grid[-1]:,.0f}", same)
    codes = torch.randint(-31, 32, (4, 576), dtype=torch.int8)
    packed = pack_bits(codes, 6)
    same = packed.shape[-1] == 432 and torch.equal(unpack_bits(packed, 6, 576), codes)
    demo.check("576 numbers of 6 bits, packed and back", "bytes", f"{packed.shape[-1]}", same)
    weight = torch.randn(96, 256, device=demo.device) / 16
    x = torch.randn(5, 256, device=demo.device)
    blocks = block_dequantize(*block_quantize(weight, 128), 128)
    error = relative_error(F.linear(tile_rounded(x), blocks), F.linear(x, weight))
    demo.check("FP8 in tiles and blocks", "(M, in) → (M, out)", f"error {error:.4f}", error < 0.06)


def show_outliers(demo):
    """A few large activations: what absmax loses, what LLM.int8() and SmoothQuant keep."""
    weight = torch.randn(256, 256, device=demo.device) / 16
    x = torch.randn(64, 256, device=demo.device)
    x[:, [3, 77, 200]] *= 60
    exact = F.linear(x, weight)
    x_codes, x_scale = absmax_quantize(x)
    w_codes, w_scale = absmax_quantize(weight)
    by_row = round_nearest(weight, 8)
    smoothing = smoothquant_smoothing(weight, x.abs().amax(dim=0))
    outputs = {
        "absmax, a scale a tensor": F.linear(x_codes * x_scale, w_codes * w_scale),
        "W8A8, a scale a row": w8a8_product(x, *by_row),
        "LLM.int8()": llm_int8_product(x, *by_row),
        "SmoothQuant": w8a8_product(x / smoothing, *round_nearest(weight * smoothing, 8)),
    }
    # The outliers drown the part of the output that the other columns make.
    ordinary = torch.ones(256, dtype=torch.bool, device=demo.device)
    ordinary[[3, 77, 200]] = False
    size = F.linear(x[:, ordinary], weight[:, ordinary]).norm()
    errors = {name: ((y - exact).norm() / size).item() for name, y in outputs.items()}
    demo.note("three of 256 input columns 60 × the others; error over what the other 253 say:")
    for name, error in errors.items():
        demo.note(f"    {name:<26} {error:.4f}")
    plain, rows, mixed, smoothed = errors.values()
    demo.check("LLM.int8() and SmoothQuant keep it", "(M, 256) → (M, 256)",
               f"{plain:.2f}, {rows:.2f} → {mixed:.3f}, {smoothed:.3f}",
               max(mixed, smoothed) < rows / 3 < plain / 3)


def show_methods(demo, bits):
    """Rounding to nearest, GPTQ and AWQ on one layer with correlated inputs."""
    mixing = torch.randn(64, 64, device=demo.device)
    mixing = mixing * torch.logspace(0, -2, 64, device=demo.device)
    x = torch.randn(512, 64, device=demo.device) @ mixing
    weight = torch.randn(64, 64, device=demo.device)
    statistics = InputStatistics(64, demo.device)
    statistics.add(x)
    naive = gptq_by_inverses(weight.double(), statistics.hessian.double(), bits)
    codes, _ = gptq(weight.double(), statistics.hessian, bits, activation_order=False)
    differing = int((codes != naive).sum())
    demo.check("GPTQ: Cholesky factor = new inverses", "(out, in)", f"{differing} codes differ",
               differing == 0)
    smoothing = awq_smoothing(weight, statistics, bits)
    rounded = {
        "nearest": dequantize(*round_nearest(weight, bits)),
        "AWQ": dequantize(*round_nearest(weight * smoothing, bits)) / smoothing,
        "GPTQ": dequantize(*gptq(weight, statistics.hessian, bits)),
    }
    errors = {name: output_error(weight, w, statistics.hessian) for name, w in rounded.items()}
    figures = ", ".join(f"{name} {error / errors['nearest']:.3f}" for name, error in errors.items())
    demo.check(f"{bits} bits: ‖(W − Ŵ) X‖² over nearest's", "", figures,
               errors["GPTQ"] < errors["AWQ"] <= errors["nearest"])


# %% Part 2: a small model with experts, learnt in seconds
def small_quantizable_model(width=64):
    def block(feed_forward):
        attention = MultiHeadLatentAttention(
            width, num_attention_heads=4, kv_lora_rank=32, qk_nope_head_dim=16,
            qk_rope_head_dim=8, v_head_dim=16,
        )
        return TransformerBlock(attention, feed_forward)

    router = TopKRouter(width, n_routed_experts=4, num_experts_per_tok=2)
    experts = MixtureOfExperts(width, 64, router, n_shared_experts=1)
    model = CausalLM(32, width, [block(SwiGLU(width, 128)), block(experts)])
    model.init_weights(std=0.05)
    return model


def trained_small_model(demo, steps):
    model = small_quantizable_model().to(demo.device)
    train_small(model, steps, 0.0, demo.device, seed=demo.seed)
    return model.eval()


@torch.no_grad()
def held_out_loss(model, caches=False):
    """Nats per token on text of the same language; `caches`: through the model's own caches."""
    ids = small_language(16_384, seed=2).view(-1, 64).to(model.lm_head.weight.device)
    return next_token_loss(model(ids, caches=model.new_caches() if caches else None), ids).item()


def show_layers(demo):
    """What one layer of each kind keeps of a product, and in how many bytes."""
    weight = torch.randn(96, 256, device=demo.device) / 16
    x = torch.randn(5, 256, device=demo.device)
    layers = {"INT8": IntegerLinear(256, 96), "INT4": IntegerLinear(256, 96, bits=4),
              "W8A8": W8A8Linear(256, 96), "FP8": Fp8Linear(256, 96)}
    for name, layer in layers.items():
        share = layer.fill_nearest(weight).weight_bytes() / weight.nbytes
        error = relative_error(layer(x), F.linear(x, weight))
        demo.check(f"{name} layer", "(M, in) → (M, out)",
                   f"error {error:.4f}, {share:.4f} × FP32's bytes",
                   error < (0.2 if name == "INT4" else 0.06))
    (codes, scale), w8a8 = absmax_quantize(x, dim=-1), layers["W8A8"]
    demo.same("W8A8: integers in the sum = dequantised factors", "(M, in) → (M, out)", w8a8(x),
              F.linear(codes * scale, w8a8.weight))


def show_schemes(demo, model, bits, steps):
    """Every scheme on the small trained model: bytes and loss."""
    calibration = small_language(4096, seed=3).view(64, 64).to(demo.device)
    base = held_out_loss(model)
    demo.note(f"the small model, {base:.4f} nats a token in FP32; matrices' bytes and loss:")
    low = {f"{bits} bits a row, {method}": Scheme(bits=bits, method=method)
           for method in ("nearest", "awq", "gptq")}
    losses = {}
    for name, scheme in {**SCHEMES, **low}.items():
        quantized = quantize_model(model, scheme, calibration)
        stored, before = matrix_bytes(quantized)
        losses[name] = held_out_loss(quantized)
        demo.note(f"    {name:<22} {stored / before:.3f} × bytes, loss {losses[name]:.4f} "
                  f"({losses[name] / base - 1:+.2%})")
    demo.check("INT8 and FP8 lose next to nothing", "nats a token",
               f"{losses['int8'] - base:+.5f}, {losses['fp8'] - base:+.5f}",
               max(abs(losses[name] / base - 1) for name in ("int8", "fp8")) < 0.005)
    quantized, ids = quantize_model(model, "int4"), calibration[:2]
    demo.same("INT4: absorbed attention reads the same matrices", "(B, T, W)",
              quantized(ids, path="absorbed"), quantized(ids), tolerance=1e-3)
    nearest, by_gptq = (losses[f"{bits} bits a row, {name}"] - base for name in ("nearest", "gptq"))
    beyond_noise = bits < 4 and steps >= 50
    demo.check(f"GPTQ loses less than rounding at {bits} bits", "nats a token",
               f"{nearest:+.4f} → {by_gptq:+.4f}", by_gptq < nearest or not beyond_noise)


def show_caches(demo, model):
    """Bytes and loss of the latent cache in fewer bits."""
    base, ids = held_out_loss(model), small_language(64, seed=3)[None].to(demo.device)
    for bits in (8, 6, 4):
        cached = quantize_cache(model.copy(), bits)
        loss, caches = held_out_loss(cached, caches=True), cached.new_caches()
        cached(ids, caches=caches)
        size = sum(cache.used_bytes() for cache in caches) / 64 / len(caches)
        demo.note(f"    latent cache in {bits} bits: {size:.0f} bytes a token and layer in "
                  f"place of {4 * 40}, loss {loss:.4f} ({loss / base - 1:+.2%})")


def show_qat(demo, model, bits, steps):
    """Training with rounded weights against a control trained as long without."""
    scheme, base = Scheme(bits=bits), held_out_loss(model)
    lost = held_out_loss(quantize_model(model, scheme)) - base
    control, rounded = model.copy(), prepare_qat(model, scheme)
    for trained in (control, rounded):
        train_small(trained, steps, 0.0, demo.device, seed=demo.seed + 1, rate=1e-3)
    control = held_out_loss(quantize_model(control, scheme))
    fake, real = held_out_loss(rounded.eval()), held_out_loss(convert_qat(rounded))
    demo.note(f"{bits} bits a row cost {lost:.4f} nats; {steps} steps later, rounded again: after "
              f"FP32 training {control - base:+.4f}, after QAT {real - base:+.4f}")
    demo.check("QAT recovers more than training on", "nats a token",
               f"{control:.4f} → {real:.4f}", real < control or steps < 50)
    demo.check("converted = trained with fake rounding", "nats a token",
               f"{fake:.5f}, {real:.5f}", abs(fake - real) < 1e-4)


def show_fp8_training(demo, steps):
    """The same steps in simulated FP8 and in BF16."""
    losses = {}
    for name, precision in (("BF16", torch.bfloat16), ("FP8", torch.float32)):
        torch.manual_seed(demo.seed)
        fresh = small_quantizable_model().to(demo.device)
        fresh = prepare_fp8_training(fresh) if name == "FP8" else fresh
        losses[name], _ = train_small(
            fresh, steps, 0.0, demo.device, seed=demo.seed, precision=precision
        )
    relative = losses["FP8"] / losses["BF16"] - 1
    demo.check(f"{steps} steps in simulated FP8 beside BF16", "held-out nats",
               f"{losses['FP8']:.4f}, {losses['BF16']:.4f}: {relative:+.2%}",
               abs(relative) < 0.01 or steps < 50)


@demonstration(
    __doc__,
    flag("bits", 3, "bits of the weights where rounding hurts, 2 to 4", at_least=2, at_most=4),
    flag("steps", 150, "training steps of each small model", at_least=1),
)
def main(demo, arguments):
    bits, steps = arguments.bits, arguments.steps
    for show in (show_shared_scales, show_formats, show_outliers, show_layers):
        show(demo)
    show_methods(demo, bits)
    model = trained_small_model(demo, steps)
    show_schemes(demo, model, bits, steps)
    show_caches(demo, model)
    show_qat(demo, model, bits, steps)
    show_fp8_training(demo, steps)
    demo.finish("--bits 2: who still works?", "--bits 4: do the methods still differ?",
                "--steps 400: does QAT catch up with FP32?")


if __name__ == "__main__":
    main()

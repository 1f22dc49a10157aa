"""Phase 8: quantisation, a model in fewer bits and what it costs.

A weight does not need 32 bits. Rounded to one of 255 values it takes a quarter of the bytes, and to
one of 15 values an eighth. Decoding mostly waits for weights, so it can gain the same factor
(benchmarks/quantization.py measures it). The difficulty is the scale. Numbers that share a scale
share a grid, and one large number makes this grid coarse for all of them. Part 1 is about one
matrix: which numbers share a scale (those of a tensor, row, group or tile), what to do with large
numbers (LLM.int8(), SmoothQuant), and how to round so that outputs change least (GPTQ, AWQ). Part 2
is about a model. It puts a rounded layer in the place of each linear one, by one of eight schemes.
Then it trains with rounded weights (QAT, quantisation-aware training), trains in FP8, and quantises
the latent cache.

    absmax        q = round(x / s),  s = max|x| / (2^(bits−1) − 1),      x̂ = s q
    W8A8          y_ij = s_i t_j Σ_k q_ik p_jk,  x̂ = s q,  ŵ = t p       (integers inside the sum)
    LLM.int8()    columns with an |x| ≥ 6 in high precision, all others as in W8A8
    GPTQ          round column i; w_j −= (w_i − ŵ_i) [H⁻¹]_ij / [H⁻¹]_ii for j > i
                  with H = X Xᵀ of the columns from i on
    AWQ           Ŵ = round(σ W) / σ,  σ_j = mean|X_j|^α,  the best of several α
    SmoothQuant   x Wᵀ = (x / σ)(σ W)ᵀ,  σ_j = max|X_j|^α / max|W_j|^(1−α),  α = ½
    FP8 (V3)      E4M3, 1×128 tiles of x and 128×128 blocks of W, s = max|·| / 448
    QAT           forward ŵ, backward ∂w = ∂ŵ                            (straight-through)

q and p are codes, s and t scales; x̂ and ŵ are the rounded x and w. X holds the inputs of a layer.
The smoothing σ has one number for each input column.

Papers: Dettmers et al., LLM.int8() (2022, arXiv:2208.07339); Frantar et al., GPTQ (2023,
arXiv:2210.17323); Lin et al., AWQ (2024, arXiv:2306.00978); Xiao et al., SmoothQuant (2023,
arXiv:2211.10438); DeepSeek-V3 (2024, arXiv:2412.19437), section 3.3; Bengio et al. (2013,
arXiv:1308.3432) for the straight-through estimator. DeepSeek-V2 (2024, arXiv:2405.04434) reports a
KV cache of 6 bits and does not say how it is made.
Simplified: the smoothing σ is applied to the input of a layer; the papers fold it into the norm
before it. LLM.int8() multiplies outlier columns by 16-bit weights; here these come from the INT8
codes. FP8 products are emulated: rounded to FP8 and multiplied in FP32.
Before: phases 1 to 6. Reading 50 minutes, running 30 to 45 seconds.

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


# %% Part 1, one matrix. Integers: which numbers share a scale
def absmax_quantize(x, bits=8, dim=None, scale_dtype=torch.float32):
    """Rounds to symmetric integers: x ≈ codes · scale. The largest number is the grid's last code.

    Four numbers in 4 bits, codes from −7 to 7:

        x      (0.1, −0.5, 1.2, 3.5)     scale 3.5 / 7 = 0.5
        codes  (  0,   −1,   2,   7)     x / scale, rounded
        x̂      (  0, −0.5, 1.0, 3.5)     without 3.5, the scale is 0.17 and the code of 0.1 is 1

    dim: the dimension along which numbers share a scale. −1 gives one scale per row, 0 one per
    column, None one for all; `in_groups(x, size)` with −1 gives one per group. A number halfway
    between two codes gets the even one.

    Returns: codes (int8, within ±(2^(bits−1) − 1)) and scale (x's shape, but 1 along `dim`). The
        scale is rounded to `scale_dtype` before the codes are chosen. Zeros come back exactly.
    """
    x = x if x.dtype == torch.float64 else x.float()
    largest = x.abs().amax() if dim is None else x.abs().amax(dim, keepdim=True)
    scale = nonzero((largest / largest_code(bits)).to(scale_dtype))
    return nearest_codes(x, scale, bits), scale


def nearest_codes(x, scale, bits):
    limit = largest_code(bits)
    return (x / scale).round_().clamp_(-limit, limit).to(torch.int8)


def largest_code(bits):
    """The largest code of the symmetric grid, 2^(bits−1) − 1."""
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
    """Rounds weights to nearest: codes (..., out, in) and BF16 scale (..., out, groups)."""
    codes, scale = absmax_quantize(in_groups(weight, group_size), bits, -1, torch.bfloat16)
    return codes.flatten(-2), scale.squeeze(-1)


def dequantize(codes, scale):
    """Returns Ŵ (..., out, in), FP32, from codes of this shape and scale (..., out, groups)."""
    groups = codes.float().unflatten(-1, (scale.shape[-1], -1))
    return groups.mul_(scale.float().unsqueeze(-1)).flatten(-2)


def zero_point_quantize(x, bits=8, dim=None):
    """Asymmetric integers, x ≈ (codes − zero) · scale, for numbers that lie on one side of 0.

    Returns: codes and zero (uint8, 0 … 2^bits − 1) and scale. The range always includes 0, which
        is represented exactly.
    """
    limit, x = 2 * largest_code(bits) + 1, x.float()
    options = dict() if dim is None else dict(dim=dim, keepdim=True)
    low, high = x.amin(**options).clamp(max=0), x.amax(**options).clamp(min=0)
    scale = nonzero((high - low) / limit)
    zero = (-low / scale).round()
    codes = ((x / scale).round() + zero).clamp(0, limit)
    return codes.to(torch.uint8), scale, zero.to(torch.uint8)


def rounding_and_clipping(x, bits, largest):
    """Mean squared error of a grid up to `largest`, in two parts: (rounding, clipping)."""
    scale = largest / largest_code(bits)
    error = (x - nearest_codes(x, scale, bits) * scale) ** 2
    inside = x.abs() <= largest
    return (error * inside).mean(), (error * ~inside).mean()


# %% Packing: codes of 2 to 7 bits fill bytes without gaps
def pack_bits(codes, bits):
    """Packs signed codes (..., n), int8, into bytes (..., ⌈n · bits / 8⌉), uint8.

    Each code is stored as code + 2^(bits−1); the first one takes the lowest bits. A byte has room
    for two codes of 4 bits: [−8, 7] → 0b1111_0000. Three bytes have room for four codes of 6 bits.
    Codes of 8 bits are returned as they are.
    """
    return codes if bits == 8 else packed_bytes(codes + 2 ** (bits - 1), bits)


def unpack_bits(packed, bits, count):
    """The inverse of `pack_bits`: bytes (..., ⌈count · bits / 8⌉) → codes (..., count), int8."""
    if bits == 8:
        return packed.view(torch.int8)
    return unpacked_bytes(packed, bits, count).view(torch.int8) - 2 ** (bits - 1)


# %% Floating point in 8 bits: the steps grow with the numbers
def float8_grid(exponent_bits, mantissa_bits):
    """All finite numbers ≥ 0 of an 8-bit float, in the order of their bit patterns.

    E4M3 (4 bits of exponent, 3 of mantissa) has no infinity, and only its last pattern is NaN, so
    it ends at 448. E5M2 keeps the whole last exponent for infinity and NaN, as IEEE does, and ends
    at 57,344. From 1 to 2, the steps of E4M3 are 1/8; from 256 on, they are 32. Down to
    1/64, a step is 1/8 of the power of two below the number. Below 1/64, the steps stay 1/512.
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
    """The naive reference of a cast: rounds to the nearest number of the grid (≥ 0, mirrored).

    Halfway between two numbers, the even bit pattern wins. Numbers beyond the end go to the end.
    """
    size = x.abs().clamp(max=grid[-1])
    above = torch.searchsorted(grid, size).clamp(min=1)
    below = above - 1
    to_above, to_below = grid[above] - size, size - grid[below]
    up = (to_above < to_below) | ((to_above == to_below) & (above % 2 == 0))
    return torch.where(up, grid[above], grid[below]).copysign(x)


E4M3_MAX = 448.0


def block_quantize(x, rows, columns=128):
    """x (R, C) → E4M3 codes (R, C) and FP32 scales, one per block: (⌈R/rows⌉, ⌈C/columns⌉).

    V3 takes blocks of 1×128 for activations and 128×128 for weights. As in the released files, the
    scale *multiplies* the codes although its name there is `weight_scale_inv`.
    """
    height, width = x.shape
    padded = F.pad(x.float(), (0, -width % columns, 0, -height % rows))
    blocks = padded.unflatten(1, (-1, columns)).unflatten(0, (-1, rows))
    scale = nonzero(blocks.abs().amax(dim=(1, 3), keepdim=True) / E4M3_MAX)
    # If the numbers of a block are tiny, its scale is rounded and a code can exceed 448: clamp it.
    scaled = (blocks / scale).clamp(-E4M3_MAX, E4M3_MAX).flatten(2).flatten(0, 1)
    return scaled[:height, :width].to(torch.float8_e4m3fn), scale[:, 0, :, 0]


def block_dequantize(codes, scale, rows, columns=128):
    """Returns the FP32 matrix (R, C) that the result of `block_quantize` stands for."""
    height, width = codes.shape
    spread = scale.repeat_interleave(rows, 0)[:height].repeat_interleave(columns, 1)[:, :width]
    return codes.float() * spread


def tile_rounded(x):
    """Rounds x (..., C) to E4M3 in tiles of 1×128; the result is FP32."""
    return block_dequantize(*block_quantize(x.flatten(0, -2), 1), 1).view_as(x)


# %% Outliers: a few large inputs, and a product that rounds only the others
def w8a8_product(x, codes, scale):
    """x Ŵᵀ with integers inside the sum: y_ij = s_i t_j Σ_k q_ik p_jk.

    A row of x, (12.7, −1.0, 0.2), has the codes (127, −10, 2) and the scale 0.1. A row of W,
    (1.27, −0.5, 0.0), has the codes (127, −50, 0) and the scale 0.01. So

        y = 0.1 · 0.01 · (127 · 127 + 10 · 50 + 2 · 0) = 0.001 · 16,629 = 16.629

    x (M, in): each row is rounded when it arrives. codes (out, in), scale (out, 1). FP32 adds whole
    numbers exactly up to 2²⁴, that is, 1,040 products of 127 · 127. Kernels that save time add in
    INT32: see pipeline/fast.
    """
    x_codes, x_scale = absmax_quantize(x.float(), dim=-1)
    sums = F.linear(x_codes.float(), codes.float())
    return sums * (x_scale * scale.T)


def llm_int8_product(x, codes, scale, threshold=6.0, product=w8a8_product):
    """LLM.int8(): columns in which some |x| reaches the threshold are multiplied in high precision.

    These columns are found anew in every input, so a token's output depends a little on the other
    tokens of its batch. The outliers are never rounded. Their weights come from the INT8 codes, so
    that no second copy is kept. `product` multiplies all other columns.
    """
    outliers = (x.abs() >= threshold).any(dim=0)
    ordinary = product(x.masked_fill(outliers, 0.0), codes, scale)
    columns = outliers.nonzero().squeeze(1)
    return ordinary + F.linear(x[:, columns].float(), dequantize(codes[:, columns], scale))


# %% Rounding that looks at the inputs: GPTQ
class InputStatistics:
    """Sums up a layer's inputs from a calibration text for GPTQ, AWQ and SmoothQuant."""

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
    """Returns ‖(W − Ŵ) X‖², summed over all inputs seen: tr((W − Ŵ) H (W − Ŵ)ᵀ)."""
    difference = weight - rounded
    return ((difference @ hessian) * difference).sum()


def gptq_by_inverses(weight, hessian, bits, group_size=None, dampening=0.01):
    """The naive reference of `gptq`: inverts the rest of H anew for each column.

    One column by hand, with 3 bits and dampening 0. W has one row; input columns 0 and 1 are alike:

        W = (0.4, 1.4, 3.0)     H = (1.0 0.8 0.0)     scale = 3.0 / 3 = 1
                                    (0.8 1.0 0.0)
                                    (0.0 0.0 1.0)

    Column 0 is rounded to 0, with an error of 0.4. [H⁻¹]_01 / [H⁻¹]_00 = −0.8, so column 1 becomes
    1.4 + 0.8 · 0.4 = 1.72 and is rounded to 2. It makes up for the error of column 0. Column 2 is
    independent of the two and stays 3. The codes (0, 2, 3) have an output error of 0.136. Rounding
    to nearest gives (0, 1, 3), with an output error of 0.576.
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

    One Cholesky factor U of H⁻¹ (H⁻¹ = Uᵀ U) replaces all inverses of the naive reference: their
    [H⁻¹]_ij / [H⁻¹]_ii is U_ij / U_ii. A few columns at a time are finished; then all later columns
    are corrected at once. Scales are fixed beforehand: a column keeps its group's scale even if
    `activation_order` takes the columns with the largest inputs first.

    weight (out, in); hessian Σ x xᵀ (in, in). dampening: this share of the mean of H's diagonal is
    added to the diagonal. Returns codes (out, in) and BF16 scale (out, groups).
    """
    codes, scale = round_nearest(weight, bits, group_size)
    column_scale = scale_of_each(weight, scale)
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
    """Gives each weight its scale: (out, groups) → (out, in), in the precision of the weights."""
    return scale.to(weight.dtype).repeat_interleave(weight.shape[1] // scale.shape[1], dim=1)


def dampened(hessian, dampening):
    """Returns H + λI; a column whose inputs were all 0 counts as independent of the others."""
    diagonal = hessian.diagonal()
    unused = (diagonal == 0).to(hessian.dtype)
    return hessian + torch.diag(unused + dampening * diagonal.mean())


# %% Scaling before rounding: AWQ and SmoothQuant
def awq_smoothing(weight, statistics, bits, group_size=None, steps=20):
    """Returns the σ = mean|X_j|^α, with α from 0, 1/steps, … 1, that changes the outputs least.

    The weights of large inputs are scaled up before rounding, so that they lose less. α = 0 is
    plain rounding.
    """
    size = statistics.total / nonzero(statistics.total.mean())
    best, best_error = None, math.inf
    for step in range(steps + 1):
        smoothing = size.clamp(min=1e-4) ** (step / steps)
        rounded = dequantize(*round_nearest(weight * smoothing, bits, group_size)) / smoothing
        error = output_error(weight, rounded, statistics.hessian)
        if error < best_error:
            best, best_error = smoothing, error
    return best


def smoothquant_smoothing(weight, largest_input, alpha=0.5):
    """Returns SmoothQuant's σ (in,), which makes large inputs smaller and their weights larger.

    With α = ½, inputs up to 8 and weights up to 2 give σ = 8^½ / 2^½ = 2; both then reach 4.
    An expert may see few inputs, and a column that is small in these can be large later. So
    max|X_j| counts as at least a tenth of its mean over columns. A column of zeros has σ = 1.
    """
    largest_weight = weight.abs().amax(dim=0)
    unused, floor = largest_input == 0, largest_input.mean() / 10
    largest_input = largest_input.clamp(min=floor)
    smoothing = largest_input**alpha / largest_weight ** (1 - alpha)
    return torch.where(unused | (largest_weight == 0), 1.0, smoothing)


# %% Part 2, a model. Layers that hold rounded weights and nothing else
def straight_through(exact, rounded):
    """`rounded` in the forward pass; in the backward pass the gradient goes to `exact`.

    Rounding is a staircase: its gradient is zero almost everywhere, so nothing would be learnt.
    """
    return exact + (rounded - exact).detach()


class QuantizedLinear(surgery.TypesKept):
    """y = (x / input_scale) Ŵᵀ + bias, (..., in) → (..., out). Each subclass has its own Ŵ.

    `input_scale` is the smoothing σ or None; it is not the scale of a grid. `weight` is the FP32
    matrix that the layer stands for, computed at each access. MLA's absorption reads it, and so
    computes the same as the layer. A cast changes neither codes nor scales.
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
        """(M, in) → (M, out), without smoothing and bias: dequantises, then multiplies."""
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
        """Counts the bytes of codes, scales and smoothing, which together stand for the matrix."""
        return sum(b.nbytes for name, b in self.named_buffers() if name != "bias")


class IntegerLinear(QuantizedLinear):
    """Has weights of 2 to 8 bits, with one BF16 scale per row or group; inputs are not rounded.

    A scale for 128 weights adds an eighth of a bit to each: INT4 takes 4.125 bits per weight.
    Codes are dequantised, then multiplied. pipeline/fast has kernels for 8 and 4 bits that read the
    codes themselves: fewer bits save time only if fewer bytes are read.
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
        """Fills in a weight (out, in), rounded to nearest."""
        return self.fill(*round_nearest(weight, self.bits, self.group_size))

    def codes_and_scale(self):
        """Returns codes (out, in), int8, and scale (out, groups), BF16."""
        return unpack_bits(self.codes, self.bits, self.in_features), self.scale

    def rounded_weight(self):
        return dequantize(*self.codes_and_scale())


class W8A8Linear(IntegerLinear):
    """Multiplies INT8 rows of inputs and of weights; with `outlier_threshold`, by LLM.int8()."""

    def __init__(self, *sizes, outlier_threshold=None, **options):
        super().__init__(*sizes, **options)
        self.outlier_threshold = outlier_threshold

    def product(self, rows):
        if self.outlier_threshold is None:
            return w8a8_product(rows, self.codes, self.scale)
        return llm_int8_product(rows, self.codes, self.scale, self.outlier_threshold)


class Fp8Linear(QuantizedLinear):
    """Has E4M3 weights in blocks of 128×128; rounds inputs to E4M3 in tiles of 1×128 (V3, 3.3).

    V3 multiplies FP8 by FP8. Its GPUs keep few bits of a long sum, so after every 128 products the
    sum is added to an FP32 number. Here both sides are dequantised first, and all sums are FP32.
    With `rounds_input=False`, inputs are not rounded.
    """

    def __init__(self, in_features, out_features, bias=False, rounds_input=True):
        super().__init__(in_features, out_features, bias)
        self.rounds_input = rounds_input
        codes, scale = block_quantize(torch.zeros(out_features, in_features), 128)
        self.hold(codes=codes, weight_scale_inv=scale)

    def fill_nearest(self, weight):
        """Fills in a weight (out, in), rounded in its blocks."""
        self.codes, self.weight_scale_inv = block_quantize(weight, 128)
        return self

    def rounded_weight(self):
        return block_dequantize(self.codes, self.weight_scale_inv, 128)

    def product(self, rows):
        return super().product(tile_rounded(rows).to(rows.dtype) if self.rounds_input else rows)


# %% Schemes: how to round every matrix of a model
LAYERS = ("weights", "w8a8", "llm_int8", "fp8")
METHODS = {"nearest": LAYERS, "smooth": ("w8a8",), "gptq": ("weights",), "awq": ("weights",)}


@dataclass(frozen=True)
class Scheme:
    """The settings by which `quantize_model` rounds every matrix.

    layer: the kind of the new layers and the numbers that they round.

        "weights"   the weights                                  `IntegerLinear`
        "w8a8"      the weights, and inputs with a scale a row   `W8A8Linear`
        "llm_int8"  the same, except columns with large inputs   `W8A8Linear` with a threshold
        "fp8"       weights in blocks and inputs in tiles        `Fp8Linear`

    bits: bits per weight. group_size: how many numbers of a row share a scale. None: the whole row.
    "auto": 128, 64 or 32, the largest that divides the row; the whole row if none does. method: how
    weights are rounded. `METHODS` lists the layers that each method is for.
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
        """How many numbers of a row share a scale; "auto": 256 → 128, 96 → 32, 100 → 100."""
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


# %% From a model to its quantised copy: a rounded layer replaces each `nn.Linear`
def quantize_model(model, scheme, calibration=None):
    """Returns a quantised copy for inference; the argument is not changed.

    It rounds the matrices of attention and of dense, shared and routed feed-forward, also those in
    the blocks of the MTP modules. Embedding, head, router, norms and `eh_proj` stay as they are.
    Each matrix is the weight of an `nn.Linear`. Block by block, rounded layers replace them.

    model: a `CausalLM` that is neither quantised nor prepared for QAT. scheme: a name in `SCHEMES`
    or a `Scheme`. calibration: token ids (B, T), for methods that look at inputs. Each block is
    rounded for the inputs that it gets from the rounded blocks before it.
    """
    scheme, copied = entry_of(SCHEMES, scheme=scheme), surgery.changeable_copy(model, CausalLM)
    quantized = listed_experts(copied).eval().requires_grad_(False)
    calibrates = scheme.method != "nearest"
    if calibrates:
        needed = f"method {scheme.method!r} needs calibration: calibration must be token ids"
        require_shape(calibration, needed, B=1, T=len(model.mtp) + 1)
    for number, block in enumerate(quantized.blocks()):
        linears, statistics = linears_of(block), {}
        if calibrates:  # with the inputs that the rounded blocks before it compute
            statistics = input_statistics(quantized.prepared(), calibration, linears)
        for name, linear in linears.items():
            full_name, seen = f"block {number} {name}", statistics.get(name)
            block.set_submodule(name, quantized_linear(linear, scheme, full_name, seen))
    quantized.quantization = asdict(scheme)
    return quantized.prepared()


class ExpertList(Experts):
    """`Experts` with an `nn.Linear` for each expert's matrix.

    Each expert is rounded separately. It has its own large weights and gets only the inputs that
    the router sends to it, so GPTQ, AWQ and SmoothQuant round each expert in its own way.
    """

    def expert(self, e, x):
        gate, up = self.gate_up_proj[e](x).chunk(2, dim=-1)
        return self.down_proj[e](F.silu(gate) * up)

    grouped = Experts.loop


def listed_experts(model):
    """Turns all `Experts` into `ExpertList`s in the same memory; returns the model itself."""
    return surgery.matrices_apart(model, Experts, ExpertList)


@torch.no_grad()
def input_statistics(model, calibration, linears, batch_size=8):
    """{name: linear} → {name: `InputStatistics`} while the model reads calibration ids (B, T)."""
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
    """Returns the filled layer that replaces `linear`; some methods need its input `statistics`.

    Rounding to nearest and GPTQ give codes at once. AWQ and SmoothQuant first find a smoothing σ.
    The weights are multiplied by σ, and the inputs will be divided by σ.
    """
    weight, width = linear.weight.float(), linear.in_features
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
    """Returns the layer that replaces the `linear` of this name, before it is filled.

    MLA's absorbed path gives `kv_b_proj` other inputs than the expanded path. Rounding these inputs
    would make the two paths disagree, so `kv_b_proj` has only its weights rounded.
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
    """Returns the bytes of all quantised matrices with their scales, and of the same in FP32."""
    layers = [m for m in model.modules() if isinstance(m, QuantizedLinear)]
    numbers = sum(layer.in_features * layer.out_features for layer in layers)
    return sum(layer.weight_bytes() for layer in layers), 4 * numbers


# %% Training with rounded weights
class FakeQuantize(nn.Module):
    """Weights (..., out, in) → the rounded weights that the integer layer will hold.

    Training changes the exact weights: small steps add up until a weight rounds to the next code.
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
    """Returns a copy that trains with weights rounded to nearest, by `int8`, `int4` or a `Scheme`.

    All code that reads a weight gets the rounded one, even MLA's absorption. The optimizer changes
    the exact weight behind it.
    """
    scheme = entry_of(SCHEMES, scheme=scheme)
    fits = (scheme.layer, scheme.method) == ("weights", "nearest")
    require(fits, "QAT is for schemes that round weights to nearest: int8 and int4")
    model = surgery.changeable_copy(model, CausalLM)
    for block in model.blocks():
        surgery.read_matrices_through(FakeQuantize(scheme), block, (nn.Linear, Experts))
    return model


def convert_qat(model):
    """Returns an integer copy of a model from `prepare_qat`; it computes the same function."""
    schemes = [module.scheme for module in model.modules() if isinstance(module, FakeQuantize)]
    require(schemes, "the model was not prepared by prepare_qat")
    return quantize_model(surgery.without_parametrizations(model.copy()), schemes[0])


# %% A training step in FP8
class Fp8Product(torch.autograd.Function):
    """y = x Wᵀ. All three products of a training step round their operands, as in V3 (figure 6).

    ⌊·⌉ rounds to FP8. The output is y = ⌊x⌉ ⌊W⌉ᵀ, the input gradient ∂x = ⌊∂y⌉ ⌊W⌉, the weight
    gradient ∂W = ⌊∂yᵀ⌉ ⌊xᵀ⌉ᵀ. Tiles of 1×128 lie along the dimension that is summed over. In the
    last product, this is the tokens.
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
    """A linear layer whose weights stay FP32 and whose products run in simulated FP8."""

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            output = Fp8Product.apply(x, self.weight)
        return output if self.bias is None else output + self.bias


def prepare_fp8_training(model):
    """Returns a copy whose blocks train in simulated FP8.

    As in V3, embedding, head, router, norms and the attention operator keep their precision.
    The projections around attention use FP8.
    """
    model = listed_experts(surgery.changeable_copy(model, CausalLM))
    for block in model.blocks():
        for linear in linears_of(block).values():
            linear.__class__ = Fp8TrainingLinear
    return model


# %% The latent cache in 8 bits or fewer
class QuantizedLatentCache(LatentCache):
    """A `LatentCache` of packed integers. A token has two BF16 scales, of latent and rotary key.

    Attention reads dequantised numbers, also those of the newest token. In V2's size and 6 bits,
    the 576 numbers of a token take 432 + 4 bytes, which are one row of the store.
    """

    def __init__(self, store=RowStore, *, bits, latent_width):
        super().__init__(store)
        self.bits, self.latent_width = bits, latent_width

    def append(self, memory):
        """Stores (B, new, C + R); returns all rows so far, dequantised, (B, S, C + R)."""
        width, C = memory.shape[-1], self.latent_width
        widths = [C, width - C] if width > C else [C]
        parts = memory.split(widths, dim=-1)
        rounded = [round_nearest(part, self.bits) for part in parts]
        codes, scales = (torch.cat(part, dim=-1) for part in zip(*rounded, strict=True))
        stored = pack_bits(codes, self.bits), scales
        packed, scales = parted_bytes(self.rows.append(joined_bytes(*stored)), *stored)
        codes = unpack_bits(packed, self.bits, width).split(widths, dim=-1)
        scales = scales.to(memory.dtype).split(1, dim=-1)
        return torch.cat([code * scale for code, scale in zip(codes, scales, strict=True)], dim=-1)


def quantize_cache(model, bits):
    """Gives the model latent caches of `bits`, 2 to 8, or plain ones (None); returns the model."""
    largest_code(8 if bits is None else bits)  # refuses all other numbers
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
    """Compares ways to share a scale, shows what a zero point gains, and splits the error."""
    x = torch.randn(256, 256, device=demo.device)
    x[:, 7] *= 30  # one large column
    views = {"tensor": (x, None), "row": (x, -1), "column": (x, 0),
             "group of 32": (in_groups(x, 32), -1)}
    errors = {}
    for name, (view, dim) in views.items():
        codes, scale = absmax_quantize(view, 8, dim)
        errors[name] = relative_error((codes * scale).view_as(x)[:, 64:], x[:, 64:])
    figures = ", ".join(f"{name} {error:.4f}" for name, error in errors.items())
    demo.note("INT8, one column is 30 × the others; error of columns 64…255 with one scale per:")
    demo.note(f"    {figures}")
    demo.check("sharing a large number's scale costs precision", "(256, 256)",
               " > ".join(errors), sorted(errors, key=errors.get, reverse=True) == list(errors))
    one_sided = torch.rand(64, 64, device=demo.device) + 0.5
    codes, scale, zero = zero_point_quantize(one_sided)
    asymmetric = relative_error((codes.float() - zero) * scale, one_sided)
    codes, scale = absmax_quantize(one_sided)
    symmetric = relative_error(codes * scale, one_sided)
    demo.check("numbers on one side of 0: a zero point helps", "(64, 64)",
               f"error {symmetric:.4f} → {asymmetric:.4f}", asymmetric < symmetric)
    normal = torch.randn(100_000, device=demo.device)
    demo.note("INT4 of a normal distribution, squared error from rounding + from clipping:")
    for share in (1.0, 0.75, 0.5, 0.3):
        largest = share * normal.abs().max()
        rounding, clipping = rounding_and_clipping(normal, 4, largest)
        demo.note(f"    grid to {largest:.2f}: {rounding:.5f} + {clipping:.5f} = "
                  f"{rounding + clipping:.5f}")


def show_formats(demo):
    """Checks the grids of 8-bit floats and packed codes, and measures what FP8 loses in blocks."""
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
    """Compares what absmax, LLM.int8() and SmoothQuant lose to a few large inputs."""
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
    # The outliers make most of the output, so errors are divided by the output of the rest.
    ordinary = torch.ones(256, dtype=torch.bool, device=demo.device)
    ordinary[[3, 77, 200]] = False
    size = F.linear(x[:, ordinary], weight[:, ordinary]).norm()
    errors = {name: ((y - exact).norm() / size).item() for name, y in outputs.items()}
    demo.note("three of 256 input columns are 60 × the others; error / output of the other 253:")
    for name, error in errors.items():
        demo.note(f"    {name:<26} {error:.4f}")
    plain, rows, mixed, smoothed = errors.values()
    demo.check("LLM.int8() and SmoothQuant keep this output", "(M, 256) → (M, 256)",
               f"{plain:.2f}, {rows:.2f} → {mixed:.3f}, {smoothed:.3f}",
               max(mixed, smoothed) < rows / 3 < plain / 3)


def show_methods(demo, bits):
    """Compares rounding to nearest, GPTQ and AWQ on one layer with correlated inputs."""
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
    demo.check(f"{bits} bits: ‖(W − Ŵ) X‖² / nearest's", "", figures,
               errors["GPTQ"] < errors["AWQ"] <= errors["nearest"])


# %% Part 2: a small model with experts, trained in seconds
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
    """Nats per token on new text of the same language; `caches`: read through the caches."""
    ids = small_language(16_384, seed=2).view(-1, 64).to(model.lm_head.weight.device)
    return next_token_loss(model(ids, caches=model.new_caches() if caches else None), ids).item()


def show_layers(demo):
    """Measures the error and the bytes of one layer of each kind."""
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
    """Measures bytes and loss of the small trained model with every scheme."""
    calibration = small_language(4096, seed=3).view(64, 64).to(demo.device)
    base = held_out_loss(model)
    demo.note(f"the small model, {base:.4f} nats a token in FP32; matrices' bytes and loss:")
    low = {f"{bits}-bit rows, {method}": Scheme(bits=bits, method=method)
           for method in ("nearest", "awq", "gptq")}
    losses = {}
    for name, scheme in {**SCHEMES, **low}.items():
        quantized = quantize_model(model, scheme, calibration)
        stored, before = matrix_bytes(quantized)
        losses[name] = held_out_loss(quantized)
        demo.note(f"    {name:<22} {stored / before:.3f} × bytes, loss {losses[name]:.4f} "
                  f"({losses[name] / base - 1:+.2%})")
    demo.check("INT8 and FP8 lose almost nothing", "nats a token",
               f"{losses['int8'] - base:+.5f}, {losses['fp8'] - base:+.5f}",
               max(abs(losses[name] / base - 1) for name in ("int8", "fp8")) < 0.005)
    quantized, ids = quantize_model(model, "int4"), calibration[:2]
    demo.same("INT4: absorbed attention reads the same matrices", "(B, T, W)",
              quantized(ids, path="absorbed"), quantized(ids), tolerance=1e-3)
    nearest, by_gptq = (losses[f"{bits}-bit rows, {name}"] - base for name in ("nearest", "gptq"))
    beyond_noise = bits < 4 and steps >= 50
    demo.check(f"GPTQ loses less than rounding at {bits} bits", "nats a token",
               f"{nearest:+.4f} → {by_gptq:+.4f}", by_gptq < nearest or not beyond_noise)


def show_caches(demo, model):
    """Measures bytes and loss of the latent cache in fewer bits."""
    base, ids = held_out_loss(model), small_language(64, seed=3)[None].to(demo.device)
    for bits in (8, 6, 4):
        cached = quantize_cache(model.copy(), bits)
        loss, caches = held_out_loss(cached, caches=True), cached.new_caches()
        cached(ids, caches=caches)
        size = sum(cache.used_bytes() for cache in caches) / 64 / len(caches)
        demo.note(f"    latent cache in {bits} bits: {size:.0f} bytes a token and layer in "
                  f"place of {4 * 40}, loss {loss:.4f} ({loss / base - 1:+.2%})")


def show_qat(demo, model, bits, steps):
    """Compares training with rounded weights and equally long training without rounding."""
    scheme, base = Scheme(bits=bits), held_out_loss(model)
    lost = held_out_loss(quantize_model(model, scheme)) - base
    control, rounded = model.copy(), prepare_qat(model, scheme)
    for trained in (control, rounded):
        train_small(trained, steps, 0.0, demo.device, seed=demo.seed + 1, rate=1e-3)
    control = held_out_loss(quantize_model(control, scheme))
    fake, real = held_out_loss(rounded.eval()), held_out_loss(convert_qat(rounded))
    demo.note(f"{bits}-bit rows cost {lost:.4f} nats; {steps} more steps, then rounded again: "
              f"after FP32 training {control - base:+.4f}, after QAT {real - base:+.4f}")
    demo.check("QAT recovers more than further FP32 training", "nats a token",
               f"{control:.4f} → {real:.4f}", real < control or steps < 50)
    demo.check("converted = trained with fake rounding", "nats a token",
               f"{fake:.5f}, {real:.5f}", abs(fake - real) < 1e-4)


def show_fp8_training(demo, steps):
    """Compares the same steps in simulated FP8 and in BF16."""
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
    flag("bits", 3, "bits of the coarsest weights, 2 to 4", at_least=2, at_most=4),
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
    demo.finish("--bits 2: which methods still work?", "--bits 4: do the methods still differ?",
                "--steps 400: does QAT catch up with FP32?")


if __name__ == "__main__":
    main()

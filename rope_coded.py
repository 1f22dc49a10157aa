"""Phase 7: rotary positions (RoPE), longer contexts (YaRN), and decoupled RoPE for MLA.

Attention alone cannot tell "dog bites man" from "man bites dog". RoPE turns each pair of numbers
in a query or key by an angle that grows with the token's position; each pair has its own speed.
The dot product of two turned vectors depends on the *difference* of their angles only, so a score
knows how far apart two tokens are, and nothing else. Slow pairs have not turned full circle in
training, so positions beyond the training length look new to them: YaRN slows just those down.
MLA's absorption needs keys that are a fixed matrix times the latent, and a rotation in between
would break that: DeepSeek rotates a small part of its own, k_R, beside the latent.

    θ_i = base^(−2i/R),   (x_2i, x_2i+1) at position m  →  turned by m·θ_i
    as complex numbers:   (x_2i + j x_2i+1) · e^(j m θ_i)
    ⟨turn_m q, turn_n k⟩ = ⟨q, turn_(n−m) k⟩
    YaRN:  θ'_i = θ_i/s · ramp_i + θ_i · (1 − ramp_i),   score scale · (0.1·mscale·ln s + 1)²

Papers: RoFormer (Su et al., 2021), equations 12–16 and 34–37; YaRN (Peng et al., 2023), section
3; DeepSeek-V2 (2024), section 2.1.3, equations 14–19, and 3.1.4.
Simplified: nothing that a released model uses.

Dimensions: B batch · T query positions · D model width · H heads · N no-position part and R
rotary part of a query/key.

Run:  python rope_coded.py [--dim 64] [--factor 40] [--original-length 4096]
"""

import math
from dataclasses import dataclass

import torch
from torch import nn

from lesson import Demonstration, demonstration_parser, one_line_errors, parse_arguments
from mla_coded import LatentCache, MultiHeadLatentAttention


# %% The naive reference: a rotation matrix for each position
def inverse_frequencies(dim, base=10000.0):
    """θ_i = base^(−2i/dim) for the dim/2 pairs, in radians per position. (dim/2,)."""
    if dim < 2 or dim % 2:
        raise ValueError(f"rotary dim={dim} must be even and at least 2")
    if not base > 1:
        raise ValueError(f"rotary base={base} must be above 1")
    # On the CPU whatever the default device: a table of a few numbers, exact in FP32.
    return 1.0 / base ** (torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim)


def rotation_matrix(position, thetas):
    """The (R, R) block-diagonal matrix of RoFormer's equation 15: a 2×2 rotation a pair."""
    angles = position * thetas
    blocks = [
        torch.stack([torch.stack([a.cos(), -a.sin()]), torch.stack([a.sin(), a.cos()])])
        for a in angles
    ]
    return torch.block_diag(*blocks)


# %% The same with real numbers only
def apply_rotary(x, cos, sin):
    """Turns the pairs (2i, 2i+1) of x (..., T, R) by angles given as cos, sin (..., T, R/2)."""
    even, odd = x[..., 0::2], x[..., 1::2]
    turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
    return turned.flatten(-2).type_as(x)


# %% The same as complex numbers, as used at speed
def turn(x, turns):
    """x (..., T, R): each pair as a complex number, times `turns` (..., T, R/2), complex.

    One multiplication in place of four, two sums and a stack: 3 µs against 9 for one token, 68
    against 392 for 32 heads of 256 tokens, forward and backward.
    """
    exact = x if x.dtype == torch.float64 else x.float()
    pairs = exact.unflatten(-1, (-1, 2)).contiguous()
    if pairs.storage_offset() % 2:  # a slice that starts in the middle of a pair's place
        pairs = pairs.clone()
    return torch.view_as_real(torch.view_as_complex(pairs) * turns).flatten(-2).type_as(x)


def rotate_complex(x, positions, thetas):
    """x (..., T, R), positions (T,): each pair is multiplied by e^(j m θ)."""
    angles = positions[:, None].float() * thetas
    return turn(x, torch.polar(torch.ones_like(angles), angles))


# %% Longer contexts: three ways to change the frequencies
def position_interpolation(thetas, factor):
    """All pairs slower by `factor`: positions squeezed into the old range (Chen et al., 2023)."""
    return thetas / factor


def ntk_aware(dim, base, factor):
    """A larger base: the fastest pair keeps its speed, the slowest is slowed by `factor`.

    YaRN (2023), section 3.1.
    """
    if dim < 4:
        raise ValueError(f"NTK-aware scaling needs 2 or more pairs, got rotary dim={dim}")
    return inverse_frequencies(dim, base * factor ** (dim / (dim - 2)))


@dataclass(frozen=True)
class YarnScaling:
    """YaRN (Peng et al., 2023): fast pairs keep their speed, slow ones are interpolated.

    `factor` s: new length over `original_max_position_embeddings`. `beta_fast`, `beta_slow`: a
    pair that turns more than beta_fast times within the original length is left alone, one that
    turns less than beta_slow times is slowed by s, those between by a linear ramp. They count
    *rotations*; they are no indices. `mscale` and `mscale_all_dim` correct the temperature of the
    softmax; None or 0 = not given.
    """

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None

    def __post_init__(self):
        if self.factor < 1:
            raise ValueError(f"YaRN factor={self.factor} must be at least 1")
        if not self.beta_fast > self.beta_slow > 0:
            raise ValueError(
                f"beta_fast={self.beta_fast} must be above beta_slow={self.beta_slow}, that above 0"
            )
        if self.original_max_position_embeddings < 1:
            raise ValueError(
                f"original_max_position_embeddings={self.original_max_position_embeddings} "
                "must be at least 1"
            )

    def ramp_ends(self, dim, base):
        """(low, high): pairs up to `low` keep their speed, from `high` on they are slowed."""

        def pair_with(rotations):
            # θ_i · length = 2π · rotations, solved for i
            ratio = self.original_max_position_embeddings / (rotations * 2 * math.pi)
            return dim * math.log(ratio) / (2 * math.log(base))

        low, high = math.floor(pair_with(self.beta_fast)), math.ceil(pair_with(self.beta_slow))
        return max(low, 0), min(high, dim - 1)

    def inverse_frequencies(self, dim, base):
        """(dim/2,) frequencies, in radians per position."""
        thetas = inverse_frequencies(dim, base)
        low, high = self.ramp_ends(dim, base)
        width = high - low if high != low else 0.001
        pairs = torch.arange(dim // 2, dtype=torch.float32, device="cpu")
        ramp = ((pairs - low) / width).clamp(0, 1)
        return thetas / self.factor * ramp + thetas * (1 - ramp)

    def temperature(self, mscale):
        """m = 0.1 · mscale · ln(factor) + 1."""
        return 0.1 * mscale * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0

    @property
    def softmax_factor(self):
        """What the softmax scale is multiplied by: m² with m from `mscale_all_dim`."""
        return self.temperature(self.mscale_all_dim) ** 2 if self.mscale_all_dim else 1.0

    @property
    def cos_sin_factor(self):
        """What cos and sin are multiplied by: 1 when mscale = mscale_all_dim, as released."""
        if self.mscale and self.mscale_all_dim:
            return self.temperature(self.mscale) / self.temperature(self.mscale_all_dim)
        return self.temperature(1.0)


# %% The module that turns positions into cos and sin
class RotaryEmbedding(nn.Module):
    """positions (..., T) → cos and sin, each (..., T, dim/2), in FP32. `scaling`: YarnScaling."""

    def __init__(self, dim, base=10000.0, scaling=None):
        super().__init__()
        self.dim, self.base, self.scaling = dim, base, scaling
        thetas = inverse_frequencies(dim, base)
        if scaling is not None:
            thetas = scaling.inverse_frequencies(dim, base)
        self.inv_freq = thetas  # no buffer: a cast of the model to BF16 would spoil far positions

    def angles(self, positions):
        return positions.unsqueeze(-1).float() * self.inv_freq.to(positions.device)

    @property
    def magnitude(self):
        """What cos and sin are multiplied by."""
        return 1.0 if self.scaling is None else self.scaling.cos_sin_factor

    def forward(self, positions):
        angles = self.angles(positions)
        return angles.cos() * self.magnitude, angles.sin() * self.magnitude

    def turns(self, positions):
        """The same as complex numbers cos + j sin, (..., T, dim/2)."""
        angles = self.angles(positions)
        return torch.polar(torch.full_like(angles, self.magnitude), angles)


# %% Decoupled RoPE: phase 4's attention with its rotary parts turned
class RotaryLatentAttention(MultiHeadLatentAttention):
    """The attention of DeepSeek-V2 and V3: MLA whose q_R and k_R are rotated before the cache.

    `rotary`: a `RotaryEmbedding` of width R; layers may share one. Its YaRN scaling, if any, also
    sharpens this layer's softmax. Other arguments: `MultiHeadLatentAttention`.
    """

    def __init__(self, *args, rotary, **kwargs):
        super().__init__(*args, **kwargs)
        if rotary.dim != self.qk_rope_head_dim:
            raise ValueError(
                f"rotary dim={rotary.dim} must equal qk_rope_head_dim={self.qk_rope_head_dim}"
            )
        self.rotary = rotary
        if rotary.scaling is not None:
            self.softmax_scale *= rotary.scaling.softmax_factor

    def rotate(self, q_rope, k_rope, positions):
        turns = self.rotary.turns(positions)  # (T, R/2) or (B, T, R/2)
        last = turns[..., -q_rope.shape[-2] :, :].unsqueeze(-3)
        return turn(q_rope, last), turn(k_rope, turns)


# %% Long-range decay
def similarity_bound(distance, thetas):
    """Mean of |Σ e^(j·distance·θ)| over partial sums: RoFormer's bound on a score (equation 37)."""
    turns = torch.polar(torch.ones_like(thetas), distance * thetas)
    return turns.cumsum(0).abs().mean().item()


# %% The demonstration
def check_three_forms(demo, dim, device):
    thetas = inverse_frequencies(dim).to(device)
    x_TR = torch.randn(7, dim, device=device)
    positions_T = torch.tensor([0, 1, 2, 5, 100, 1000, 4095], device=device)
    matrices = torch.stack(
        [rotation_matrix(m, thetas) @ x for m, x in zip(positions_T, x_TR, strict=True)]
    )
    as_complex = rotate_complex(x_TR, positions_T, thetas)
    rotary = RotaryEmbedding(dim).to(device)
    real = apply_rotary(x_TR, *rotary(positions_T))
    demo.same("complex numbers = rotation matrices", "(T, R)", as_complex, matrices, 1e-5)
    demo.same("real-valued form = rotation matrices", "(T, R)", real, matrices, 1e-5)
    demo.same("a rotation keeps the length", "(T,)", real.norm(dim=-1), x_TR.norm(dim=-1), 1e-4)

    query_R, key_R = torch.randn(2, dim, device=device)
    shifts_T = torch.tensor([0, 3, 50, 2000], device=device)
    q_TR = apply_rotary(query_R.expand(4, dim), *rotary(shifts_T + 12))
    k_TR = apply_rotary(key_R.expand(4, dim), *rotary(shifts_T + 5))
    scores_T = (q_TR * k_TR).sum(-1)
    demo.check("score at (12, 5), (15, 8), (62, 55), (2012, 2005)", "one distance, 7",
               ", ".join(f"{score:.4f}" for score in scores_T.tolist()),
               scores_T.max() - scores_T.min() < 2e-3 * dim**0.5)  # fmt: skip
    near, far = similarity_bound(1, thetas), similarity_bound(512, thetas)
    demo.check("long-range decay: bound at 1 and 512 tokens", "", f"{near:.1f} → {far:.1f}",
               far < near)  # fmt: skip


def show_scaling(demo, dim, factor, original_length):
    yarn = YarnScaling(factor, original_length, mscale=1.0, mscale_all_dim=1.0)
    thetas = inverse_frequencies(dim)
    scaled = {
        "as trained": thetas,
        "interpolated": position_interpolation(thetas, factor),
        "NTK-aware": ntk_aware(dim, 10000.0, factor),
        "YaRN": yarn.inverse_frequencies(dim, 10000.0),
    }
    demo.note(f"turns within {original_length} tokens, fastest, middle and slowest pair:")
    for name, frequencies in scaled.items():
        turns = frequencies * original_length / (2 * math.pi)
        demo.note(f"    {name:<13} {turns[0]:9.2f} {turns[dim // 4]:9.3f} {turns[-1]:9.4f}")
    low, high = yarn.ramp_ends(dim, 10000.0)
    kept = torch.allclose(scaled["YaRN"][: low + 1], thetas[: low + 1])
    slowed = torch.allclose(scaled["YaRN"][high:], thetas[high:] / factor)
    demo.check("YaRN keeps fast pairs, slows the slow ones", f"ramp from pair {low} to {high}",
               f"score scale × {yarn.softmax_factor:.4f}", kept and slowed)  # fmt: skip
    v3 = YarnScaling(40, 4096, mscale=1.0, mscale_all_dim=1.0)
    v3_scale = 192**-0.5 * v3.softmax_factor
    demo.check("V3's published ramp and softmax scale", "R 64", f"{v3.ramp_ends(64, 1e4)}, "
               f"{v3_scale:.10f}", v3.ramp_ends(64, 1e4) == (10, 23)
               and abs(v3_scale - 0.1352337789) < 1e-10)  # fmt: skip


@one_line_errors
def main(argv=None):
    parser = demonstration_parser(__doc__)
    parser.add_argument("--dim", type=int, default=64, help="rotary width R")
    parser.add_argument("--factor", type=float, default=40.0, help="how much longer the context")
    parser.add_argument("--original-length", type=int, default=4096, help="trained context")
    arguments = parse_arguments(parser, argv)
    if arguments.dim < 4:
        raise ValueError(f"--dim={arguments.dim} must be at least 4")
    demo = Demonstration("rope_coded.py", arguments.device, arguments.seed)
    check_three_forms(demo, arguments.dim, arguments.device)
    show_scaling(demo, arguments.dim, arguments.factor, arguments.original_length)

    attention = RotaryLatentAttention(
        64, 4, 32, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16, q_lora_rank=24,
        rotary=RotaryEmbedding(8),
    ).to(arguments.device)  # fmt: skip
    x_BTD = torch.randn(2, 9, 64, device=arguments.device)
    with torch.no_grad():
        naive = attention(x_BTD, path="naive")
        demo.same("rotated MLA: expanded = head by head", "(B, T, D)", attention(x_BTD), naive)
        demo.same("rotated MLA: absorbed = head by head", "(B, T, D)",
                  attention(x_BTD, path="absorbed"), naive)  # fmt: skip
        cache = LatentCache()
        pieces = [attention(part, cache=cache) for part in x_BTD.split([4, 1, 3, 1], dim=1)]
        demo.same("rotated MLA: uneven chunks = one pass", "(B, T, D)", torch.cat(pieces, 1), naive)
        moved = attention(x_BTD, positions=torch.arange(9, device=arguments.device) + 500)
        demo.same("all tokens 500 later: same outputs", "(B, T, D)", moved, naive, 1e-4)
        order = torch.tensor([1, 0, 2, 3, 4, 5, 6, 7, 8])
        swapped = attention(x_BTD[:, order])[:, -1] - naive[:, -1]
        change = swapped.abs().max().item()
        demo.check("two early tokens swapped: the last notices", "(B, D)",
                   f"changes by {change:.3f}", change > 1e-4)  # fmt: skip
    demo.finish("--factor 8 --original-length 512: which pairs does YaRN slow now?", "--dim 32")


if __name__ == "__main__":
    main()

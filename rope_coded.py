"""Phase 7: rotary positions (RoPE), why MLA keeps them apart, and longer contexts (YaRN).

Attention alone cannot tell "dog bites man" from "man bites dog". RoPE rotates each pair of numbers
in a query or key by an angle that grows with the token's position; each pair has its own speed. The
dot product of two rotated vectors depends only on the difference of their positions. So a score
knows how far apart two tokens are, and nothing else about where they stand. MLA has a problem with
this. Absorption (phase 4) moves W_UK to the queries; a rotation of the keys would block this
move. DeepSeek therefore *decouples* position from content: a small extra part, q_R and k_R, is
rotated, and the content is not. In training, the slow pairs never complete a full circle, so
positions beyond the training length give angles that the model has never seen. YaRN slows these
pairs down. Pairs that complete a few circles are slowed down less.

    θ_i = base^(−2i/R),   (x_2i, x_2i+1) at position m  →  rotated by m·θ_i
    as complex numbers:   (x_2i + j x_2i+1) · e^(j m θ_i)
    R_m q · R_n k = q · R_(n−m) k
    rotated content:  R_m q · R_n W_UK c = q · (R_(n−m) W_UK) c      (no fixed matrix to absorb)
    decoupled:        q_C · W_UK c + R_m q_R · R_n k_R               (W_UKᵀ q_C is absorbed)
    YaRN:  θ'_i = θ_i/s · ramp_i + θ_i · (1 − ramp_i),   scores · (0.1·mscale_all_dim·ln s + 1)²

R_m is the rotation by position m and j the imaginary unit; q is a query and c a latent. YaRN makes
the context s times as long; ramp_i is 0 for fast pairs and 1 for slow ones.

Papers: RoFormer (Su et al., 2021, arXiv:2104.09864), equations 12–16 and 34–37; DeepSeek-V2 (2024,
arXiv:2405.04434), section 2.1.3, equations 14–19, and 3.1.4; YaRN (Peng et al., 2023,
arXiv:2309.00071), section 3.
Simplified: nothing. The released models use positions in no other way.
Before: phases 1 to 4. Reading 18 minutes, running 2 seconds.

Dimensions: B batch · T query positions · S key positions · D model width · H heads · N no-position
part and R rotary part of a query/key · C KV latent.

Run:  python rope_coded.py [--dim 64] [--factor 40] [--original-length 4096]
"""

import math
from dataclasses import dataclass

import torch
from torch import nn

from lesson import check_positions, check_settings, demonstration, flag, require, setting
from mla_coded import LatentCache, MultiHeadLatentAttention


# %% The naive reference: a rotation matrix for each position
def inverse_frequencies(dim, base=10000.0):
    """Returns θ_i = base^(−2i/dim) for the dim/2 pairs, (dim/2,), in radians per position."""
    require(dim >= 2 and dim % 2 == 0, f"rotary dim={dim} must be even and at least 2")
    require(base > 1, f"rotary base={base} must be above 1")
    # The table is small, so it is always made on the CPU, in FP32.
    return 1.0 / base ** (torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim)


def rotation_matrix(position, thetas):
    """RoFormer's block-diagonal matrix (R, R) of equation 15 has a 2×2 rotation for each pair."""
    angles = position * thetas
    blocks = [
        torch.stack([torch.stack([a.cos(), -a.sin()]), torch.stack([a.sin(), a.cos()])])
        for a in angles
    ]
    return torch.block_diag(*blocks)


# %% The same with real numbers only: most entries of that matrix are zero
def apply_rotary(x, cos, sin):
    """Rotates the pairs (2i, 2i+1) of x (..., T, R) by angles given as cos, sin (..., T, R/2).

    Take x = (1, 2, 3, 4) at position 3. With R = 4 and base 100, θ = (1, 0.1), so the angles are 3
    and 0.3 radians:

        (1, 2) by 3      (1 cos 3 − 2 sin 3,      1 sin 3 + 2 cos 3)      = (−1.27, −1.84)
        (3, 4) by 0.3    (3 cos 0.3 − 4 sin 0.3,  3 sin 0.3 + 4 cos 0.3)  = ( 1.68,  4.71)
    """
    even, odd = x[..., 0::2], x[..., 1::2]
    rotated = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
    return rotated.flatten(-2).type_as(x)


# %% The same as complex numbers: one multiplication for each pair
def rotate_complex(x, rotations):
    """Multiplies the pairs of x (..., T, R), as complex numbers, by e^(j m θ) (..., T, R/2)."""
    exact = x.to(torch.promote_types(x.dtype, torch.float32))  # FP32, or float64 if x is
    pairs = exact.unflatten(-1, (-1, 2)).clone(memory_format=torch.contiguous_format)
    return torch.view_as_real(torch.view_as_complex(pairs) * rotations).flatten(-2).type_as(x)


class RotaryEmbedding(nn.Module):
    """positions (..., T) → cos and sin, each (..., T, dim/2), in FP32.

    `scaling`: a `YarnScaling`, which changes the frequencies for longer contexts.
    """

    def __init__(self, dim, base=10000.0, scaling=None):
        super().__init__()
        self.dim, self.base, self.scaling = dim, base, scaling
        # This is not a buffer: a cast of the model to BF16 would round a buffer, and the angles of
        # far positions would be quite wrong.
        source = inverse_frequencies if scaling is None else scaling.inverse_frequencies
        self.inv_freq = source(dim, base)
        self.magnitude = 1.0 if scaling is None else scaling.cos_sin_factor

    def angles(self, positions):
        return positions.unsqueeze(-1).float() * self.inv_freq.to(positions.device)

    def forward(self, positions):
        angles = self.angles(positions)
        return angles.cos() * self.magnitude, angles.sin() * self.magnitude

    def rotations(self, positions):
        """Returns the same as complex numbers cos + j sin, (..., T, dim/2)."""
        angles = self.angles(positions)
        return torch.polar(torch.full_like(angles, self.magnitude), angles)


def similarity_bound(distance, thetas):
    """RoFormer's bound on a score (equation 37), up to a factor that is equal at all distances.

    It is the mean size of the partial sums of e^(j·distance·θ_i).
    """
    rotations = torch.polar(torch.ones_like(thetas), distance * thetas)
    return rotations.cumsum(0).abs().mean().item()


# %% Why MLA must decouple: absorption needs one fixed matrix, and a rotation is in its way
def rotated_content_scores(q_BHTN, latent_BSC, w_uk_HNC, rotate):
    """Rebuilds all keys and rotates the content itself: R_i q · R_j (W_UK c_j).

    rotate(x) rotates x (..., T, width) by positions 0 … T − 1. Returns: scores (B, H, T, S).
    """
    k_BHSN = latent_BSC.unsqueeze(1) @ w_uk_HNC.transpose(-2, -1)
    return rotate(q_BHTN) @ rotate(k_BHSN).transpose(-2, -1)


def absorbed_content_scores(q_BHTN, latent_BSC, w_uk_HNC, rotate):
    """Tries to absorb: W_UK moves to the query, and latents are rotated: R_i W_UKᵀ q · R_j c_j.

    The scores are equal if `rotate` changes nothing. Otherwise they differ: R_j W_UK ≠ W_UK R_j.
    """
    return rotate(q_BHTN @ w_uk_HNC) @ rotate(latent_BSC.unsqueeze(1)).transpose(-2, -1)


def absorbed_by_distance(q_BHTN, latent_BSC, w_uk_HNC):
    """Absorbs exactly, by a matrix R_(j−i) W_UK for each distance: more work than rebuilding."""
    T, S, thetas = q_BHTN.shape[2], latent_BSC.shape[1], inverse_frequencies(q_BHTN.shape[-1])
    scores_BHTS = q_BHTN.new_zeros(*q_BHTN.shape[:3], S)
    for i in range(T):
        for j in range(S):
            w_HNC = rotation_matrix(j - i, thetas.to(w_uk_HNC)) @ w_uk_HNC
            absorbed_BHC = torch.einsum("bhn,hnc->bhc", q_BHTN[:, :, i], w_HNC)
            scores_BHTS[..., i, j] = torch.einsum("bhc,bc->bh", absorbed_BHC, latent_BSC[:, j])
    return scores_BHTS


# %% Decoupled RoPE: phase 4's attention, where only the position parts are rotated
class RotaryLatentAttention(MultiHeadLatentAttention):
    """The attention of DeepSeek-V2 and V3: q_R and k_R are rotated, k_R before it is cached.

    The content parts q_C and k_C are not rotated, so phase 4's absorption still works. `rotary` is
    a `RotaryEmbedding` of width R; layers may share one. If it has YaRN scaling, this also sharpens
    the softmax of the layer. The other arguments are those of `MultiHeadLatentAttention`.
    """

    def __init__(self, *args, rotary, **kwargs):
        super().__init__(*args, **kwargs)
        R = self.qk_rope_head_dim
        require(rotary.dim == R, f"rotary dim={rotary.dim} must equal qk_rope_head_dim={R}")
        self.rotary = rotary
        if rotary.scaling is not None:
            self.softmax_scale *= rotary.scaling.softmax_factor

    def rotate(self, x, positions):
        """Rotates queries (B, H, T, R) or keys (B, T, R) by their positions, (T,) or (B, T)."""
        check_positions(positions, x.shape[0], x.shape[-2])
        rotations = self.rotary.rotations(positions)
        return rotate_complex(x, rotations if x.dim() == 3 else rotations.unsqueeze(-3))


# %% Longer contexts: three ways to change the frequencies
def position_interpolation(thetas, factor):
    """Slows all pairs by `factor`: positions fit into the old range (arXiv:2306.15595)."""
    return thetas / factor


def ntk_aware(dim, base, factor):
    """Takes a larger base: the fastest pair keeps its speed, the slowest is slowed by `factor`.

    The slowest pair's θ is base^(−(R−2)/R). If the base is factor^(R/(R−2)) times as large, this θ
    is divided by the factor (YaRN, section 3.1).
    """
    require(dim >= 4, f"NTK-aware scaling needs 2 or more pairs, got rotary dim={dim}")
    return inverse_frequencies(dim, base * factor ** (dim / (dim - 2)))


@dataclass(frozen=True)
class YarnScaling:
    """YaRN: fast pairs keep their speed, slow pairs are slowed by `factor`.

    `factor` s is the new length divided by `original_max_position_embeddings`. A pair that rotates
    more than `beta_fast` times within the original length keeps its speed. A pair that rotates less
    than `beta_slow` times is slowed by s. A linear ramp joins the two. Both betas count full
    circles, not pairs. `mscale` and `mscale_all_dim` correct the softmax's temperature; None or 0:
    not given.
    """

    factor: float = setting(at_least=1)
    original_max_position_embeddings: int = setting(at_least=1)
    beta_fast: float = 32.0
    beta_slow: float = setting(1.0, above=0)
    mscale: float | None = None
    mscale_all_dim: float | None = None

    def __post_init__(self):
        check_settings(self, whose="YaRN ")
        fast, slow = self.beta_fast, self.beta_slow
        require(fast > slow, f"beta_fast={fast} must be above beta_slow={slow}")

    def ramp_ends(self, dim, base):
        """Returns (low, high): pairs up to `low` keep their speed, pairs from `high` on are slowed.

        Both stay within 0 and dim − 1, as in the released code. ValueError if this leaves no ramp.
        V3 has R = 64, base 10,000 and 4,096 tokens. In 4,096 tokens, pair 10.47 would rotate 32
        times and pair 22.51 once, so the ramp goes from pair 10 to pair 23.
        """
        length = self.original_max_position_embeddings

        def pair_with(circles):
            # θ_i · length = 2π · circles, solved for i
            return dim * math.log(length / (circles * 2 * math.pi)) / (2 * math.log(base))

        low = max(math.floor(pair_with(self.beta_fast)), 0)
        high = min(math.ceil(pair_with(self.beta_slow)), dim - 1)
        wanted = f"original_max_position_embeddings={length} gives YaRN no ramp"
        require(low < high, f"{wanted}: from pair {low} to {high}")
        return low, high

    def inverse_frequencies(self, dim, base):
        """Returns the changed frequencies (dim/2,), in radians per position."""
        thetas = inverse_frequencies(dim, base)
        low, high = self.ramp_ends(dim, base)
        pairs = torch.arange(dim // 2, dtype=torch.float32, device="cpu")
        ramp = ((pairs - low) / (high - low)).clamp(0, 1)
        return thetas / self.factor * ramp + thetas * (1 - ramp)

    def temperature(self, mscale):
        """Returns m = 0.1 · mscale · ln(factor) + 1."""
        return 0.1 * mscale * math.log(self.factor) + 1.0

    @property
    def softmax_factor(self):
        """The softmax scale is multiplied by this: m² with m from `mscale_all_dim`, or else 1."""
        return self.temperature(self.mscale_all_dim) ** 2 if self.mscale_all_dim else 1.0

    @property
    def cos_sin_factor(self):
        """Cos and sin are multiplied by this: 1 if mscale = mscale_all_dim, as in V2 and V3."""
        if self.mscale and self.mscale_all_dim:
            return self.temperature(self.mscale) / self.temperature(self.mscale_all_dim)
        return self.temperature(1.0)


# %% The demonstration
def check_three_forms(demo, dim):
    thetas, rotary = inverse_frequencies(dim).to(demo.device), RotaryEmbedding(dim)
    x_TR = torch.randn(7, dim, device=demo.device)
    positions_T = torch.tensor([0, 1, 2, 5, 100, 1000, 4095], device=demo.device)
    matrices_TRR = torch.stack([rotation_matrix(m, thetas) for m in positions_T])
    by_matrix_TR = (matrices_TRR @ x_TR.unsqueeze(-1)).squeeze(-1)
    real_TR = apply_rotary(x_TR, *rotary(positions_T))
    complex_TR = rotate_complex(x_TR, rotary.rotations(positions_T))
    demo.same("real-valued form = rotation matrices", "(T, R)", real_TR, by_matrix_TR)
    demo.same("complex numbers = rotation matrices", "(T, R)", complex_TR, by_matrix_TR)
    lengths_T = x_TR.norm(dim=-1)
    demo.same("a rotation keeps the length", "(T,)", real_TR.norm(dim=-1), lengths_T, 1e-4)

    query_R, key_R = torch.randn(2, dim, device=demo.device)
    shifts_T = torch.tensor([0, 3, 50, 2000], device=demo.device)
    q_TR = apply_rotary(query_R.expand(4, dim), *rotary(shifts_T + 12))
    k_TR = apply_rotary(key_R.expand(4, dim), *rotary(shifts_T + 5))
    scores_T = (q_TR * k_TR).sum(-1)
    figure = ", ".join(f"{score:.4f}" for score in scores_T.tolist())
    demo.check("score at (12, 5), (15, 8), (62, 55), (2012, 2005)", "one distance, 7", figure,
               scores_T.max() - scores_T.min() < 2e-3 * dim**0.5)
    near, far = similarity_bound(1, thetas), similarity_bound(512, thetas)
    demo.check("long-range decay: bound at 1 and 512 tokens", "", f"{near:.1f} → {far:.1f}",
               far < near)


def show_why_decoupled(demo, attention, x_BTD):
    """Shows that rotated content cannot be absorbed, but the decoupled form can."""
    q_BHTN, _ = attention.queries(x_BTD)
    memory = attention.remember(x_BTD, torch.arange(x_BTD.shape[1], device=demo.device))
    latent_BSC, _ = attention.split_memory(memory)
    w_uk_HNC, _ = attention.up_projections(torch.float32)
    parts = (q_BHTN, latent_BSC, w_uk_HNC)

    def rotate(x):
        positions = torch.arange(x.shape[-2], device=demo.device)
        return rotate_complex(x, RotaryEmbedding(x.shape[-1]).rotations(positions))

    def keep(x):
        return x

    rebuilt, absorbed = rotated_content_scores(*parts, keep), absorbed_content_scores(*parts, keep)
    demo.same("content not rotated: absorbed = rebuilt", "(B, H, T, S)", absorbed, rebuilt)
    wanted, got = rotated_content_scores(*parts, rotate), absorbed_content_scores(*parts, rotate)
    mismatch = ((got - wanted).norm() / wanted.norm()).item()
    demo.check("content rotated: absorbed is another function", "(B, H, T, S)",
               f"off by {mismatch:.0%} of the scores", mismatch > 0.1)
    demo.same("content rotated: matrix per distance = rebuilt", "(B, H, T, S)",
              absorbed_by_distance(*parts), wanted)
    expanded, absorbed = attention(x_BTD), attention(x_BTD, path="absorbed")
    demo.same("decoupled RoPE: absorbed = expanded", "(B, T, D)", absorbed, expanded)


def check_decoupled(demo, attention, x_BTD):
    naive, positions_T = attention(x_BTD, path="naive"), torch.arange(9, device=demo.device)
    demo.same("decoupled RoPE: expanded = head by head", "(B, T, D)", attention(x_BTD), naive)
    cache = LatentCache()
    pieces = [attention(part, cache=cache) for part in x_BTD.split([4, 1, 3, 1], dim=1)]
    demo.same("uneven chunks = one pass", "(B, T, D)", torch.cat(pieces, 1), naive)
    moved = attention(x_BTD, positions=positions_T + 500)
    demo.same("all tokens 500 later: same outputs", "(B, T, D)", moved, naive, 1e-4)
    swapped = attention(x_BTD[:, [1, 0, *range(2, 9)]])
    change = (swapped - naive)[:, -1].abs().max().item()
    demo.check("two early tokens swapped: the last output differs", "(B, D)", f"by {change:.3f}",
               change > 1e-4)


def show_scaling(demo, dim, factor, original_length):
    yarn = YarnScaling(factor, original_length, mscale=1.0, mscale_all_dim=1.0)
    thetas = inverse_frequencies(dim)
    scaled = {
        "as trained": thetas,
        "interpolated": position_interpolation(thetas, factor),
        "NTK-aware": ntk_aware(dim, 10000.0, factor),
        "YaRN": yarn.inverse_frequencies(dim, 10000.0),
    }
    demo.note(f"circles within {original_length} tokens, fastest, middle and slowest pair:")
    for name, frequencies in scaled.items():
        circles = frequencies * original_length / (2 * math.pi)
        demo.note(f"  {name:<13} {circles[0]:9.2f} {circles[dim // 4]:9.3f} {circles[-1]:9.4f}")
    low, high = yarn.ramp_ends(dim, 10000.0)
    kept = torch.allclose(scaled["YaRN"][: low + 1], thetas[: low + 1])
    slowed = torch.allclose(scaled["YaRN"][high:], thetas[high:] / factor)
    demo.check("YaRN keeps the fast pairs, slows the slow pairs", f"ramp from pair {low} to {high}",
               f"score scale × {yarn.softmax_factor:.4f}", kept and slowed)
    v3 = YarnScaling(40, 4096, mscale=1.0, mscale_all_dim=1.0)
    ends, scale = v3.ramp_ends(64, 10000.0), 192**-0.5 * v3.softmax_factor
    demo.check("V3's published ramp and softmax scale", "R 64", f"{ends}, {scale:.10f}",
               ends == (10, 23) and abs(scale - 0.1352337789) < 1e-10)


@demonstration(__doc__, flag("dim", 64, "rotary width R", at_least=4),
               flag("factor", 40.0, "new context / trained context"),
               flag("original-length", 4096, "trained context, in tokens"))
def main(demo, arguments):
    check_three_forms(demo, arguments.dim)
    sizes = dict(kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16)
    attention = RotaryLatentAttention(
        64, 4, **sizes, q_lora_rank=24, rotary=RotaryEmbedding(8)
    ).to(demo.device)
    x_BTD = torch.randn(2, 9, 64, device=demo.device)
    with torch.no_grad():
        show_why_decoupled(demo, attention, x_BTD)
        check_decoupled(demo, attention, x_BTD)
    show_scaling(demo, arguments.dim, arguments.factor, arguments.original_length)
    demo.finish("--factor 8 --original-length 512: which pairs does YaRN slow now?",
                "--dim 32: fewer pairs, the same range of speeds")


if __name__ == "__main__":
    main()

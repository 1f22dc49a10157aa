"""Phase 7: rotations, scaling, and the attention DeepSeek uses."""

import dataclasses
import math

import pytest
import torch

from mla_coded import LatentCache
from rope_coded import (
    RotaryEmbedding,
    RotaryLatentAttention,
    YarnScaling,
    absorbed_by_distance,
    absorbed_content_scores,
    apply_rotary,
    inverse_frequencies,
    ntk_aware,
    position_interpolation,
    rotate_complex,
    rotated_content_scores,
    rotation_matrix,
    similarity_bound,
)

POSITIONS = torch.tensor([0, 1, 7, 100, 4095])


def build(scaling=None, **changes):
    sizes = dict(
        hidden_size=32, num_attention_heads=4, kv_lora_rank=12, qk_nope_head_dim=8,
        qk_rope_head_dim=8, v_head_dim=6, q_lora_rank=10,
    )
    return RotaryLatentAttention(**{**sizes, **changes}, rotary=RotaryEmbedding(8, scaling=scaling))


def test_three_forms_are_one_rotation():
    x, thetas = torch.randn(5, 16), inverse_frequencies(16)
    matrices = torch.stack(
        [rotation_matrix(m, thetas) @ row for m, row in zip(POSITIONS, x, strict=True)]
    )
    # angles up to 4095 rad in float32: their rounding is about 2e-4
    rotary = RotaryEmbedding(16)
    in_complex = rotate_complex(x, rotary.rotations(POSITIONS))
    torch.testing.assert_close(in_complex, matrices, rtol=0, atol=1e-3)
    real = apply_rotary(x, *rotary(POSITIONS))
    torch.testing.assert_close(real, matrices, rtol=0, atol=1e-3)


def test_rotation_by_hand():
    # one pair, θ = 1: a quarter of a circle takes (1, 0) to (0, 1)
    quarter = torch.tensor([[math.pi / 2]])
    rotated = apply_rotary(torch.tensor([[1.0, 0.0]]), quarter.cos(), quarter.sin())
    torch.testing.assert_close(rotated, torch.tensor([[0.0, 1.0]]))


def test_four_numbers_rotated_by_hand():
    """The example in the docstring of `apply_rotary`."""
    x, thetas = torch.tensor([[1.0, 2.0, 3.0, 4.0]]), inverse_frequencies(4, base=100.0)
    torch.testing.assert_close(thetas, torch.tensor([1.0, 0.1]))
    rotary, position = RotaryEmbedding(4, base=100.0), torch.tensor([3])
    wanted = torch.tensor([[-1.27, -1.84, 1.68, 4.71]])  # two digits, as the docstring has them
    for rotated in (apply_rotary(x, *rotary(position)),
                    rotate_complex(x, rotary.rotations(position)),
                    x @ rotation_matrix(3, thetas).T):
        torch.testing.assert_close(rotated, wanted, rtol=0, atol=0.005)


def test_pairs_are_neighbours():
    x = torch.zeros(1, 8)
    x[0, 2] = 1.0
    rotated = apply_rotary(x, *RotaryEmbedding(8)(torch.tensor([3])))
    assert rotated[0].nonzero().flatten().tolist() == [2, 3]


def test_rotations_are_orthogonal_and_add_up():
    thetas = inverse_frequencies(8).double()
    one, two = rotation_matrix(5, thetas), rotation_matrix(9, thetas)
    torch.testing.assert_close(one.T @ one, torch.eye(8).double())
    torch.testing.assert_close(one @ two, rotation_matrix(14, thetas))


def test_score_depends_on_relative_position_only():
    q, k, rotary = torch.randn(2, 1, 16).unbind(0) + (RotaryEmbedding(16),)
    scores = [
        (apply_rotary(q, *rotary(torch.tensor([m]))) * apply_rotary(k, *rotary(torch.tensor([n]))))
        .sum().item() for m, n in ((7, 0), (12, 5), (1007, 1000))
    ]
    assert scores == pytest.approx([scores[0]] * 3, abs=1e-3)


def test_long_range_decay():
    thetas = inverse_frequencies(64)
    near = sum(similarity_bound(d, thetas) for d in range(1, 20))
    far = sum(similarity_bound(d, thetas) for d in range(1000, 1019))
    assert far < 0.5 * near


def test_similarity_bound_by_hand():
    # The first partial sum has size 1; the second is |e^jd + e^(jd/2)| = 2 |cos(d/4)|.
    thetas = torch.tensor([1.0, 0.5])
    for d in (0, 2, 3 * math.pi):
        wanted = (1 + 2 * abs(math.cos(d / 4))) / 2
        assert similarity_bound(d, thetas) == pytest.approx(wanted, abs=1e-6)


def test_scalings_change_the_frequencies_they_should():
    thetas = inverse_frequencies(16)
    torch.testing.assert_close(position_interpolation(thetas, 4), thetas / 4)
    aware = ntk_aware(16, 10000.0, 4)
    assert aware[0] == 1.0 and aware[-1].item() == pytest.approx(thetas[-1].item() / 4, rel=1e-5)


def test_yarn_published_numbers():
    v3 = YarnScaling(40, 4096, 32, 1, mscale=1.0, mscale_all_dim=1.0)
    v2 = YarnScaling(40, 4096, 32, 1, mscale=0.707, mscale_all_dim=0.707)
    assert v3.ramp_ends(64, 10000.0) == (10, 23)
    circles = [4096 * 10000.0 ** (-2 * pair / 64) / (2 * math.pi) for pair in (10.47, 22.51)]
    assert circles == pytest.approx([32, 1], rel=1e-3)
    assert v3.temperature(1.0) == pytest.approx(1.3688879454, abs=1e-10)
    assert v2.temperature(0.707) == pytest.approx(1.2608037774, abs=1e-10)
    assert 192**-0.5 * v3.softmax_factor == pytest.approx(0.1352337789, abs=1e-10)
    assert 192**-0.5 * v2.softmax_factor == pytest.approx(0.1147213868, abs=1e-10)
    assert v3.cos_sin_factor == v2.cos_sin_factor == 1.0


def test_yarn_keeps_fast_pairs_and_slows_the_slow_ones():
    yarn, thetas = YarnScaling(40, 4096), inverse_frequencies(64)
    scaled = yarn.inverse_frequencies(64, 10000.0)
    torch.testing.assert_close(scaled[:11], thetas[:11])
    torch.testing.assert_close(scaled[23:], thetas[23:] / 40)
    ratio = scaled / thetas
    assert (ratio.diff() <= 1e-7).all() and 1 / 40 < ratio[16] < 1


@pytest.mark.parametrize(("dim", "length", "ends"), [(64, 4, "0 to -1"), (8, 6, "0 to 0"),
                                                     (64, 10**12, "77 to 63")])
def test_yarn_refuses_an_original_length_that_leaves_no_ramp(dim, length, ends):
    # In 6 tokens or fewer (2π · beta_slow), not even the fastest pair turns beta_slow circles. The
    # released code then slows all pairs but the first, or, where the ends cross, none.
    wanted = f"original_max_position_embeddings={length} gives YaRN no ramp: from pair {ends}"
    with pytest.raises(ValueError, match=wanted):
        RotaryEmbedding(dim, scaling=YarnScaling(40, length))


@pytest.mark.parametrize("dim", [4, 8, 64, 128])
def test_yarn_slows_the_slowest_pair_from_seven_tokens_on(dim):
    ratio = YarnScaling(40, 7).inverse_frequencies(dim, 10000.0) / inverse_frequencies(dim)
    assert ratio[0] == 1 and ratio[-1].item() == pytest.approx(1 / 40)


@pytest.mark.comparison
@pytest.mark.parametrize("mscales", [(1.0, 1.0), (0.707, 0.707), (1.0, 0.5), (None, None)])
def test_yarn_matches_transformers(mscales):
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3RotaryEmbedding

    settings = dict(
        rope_type="yarn", rope_theta=10000.0, factor=8.0, beta_fast=32, beta_slow=1,
        original_max_position_embeddings=128, mscale=mscales[0], mscale_all_dim=mscales[1],
    )
    settings = {key: value for key, value in settings.items() if value is not None}
    config = DeepseekV3Config(
        qk_rope_head_dim=32, max_position_embeddings=1024, rope_parameters=settings
    )
    cos, sin = DeepseekV3RotaryEmbedding(config)(torch.zeros(1), POSITIONS[None])
    scaling = YarnScaling(8.0, 128, mscale=mscales[0], mscale_all_dim=mscales[1])
    ours = RotaryEmbedding(32, scaling=scaling)(POSITIONS[None])
    torch.testing.assert_close(ours[0], cos[..., :16], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours[1], sin[..., :16], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mscales", [(1.0, 0.5), (None, None), (1.0, 1.0)])
def test_complex_rotations_are_cos_and_sin_of_a_scaled_embedding(mscales):
    rotary = RotaryEmbedding(8, scaling=YarnScaling(8.0, 128, 32.0, 1.0, *mscales))
    positions = torch.tensor([[0, 1, 40], [7, 8, 9]])
    torch.testing.assert_close(rotary.rotations(positions), torch.complex(*rotary(positions)))


def test_yarn_sharpens_the_softmax_of_the_layer():
    yarn = YarnScaling(40, 4096, mscale=1.0, mscale_all_dim=1.0)
    plain, scaled = build(), build(yarn)
    ratio = scaled.softmax_scale / plain.softmax_scale
    assert ratio == pytest.approx((0.1 * math.log(40) + 1) ** 2)


@pytest.mark.parametrize("path", ["expanded", "absorbed", "naive"])
@pytest.mark.parametrize("chunks", [[9], [1] * 9, [4, 3, 1, 1]])
def test_rotated_chunks_match_one_pass(path, chunks):
    attention, x, cache = build(), torch.randn(2, 9, 32), LatentCache()
    with torch.no_grad():
        pieces = [attention(part, cache=cache, path=path) for part in x.split(chunks, dim=1)]
        naive = attention(x, path="naive")
    torch.testing.assert_close(torch.cat(pieces, 1), naive, rtol=1e-4, atol=1e-5)


def test_cache_holds_the_rotated_key():
    attention, cache, x = build(), LatentCache(), torch.randn(1, 5, 32)
    attention(x, cache=cache)
    plain = x @ attention.kv_a_proj_with_mqa.weight[12:].T
    expected = apply_rotary(plain, *attention.rotary(torch.arange(5)))
    memory = cache.append(torch.empty(1, 0, 20))
    torch.testing.assert_close(memory[..., 12:], expected)
    assert memory.shape == (1, 5, 12 + 8)


def test_only_distances_matter_and_order_does():
    attention, x = build(), torch.randn(1, 6, 32)
    shifted = attention(x, positions=torch.arange(6) + 300)
    torch.testing.assert_close(shifted, attention(x), rtol=1e-3, atol=1e-4)
    swapped = attention(x[:, [1, 0, 2, 3, 4, 5]])
    assert (swapped[:, -1] - attention(x)[:, -1]).abs().max() > 1e-4


def test_positions_may_differ_from_row_to_row():
    attention, x = build(), torch.randn(2, 4, 32)
    positions = torch.stack([torch.arange(4), torch.tensor([0, 5, 6, 20])])
    both = attention(x, positions=positions)
    for row in range(2):
        alone = attention(x[row : row + 1], positions=positions[row])
        torch.testing.assert_close(both[row : row + 1], alone)


def test_angles_stay_float32_for_half_precision_inputs():
    x, far = torch.randn(1, 8).bfloat16(), torch.tensor([100_001])
    cos, sin = RotaryEmbedding(8).bfloat16()(far)
    assert torch.equal(torch.stack([cos, sin]), torch.stack(RotaryEmbedding(8)(far)))
    assert cos.dtype == torch.float32
    in_float32 = apply_rotary(x.float(), cos, sin)
    for rotated in (apply_rotary(x, cos, sin), rotate_complex(x, torch.complex(cos, sin))):
        # The sums are made in FP32 and rounded once, to 8 bits.
        torch.testing.assert_close(rotated, in_float32.bfloat16(), rtol=2**-8, atol=0)


def test_tables_are_float32_on_the_cpu_whatever_the_default():
    yarn = YarnScaling(40, 4096)
    wanted = RotaryEmbedding(64), RotaryEmbedding(64, scaling=yarn)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            got = RotaryEmbedding(64), RotaryEmbedding(64, scaling=yarn)
    finally:
        torch.set_default_dtype(before)
    for ours, plain in zip(got, wanted, strict=True):
        assert torch.equal(ours.inv_freq, plain.inv_freq)
        assert ours.inv_freq.dtype == torch.float32


def test_every_parameter_gets_a_gradient():
    attention = build()
    attention(torch.randn(2, 5, 32)).square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in attention.parameters())


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="rotary dim=7 must be even"):
        RotaryEmbedding(7)
    with pytest.raises(ValueError, match="rotary dim=0 must be even and at least 2"):
        RotaryEmbedding(0)
    with pytest.raises(ValueError, match="rotary dim=8 must equal qk_rope_head_dim=4"):
        build(qk_rope_head_dim=4)
    with pytest.raises(ValueError, match="YaRN factor=0.5 must be at least 1"):
        YarnScaling(0.5, 4096)
    with pytest.raises(ValueError, match="YaRN beta_slow=0 must be a number above 0"):
        YarnScaling(2, 4096, beta_slow=0)
    with pytest.raises(ValueError, match="original_max_position_embeddings=0"):
        YarnScaling(2, 0)
    with pytest.raises(ValueError, match="beta_fast=1 must be above beta_slow=32"):
        YarnScaling(2, 4096, beta_fast=1, beta_slow=32)
    with pytest.raises(ValueError, match="beta_fast=1 must be above beta_slow=1"):
        YarnScaling(2, 4096, beta_fast=1, beta_slow=1)
    with pytest.raises(ValueError, match="rotary base=1 must be above 1"):
        RotaryEmbedding(8, base=1)
    with pytest.raises(ValueError, match=r"positions must be \(5,\) or \(1, 5\), got \(1,\)"):
        build()(torch.ones(1, 5, 32), positions=torch.tensor([3]))
    with pytest.raises(ValueError, match=r"positions must be \(5,\) or \(2, 5\), got \(3, 5\)"):
        build()(torch.ones(2, 5, 32), positions=torch.zeros(3, 5))
    with pytest.raises(ValueError, match="2 or more pairs"):
        ntk_aware(2, 1e4, 2)


@pytest.mark.integration
def test_script(check_script):
    check_script("rope_coded.py", ["--dim", 7], "rotary dim=7")


def test_complex_rotations_are_exact_in_float64_and_follow_positions_changed_in_place():
    x = torch.randn(1, 2, 5, 8, dtype=torch.float64, requires_grad=True)
    rotary, positions = RotaryEmbedding(8), torch.arange(5)
    before = rotary.rotations(positions)
    assert torch.autograd.gradcheck(lambda x: rotate_complex(x, before), [x])
    positions += 3
    torch.testing.assert_close(rotary.rotations(positions)[:2], before[3:])


def test_rotated_attention_trains_after_inference_on_the_same_positions():
    attention, x, positions = build(), torch.randn(1, 5, 32), torch.arange(5)
    with torch.inference_mode():
        attention(x, positions)
    attention(x, positions).sum().backward()
    assert attention.o_proj.weight.grad.norm() > 0


def test_slices_at_odd_places_and_transposed_tensors_are_rotated():
    rotations = torch.polar(torch.ones(5, 4), torch.rand(5, 4))
    for part in (torch.randn(1, 5, 27)[..., 19:], torch.randn(1, 8, 5).transpose(1, 2)):
        rotated = rotate_complex(torch.tensor(part.tolist()), rotations)
        torch.testing.assert_close(rotate_complex(part, rotations), rotated)


def rotated_content(T=5, S=5, N=6, C=8):
    """Queries, latents and W_UK of two heads in float64, and a rotation by positions 0, 1, …"""

    def rotate(x):
        rotary = RotaryEmbedding(x.shape[-1])
        return rotate_complex(x, rotary.rotations(torch.arange(x.shape[-2])))

    shapes = ((3, 2, T, N), (3, S, C), (2, N, C))
    return [torch.randn(shape, dtype=torch.float64) for shape in shapes], rotate


def test_rotated_content_matches_the_equation():
    (q, latent, w_uk), rotate = rotated_content()
    got, thetas = rotated_content_scores(q, latent, w_uk, rotate), inverse_frequencies(6).double()
    for i, j in ((0, 0), (3, 1), (1, 4)):
        key = rotation_matrix(j, thetas) @ w_uk[1] @ latent[2, j]
        wanted = (rotation_matrix(i, thetas) @ q[2, 1, i]) @ key
        # the angles have FP32's rounding
        torch.testing.assert_close(got[2, 1, i, j], wanted, rtol=0, atol=1e-5)


def test_content_that_is_rotated_cannot_be_absorbed():
    parts, rotate = rotated_content()
    rebuilt, absorbed = (
        scores(*parts, lambda x: x) for scores in (rotated_content_scores, absorbed_content_scores)
    )
    torch.testing.assert_close(absorbed, rebuilt)  # without rotation, W_UK may move
    wanted = rotated_content_scores(*parts, rotate)
    mismatch = absorbed_content_scores(*parts, rotate) - wanted
    assert mismatch.norm() > 0.3 * wanted.norm()
    # at position 0 nothing is rotated
    torch.testing.assert_close(mismatch[..., 0, 0], torch.zeros(3, 2).double())


def test_rotated_content_is_absorbed_by_a_matrix_for_each_distance():
    parts, rotate = rotated_content(T=4, S=6)
    wanted = rotated_content_scores(*parts, rotate)
    # the angles have FP32's rounding
    torch.testing.assert_close(absorbed_by_distance(*parts), wanted, rtol=0, atol=1e-5)


def test_decoupled_scores_are_absorbed_with_the_rotated_part_beside_them():
    attention, x = build(), torch.randn(2, 7, 32)
    with torch.no_grad():
        expanded = attention(x)
        # a function of order, and yet the latents are all that the content needs
        torch.testing.assert_close(attention(x, path="absorbed"), expanded, rtol=1e-4, atol=1e-5)
        attention.rotary = RotaryEmbedding(8, base=3.0)
        assert (attention(x) - expanded).abs().max() > 1e-4


def test_in_bf16_two_positions_would_be_one():
    assert torch.tensor([256.0, 257.0]).bfloat16().unique().numel() == 1


def test_yarn_without_a_softmax_correction():
    assert YarnScaling(40, 4096).softmax_factor == 1
    only_one = YarnScaling(40, 4096, mscale=0.7).cos_sin_factor
    assert only_one == pytest.approx(0.1 * math.log(40) + 1)
    for not_given in (dict(mscale=0.0, mscale_all_dim=0.7), dict(mscale_all_dim=0.7)):
        assert YarnScaling(40, 4096, **not_given).cos_sin_factor == only_one


def test_a_scaling_keeps_the_values_that_were_checked():
    yarn = YarnScaling(40, 4096)
    with pytest.raises(dataclasses.FrozenInstanceError):
        yarn.factor = 0.5


def test_smallest_sizes_work():
    assert RotaryEmbedding(2)(torch.tensor([1]))[0].shape == (1, 1)
    torch.testing.assert_close(ntk_aware(4, 100.0, 1.0), inverse_frequencies(4, 100.0))
    same = YarnScaling(1, 4096).inverse_frequencies(64, 10000.0)
    torch.testing.assert_close(same, inverse_frequencies(64))


def test_yarn_ramp_by_hand():
    # R 8, base 100: θ = 1, .316228, .1, .0316228. 100 tokens: pair 0 … 3 rotate 15.9 to 0.5 times.
    thetas = YarnScaling(4, 100).inverse_frequencies(8, 100.0)
    low, high = YarnScaling(4, 100).ramp_ends(8, 100.0)
    ramp = [min(max((i - low) / (high - low), 0), 1) for i in range(4)]
    wanted = [100 ** (-i / 4) * (1 - ramp[i] + ramp[i] / 4) for i in range(4)]
    torch.testing.assert_close(thetas, torch.tensor(wanted))
    torch.testing.assert_close(thetas, torch.tensor([1, 0.23717, 0.05, 0.0079057]))

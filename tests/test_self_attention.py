"""Phase 1: the attention function and the single head."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from self_attention_coded import (
    SelfAttention,
    scaled_dot_product_attention,
    self_attention_loops,
    softmax_health,
)


def random_qkv(T=5, S=7, K=8, V=6):
    return torch.randn(2, 3, T, K), torch.randn(2, 3, S, K), torch.randn(2, 3, S, V)


def test_batched_module_matches_explicit_loops():
    attention, x = SelfAttention(10, 6), torch.randn(2, 4, 10)
    weights = (attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight)
    for b in range(2):
        expected, _ = self_attention_loops(x[b], *weights)
        torch.testing.assert_close(attention(x)[b], expected)


@pytest.mark.parametrize("sign", [1, -1])
def test_scores_beyond_the_range_of_exp_are_no_problem(sign):
    x, same = 20 * torch.eye(3, 4), torch.eye(4)
    output, weights = self_attention_loops(x, sign * same, same, same)
    # The scores are ±200 on the diagonal and 0 elsewhere.
    expected = torch.eye(3) if sign == 1 else (1 - torch.eye(3)) / 2
    torch.testing.assert_close(weights, expected)
    torch.testing.assert_close(output, expected @ x)


def test_module_uses_its_mask():
    attention, x = SelfAttention(6, 4), torch.randn(1, 5, 6)
    mask = torch.tensor([True, True, True, False, False])
    torch.testing.assert_close(attention(x, mask)[:, :3], attention(x[:, :3]))


def test_attention_matches_numpy_in_float64():
    q, k, v = (t.double().numpy() for t in random_qkv())
    scores = q @ np.swapaxes(k, -2, -1) / np.sqrt(8)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    output, got = scaled_dot_product_attention(*map(torch.from_numpy, (q, k, v)))
    np.testing.assert_allclose(output.numpy(), weights @ v, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(got.numpy(), weights, rtol=1e-12)


@pytest.mark.comparison
@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_matches_pytorch(scale, masked):
    q, k, v = random_qkv()
    mask = torch.rand(5, 7) > 0.4 if masked else None
    if masked:
        mask[:, 0] = True
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    torch.testing.assert_close(scaled_dot_product_attention(q, k, v, mask, scale)[0], expected)


def test_weights_are_a_distribution_over_the_allowed_keys():
    q, k, v = random_qkv()
    mask = torch.rand(5, 7) > 0.5
    mask[:, 2] = True
    _, weights = scaled_dot_product_attention(q, k, v, mask)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3, 5))
    assert (weights.masked_select(~mask.expand_as(weights)) == 0).all()


def test_fully_masked_row_gives_zeros_and_finite_gradients():
    q, k, v = (t.requires_grad_() for t in random_qkv())
    mask = torch.ones(5, 7, dtype=torch.bool)
    mask[3] = False
    output, weights = scaled_dot_product_attention(q, k, v, mask)
    assert (output[..., 3, :] == 0).all() and (weights[..., 3, :] == 0).all()
    output.square().sum().backward()
    assert all(t.grad.isfinite().all() for t in (q, k, v))


def test_gradients_match_finite_differences():
    q, k, v = (t[0, 0].double().requires_grad_() for t in random_qkv())
    mask = torch.rand(5, 7) > 0.3
    mask[2] = False
    function = lambda q, k, v: scaled_dot_product_attention(q, k, v, mask)[0]  # noqa: E731
    assert torch.autograd.gradcheck(function, (q, k, v))


def test_permuted_tokens_give_permuted_outputs():
    attention, x, order = SelfAttention(6, 6), torch.randn(1, 5, 6), torch.randperm(5)
    torch.testing.assert_close(attention(x[:, order]), attention(x)[:, order])


def test_every_parameter_gets_a_gradient():
    attention = SelfAttention(6, 4, bias=True)
    attention(torch.randn(2, 5, 6)).square().sum().backward()
    # A bias on the keys adds the same number to all scores of a query, so its gradient is zero.
    graded = {n for n, p in attention.named_parameters() if p.grad.abs().max() > 1e-6}
    assert graded == {n for n, _ in attention.named_parameters()} - {"k_proj.bias"}


@pytest.mark.parametrize("bias", [True, False])
def test_all_projections_have_a_bias_or_none(bias):
    names = {f"{name}_proj.{kind}" for name in "qkv" for kind in ["weight"] + ["bias"] * bias}
    assert {name for name, _ in SelfAttention(6, 4, bias=bias).named_parameters()} == names


def test_dropout_drops_weights_and_keeps_their_mean():
    q, k, v = torch.zeros(4000, 1, 4), torch.zeros(4000, 5, 4), torch.ones(4000, 5, 1)
    output, weights = scaled_dot_product_attention(q, k, v, dropout_p=0.4)
    # 20,000 weights: the standard error of the share is 0.0035, of the mean 0.0058
    assert abs((weights == 0).float().mean() - 0.4) < 0.02
    assert abs(output.mean() - 1) < 0.03


def test_scale_by_root_of_width_keeps_the_softmax_soft():
    sharp, sharp_gradient = softmax_health(1024, scale=1.0)
    soft, soft_gradient = softmax_health(1024, scale=1024**-0.5)
    assert sharp > 0.9 and soft < 0.3 and soft_gradient > 3 * sharp_gradient


def test_health_of_equal_weights_by_hand():
    # Scale 0: four weights of 1/4. The gradient at a score is (u − mean of u) / 4, where the four u
    # have variance 1. The norm of u − mean has a chi distribution with 3 degrees: mean 1.596.
    weight, gradient = softmax_health(8, scale=0.0, queries=4000, keys=4)
    assert weight == 0.25
    assert gradient == pytest.approx(1.596 / 4, rel=0.05)  # five standard errors are 0.033


def test_health_depends_on_its_seed_only():
    first, other = softmax_health(4, 1.0), softmax_health(4, 1.0, seed=1)
    assert first == softmax_health(4, 1.0, seed=0) != other


MISTAKES = [
    (lambda: scaled_dot_product_attention(torch.ones(2, 3), torch.ones(2, 4), torch.ones(2, 4)),
     "query width 3 must equal key width 4"),
    (lambda: scaled_dot_product_attention(torch.ones(2, 3), torch.ones(2, 3), torch.ones(5, 4)),
     "got 2 keys for 5 values"),
    (lambda: scaled_dot_product_attention(*[torch.ones(2, 2)] * 3, mask=torch.ones(2, 2)),
     "mask must be boolean"),
    (lambda: scaled_dot_product_attention(*[torch.ones(2, 2)] * 3, mask=torch.ones(3, 2) > 0),
     r"mask must be broadcastable to \(2, 2\), got \(3, 2\)"),
    (lambda: scaled_dot_product_attention(*[torch.ones(2)] * 3), "must each be"),
    (lambda: SelfAttention(4, 2)(torch.ones(2, 5)), r"be \(..., T, 4\), got \(2, 5\)"),
    (lambda: SelfAttention(0, 2), "d_in=0 must be at least 1"),
    (lambda: SelfAttention(2, 0), "d_out=0 must be at least 1"),
]


@pytest.mark.parametrize(("call", "message"), MISTAKES)
def test_mistakes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.integration
def test_script(check_script):
    check_script("self_attention_coded.py", ["--d-k", 1], "--d-k=1")

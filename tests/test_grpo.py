"""Phase 9: group relative policy optimisation."""

import functools
import math
import warnings
from dataclasses import asdict

import pytest
import torch

import grpo_coded
from grpo_coded import (
    CURVES,
    END,
    VARIANTS,
    Rollout,
    Settings,
    Task,
    add_loads,
    addition_prompts,
    answers,
    averaged,
    clipped_gain,
    clipped_loss,
    collect,
    completion_mask,
    decode,
    descend,
    encode,
    exact_match,
    fixed_logprobs,
    group_advantages,
    grpo_loss,
    grpo_step,
    has_signal,
    judged,
    k3,
    move_routing_bias,
    naive_grpo_loss,
    overlong_penalty,
    policy_optimizer,
    rate_of,
    reinforce_loss,
    roll_out,
    rollout_figures,
    sampled_accuracy,
    small_policy,
    sum_of,
    token_logprobs,
    train,
    update,
    warm_up,
)
from lesson.batches import drawn_from, joined, means
from moe_coded import MixtureOfExperts, Routed, Routing, SwitchRouter, sequence_balance_loss
from mtp_coded import Sampling
from pipeline.trainer import GRPOTrainer, checked_rewards

EVERY_VARIANT = pytest.mark.parametrize("variant", VARIANTS)


# Advantages
def test_advantages_by_hand():
    rewards = torch.tensor([1.0, 0.0, 0.0, 3.0, 5.0, 5.0, 5.0, 7.0])
    with_std = group_advantages(rewards, 4)
    root = math.sqrt(2)  # the sample variance of 1, 0, 0, 3 is 6/3; of 5, 5, 5, 7 it is 3/3
    wanted = torch.tensor([0, -1 / root, -1 / root, 2 / root, -0.5, -0.5, -0.5, 1.5])
    torch.testing.assert_close(with_std, wanted, atol=1e-5, rtol=0)  # the epsilon of the std
    plain = group_advantages(rewards, 4, normalize_std=False)
    assert plain.tolist() == [0, -1, -1, 2, -0.5, -0.5, -0.5, 1.5]


@pytest.mark.parametrize("normalize_std", [True, False])
@pytest.mark.parametrize("group_size", [1, 3, 6, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_rewards_give_exactly_zero(group_size, normalize_std, dtype):
    rewards = torch.full((42,), 0.1, dtype=dtype)  # whose mean may be another number
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns of the deviation of a single number
        assert group_advantages(rewards, group_size, normalize_std).tolist() == [0.0] * 42


def test_shifting_and_scaling_rewards_changes_nothing():
    rewards = torch.rand(12, dtype=torch.float64)
    advantages = group_advantages(rewards, 4)
    torch.testing.assert_close(group_advantages(rewards + 7, 4), advantages)
    # Scaling: up to the epsilon beside a std of about 0.3.
    torch.testing.assert_close(group_advantages(5 * rewards, 4), advantages, rtol=1e-4, atol=0)
    plain = group_advantages(rewards, 4, normalize_std=False)
    torch.testing.assert_close(group_advantages(rewards - 3, 4, normalize_std=False), plain)


def test_a_std_near_zero_does_not_magnify_without_limit():
    rewards = torch.tensor([0.0, 2e-6], dtype=torch.float64)  # std √2e-6, and 1e-6 is added
    wanted = torch.tensor([-1.0, 1.0], dtype=torch.float64) / (math.sqrt(2) + 1)
    torch.testing.assert_close(group_advantages(rewards, 2), wanted)


def test_signal_by_hand():
    rewards = torch.tensor([1.0, 0.0, 2.0, 2.0])
    assert has_signal(rewards, 2).tolist() == [True, True, False, False]


def test_integer_and_list_rewards_are_taken():
    assert group_advantages(torch.tensor([1, 0]), 2, normalize_std=False).tolist() == [0.5, -0.5]
    assert group_advantages([1, 0], 2, normalize_std=False).tolist() == [0.5, -0.5]


@pytest.mark.parametrize(
    ("rewards", "group_size", "message"),
    [
        (torch.ones(6), 4, "6 rewards must be divisible by group_size=4"),
        (torch.ones(6), 0, "group_size=0"),
        (torch.ones(2, 3), 3, r"rewards must be \(B,\), got \(2, 3\)"),
        (torch.tensor([1.0, math.nan]), 2, "rewards must be finite"),
    ],
)
def test_wrong_rewards_are_named(rewards, group_size, message):
    with pytest.raises(ValueError, match=message):
        group_advantages(rewards, group_size)


def test_overlong_penalty_by_hand():
    lengths = torch.tensor([0, 6, 7, 8, 10, 12])
    for buffer, wanted in ((4, [0, 0, -0.25, -0.5, -1, -1]), (1, [0, 0, 0, 0, -1, -1]),
                           (10, [0, -0.6, -0.7, -0.8, -1, -1])):
        assert overlong_penalty(lengths, 10, buffer).tolist() == pytest.approx(wanted)
    for buffer in (0, 11):
        with pytest.raises(ValueError, match=f"buffer={buffer}"):
            overlong_penalty(lengths, 10, buffer)


# The loss by hand: two completions, of three tokens and of one
def hand_case(ratios=((1.5, 1.0, 0.5), (1.1, 1.0, 1.0)), advantages=(1.0, -1.0)):
    old_logp = torch.tensor([[-1.0, -2.0, -0.5], [-3.0, math.nan, math.inf]])
    mask = torch.tensor([[True, True, True], [True, False, False]])
    logp = (old_logp + torch.tensor(ratios).log()).requires_grad_()
    return logp, old_logp, torch.tensor(advantages), mask


@pytest.mark.parametrize(
    ("variant", "max_length", "loss"),
    [
        # 1.5 is clipped to 1.2; (1.2 + 1 + 0.5)/3 and −1.1, then the mean of two completions
        ("grpo", None, -(2.7 / 3 - 1.1) / 2),
        # the sums, over two times the constant length
        ("dr_grpo", None, -(2.7 - 1.1) / (2 * 3)),
        ("dr_grpo", 4, -(2.7 - 1.1) / (2 * 4)),
        # clipped to 1.28; all four tokens alike
        ("dapo", None, -(1.28 + 1 + 0.5 - 1.1) / 4),
        # (1.5 · 1 · 0.5)^(1/3) and 1.1; neither is on the side where the clip works
        ("gspo", None, -(0.75 ** (1 / 3) - 1.1) / 2),
    ],
)
def test_loss_by_hand(variant, max_length, loss):
    logp, old_logp, advantages, mask = hand_case()
    got, _ = grpo_loss(
        logp, old_logp, None, advantages, mask, variant=variant, max_length=max_length
    )
    assert got.item() == pytest.approx(loss, abs=1e-6)


@pytest.mark.parametrize(
    ("variant", "loss", "low", "high"),
    [
        # 0.5 is clipped to 0.8 where Â < 0; 1.1 is within the clip
        ("grpo", -((-1.5 - 1 - 0.8) / 3 + 1.1) / 2, 1 / 4, 0),
        ("dr_grpo", -((-1.5 - 1 - 0.8) + 1.1) / 6, 1 / 4, 0),
        ("dapo", -((-1.5 - 1 - 0.8) + 1.1) / 4, 1 / 4, 0),
        # both completions are clipped, at 0.9997 and at 1.0004
        ("gspo", -(-0.9997 + 1.0004) / 2, 1 / 2, 1 / 2),
    ],
)
def test_clipping_below_by_hand(variant, loss, low, high):
    logp, old_logp, advantages, mask = hand_case(advantages=(-1.0, 1.0))
    got, figures = grpo_loss(logp, old_logp, None, advantages, mask, variant=variant)
    assert got.item() == pytest.approx(loss, abs=1e-6)
    assert figures["clip_low"] == pytest.approx(low)
    assert figures["clip_high"] == pytest.approx(high)


@pytest.mark.parametrize(
    ("sign", "clips", "gains"),
    [
        (1.0, dict(clip_high=0.05), 1.05 + 1 + 0.5),
        (1.0, dict(clip_high=0.0), 1 + 1 + 0.5),
        (-1.0, dict(clip_low=0.4), 1.5 + 1 + 0.6),
        (-1.0, dict(clip_low=0.0), 1.5 + 1 + 1),
        (-1.0, dict(clip_low=1.0), 1.5 + 1 + 0.5),
    ],
)
def test_a_clip_that_is_given_replaces_the_variants(sign, clips, gains):
    logp, old_logp, _, mask = hand_case()
    loss, _ = grpo_loss(logp, old_logp, None, torch.tensor([sign, 0.0]), mask, **clips)
    assert loss.item() == pytest.approx(-sign * gains / 3 / 2, abs=1e-6)


def test_only_tokens_that_lost_their_gradient_are_counted_as_clipped():
    logp, old_logp, _, mask = hand_case()  # far from 1, but without advantage
    at_one = grpo_loss(logp, logp.detach(), None, torch.tensor([1.0, -1.0]), mask,
                       clip_low=0.0, clip_high=0.0)
    for _, figures in (grpo_loss(logp, old_logp, None, torch.zeros(2), mask), at_one):
        assert figures["clip_low"] == figures["clip_high"] == 0


def test_figures_by_hand():
    logp, old_logp, advantages, mask = hand_case()
    ref_logp = logp.detach() + math.log(0.5)
    _, figures = grpo_loss(logp, old_logp, ref_logp, advantages, mask)
    assert figures["ratio"] == pytest.approx((1.5 + 1 + 0.5 + 1.1) / 4)
    assert figures["clip_high"] == pytest.approx(1 / 4) and figures["clip_low"] == 0
    assert figures["kl"] == pytest.approx(0.5 - math.log(0.5) - 1)
    drawn = [-1 + math.log(1.5), -2, -0.5 + math.log(0.5), -3 + math.log(1.1)]
    assert figures["entropy"] == pytest.approx(-sum(drawn) / 4)
    _, figures = grpo_loss(logp, old_logp, None, advantages, mask, variant="gspo")
    assert figures["ratio"] == pytest.approx((0.75 ** (1 / 3) + 1.1) / 2)
    assert round(0.75 ** (1 / 3), 2) == 0.91
    assert figures["kl"] is None


@pytest.mark.parametrize(
    ("variant", "average"), [("grpo", 1.0), ("dr_grpo", 4 / 6), ("dapo", 1.0), ("gspo", 1.0)]
)
def test_k3_by_hand(variant, average):
    logp, _, _, mask = hand_case()
    ref_logp = logp.detach() + math.log(0.5)  # π_ref/π = 1/2; upside down it would be 2 − ln 2 − 1
    loss, _ = grpo_loss(
        logp, logp.detach(), ref_logp, torch.zeros(2), mask, kl_coef=0.3, variant=variant
    )
    assert loss.item() == pytest.approx(0.3 * average * (0.5 - math.log(0.5) - 1), abs=1e-6)


def test_k3_is_never_negative_and_zero_for_equals():
    logp = -torch.rand(4, 5) * 3
    mask = torch.ones(4, 5, dtype=torch.bool)
    for _ in range(20):
        ref_logp = -torch.rand(4, 5) * 3
        _, figures = grpo_loss(logp, logp, ref_logp, torch.zeros(4), mask)
        assert figures["kl"] > 0
    assert grpo_loss(logp, logp, logp, torch.zeros(4), mask)[1]["kl"] == 0


def test_k3_of_twice_and_half_the_reference():
    logp = torch.tensor([2.0, 0.5]).log()
    assert k3(logp, torch.zeros(2)).tolist() == pytest.approx([0.19, 0.31], abs=0.005)


@pytest.mark.comparison
def test_mean_k3_is_pytorchs_kl_divergence():
    """Σ_x π(x) k3(x) = KL(π ‖ π_ref), over all tokens of a small vocabulary."""
    log_p, log_ref = torch.randn(2, 7, dtype=torch.float64).log_softmax(dim=-1)
    zeros, mask = torch.zeros(7, dtype=torch.float64), torch.ones(7, 1, dtype=torch.bool)
    loss = [
        grpo_loss(log_p[x, None, None], log_p[x, None, None], log_ref[x, None, None], zeros[:1],
                  mask[:1], kl_coef=1.0)[0]
        for x in range(7)
    ]
    mean = (log_p.exp() * torch.stack(loss)).sum()
    policy, reference = (torch.distributions.Categorical(logits=x) for x in (log_p, log_ref))
    torch.testing.assert_close(mean, torch.distributions.kl_divergence(policy, reference))


# The rungs
def test_averages_by_hand():
    values = torch.tensor([[1.0, 2.0, 3.0], [5.0, math.nan, math.inf]])
    mask = torch.tensor([[True, True, True], [True, False, False]])
    assert averaged(values, mask).item() == (2 + 5) / 2
    assert averaged(values, mask, "token").item() == 11 / 4
    assert averaged(values, mask, "constant", max_length=4).item() == (6 + 5) / (2 * 4)
    for how in ("completion", "token"):
        assert averaged(values, mask & False, how).item() == 0


def test_reinforce_by_hand():
    logp = torch.tensor([[-1.0, -2.0], [-3.0, 0.0]], requires_grad=True)
    mask = torch.tensor([[True, True], [True, False]])
    loss = reinforce_loss(logp, torch.tensor([2.0, 1.0]), mask)
    assert loss.item() == pytest.approx((2 * 3 + 3) / 2) == 4.5
    (gradient,) = torch.autograd.grad(loss, logp)
    assert gradient.tolist() == [[-1, -1], [-0.5, 0]]  # −r/B


def test_reinforce_estimates_the_gradient_of_the_expected_reward():
    """Over all answers of one token, each weighed by its probability."""
    logits = torch.randn(5, dtype=torch.float64, requires_grad=True)
    rewards, mask = torch.rand(5, dtype=torch.float64), torch.ones(1, 1, dtype=torch.bool)
    log_p = logits.log_softmax(dim=0)
    (wanted,) = torch.autograd.grad((log_p.exp() * rewards).sum(), logits, retain_graph=True)
    losses = [reinforce_loss(log_p[i].view(1, 1), rewards[i, None], mask) for i in range(5)]
    weighed = sum(p * loss for p, loss in zip(log_p.exp().detach(), losses, strict=True))
    torch.testing.assert_close(-torch.autograd.grad(weighed, logits)[0], wanted)


def test_the_sum_over_tokens_estimates_it_and_their_mean_does_not():
    """An answer is the first token alone, or the second and one more; each weighed as above."""
    logits = torch.randn(2, 2, dtype=torch.float64, requires_grad=True)
    (end, on), then = logits.log_softmax(dim=1)
    answers = [end, end * 0, on, then[0], on, then[1]]
    logp = torch.stack(answers).view(3, 2)
    mask = torch.tensor([[True, False], [True, True], [True, True]])
    rewards, p = torch.rand(3, dtype=torch.float64), logp.sum(dim=1).exp()
    (wanted,) = torch.autograd.grad((p * rewards).sum(), logits, retain_graph=True)

    def estimate(loss_of_row):
        weighed = sum(p[i].detach() * loss_of_row(slice(i, i + 1)) for i in range(3))
        return -torch.autograd.grad(weighed, logits, retain_graph=True)[0]

    of_sum = estimate(lambda row: reinforce_loss(logp[row], rewards[row], mask[row]))
    torch.testing.assert_close(of_sum, wanted)
    of_mean = estimate(lambda row: -averaged(rewards[row, None] * logp[row], mask[row]))
    assert not torch.allclose(of_mean, wanted, rtol=0.01)


def test_each_rung_is_the_one_below_where_its_change_does_nothing():
    logp, old_logp, ref_logp, advantages, mask = random_case()
    at_one = [
        torch.autograd.grad(loss, logp)[0]
        for loss in (reinforce_loss(logp, advantages, mask),
                     clipped_loss(logp, logp.detach(), advantages, mask))
    ]
    torch.testing.assert_close(*at_one)
    rung_3 = clipped_loss(logp, old_logp, advantages, mask)
    over_one, _ = grpo_loss(
        logp, old_logp, None, advantages, mask, variant="dr_grpo", max_length=1
    )
    torch.testing.assert_close(rung_3, over_one)
    plain, _ = grpo_loss(logp, old_logp, None, advantages, mask)
    by_length = [torch.autograd.grad(loss, logp, retain_graph=True)[0] for loss in (rung_3, plain)]
    lengths = mask.sum(dim=1, keepdim=True).clamp(min=1)
    torch.testing.assert_close(by_length[0] / lengths, by_length[1])
    with_kl, _ = grpo_loss(logp, old_logp, ref_logp, advantages, mask, kl_coef=0.1)
    torch.testing.assert_close(plain + 0.1 * averaged(k3(logp, ref_logp), mask), with_kl)


def test_clipped_gain_by_hand():
    ratio = torch.tensor([1.5, 0.5])
    for advantage, wanted in ((1.0, [1.2, 0.5]), (-1.0, [-1.5, -0.8])):
        assert clipped_gain(ratio, advantage * torch.ones(2), 0.2, 0.2).tolist() == pytest.approx(
            wanted
        )


def test_clip_takes_the_gradient_away_on_one_side_only():
    logp, old_logp, _, mask = hand_case()  # ratios 1.5, 1 and 0.5
    for sign, wanted in ((1.0, [0, 1, 1]), (-1.0, [1, 1, 0])):
        loss = clipped_loss(logp, old_logp, torch.tensor([sign, 0.0]), mask)
        (gradient,) = torch.autograd.grad(loss, logp)
        assert (gradient[0] != 0).long().tolist() == wanted


# The loss against two other derivations, and by finite differences
def random_case(dtype=torch.float64, B=6, L=5):
    mask = torch.arange(L) < torch.tensor([[5], [3], [1], [2], [4], [0]])
    logp = (torch.randn(B, L, dtype=dtype) - 2).requires_grad_()
    old_logp, ref_logp = (logp.detach() + 0.3 * torch.randn(B, L, dtype=dtype) for _ in range(2))
    advantages = group_advantages(torch.randn(B, dtype=dtype), 3)
    return logp, old_logp, ref_logp, advantages, mask


def plain_python(logp, old, ref, advantages, mask, kl_coef, variant):
    """Numbers and lists only, from the papers' formulas."""
    low, high = {"grpo": (0.2, 0.2), "dr_grpo": (0.2, 0.2), "dapo": (0.2, 0.28),
                 "gspo": (3e-4, 4e-4)}[variant]
    per_completion, lengths = [], []
    for row in range(len(advantages)):
        tokens = [t for t, counts in enumerate(mask[row]) if counts]
        gains = []
        for t in tokens:
            ratio = math.exp(logp[row][t] - old[row][t])
            if variant == "gspo":
                product = math.prod(math.exp(logp[row][u] - old[row][u]) for u in tokens)
                ratio = product ** (1 / len(tokens))
            bounded = max(1 - low, min(1 + high, ratio))
            odds = math.exp(ref[row][t]) / math.exp(logp[row][t])
            gain = min(ratio * advantages[row], bounded * advantages[row])
            gains.append(gain - kl_coef * (odds - math.log(odds) - 1))
        per_completion.append(sum(gains))
        lengths.append(len(tokens))
    if variant == "dapo":
        return -sum(per_completion) / sum(lengths)
    if variant == "dr_grpo":
        return -sum(per_completion) / (len(advantages) * len(mask[0]))
    means = [gain / max(1, n) for gain, n in zip(per_completion, lengths, strict=True)]
    return -sum(means) / len(means)


@EVERY_VARIANT
@pytest.mark.parametrize("kl_coef", [0.0, 0.1])
def test_loss_matches_plain_python(variant, kl_coef):
    case = random_case()
    loss, _ = grpo_loss(*case, kl_coef=kl_coef, variant=variant)
    lists = [tensor.detach().tolist() for tensor in case]
    assert loss.item() == pytest.approx(plain_python(*lists, kl_coef, variant), rel=1e-9)


@EVERY_VARIANT
def test_batched_loss_and_gradient_are_the_naive_ones(variant):
    case = random_case()
    setting = VARIANTS[variant]
    loss, _ = grpo_loss(*case, kl_coef=0.1, variant=variant, max_length=7)
    naive = naive_grpo_loss(*case, kl_coef=0.1, variant=variant, max_length=7,
                            clip_low=setting.clip_low, clip_high=setting.clip_high)
    torch.testing.assert_close(loss, naive)
    gradients = [torch.autograd.grad(value, case[0])[0] for value in (loss, naive)]
    torch.testing.assert_close(*gradients)


@EVERY_VARIANT
def test_gradients_by_finite_differences(variant):
    logp, *rest = random_case()
    assert torch.autograd.gradcheck(
        lambda x: grpo_loss(x, *rest, kl_coef=0.1, variant=variant)[0], (logp,), eps=1e-7
    )


# Properties
def test_at_ratio_one_the_loss_is_zero_and_its_gradient_is_not():
    logp = torch.randn(6, 5, requires_grad=True)
    advantages = group_advantages(torch.rand(6), 3)
    loss, figures = grpo_loss(logp, logp.detach(), None, advantages, torch.ones(6, 5))
    (gradient,) = torch.autograd.grad(loss, logp)
    assert abs(loss.item()) < 1e-6 and figures["ratio"] == 1
    # ∂loss/∂logp = −Â/(B·L) there
    torch.testing.assert_close(gradient, (-advantages / 30).unsqueeze(1).expand(6, 5))


@EVERY_VARIANT
def test_equal_rewards_give_no_policy_gradient(variant):
    logp, old_logp, _, _, mask = random_case()
    advantages = group_advantages(torch.full((6,), 0.1, dtype=torch.float64), 3)
    loss, _ = grpo_loss(logp, old_logp, None, advantages, mask, variant=variant)
    assert torch.autograd.grad(loss, logp)[0].abs().max() == 0


@EVERY_VARIANT
@pytest.mark.parametrize("content", [0.0, -1e9, math.nan, math.inf])
def test_padding_content_changes_nothing(variant, content):
    logp, old_logp, ref_logp, advantages, mask = random_case()
    results = []
    for filled in (False, True):
        tensors = [x.detach().clone() for x in (logp, old_logp, ref_logp)]
        if filled:
            for tensor in tensors:
                tensor[~mask] = content
        tensors[0].requires_grad_()
        loss, figures = grpo_loss(*tensors, advantages, mask, kl_coef=0.1, variant=variant)
        results.append((loss.detach(), torch.autograd.grad(loss, tensors[0])[0], figures))
    torch.testing.assert_close(results[0][:2], results[1][:2], rtol=0, atol=0)
    assert results[0][2] == results[1][2]


@EVERY_VARIANT
def test_no_gradient_reaches_old_and_reference(variant):
    logp, old_logp, ref_logp, advantages, mask = random_case()
    old_logp.requires_grad_()
    ref_logp.requires_grad_()
    clipped_loss(logp, old_logp, advantages, mask).backward()
    advantages.requires_grad_()
    loss, _ = grpo_loss(logp, old_logp, ref_logp, advantages, mask, kl_coef=0.1, variant=variant)
    loss.backward()
    assert old_logp.grad is None and ref_logp.grad is None and advantages.grad is None
    assert logp.grad is not None


@EVERY_VARIANT
def test_nothing_that_counts_gives_zero_and_no_nan(variant):
    logp, old_logp, ref_logp, _, mask = random_case()
    for counted in (mask, torch.zeros_like(mask)):
        advantages = group_advantages(torch.rand(6, dtype=torch.float64), 1)  # G = 1
        loss, figures = grpo_loss(
            logp, old_logp, ref_logp, advantages, counted, kl_coef=0.1, variant=variant
        )
        assert loss.isfinite() and torch.autograd.grad(loss, logp)[0].isfinite().all()
        assert all(math.isfinite(value) for value in figures.values())
    assert loss == 0
    assert naive_grpo_loss(logp, old_logp, ref_logp, advantages, counted, clip_low=0.2,
                           clip_high=0.2, kl_coef=0.1, max_length=5, variant=variant) == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(variant="ppo"), "variant='ppo' must be one of grpo, dr_grpo, dapo, gspo"),
        (dict(kl_coef=0.1, ref_logp=None), "kl_coef=0.1 needs ref_logp"),
        (dict(kl_coef=-1.0), "kl_coef=-1.0"),
        (dict(clip_low=1.5), "clip_low=1.5"),
        (dict(clip_high=-0.1), "clip_high=-0.1"),
        (dict(max_length=0), "max_length=0"),
        (dict(mask=torch.ones(6, 4)), r"mask must be \(6, 5\), got \(6, 4\)"),
        (dict(old_logp=torch.ones(6)), r"old_logp must be \(6, 5\)"),
        (dict(advantages=torch.ones(5)), r"advantages must be \(6,\), got \(5,\)"),
        (dict(logp=torch.ones(5)), r"logp must be \(B, L\), got \(5,\)"),
    ],
)
def test_wrong_loss_arguments_are_named(changes, message):
    names = ("logp", "old_logp", "ref_logp", "advantages", "mask")
    arguments = {**dict(zip(names, random_case(), strict=True)), **changes}
    with pytest.raises(ValueError, match=message):
        grpo_loss(**arguments)


@EVERY_VARIANT
def test_huge_ratios_give_no_nan(variant):
    logp, old_logp, _, advantages, mask = random_case(torch.float32)
    loss, _ = grpo_loss(logp + 200, old_logp, None, advantages, mask, variant=variant)
    assert loss.isfinite() and torch.autograd.grad(loss, logp)[0].isfinite().all()


# Which tokens count
def test_tokens_after_the_first_end_never_count():
    end = 9
    completions = torch.tensor([[1, 9, 3, 9], [9, 9, 9, 9], [1, 2, 3, 4], [1, 2, 3, 9]])
    wanted = [[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1]]
    assert completion_mask(completions, end).long().tolist() == wanted


@pytest.fixture(scope="module")
def policy():
    torch.manual_seed(0)
    return small_policy(width=32, layers=2)


def test_logprobs_are_those_of_each_sequence_alone(policy):
    """Shifted by one, prompts left out, left padding without effect."""
    prompts = [encode("7+8="), encode("12+34="), encode("1+10=")]
    rollout = roll_out(policy, prompts, 2, 5, END, generator=torch.Generator().manual_seed(1))
    logp = token_logprobs(policy, rollout)
    assert logp.shape == rollout.mask.shape == (6, 5)
    for i in range(6):
        length = int(rollout.mask[i].sum())
        prompt, completion = prompts[i // 2], rollout.completions[i, :length]
        ids = torch.cat([torch.tensor(prompt), completion])[None]
        log_p = policy(ids)[0].log_softmax(dim=-1)
        alone = [log_p[len(prompt) - 1 + t, token] for t, token in enumerate(completion)]
        torch.testing.assert_close(logp[i, :length], torch.stack(alone), atol=1e-5, rtol=1e-5)
        # The cached decoding had the same.
        torch.testing.assert_close(rollout.logp[i, :length], torch.stack(alone).detach(),
                                   atol=1e-5, rtol=1e-5)


def test_temperature_enters_logprobs(policy):
    ids, mask = torch.randint(0, END, (2, 7)), torch.ones(2, 7, dtype=torch.bool)
    written = Rollout(ids[:, :4], mask[:, :4], ids[:, 4:], mask[:, 4:])
    log_p = (policy(ids)[:, 3:-1] / 0.5).log_softmax(dim=-1)
    wanted = log_p.gather(2, ids[:, 4:, None]).squeeze(2)
    torch.testing.assert_close(token_logprobs(policy, written, temperature=0.5), wanted)


def test_logprobs_of_bf16_products_are_fp32_numbers(policy):
    ids, mask = torch.randint(0, END, (2, 7)), torch.ones(2, 7, dtype=torch.bool)
    written = Rollout(ids[:, :4], mask[:, :4], ids[:, 4:], mask[:, 4:])
    fine, coarse = (token_logprobs(policy, written, precision=p) for p in ("float32", "bfloat16"))
    assert coarse.dtype == torch.float32 and not torch.equal(coarse, fine)
    assert not torch.equal(coarse, coarse.bfloat16().float())  # not rounded in the end
    torch.testing.assert_close(coarse, fine, atol=0.1, rtol=0.1)


def without_preference():
    """A policy to which all tokens are equally likely: a third of its completions end in time."""
    policy = small_policy(32, 1)
    with torch.no_grad():
        policy.lm_head.weight.zero_()
    return policy


def test_a_completion_is_filled_up_with_its_end():
    rollout = roll_out(without_preference(), [encode("1+2=")], 32, 5, END)
    assert (~rollout.mask).any() and (rollout.completions[~rollout.mask] == END).all()


def test_figures_of_a_rollout_by_hand():
    mask = torch.tensor([[True, True], [True, False], [True, True], [True, True]])
    logp = torch.tensor([[-1.0, -2.0], [-3.0, math.nan], [-1.0, -1.0], [-2.0, -4.0]])
    rewards = torch.tensor([1.0, 0.0, 0.5, 0.5])
    drawn = Rollout(None, None, None, mask, logp, rewards)
    figures = rollout_figures(drawn, 2)
    assert figures == dict(reward=0.5, entropy=2.0, length=1.75, signal=0.5, completions=4)
    assert not any(map(torch.is_tensor, figures.values()))  # they go into a file


def test_generation_gives_the_logprobs_of_what_it_drew(policy):
    ids, generator = torch.tensor([encode("1+2=")]), torch.Generator().manual_seed(3)
    drawn = policy.complete(ids, 4, Sampling(0.7, generator=generator))
    log_p = (policy(drawn.ids)[0, 3:-1] / 0.7).log_softmax(dim=-1)
    wanted = log_p.gather(1, drawn.ids[0, 4:, None]).T
    torch.testing.assert_close(drawn.logprobs, wanted, atol=1e-5, rtol=1e-5)
    assert policy.complete(ids, 2, Sampling()).logprobs.tolist() == [[0, 0]]  # greedy: no choice


def test_joined_rollouts_keep_their_rows(policy):
    parts = [roll_out(policy, [encode(text)], 2, 3, END) for text in ("1+2=", "12+34=")]
    parts = [part._replace(rewards=torch.arange(2.0), advantages=torch.ones(2)) for part in parts]
    both = joined(parts)
    assert both.rewards.tolist() == [0, 1, 0, 1]
    assert both.prompt_ids.shape == (4, 6) and both.completions.shape == (4, 3)
    for i, part in enumerate(parts):
        rows = both.rows(torch.arange(2 * i, 2 * i + 2))
        assert torch.equal(rows.completions, part.completions)
        assert torch.equal(rows.mask, part.mask) and torch.equal(rows.logp, part.logp)
        one, other = (
            token_logprobs(policy, r) for r in (rows, part)
        )
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


# The reward
@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (lambda prompt, texts: [1.0], r"gave 1 rewards for the 2 completions of prompt '1\+2='"),
        (lambda prompt, texts: [1.0, math.nan], r"gave nan for prompt '1\+2=', completion 'b'"),
        (lambda prompt, texts: 1 / 0, r"raised ZeroDivisionError .* for prompt '1\+2='"),
        (lambda prompt, texts: [1.0, -1e20], r"gave -1e\+20 for prompt '1\+2=', completion 'b'"),
        (lambda prompt, texts: int("one\ntwo"), r"raised ValueError .* for prompt '1\+2='$"),
        (lambda prompt, texts: None, r"raised TypeError .* for prompt '1\+2='"),
        (lambda prompt, texts: ["x", "y"], r"raised ValueError .* for prompt '1\+2='"),
    ],
)
def test_wrong_rewards_name_the_prompt(reward, message):
    with pytest.raises(ValueError, match=message):
        checked_rewards(reward, "1+2=", ["a", "b"])


def test_exact_match_by_hand():
    assert sum_of("12+34=") == "64" and sum_of("99+99=") == "891" and sum_of("0+0=") == "0"
    assert exact_match("12+34=", ["64", "46", "640", "", "6"]) == [1, 0, 0, 0, 0]


def test_the_three_parts_of_the_sums_do_not_meet():
    parts = addition_prompts()
    assert [len(part) for part in parts] == [8000, 1000, 1000]
    assert all(len({prompt.split("+")[0] for prompt in part}) == 100 for part in parts)  # mixed
    assert len(set().union(*parts)) == 10_000


# The trainer
def trainer_for(policy, reward=exact_match, prompts=("1+2=", "12+34=", "7+10="), **settings):
    settings = Settings(**{**dict(prompts=4, group_size=4, minibatches=1), **settings})
    torch.manual_seed(0)
    task = Task(reward, [encode(prompt) for prompt in prompts], decode, END)
    return GRPOTrainer(policy, task, settings)


def collected(trainer):
    """What the trainer's next step learns from, and all that it draws."""
    return collect(trainer.policy, trainer.task, trainer.settings, trainer.steps_done)


def updated(trainer, rollout):
    update(trainer.policy, trainer.reference, trainer.optimizer, rollout, trainer.settings,
           trainer.steps_done)


def likes_ones(prompt, completions):
    """A reward that every policy can find."""
    return [text.count("1") / 5 for text in completions]


def recorded_losses(monkeypatch):
    """Collects (logp, old_logp) of every update."""
    calls = []

    def record(logp, old_logp, *rest, **options):
        calls.append((logp.detach().clone(), old_logp.clone()))
        return grpo_loss(logp, old_logp, *rest, **options)

    monkeypatch.setattr(grpo_coded, "grpo_loss", record)
    return calls


def recorded_rollouts(monkeypatch):
    """Collects the rollout that each step learns from."""
    kept = []

    def record(*arguments):
        kept.append(collect(*arguments)[0])
        return kept[-1], kept[-1]

    monkeypatch.setattr(grpo_coded, "collect", record)
    return kept


@pytest.mark.parametrize("minibatches", [1, 3])
@pytest.mark.parametrize("kl_coef", [0.0, 0.1])
def test_first_ratio_is_exactly_one_and_learns(monkeypatch, minibatches, kl_coef):
    calls = recorded_losses(monkeypatch)
    trainer = trainer_for(small_policy(32, 2), likes_ones, minibatches=minibatches, kl_coef=kl_coef)
    trainer.step()  # from now on the policy is not its reference
    calls.clear()
    before = [p.detach().clone() for p in trainer.policy.parameters()]
    figures = trainer.step()
    assert len(calls) == minibatches
    assert torch.equal(*calls[0])
    for later in calls[1:]:  # the policy has moved under them
        assert not torch.equal(*later)
    assert figures["gradient_norm"] > 0
    moved = [
        not torch.equal(p, q) for p, q in zip(before, trainer.policy.parameters(), strict=True)
    ]
    assert all(moved)


def plain_step(policy, reference, optimizer, prompts, *, reward, generator, settings):
    """`grpo_step` with one minibatch, every completion in it; returns the mean reward."""
    s, variant = settings, VARIANTS[settings.variant]
    rollout = roll_out(policy, prompts, s.group_size, s.max_new_tokens, END, s.temperature,
                       generator)
    texts, rewards = rollout.texts(decode), []
    for i, prompt in enumerate(prompts):
        rewards += reward(decode(prompt), texts[i * s.group_size : (i + 1) * s.group_size])
    rewards = torch.tensor(rewards)
    penalty = overlong_penalty(rollout.mask.sum(dim=1), s.max_new_tokens, s.overlong_buffer)
    shaped = rewards + penalty if variant.overlong else rewards
    advantages = group_advantages(shaped, s.group_size, variant.normalize_std)
    with torch.no_grad():  # before the first update, the policy is still the one that drew
        old_logp, ref_logp = (token_logprobs(model, rollout) for model in (policy, reference))
    loads = {}
    for _ in range(s.passes):
        routed = []
        logp = token_logprobs(policy, rollout, routed=routed)
        loss, _ = grpo_loss(
            logp, old_logp, ref_logp, advantages, rollout.mask, kl_coef=s.kl_coef,
            max_length=s.max_new_tokens, variant=s.variant,
        )
        descend(optimizer, loss + sum(layer.balance_loss() for layer in routed))
        add_loads(loads, routed)
    move_routing_bias(loads, s.gamma)
    return rewards.mean().item()


def assert_same_weights(one, other):
    # an update is 3e-3 long: a last bit of a gradient near zero may turn a part of it
    torch.testing.assert_close(one.state_dict(), other.state_dict(), rtol=1e-3, atol=3e-4)


@EVERY_VARIANT
@pytest.mark.parametrize("passes", [1, 3])
def test_step_and_trainer_equal_the_step_that_is_written_out(variant, passes):
    """Three steps long: figures, weights, routing bias. Prompts of unequal length.

    Up to rounding: some kernels round by where a tensor lies in memory.
    """

    def reward(prompt, texts):  # every group has signal: dapo need not draw again
        return [text.count("1") + 0.1 * i for i, text in enumerate(texts)]

    plain = small_policy(32, 2)
    trainer = trainer_for(plain.copy(), reward, variant=variant, passes=passes, kl_coef=0.05,
                          gamma=0.01, learning_rate=3e-3)
    settings, task, stepped = trainer.settings, trainer.task, plain.copy()
    reference = plain.copy()
    optimizers = [policy_optimizer(policy, settings) for policy in (plain, stepped)]
    start = plain.lm_head.weight.clone()
    for step in range(3):
        generator = trainer.generator()
        mean_reward = plain_step(
            plain, reference, optimizers[0], drawn_from(task.prompts, settings.prompts, generator),
            reward=reward, generator=generator, settings=settings,
        )
        figures = grpo_step(stepped, reference, optimizers[1], task, settings, step)
        assert trainer.step() == pytest.approx(figures, rel=1e-4, abs=1e-5)
        assert figures["reward"] == pytest.approx(mean_reward)
    assert not torch.equal(plain.lm_head.weight, start)
    assert plain.moe_layers()["layer 0"].gate.e_score_correction_bias.any()
    for policy in (stepped, trainer.policy):
        assert_same_weights(plain, policy)


@pytest.mark.parametrize("changes", [
    dict(minibatches=2, kl_coef=0.05), dict(variant="dapo", minibatches=3, passes=2),
    dict(minibatches=2, refresh_reference=2, rollout_logprobs=True),
])
def test_training_is_the_trainers_steps(changes):
    """The lesson's loop, with minibatches, a second draw and a reference that is refreshed."""
    trainer = trainer_for(small_policy(32, 2), likes_ones, learning_rate=3e-3, **changes)
    policy, settings = trainer.policy.copy(), trainer.settings
    history = train(policy, trainer.task, settings, 4)
    for step, figures in enumerate(history):
        wanted = trainer.step(rate_of(settings, step, step / 4))
        assert figures == pytest.approx(wanted, rel=1e-4, abs=1e-5)
    assert_same_weights(policy, trainer.policy)


def test_old_logprobs_of_two_minibatches_come_from_before_the_first_update(monkeypatch):
    calls = recorded_losses(monkeypatch)
    trainer = trainer_for(small_policy(32, 2), likes_ones, minibatches=2, kl_coef=0.1,
                          learning_rate=1e-2)
    before = trainer.policy.copy()
    kept = recorded_rollouts(monkeypatch)
    trainer.step()
    wanted = fixed_logprobs(before, kept[0], trainer.settings)
    used = torch.cat([old_logp for _, old_logp in calls])
    torch.testing.assert_close(used.sort(dim=0).values, wanted.sort(dim=0).values)
    assert len(calls) == 2 and not torch.equal(*calls[1])


def test_passes_go_over_the_same_rollout(monkeypatch):
    calls = recorded_losses(monkeypatch)
    trainer = trainer_for(small_policy(32, 2), likes_ones, minibatches=2, passes=3, kl_coef=0.1)
    trainer.step()
    assert len(calls) == 6
    rows = [sorted(map(tuple, torch.cat([old for _, old in calls[i : i + 2]]).tolist()))
            for i in (0, 2, 4)]
    assert rows[0] == rows[1] == rows[2]


@pytest.mark.parametrize("minibatches", [1, 2])
def test_rollout_logprobs_can_be_kept(monkeypatch, minibatches):
    calls = recorded_losses(monkeypatch)
    trainer = trainer_for(small_policy(32, 2), likes_ones, rollout_logprobs=True, kl_coef=0.1,
                          minibatches=minibatches)
    kept = recorded_rollouts(monkeypatch)
    trainer.step()
    used = sorted(tuple(row) for _, old_logp in calls for row in old_logp.tolist())
    assert used == sorted(map(tuple, kept[0].logp.tolist()))
    logp, old_logp = calls[0]
    assert not torch.equal(logp, old_logp)  # in the last bits


@pytest.mark.parametrize("minibatches", [1, 2])
def test_a_step_measures_all_probabilities_at_the_temperature_of_its_drawing(
    monkeypatch, minibatches
):
    measured, kept = [], recorded_rollouts(monkeypatch)

    def record(logp, old_logp, ref_logp, advantages, mask, **options):
        measured.append([each.detach()[mask] for each in (logp, old_logp, ref_logp)])
        return grpo_loss(logp, old_logp, ref_logp, advantages, mask, **options)

    monkeypatch.setattr(grpo_coded, "grpo_loss", record)
    trainer = trainer_for(small_policy(32, 2), lambda p, texts: list(range(len(texts))),
                          temperature=0.5, learning_rate=1e-9, minibatches=minibatches, kl_coef=0.1)
    assert abs(trainer.step()["kl"]) < 1e-6  # the policy is still the reference
    for logp in map(torch.cat, zip(*measured, strict=True)):
        wanted = kept[0].logp[kept[0].mask].sort().values
        torch.testing.assert_close(logp.sort().values, wanted, atol=1e-4, rtol=1e-4)


def test_the_loss_of_a_step_is_that_of_all_its_completions():
    """Here of one update, for which half of the rows are left out because they have no signal."""
    trainer = trainer_for(
        without_preference(), lambda p, texts: [float(i) * (p == "1+2=") for i, _ in
                                                enumerate(texts)],
        prompts=("1+2=", "12+34="), variant="dr_grpo",
    )
    rollout, _ = collected(trainer)
    assert 0 < (rollout.advantages == 0).sum() < 16
    wanted, _ = grpo_loss(rollout.logp, rollout.logp, None, rollout.advantages, rollout.mask,
                          variant="dr_grpo")
    assert trainer.step()["loss"] == pytest.approx(wanted.item(), rel=1e-3) and abs(wanted) > 1e-3


@pytest.mark.performance
def test_log_probabilities_are_measured_a_minibatch_at_a_time():
    trainer = trainer_for(small_policy(32, 1), likes_ones, minibatches=3)
    rollout, rows = collected(trainer)[0], watched_reference(trainer)
    fixed_logprobs(trainer.reference, rollout, trainer.settings)
    assert rows == [6, 6, 4]


@EVERY_VARIANT
def test_rows_without_advantage_are_left_out_but_counted(variant, monkeypatch):
    """The same gradient as with them."""

    def gradients(skip):
        torch.manual_seed(3)
        trainer = trainer_for(
            small_policy(32, 2), lambda p, texts: [float(p == "1+2=" and "1" in t) for t in texts],
            prompts=("1+2=", "12+34="), kl_coef=0.0 if skip else 1e-12, learning_rate=1e-9,
            group_size=16,
        )
        for moe in trainer.policy.moe_layers().values():  # its loss is over all rows
            moe.balance_loss = None
        rollout, _ = collected(trainer)
        assert 0 < (rollout.advantages != 0).sum() < len(rollout.mask)
        if not skip:
            monkeypatch.setattr(grpo_coded, "has_signal", lambda a, size: torch.ones_like(a) > 0)
        updated(trainer, rollout)
        return [p.grad for p in trainer.policy.parameters()]

    for one, other in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)


@pytest.mark.performance
def test_rows_without_signal_cost_no_training_pass():
    def rows_trained(kl_coef):
        trainer = trainer_for(
            small_policy(32, 2), lambda p, texts: [float(p == "1+2=" and "1" in t) for t in texts],
            prompts=("1+2=", "12+34="), kl_coef=kl_coef, group_size=16,
        )
        rollout, _ = collected(trainer)
        rows = []
        trainer.policy.layers[0].register_forward_hook(
            lambda m, i, output: rows.append(len(output))
        )
        updated(trainer, rollout)
        in_groups = int(has_signal(rollout.advantages, 16).sum())
        return sum(rows), int((rollout.advantages != 0).sum()), in_groups, len(rollout.mask)

    for kl_coef in (0.0, 0.1):
        trained, with_advantage, in_groups, drawn = rows_trained(kl_coef)
        assert 0 < with_advantage <= in_groups < drawn
        assert trained == (in_groups if kl_coef else with_advantage)


def test_dapo_draws_groups_without_signal_again():
    """Only one of the two prompts can have signal: the other never enters the update."""

    def reward(prompt, texts):
        return [float(prompt == "1+2=") * i for i, _ in enumerate(texts)]

    settings = Settings(variant="dapo", prompts=4, group_size=4, minibatches=1, resamplings=8,
                        max_new_tokens=6)
    task = Task(reward, [encode("1+2="), encode("12+34=")], decode, END)
    trainer = GRPOTrainer(small_policy(32, 2), task, settings)
    rollout, drawn = collected(trainer)
    assert len(rollout.mask) == 16 and len(drawn.mask) > 16
    grpo = trainer_for(small_policy(32, 2), reward, prompts=("1+2=", "12+34="))
    rollout, drawn = collected(grpo)
    assert len(rollout.mask) == len(drawn.mask) == 16


def test_dapo_draws_something_else_each_time(monkeypatch):
    attempts = []
    monkeypatch.setattr(
        grpo_coded, "judged", lambda *given: attempts.append(judged(*given)) or attempts[-1]
    )
    trainer = trainer_for(without_preference(), lambda p, texts: [0.0] * len(texts), variant="dapo",
                          resamplings=2, prompts=("1+2=",))
    collected(trainer)
    texts = [tuple(rollout.completions.flatten().tolist()) for rollout in attempts]
    assert len(texts) == len(set(texts)) == 3


def test_dapo_punishes_completions_that_run_out_of_room():
    trainer = trainer_for(without_preference(), lambda p, texts: [1.0] * len(texts), variant="dapo",
                          group_size=16, resamplings=0)
    generator = torch.Generator().manual_seed(0)
    rollout = judged(trainer.policy, [encode("1+2=")], trainer.task, trainer.settings, generator)
    full = rollout.mask.all(dim=1)
    assert 0 < full.sum() < 16
    assert (rollout.advantages[full] < 0).all() and (rollout.advantages[~full] > 0).all()
    assert (rollout.rewards == 1).all()  # what is reported is the reward itself


def test_dapo_does_not_learn_from_length_alone():
    trainer = trainer_for(small_policy(32, 2), lambda p, texts: [0.0] * len(texts), variant="dapo",
                          resamplings=1)
    rollout, drawn = collected(trainer)
    assert (drawn.advantages != 0).any()  # lengths differ
    assert len(rollout.mask) == 0 and len(drawn.mask) == 32
    assert trainer.step()["signal"] == 0


def test_variants_normalise_in_their_own_way():
    rewards = {}
    for variant in ("grpo", "dr_grpo"):
        trainer = trainer_for(small_policy(32, 2), likes_ones, variant=variant)
        rollout, _ = collected(trainer)
        rewards[variant] = rollout.advantages
        wanted = group_advantages(rollout.rewards, 4, normalize_std=variant == "grpo")
        assert torch.equal(rollout.advantages, wanted)
    assert not torch.equal(*rewards.values())


def watched_reference(trainer):
    """Collects the rows that the reference reads."""
    rows = []
    trainer.reference.layers[0].register_forward_hook(lambda m, i, out: rows.append(len(out)))
    return rows


@pytest.mark.performance
@pytest.mark.parametrize("kl_coef", [0.0, 0.1])
def test_the_reference_reads_one_completion_of_each_prompt_and_what_is_pulled_back(kl_coef):
    trainer = trainer_for(small_policy(32, 2), likes_ones, kl_coef=kl_coef, learning_rate=3e-3)
    trainer.step()  # from now on the policy is not its reference
    rollout, _ = collected(trainer)
    of_all = fixed_logprobs(trainer.reference, rollout, trainer.settings)
    rows = watched_reference(trainer)
    kl = trainer.step()["kl"]
    signal = int(has_signal(rollout.advantages, 4).sum())
    assert signal > 0 and sum(rows) == 4 + (signal if kl_coef else 0)
    first = slice(0, None, 4)  # of each prompt's four neighbours
    wanted = k3(rollout.logp, of_all)[first][rollout.mask[first]].mean().item()
    assert kl == pytest.approx(wanted, rel=1e-3) and kl > 0


@EVERY_VARIANT
@pytest.mark.parametrize("kl_coef", [0.0, 0.1])
def test_only_a_penalty_makes_the_reference_change_an_update(variant, kl_coef):
    weights, policy = [], small_policy(32, 2)
    for std in (0.08, 0.2):
        trainer = trainer_for(policy.copy(), likes_ones, variant=variant, minibatches=2,
                              kl_coef=kl_coef)
        rollout, _ = collected(trainer)
        trainer.reference.init_weights(std)
        updated(trainer, rollout)
        weights.append(trainer.policy.lm_head.weight.detach())
    assert torch.equal(*weights) == (kl_coef == 0)


def test_reference_is_frozen_until_it_is_refreshed():
    trainer = trainer_for(small_policy(32, 2), likes_ones, refresh_reference=2, learning_rate=1e-2)
    start = trainer.reference.lm_head.weight.clone()
    trainer.step()
    assert torch.equal(trainer.reference.lm_head.weight, start)
    assert not torch.equal(trainer.policy.lm_head.weight, start)
    trainer.step()
    assert torch.equal(trainer.reference.lm_head.weight, trainer.policy.lm_head.weight)
    assert not any(p.requires_grad for p in trainer.reference.parameters())


def test_kl_pulls_back_to_the_reference():
    def hardly_any_difference(prompt, texts):  # of groups without any, nothing is learnt
        return [1e-6 * (i % 2) for i, _ in enumerate(texts)]

    trainer = trainer_for(small_policy(32, 2), hardly_any_difference, kl_coef=1.0,
                          variant="dr_grpo", prompts=("1+2=",), group_size=32, learning_rate=3e-3)
    with torch.no_grad():
        trainer.policy.lm_head.weight += 0.3 * torch.randn_like(trainer.policy.lm_head.weight)
    history = [trainer.step()["kl"] for _ in range(30)]
    assert sum(history[-5:]) < 0.7 * sum(history[:5])


def test_routing_bias_moves_after_the_updates_only(monkeypatch):
    trainer = trainer_for(small_policy(32, 2), likes_ones, minibatches=2, gamma=0.5)
    biases = []
    monkeypatch.setattr(grpo_coded, "grpo_loss", lambda *a, **k: biases.append(
        [m.gate.e_score_correction_bias.clone() for m in trainer.policy.moe_layers().values()]
    ) or grpo_loss(*a, **k))
    trainer.step()
    assert all((bias == 0).all() for step in biases for bias in step)
    moved = [m.gate.e_score_correction_bias for m in trainer.policy.moe_layers().values()]
    assert all((bias.abs() == 0.5).any() for bias in moved)


def test_an_update_and_the_warm_up_add_the_balance_loss(monkeypatch):
    descended = {0.0: [], 1.0: []}
    for alpha, losses in descended.items():
        monkeypatch.setattr(
            grpo_coded, "descend", lambda _, loss, losses=losses: losses.append(loss) or 1.0
        )
        torch.manual_seed(0)
        policy = small_policy(32, 2)
        for moe in policy.moe_layers().values():
            moe.balance_loss = functools.partial(sequence_balance_loss, alpha=alpha)
        warm_up(policy, ["1+2="] * 8, [], seed=0, most_steps=1, batch=8)
        trainer = trainer_for(policy, likes_ones)
        updated(trainer, collected(trainer)[0])
    for without, with_it in zip(*descended.values(), strict=True):
        # The loss of each of two layers is about α.
        assert (with_it - without).item() == pytest.approx(2, rel=0.2)


def test_loads_of_several_passes_are_summed_before_the_bias_moves():
    """Pass 1 overloads expert 0, pass 2 expert 1; in all, expert 0 had the most."""
    layer = small_policy(32, 1).moe_layers()["layer 0"]
    loads = {}
    for chosen in ([0, 0, 0, 0, 0, 2, 3], [1, 1, 2, 3]):
        routing = Routing(None, torch.tensor(chosen)[:, None], None)
        add_loads(loads, [Routed(layer, routing, (len(chosen),), None)])
    assert loads[layer].tolist() == [5, 2, 2, 2]
    move_routing_bias(loads, 0.5)
    assert layer.gate.e_score_correction_bias.tolist() == [-0.5, 0.5, 0.5, 0.5]


def test_a_router_without_bias_is_left_alone():
    layer = MixtureOfExperts(8, 8, SwitchRouter(8, 4))
    before = {name: t.clone() for name, t in layer.state_dict().items()}
    move_routing_bias({layer: torch.tensor([3, 0, 0, 0])}, 0.5)
    assert all(torch.equal(t, before[name]) for name, t in layer.state_dict().items())


def test_an_update_cuts_its_gradient_to_norm_one():
    weight = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    assert descend(optimizer, 3 * weight[0] - 4 * weight[1]) == pytest.approx(5)
    torch.testing.assert_close(weight.detach(), torch.tensor([-0.6, 0.8]))
    before = weight.detach().clone()
    with pytest.raises(ValueError, match="the gradient is nan"):
        descend(optimizer, weight.sum() * math.nan)
    assert torch.equal(weight, before)


def test_an_update_knows_nothing_of_the_gradient_before():
    weight = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    assert [descend(optimizer, number * weight[0]) for number in (0.5, -0.25)] == [0.5, 0.25]
    assert weight.tolist() == [-0.25, 0]


def test_the_optimizer_is_adamw_without_decay_and_leaves_the_mtp_modules_out():
    policy = torch.nn.ModuleDict({name: torch.nn.Linear(1, 1, bias=False) for name in ("a", "mtp")})
    for momentum in (0.0, 0.5):
        optimizer = policy_optimizer(policy, Settings(learning_rate=0.1, momentum=momentum))
        assert [group["params"] for group in optimizer.param_groups] == [[policy["a"].weight]]
        torch.nn.init.constant_(policy["a"].weight, 5.0)
        wanted, mean, square = 5.0, 0.0, 0.0
        for step, gradient in enumerate((1.0, -2.0), start=1):
            policy["a"].weight.grad = torch.tensor([[gradient]])
            optimizer.step()
            mean = momentum * mean + (1 - momentum) * gradient
            square = 0.99 * square + 0.01 * gradient**2
            wanted -= 0.1 * mean / (1 - momentum**step) / (square / (1 - 0.99**step)) ** 0.5
        assert policy["a"].weight.item() == pytest.approx(wanted, abs=1e-5)


def test_trainer_improves_a_policy():
    trainer = trainer_for(small_policy(32, 2), likes_ones, prompts=("1+2=", "3+4="), group_size=16,
                          learning_rate=3e-3)
    rewards = [trainer.step()["reward"] for _ in range(25)]
    assert rewards[0] < 0.2 and sum(rewards[-3:]) / 3 > 0.8


@EVERY_VARIANT
@pytest.mark.parametrize("kl_coef", [0.0, 0.1])
def test_a_step_without_any_signal_leaves_the_policy(variant, kl_coef):
    """Groups of one, policy = reference."""
    policy = small_policy(32, 2)
    for moe in policy.moe_layers().values():
        moe.balance_loss = None
    trainer = trainer_for(policy, lambda p, texts: [0.5] * len(texts), variant=variant,
                          kl_coef=kl_coef, group_size=1)
    before = [p.detach().clone() for p in policy.parameters()]
    figures = trainer.step()
    assert figures["signal"] == 0 and all(math.isfinite(f) for f in figures.values())
    for one, other in zip(before, policy.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [("", "prompt 0 is empty"), ("1+1+1+1+1+1+", r"prompt 0, '1\+1.*, has 12 tokens: with 5 new")],
)
def test_prompts_that_cannot_be_are_named(prompt, message):
    with pytest.raises(ValueError, match=message):
        trainer_for(small_policy(32, 2), prompts=(prompt,))


def test_a_prompt_may_fill_the_context_or_any_room_if_there_is_no_limit():
    full = trainer_for(small_policy(32, 1), prompts=("1+1+1+1+1+1",))
    assert len(full.task.prompts[0]) + full.settings.max_new_tokens == full.policy.max_positions
    policy = small_policy(32, 1)
    policy.max_positions = None
    assert len(trainer_for(policy, prompts=("1+" * 20,)).task.prompts[0]) == 40


def test_a_task_without_prompts_is_named():
    with pytest.raises(ValueError, match="there are no prompts"):
        trainer_for(small_policy(32, 2), prompts=())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(variant="ppo"), "variant=ppo must be one of grpo, dr_grpo, dapo, gspo"),
        (dict(group_size=0), "group_size=0 must be at least 1"),
        (dict(minibatches=17), "minibatches=17 exceed the 16 completions"),
        (dict(temperature=0.0), "temperature=0.0 must be a number above 0"),
        (dict(learning_rate=math.nan), "learning_rate=nan"),
        (dict(momentum=1.0), "momentum=1.0"),
        (dict(resamplings=15), "resamplings=15"),
        (dict(kl_coef=math.inf), "kl_coef=inf"),
        (dict(variant="dapo", overlong_buffer=6), "overlong_buffer=6 must be from 1 to 5"),
    ],
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        Settings(**{**dict(prompts=4, group_size=4), **settings})


def test_the_smallest_settings_are_taken_and_what_is_below_is_not():
    least = dict(prompts=1, group_size=1, max_new_tokens=1, minibatches=1, passes=1, momentum=0.0,
                 kl_coef=0.0, refresh_reference=0, gamma=0.0, resamplings=0, overlong_buffer=1,
                 seed=0)
    assert Settings(**least, variant="dapo").prompts == 1
    for name, value in least.items():
        with pytest.raises(ValueError, match=f"{name}={value - 1}"):
            Settings(**{**least, name: value - 1})
    assert Settings(resamplings=14, prompts=4, group_size=4, minibatches=16).minibatches == 16
    assert Settings(variant="dapo", max_new_tokens=3, overlong_buffer=3).overlong_buffer == 3


def test_the_defaults_are_plain_grpo_and_the_sizes_of_the_documented_run():
    assert asdict(Settings()) == dict(
        variant="grpo", temperature=1, passes=1, precision="float32", rollout_logprobs=False,
        momentum=0, kl_coef=0, refresh_reference=0, gamma=0, seed=0,
        prompts=128, group_size=8, minibatches=2, max_new_tokens=5, learning_rate=4e-4,
        resamplings=2, overlong_buffer=1,
    )


def test_a_step_depends_on_seed_and_step_number_alone():
    """So a run goes on as if it had never stopped, once weights, optimizer and number are back."""

    def fresh():
        torch.manual_seed(0)
        return trainer_for(small_policy(32, 2), likes_ones, minibatches=2, kl_coef=0.01, gamma=0.01)

    unbroken = fresh()
    whole = [unbroken.step() for _ in range(4)]
    first, second = fresh(), fresh()
    for _ in range(2):
        first.step()
    second.policy.load_state_dict(first.policy.state_dict())
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    second.steps_done = first.steps_done
    torch.manual_seed(99)  # nothing depends on the state of the global generator
    assert [second.step() for _ in range(2)] == whole[2:]
    for one, other in zip(unbroken.policy.parameters(), second.policy.parameters(), strict=True):
        assert torch.equal(one, other)


def test_training_goes_up_over_ten_steps_and_down_to_a_tenth():
    settings = Settings(learning_rate=1.0)
    rates = [rate_of(settings, step, step / 100) for step in range(100)]
    assert rates[0] == 0.1 and rates[9] == pytest.approx(1 - 0.9 * 0.09)
    assert rates.index(max(rates)) == 9 and rates[-1] == pytest.approx(0.109)
    trainer = trainer_for(small_policy(32, 2), likes_ones, learning_rate=1.0)
    history = train(trainer.policy, trainer.task, trainer.settings, 2)
    assert [line["learning_rate"] for line in history] == [0.1, pytest.approx(0.2 * 0.55)]
    assert [line["step"] for line in history] == [1, 2]


# The task and the script
def test_warm_up_ends_after_its_steps_at_the_latest():
    prompts, watched, _ = addition_prompts()
    policy = small_policy(32, 2)
    assert warm_up(policy, prompts, watched[:50], seed=0, most_steps=3) == 3
    assert 0 <= sampled_accuracy(policy, watched[:50]) <= 0.5


@pytest.mark.parametrize(("share", "end", "tested"), [(0.24, 111, 3), (0.25, 100, 1)])
def test_warm_up_tests_every_five_steps_from_step_100_on(monkeypatch, share, end, tested):
    calls = []
    monkeypatch.setattr(grpo_coded, "sampled_accuracy",
                        lambda policy, prompts: calls.append(prompts) or share)
    steps = warm_up(small_policy(8, 1), ["1+2=", "3+4="], ["5+6="], 0, most_steps=111, batch=1)
    assert steps == end and calls == [["5+6="]] * tested


def test_an_answer_is_a_text_or_none_if_it_did_not_end(policy):
    prompts = ["1+2=", "12+34="] * 20
    given = answers(policy, prompts, seed=3)
    rollout = roll_out(policy, [encode(prompt) for prompt in prompts], 1, 5, END, 1.0,
                       torch.Generator().manual_seed(3))
    for text, ids in zip(given, rollout.completions.tolist(), strict=True):
        assert text == (decode(ids[: ids.index(END)]) if END in ids else None)
    assert None in given and any(given) and given != answers(policy, prompts, seed=4)
    assert answers(without_preference(), prompts[:1], temperature=0.0) == [None]  # 00000
    assert answers(policy, prompts) == answers(policy, prompts, temperature=1.0, seed=0)


def test_accuracy_is_the_share_of_right_answers(monkeypatch):
    asked = []
    monkeypatch.setattr(grpo_coded, "answers",
                        lambda policy, *rest: asked.append(rest) or ["64", None, "3", "46"])
    prompts = ["12+34=", "1+2=", "1+2=", "12+34="]
    assert sampled_accuracy(None, prompts, 0.5, 7) == 0.5
    assert sampled_accuracy(None, prompts) == 0.5
    assert asked == [(prompts, 0.5, 7), (prompts, 1.0, 0)]


def test_warm_up_makes_the_digits_of_the_sum_and_its_end_likelier(monkeypatch):
    written, losses, rates = [], [], []

    def record(policy, rollout, **options):
        written.append(rollout)
        return token_logprobs(policy, rollout, **options)

    def descend_and_record(optimizer, loss):
        losses.append(loss.item())
        rates.append(optimizer.param_groups[0]["lr"])
        return descend(optimizer, loss)

    monkeypatch.setattr(grpo_coded, "token_logprobs", record)
    monkeypatch.setattr(grpo_coded, "descend", descend_and_record)
    warm_up(small_policy(32, 1), ["1+2=", "12+34="], [], seed=0, most_steps=22, batch=2)
    assert {decode(ids) for ids in written[0].prompt_ids.tolist()} == {"1+2=", "12+34="}
    assert sorted(written[0].texts(decode)) == ["3", "64"] and written[0].mask[:, 0].all()
    assert losses[0] == pytest.approx(math.log(END + 1), abs=0.4) and losses[-1] < losses[0] - 0.5
    assert [rates[step] for step in (0, 9, 19, 21)] == pytest.approx([1e-4, 1e-3, 2e-3, 2e-3])


def test_the_small_policy_uses_two_of_four_experts_and_a_shared_one():
    policy = small_policy(32, 2)
    layers = policy.moe_layers()
    assert policy.lm_head.out_features == 13  # ten digits, "+", "=" and the end
    assert list(layers) == ["layer 0", "layer 1"]
    for layer in layers.values():
        assert (layer.gate.num_experts, layer.gate.num_experts_per_tok) == (4, 2)
        assert layer.shared_experts.down_proj.in_features == 32 == layer.experts.down_proj.shape[2]


def test_the_curves_are_figures_of_a_step():
    figures = trainer_for(small_policy(32, 1), likes_ones).step()
    assert list(CURVES) == ["reward", "kl", "entropy", "length"] and CURVES.keys() <= figures.keys()


def test_warm_up_sees_training_prompts_only(monkeypatch):
    prompts, watched, _ = addition_prompts()
    seen = []
    monkeypatch.setattr(grpo_coded, "sum_of", lambda p: seen.append(p) or sum_of(p))
    warm_up(small_policy(32, 2), prompts, watched, seed=0, most_steps=2)
    assert len(seen) == 256 and set(seen) <= set(prompts)


@pytest.mark.integration
def test_script(check_script, tmp_path):
    check_script("grpo_coded.py", ["--steps", "0"], "--steps=0 must be at least 1")
    assert (tmp_path / "pictures" / "grpo.png").stat().st_size > 1000
    assert [path.name for path in tmp_path.iterdir()] == ["pictures"]  # nothing else is stored


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--picture", "x.txt"], "--picture=x.txt must end in"),
        (["--group-size", "0"], "group_size=0"),
        (["--variant", "ppo"], "invalid choice"),
    ],
)
def test_wrong_flags_are_named_before_any_work(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit_info:
        grpo_coded.main(arguments)
    assert exit_info.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("how", ["completion", "token", "constant"])
def test_the_mean_of_a_single_token_is_the_token(how):
    assert averaged(torch.tensor([[7.0]]), torch.tensor([[True]]), how) == 7


def test_the_mean_of_a_single_record_is_the_record():
    assert means([{"a": 3.0}], "a") == {"a": 3.0}

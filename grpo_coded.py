"""Phase 9: group relative policy optimisation (GRPO): learning from rewards instead of a text.

A policy is a language model that writes a completion after a prompt. It writes G completions of
each prompt, and a program rewards each by a rule. Training makes a completion likelier if its
reward is above the mean of its group, and rarer if it is below. PPO compares with the estimate of
a second network, the value network; GRPO needs only the group. One set of completions serves
several updates. After the first update, the policy differs from the policy that wrote them. The
ratio of the two probabilities corrects each token's gradient for this. Once its ratio has moved far
in the direction of the advantage, a token is clipped: it gets no gradient. A penalty can keep the
policy near a frozen copy, the reference.

The script builds this loss in rungs, one change at a time:

    1  REINFORCE        J = 1/G Σ_i r_i Σ_t log π(o_i,t)
    2  group baseline   Â_i = (r_i − mean(r)) / std(r) in place of r_i   over the group
    3  ratio and clip   ρ_i,t = π(o_i,t) / π_old(o_i,t)
                        min{ρ Â, clip(ρ, 1 − ε, 1 + ε) Â} in place of Â log π
    4  mean over tokens 1/|o_i| Σ_t in place of Σ_t
    5  KL penalty       − β k3,  k3_i,t = π_ref/π − log(π_ref/π) − 1   ≥ 0, estimates KL(π ‖ π_ref)
    6  variants         dr_grpo  Â without std; Σ_t of rung 3, divided by a constant
                        dapo     ε 0.2 below, 0.28 above; the mean is over all tokens; new prompts
                                 replace those whose group has equal rewards; completions that run
                                 out of room are punished
                        gspo     one ρ for a completion, (π(o)/π_old(o))^(1/|o|); ε 0.0003 below,
                                 0.0004 above

r_i is the reward of completion o_i, o_i,t its token number t, |o_i| its length, Â_i its advantage.

Rung 1 estimates ∇ E[r]. Rung 2 without its std also estimates it, up to a factor. The other changes
give up some of this accuracy for steadier steps: with std, prompts count unequally; the clip
leaves tokens out; with the mean over tokens, each token of a long completion counts less.

Every loss is −J. Papers: REINFORCE: Williams (1992); the clip: PPO, Schulman et al. (2017),
arXiv:1707.06347, equation 7; GRPO: DeepSeekMath (2024), arXiv:2402.03300, section 4.1, equations
3–4; k3: Schulman (2020), "Approximating KL divergence"; Dr. GRPO: Liu et al. (2025),
arXiv:2503.20783, section 3; DAPO: Yu et al. (2025), arXiv:2503.14476, section 3; GSPO: Zheng et
al. (2025), arXiv:2507.18071, section 4.1, its ε: section 5.1.
Simplified: the task is small enough for a CPU. It is the sum of two numbers from 0 to 99, written
last digit first (12+34=64).
Before: phases 5 to 7. Reading 40 minutes, running under 3 minutes.

Dimensions: B batch (all completions) · G completions of a prompt · L completion length · T query
positions · W vocabulary. P is the length of the prompts.

Run:  python grpo_coded.py [--seed 1] [--variant dapo] [--steps 200]     under three minutes
      python grpo_coded.py --quick                                      the same as a smoke test
      python benchmarks/grpo.py                         all variants, a collapse, and the routing
"""

import functools
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F

from lesson import batches, check_settings, demonstration, flag, panels, setting, shown_steps
from lesson.batches import add_loads, completion_mask, drawn_from, grouped, padded, step_generator
from lesson.checks import check_no_more, check_ranges, check_rows, entry_of, require
from moe_coded import MixtureOfExperts, TopKRouter, TransformerBlock, sequence_balance_loss
from mtp_coded import CausalLM, Sampling
from rope_coded import RotaryEmbedding, RotaryLatentAttention


# %% Rung 1: REINFORCE. Rewarded answers become likelier
def reinforce_loss(logp, rewards, mask):
    """−J of rung 1: logp (B, L) of the tokens drawn, rewards (B,), mask (B, L) → scalar.

    The reward needs no gradient: ∇ E[r] = E[r ∇ log π(o)]. Here log π(o) is the sum over the
    completion's tokens, and completions drawn from π estimate this mean. One completion has two
    tokens, with log π of −1 and −2, and the reward 2. Another has one token, with −3, and the
    reward 1. The loss is (2 · 3 + 1 · 3) / 2 = 4.5. It pulls the tokens of the first twice as hard.
    """
    return -(rewards * logp.masked_fill(~mask, 0.0).sum(dim=1)).mean()


# %% Rung 2: the group's mean is the baseline. Is a completion better than the others?
def group_advantages(rewards, group_size, normalize_std=True):
    """Rewards (B,) → advantages (B,); `group_size` neighbours complete the same prompt.

    r − mean of the group; with `normalize_std` divided by its sample std + 1e-6 (DeepSeekMath,
    section 4.1.2). Rewards 1, 0, 0, 3 of one group have mean 1 and std 1.41: the advantages are
    0, −0.71, −0.71, 1.41. They are exactly 0 if all rewards of a group are equal, as in a group
    of one.
    Raises: ValueError for rewards that are not (B,) or not finite, or a B that G does not divide.
    """
    groups = grouped(rewards, group_size, "rewards", "group_size")
    advantages = groups - groups.mean(dim=1, keepdim=True)
    if normalize_std and group_size > 1:
        advantages = advantages / (groups.std(dim=1, keepdim=True) + 1e-6)
    # The mean of equal rewards may be off in its last bit: a std near 0 would magnify that.
    return advantages.flatten().masked_fill(~has_signal(groups.flatten(), group_size), 0.0)


def has_signal(rewards, group_size):
    """(B,) bool: True where the rewards of the row's group differ (DAPO, section 3.2).

    Rewards 1, 0, 2, 2 in groups of two give True, True, False, False.
    """
    groups = rewards.view(-1, group_size)
    return (groups.amin(dim=1) != groups.amax(dim=1)).repeat_interleave(group_size)


# %% Rung 3: several updates from one rollout, corrected by a ratio that a clip bounds
def clipped_gain(ratio, advantages, clip_low, clip_high):
    """min{ρ Â, clip(ρ) Â}: no gradient once ρ is far enough above 1 (Â > 0) or below 1 (Â < 0).

    ε = 0.2: with Â = 1, ratio 1.5 gives 1.2 (clipped), and 0.5 gives 0.5. With Â = −1, 1.5 gives
    −1.5, and 0.5 gives −0.8 (clipped). A token that moved the wrong way keeps its gradient.
    """
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    return torch.minimum(ratio * advantages, clipped * advantages)


def clipped_loss(logp, old_logp, advantages, mask, clip=0.2):
    """−J of rung 3: log π and log π_old (B, L), advantages (B,), mask (B, L) → scalar.

    At ρ = 1 its gradient is that of rung 2, since ∇ρ = ρ ∇ log π.
    """
    ratio_BL = (logp - old_logp.detach()).masked_fill(~mask, 0.0).exp()
    gain_BL = clipped_gain(ratio_BL, advantages.unsqueeze(1), clip, clip)
    return -gain_BL.masked_fill(~mask, 0.0).sum(dim=1).mean()


# %% Rung 4: the mean over tokens. How much does a completion's length count?
def averaged(values, mask, how="completion", max_length=None):
    """One number from values (B, L) of the tokens that count, where mask (B, L) is True.

    "completion" (GRPO): the mean of each completion's tokens, then the mean of the completions. A
    token of a long one counts less: unlike the sum of rung 1, this does not estimate ∇ E[r].
    "constant" (Dr. GRPO): each completion's sum divided by `max_length` (default L), then the mean
    of the completions: the sum again, up to a constant factor. "token" (DAPO): the mean of all
    tokens.
    Values 1, 2, 3 of one completion and 5 of another, max_length 4, give (2 + 5) / 2, (6 + 5) / 8
    and 11 / 4.
    """
    values_BL = values.masked_fill(~mask, 0.0)
    if how == "completion":
        return (values_BL.sum(dim=1) / mask.sum(dim=1).clamp(min=1)).mean()
    if how == "constant":
        return values_BL.sum() / (len(mask) * (max_length or mask.shape[1]))
    return values_BL.sum() / mask.sum().clamp(min=1)


# %% Rung 5: a penalty for leaving the frozen reference
def k3(logp, ref_logp):
    """π_ref/π − log(π_ref/π) − 1: never negative, its mean over tokens drawn from π is the KL.

    If π = 2 π_ref, it is 1/2 − log(1/2) − 1 = 0.19; if π = π_ref / 2, it is 2 − log 2 − 1 = 0.31.
    From the second update on, the tokens are drawn from π_old, and the mean is only nearly the KL.
    """
    log_odds = ref_logp.detach() - logp
    return log_odds.exp() - log_odds - 1


# %% Rung 6: the variants, and how each differs
@dataclass
class Variant:
    """The bounds ε below and above 1, and the other settings in which variants differ.

    `average`: the `how` of `averaged`. `sequence_ratio`: a completion has one ρ, the geometric mean
    of its tokens' ρ: 1.5, 1 and 0.5 give 0.75^(1/3) = 0.91. `resample`: new prompts replace those
    whose group has no signal. `overlong`: completions that run out of room are punished.
    """

    clip_low: float = 0.2
    clip_high: float = 0.2
    normalize_std: bool = True
    average: str = "completion"
    sequence_ratio: bool = False
    resample: bool = False
    overlong: bool = False


VARIANTS = {
    "grpo": Variant(),  # the paper does not give its ε: 0.2 is PPO's
    "dr_grpo": Variant(normalize_std=False, average="constant"),
    "dapo": Variant(clip_high=0.28, average="token", resample=True, overlong=True),
    "gspo": Variant(clip_low=3e-4, clip_high=4e-4, sequence_ratio=True),
}


def overlong_penalty(lengths, max_length, buffer):
    """DAPO, equation 13: 0 up to max_length − buffer tokens, then linearly down to −1.

    max_length 10, buffer 4: the lengths 6, 7, 8 and 10 give 0, −0.25, −0.5 and −1.
    """
    check_ranges(buffer=(1, buffer, max_length))
    return -((lengths - (max_length - buffer)) / buffer).clamp(0.0, 1.0)


# %% All rungs in one loss, token by token: the naive reference
def naive_grpo_loss(
    logp, old_logp, ref_logp, advantages, mask, *, clip_low, clip_high, kl_coef, max_length, variant
):
    """`grpo_loss` completion by completion and token by token, all settings given."""
    total, completions = 0.0, len(mask)
    for i in range(completions):
        counted = [t for t in range(mask.shape[1]) if mask[i, t]]
        divisors = {
            "completion": completions * len(counted),
            "constant": completions * max_length,
            "token": int(mask.sum()),
        }
        for t in counted:
            log_ratio = logp[i, t] - old_logp[i, t]
            if VARIANTS[variant].sequence_ratio:
                log_ratio = sum(logp[i, u] - old_logp[i, u] for u in counted)
                log_ratio = log_ratio / len(counted)
            ratio = log_ratio.exp()
            clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
            gain = torch.minimum(ratio * advantages[i], clipped * advantages[i])
            if kl_coef:
                log_odds = ref_logp[i, t] - logp[i, t]
                gain = gain - kl_coef * (log_odds.exp() - log_odds - 1)
            total = total - gain / divisors[VARIANTS[variant].average]
    return torch.as_tensor(total)


# %% All rungs in one loss, all tokens at once: the efficient version
def grpo_loss(
    logp, old_logp, ref_logp, advantages, mask, *, clip_low=None, clip_high=None, kl_coef=0.0,
    max_length=None, variant="grpo",
):
    """−J: (B, L) log-probabilities and (B,) advantages → (loss, `loss_figures`).

    Args:
        logp: log π of the tokens by the policy that learns; only this one gets a gradient.
        old_logp: by the policy that drew them. ref_logp: by the reference; None if `kl_coef` is 0.
        mask: (B, L), True for the tokens that count: `completion_mask`. Values elsewhere, even NaN,
            change nothing.
        clip_low, clip_high: how far ρ may move below and above 1; None: the variant's own ε.
        kl_coef: β. max_length: the constant length of dr_grpo, default L.
    Raises: ValueError for wrong shapes, an unknown variant, or settings out of range.
    """
    chosen = entry_of(VARIANTS, variant=variant)
    require(ref_logp is not None or not kl_coef, f"kl_coef={kl_coef} needs ref_logp")
    check_rows("(B, L)", dict(advantages=advantages),
               logp=logp, old_logp=old_logp, ref_logp=ref_logp, mask=mask)
    check_ranges(clip_low=(0, clip_low, 1), clip_high=(0, clip_high, math.inf),
                 kl_coef=(0, kl_coef, math.inf), max_length=(1, max_length, math.inf))
    mask, advantages_B1 = mask.bool(), advantages.detach().unsqueeze(1)
    low = chosen.clip_low if clip_low is None else clip_low
    high = chosen.clip_high if clip_high is None else clip_high

    log_ratio_BL = (logp - old_logp.detach()).masked_fill(~mask, 0.0)
    log_ratio_BL = log_ratio_BL.clamp(-20, 20)  # e^88 is too large for FP32
    if chosen.sequence_ratio:
        lengths_B1 = mask.sum(dim=1, keepdim=True).clamp(min=1)
        log_ratio_BL = (log_ratio_BL.sum(dim=1, keepdim=True) / lengths_B1).expand_as(mask)
    ratio_BL = log_ratio_BL.exp()
    gain_BL = clipped_gain(ratio_BL, advantages_B1, low, high)
    if kl_coef:
        gain_BL = gain_BL - kl_coef * k3(*(x.masked_fill(~mask, 0.0) for x in (logp, ref_logp)))
    loss = -averaged(gain_BL, mask, chosen.average, max_length)
    ratio = ratio_BL[:, :1] if chosen.sequence_ratio else ratio_BL
    return loss, loss_figures(ratio, logp, ref_logp, advantages_B1, mask, low, high)


@torch.no_grad()
def loss_figures(ratio, logp, ref_logp, advantages, mask, clip_low, clip_high):
    """Figures to watch during training; ratio (B, L), or (B, 1) for whole completions → floats.

    `ratio`: mean ρ. `clip_low`, `clip_high`: shares of tokens (gspo: completions) that lost their
    gradient to the clip. `kl`: mean k3, None without ref_logp. `entropy`: mean −log π of the
    tokens drawn, in nats.
    """
    counted = mask if ratio.shape == mask.shape else mask.any(dim=1, keepdim=True)
    return {
        "ratio": mean_of(ratio, counted),
        "clip_low": mean_of((ratio < 1 - clip_low) & (advantages < 0), counted),
        "clip_high": mean_of((ratio > 1 + clip_high) & (advantages > 0), counted),
        "kl": None if ref_logp is None else mean_of(k3(logp, ref_logp), mask),
        "entropy": mean_of(-logp, mask),
    }


def rollout_figures(drawn, group_size):
    """Figures of the policy that drew these completions.

    `reward`, `length` (in tokens): means over the completions. `signal`: the share of completions
    in groups whose rewards differ. `entropy`: as in `loss_figures`. `completions`: their number.
    """
    return {
        "reward": drawn.rewards.mean().item(),
        "entropy": mean_of(-drawn.logp, drawn.mask),
        "length": drawn.mask.sum(dim=1).float().mean().item(),
        "signal": has_signal(drawn.rewards, group_size).float().mean().item(),
        "completions": len(drawn.mask),
    }


CURVES = dict(reward="mean reward", kl="KL to the reference (nats per token)",
              entropy="entropy (nats per token)", length="completion length (tokens)")


def mean_of(values, mask):
    """The mean over all tokens that count, a float; 0 if none does."""
    return averaged(values, mask, "token").item()


# %% The rollout: G completions of each prompt, generated with a cache
class Rollout(NamedTuple):
    """The completions of a step, one in each row; rows of the same prompt are neighbours."""

    prompt_ids: torch.Tensor  # (B, P), padded on the left
    prompt_mask: torch.Tensor  # (B, P): False for padding
    completions: torch.Tensor  # (B, L) ids
    mask: torch.Tensor  # (B, L): True for the tokens that count
    logp: torch.Tensor | None = None  # (B, L): as computed while drawing, with the cache
    rewards: torch.Tensor | None = None  # (B,), once judged
    advantages: torch.Tensor | None = None  # (B,), once judged

    rows, texts = batches.picked, batches.texts  # rollout.rows(chosen), rollout.texts(decode)


def roll_out(
    policy, prompts, group_size, max_new_tokens, eos_token_id, temperature=1.0, generator=None
):
    """Draws `group_size` completions of each prompt (a list of lists of ids) → `Rollout`."""
    prompt_ids, real = padded(prompts, eos_token_id, policy.lm_head.weight.device)
    drawn = policy.complete(
        prompt_ids, max_new_tokens, Sampling(temperature, generator=generator),
        attention_mask=None if bool(real.all()) else real, eos_token_id=eos_token_id,
        pad_token_id=eos_token_id, copies=group_size,  # each prompt is read once
    )
    real_BP = real.repeat_interleave(group_size, dim=0)
    prompt_ids_BP, completions_BL = drawn.ids.tensor_split([prompt_ids.shape[1]], dim=1)
    mask_BL = completion_mask(completions_BL, eos_token_id)
    return Rollout(prompt_ids_BP, real_BP, completions_BL, mask_BL, drawn.logprobs)


def token_logprobs(policy, rollout, temperature=1.0, precision="float32", routed=None):
    """log π (B, L) of a rollout's completions, all tokens in one pass; FP32.

    The position before a token predicts it: the prompt's last predicts the first. After a prompt
    of 4 tokens, positions 3 … T − 2 predict tokens 4 … T − 1.
    precision: of the matrix products. routed: a list that collects one `Routed` per MoE layer.
    """
    prompt_ids_BP, prompt_mask_BP, completions_BL, mask_BL = rollout[:4]
    ids_BT = torch.cat([prompt_ids_BP, completions_BL], dim=1)
    real_BT = torch.cat([prompt_mask_BP, mask_BL], dim=1)
    with torch.autocast(ids_BT.device.type, getattr(torch, precision), precision != "float32"):
        hidden_BTD = policy.hidden_states(ids_BT, real_BT, routed=routed)
        logits_BLW = policy.lm_head(hidden_BTD[:, prompt_ids_BP.shape[1] - 1 : -1])
    logits = logits_BLW.flatten(0, 1).float() / temperature
    loss = F.cross_entropy(logits, completions_BL.flatten(), reduction="none")
    return -loss.view(completions_BL.shape)


# %% The judgement: each completion gets a reward, and each reward becomes an advantage
class Task(NamedTuple):
    """The task that a policy learns, and how its token ids become text."""

    reward: Callable  # (prompt, completions of one group), all texts → a number for each
    prompts: list  # of lists of ids
    decode: Callable  # ids → text
    eos_token_id: int


def judged(policy, prompts, task, settings, generator):
    """The rollout of `prompts` (lists of ids) with its rewards and advantages.

    dapo adds the overlong penalty before it compares the completions: of two that are right, the
    one that ran out of room gets the lower advantage. The reported rewards leave the penalty out.
    """
    s, variant = settings, VARIANTS[settings.variant]
    rollout = roll_out(policy, prompts, s.group_size, s.max_new_tokens, task.eos_token_id,
                       s.temperature, generator)
    texts, rewards = rollout.texts(task.decode), []
    for i, prompt in enumerate(prompts):
        group = texts[i * s.group_size : (i + 1) * s.group_size]
        rewards += task.reward(task.decode(prompt), group)
    rewards = shaped = torch.tensor(rewards, device=rollout.mask.device)
    if variant.overlong:
        lengths = rollout.mask.sum(dim=1)
        shaped = rewards + overlong_penalty(lengths, s.max_new_tokens, s.overlong_buffer)
    advantages = group_advantages(shaped, s.group_size, variant.normalize_std)
    return rollout._replace(rewards=rewards, advantages=advantages)


def collect(policy, task, settings, step):
    """Returns (the rollout to learn from, everything drawn). They differ if dapo draws new prompts.

    If 50 of 128 groups have signal, they are kept, and 78 prompts are drawn. If 30 of these have
    signal, 80 are kept, and 48 are drawn. This stops at 128, or after `resamplings` new draws.
    """
    s, resample = settings, VARIANTS[settings.variant].resample
    drawn, kept, wanted = [], [], s.prompts
    for attempt in range(1 + s.resamplings if resample else 1):
        generator = step_generator(s.seed, step, attempt, policy.lm_head.weight.device)
        prompts = drawn_from(task.prompts, wanted, generator)
        drawn.append(judged(policy, prompts, task, s, generator))
        signal = has_signal(drawn[-1].rewards, s.group_size)
        kept.append(drawn[-1].rows(signal) if resample else drawn[-1])
        wanted -= len(kept[-1].mask) // s.group_size
        if wanted == 0:
            break
    return batches.joined(kept), batches.joined(drawn)


# %% One step, whole: draw, judge, update
def grpo_step(policy, reference, optimizer, task, settings, step):
    """Step number `step`, counted from 0: changes the policy and returns the step's figures.

    The figures are those of `rollout_figures` and `update`, and `kl`: that of the policy before
    the update, on one completion of each prompt.
    """
    s, (rollout, drawn) = settings, collect(policy, task, settings, step)
    compared = rollout.rows(slice(0, None, s.group_size))
    kl = mean_of(k3(compared.logp, fixed_logprobs(reference, compared, s)), compared.mask)
    figures = {"step": step + 1, **rollout_figures(drawn, s.group_size), "kl": kl}
    figures |= update(policy, reference, optimizer, rollout, s, step)
    if s.refresh_reference and (step + 1) % s.refresh_reference == 0:
        reference.load_state_dict(policy.state_dict())
    return {**figures, "learning_rate": optimizer.param_groups[0]["lr"]}


def update(policy, reference, optimizer, rollout, settings, step):
    """One update for each minibatch, then one of the routing bias; returns the mean figures.

    A completion with zero advantage has zero gradient: it is skipped, but counted in the average.
    With a KL penalty, it has a gradient, so only groups without signal are skipped. `weight` is the
    share of the completions (dapo: of the tokens) that are left: if 2 of 8 are left,
    weight = 1/4 turns the mean of 2 into a mean of 8. The balance loss and the load of the experts
    leave out the skipped completions.

    dapo's mean over all tokens is computed in each minibatch: a token of a minibatch with few
    tokens counts for more than a token of a minibatch with many.
    """
    s, loads, history = settings, {}, []
    taken = has_signal(rollout.advantages, s.group_size) if s.kl_coef else rollout.advantages != 0
    counts = rollout.mask.sum(dim=1) if VARIANTS[s.variant].average == "token" else None
    parts, weight = batches.weighed_parts(taken, counts, s.minibatches, s.passes, s.seed, step)
    # log π_old is computed before the first update, in the same minibatches: the first ratio is 1.
    # If there is only one update, the policy is still π_old when its ratio is computed.
    first, ref_logp = parts[: s.minibatches], None
    old_logp = rollout.logp if s.rollout_logprobs else None
    if old_logp is None and len(parts) > 1:
        old_logp = fixed_logprobs(policy, rollout, s, first)
    if s.kl_coef:
        ref_logp = fixed_logprobs(reference, rollout, s, first)
    for rows in parts:
        minibatch, routed = rollout.rows(rows), []
        logp = token_logprobs(policy, minibatch, s.temperature, s.precision, routed)
        loss, figures = grpo_loss(
            logp, logp.detach() if old_logp is None else old_logp[rows],
            None if ref_logp is None else ref_logp[rows], minibatch.advantages, minibatch.mask,
            kl_coef=s.kl_coef, variant=s.variant,
        )
        balance_loss = sum(layer.balance_loss() for layer in routed)
        norm = descend(optimizer, weight * loss + balance_loss)
        add_loads(loads, routed)
        history.append({**figures, "loss": weight * loss.item(), "gradient_norm": norm})
    move_routing_bias(loads, s.gamma)
    return batches.means(history, "loss", "gradient_norm", "ratio", "clip_low", "clip_high")


@torch.no_grad()
def fixed_logprobs(policy, rollout, settings, parts=None):
    """log π (B, L) without gradient, part by part; `parts`: lists of rows (default: all rows)."""
    logp, s = torch.zeros_like(rollout.logp), settings
    size = math.ceil(s.prompts * s.group_size / s.minibatches)
    for rows in parts or batches.runs(len(logp), size):
        logp[rows] = token_logprobs(policy, rollout.rows(rows), s.temperature, s.precision)
    return logp


def descend(optimizer, loss):
    """One update with the gradient's norm limited to 1; returns the norm before the limit.

    The gradient (3, −4) has norm 5 and becomes (0.6, −0.8): one large loss cannot dominate.
    """
    optimizer.zero_grad()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0).item()
    require(math.isfinite(norm), f"the gradient is {norm}")
    optimizer.step()
    return norm


def move_routing_bias(loads, gamma):
    """Call it after a step's last update: an earlier call would send tokens to other experts.

    Loads of 5, 2, 2 and 2 and γ = 0.5 move the bias by −0.5, 0.5, 0.5 and 0.5: phase 5's rule.
    """
    for layer, load in loads.items():
        if isinstance(layer.gate, TopKRouter):
            layer.gate.update_bias(load, gamma)


# %% A step's settings, and its optimizer
@dataclass
class Settings:
    """A step: `prompts` × `group_size` completions, `passes` × `minibatches` updates."""

    variant: str = setting("grpo", "which loss", choices=tuple(VARIANTS))
    prompts: int = setting(128, "prompts a step", at_least=1)
    group_size: int = setting(8, "completions of each prompt", at_least=1)
    max_new_tokens: int = setting(5, at_least=1)  # the longest completion
    temperature: float = setting(1.0, above=0)  # of the completions drawn
    minibatches: int = setting(2, "updates in one pass over a rollout", at_least=1)
    passes: int = setting(1, "passes over a rollout", at_least=1)
    learning_rate: float = setting(4e-4, "its highest value", above=0)
    momentum: float = setting(0.0, "AdamW's beta 1", at_least=0, below=1)
    kl_coef: float = setting(0.0, "β, the penalty's weight", at_least=0)
    refresh_reference: int = setting(0, "steps between its refreshes, 0: never", at_least=0)
    rollout_logprobs: bool = setting(False, "π_old from the rollout, not from a training pass")
    gamma: float = setting(0.0, "how far the routing bias moves after a step", at_least=0)
    resamplings: int = setting(2, at_least=0, below=15)  # how often dapo may draw again
    overlong_buffer: int = setting(1, at_least=1)  # tokens before the end that dapo punishes
    precision: str = "float32"  # of the training forward
    seed: int = setting(0, at_least=0)

    def __post_init__(self):
        check_settings(self)
        if VARIANTS[self.variant].overlong:
            check_ranges(overlong_buffer=(1, self.overlong_buffer, self.max_new_tokens))
        check_no_more(minibatches=self.minibatches, completions=self.prompts * self.group_size)


def policy_optimizer(policy, settings):
    """AdamW on all weights but the MTP modules', which take no part in a completion."""
    trained = [p for name, p in policy.named_parameters() if not name.startswith("mtp.")]
    # No momentum by default: it would keep applying gradients computed for older policies.
    return torch.optim.AdamW(trained, lr=settings.learning_rate, betas=(settings.momentum, 0.99),
                             weight_decay=0.0, fused=True)


# %% The task: sums of two numbers from 0 to 99, written down as on paper, last digit first
CHARACTERS = "0123456789+="
END = len(CHARACTERS)  # end of sequence, and padding


def encode(text):
    return [CHARACTERS.index(character) for character in text]


def decode(ids):
    return "".join(CHARACTERS[i] if i < END else "" for i in ids)


def exact_match(prompt, completions):
    """1 for the right sum, 0 for anything else: prompt "12+34=", completion "64" (no end)."""
    return [float(completion == sum_of(prompt)) for completion in completions]


def sum_of(prompt):
    """The answer to "a+b=", its last digit first: each digit then needs only the carry of the
    digit before."""
    first, second = prompt.rstrip("=").split("+")
    return str(int(first) + int(second))[::-1]


def addition_prompts():
    """All 10,000 prompts "a+b=" in three parts, the same for all runs.

    Returns: 8,000 to learn from, 1,000 that decide when the warm-up ends, 1,000 held out.
    """
    prompts = [f"{first}+{second}=" for first in range(100) for second in range(100)]
    random.Random(0).shuffle(prompts)
    return prompts[2000:], prompts[1000:2000], prompts[:1000]


# %% A policy that knows a little: GRPO can only learn if some completions are right
def small_policy(width=96, layers=3):
    """A small model of phases 4 to 7: rotary latent attention, two of four experts, one shared."""
    rotary = RotaryEmbedding(16)

    def block():
        attention = RotaryLatentAttention(
            width, num_attention_heads=4, kv_lora_rank=48, qk_nope_head_dim=16,
            qk_rope_head_dim=16, v_head_dim=24, rotary=rotary,
        )
        balance = functools.partial(sequence_balance_loss, alpha=1e-3)
        router = TopKRouter(width, n_routed_experts=4, num_experts_per_tok=2)
        experts = MixtureOfExperts(width, width, router, n_shared_experts=1, balance_loss=balance)
        return TransformerBlock(attention, experts)

    policy = CausalLM(END + 1, width, [block() for _ in range(layers)], max_positions=16)
    # About 1/√width. With 0.02, as in large models, this one learns ten times more slowly.
    policy.init_weights(std=0.08)
    return policy


def warm_up(policy, prompts, watched, seed, most_steps, target=0.25, batch=128):
    """Supervised steps on sums until `target` of the sampled answers are right; returns the steps.

    From step 100 on, it tests the `watched` prompts every five steps. It ends after `most_steps`.
    """
    device, source = policy.lm_head.weight.device, random.Random(seed)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=2e-3, betas=(0.0, 0.99), weight_decay=0.0)
    for step in shown_steps(most_steps, "warm-up", start=1):
        optimizer.param_groups[0]["lr"] = 2e-3 * min(1.0, step / 20)
        chosen, routed = source.sample(prompts, batch), []
        sums = [encode(sum_of(prompt)) + [END] for prompt in chosen]
        written = Rollout(*padded([encode(prompt) for prompt in chosen], END, device),
                          *padded(sums, END, device, side="right"))
        logp = token_logprobs(policy, written, routed=routed)
        balance_loss = sum(layer.balance_loss() for layer in routed)
        descend(optimizer, -logp[written.mask].mean() + balance_loss)
        if step % 5 == 0 and step >= 100 and sampled_accuracy(policy, watched) >= target:
            break
    return step


def answers(policy, prompts, temperature=1.0, seed=0):
    """One completion of each prompt, as text; None if it did not reach its end."""
    generator = torch.Generator(device=policy.lm_head.weight.device).manual_seed(seed)
    ids = [encode(prompt) for prompt in prompts]
    rollout = roll_out(policy, ids, 1, 5, END, temperature, generator)
    return [decode(row) if END in row else None for row in rollout.completions.tolist()]


def sampled_accuracy(policy, prompts, temperature=1.0, seed=0):
    """The share of the prompts whose sampled answer is the sum."""
    given = answers(policy, prompts, temperature, seed)
    right = [exact_match(p, [a])[0] for p, a in zip(prompts, given, strict=True)]
    return sum(right) / len(right)


# %% A run
def rate_of(settings, step, used):
    """The learning rate: it rises for ten steps and falls to a tenth as `used` goes from 0 to 1."""
    return settings.learning_rate * min(1.0, (step + 1) / 10) * (1 - 0.9 * used)


def train(policy, task, settings, steps):
    """Returns the figures of every step. The policy as it is now becomes the reference."""
    reference = policy.copy()
    optimizer, history = policy_optimizer(policy, settings), []
    for step in shown_steps(steps, settings.variant, history, "reward"):
        optimizer.param_groups[0]["lr"] = rate_of(settings, step, step / steps)
        history.append(grpo_step(policy, reference, optimizer, task, settings, step))
    return history


# %% The proofs
def check_baseline(demo, groups=20_000, G=4):
    """Rung 2 has the direction of rung 1 with less noise. A completion is one token of 8."""
    log_p = torch.randn(8, device=demo.device).log_softmax(dim=0)
    p, prizes = log_p.exp(), 10 + torch.rand(8, device=demo.device)
    drawn_B = torch.multinomial(p, groups * G, replacement=True)
    logp, rewards = log_p[drawn_B].unsqueeze(1).requires_grad_(), prizes[drawn_B]
    score_BW = F.one_hot(drawn_B, 8) - p  # ∇ log π(o) by the 8 logits
    true_W = p * (prizes - (p * prizes).sum())  # ∇ E[r]
    noise = {}
    advantages = group_advantages(rewards, G, normalize_std=False)
    for name, signal in {"rewards": rewards, "advantages": advantages}.items():
        loss = reinforce_loss(logp, signal, torch.ones_like(logp, dtype=torch.bool))
        (gradient_B1,) = torch.autograd.grad(loss, logp)
        estimates = (-len(logp) * gradient_B1 * score_BW).view(groups, G, 8).mean(dim=1)
        noise[name] = estimates.std(dim=0).norm().item()
    # The group's mean contains the completion itself: this removes 1/G of the gradient.
    off = (estimates.mean(dim=0) - (1 - 1 / G) * true_W).norm() / true_W.norm()
    demo.check("a baseline: the same direction, less noise", "∇ by 8 logits",
               f"noise {noise['rewards']:.2f} → {noise['advantages']:.2f}, mean off by {off:.1%}",
               off < 0.1 and noise["advantages"] < 0.2 * noise["rewards"])


def check_rungs(demo):
    """A rung equals the one below it wherever its change has no effect."""
    logp = torch.randn(6, 5, device=demo.device, requires_grad=True)
    lengths_B1 = torch.tensor([[5], [3], [1], [2], [4], [5]], device=demo.device)
    mask = torch.arange(5, device=demo.device) < lengths_B1
    advantages = group_advantages(torch.rand(6, device=demo.device), 3)
    losses = [
        reinforce_loss(logp, advantages, mask),
        clipped_loss(logp, logp.detach(), advantages, mask),
        grpo_loss(logp, logp.detach(), None, advantages, mask)[0],
    ]
    rung_2, rung_3, rung_4 = (torch.autograd.grad(loss, logp)[0] for loss in losses)
    demo.same("at ρ = 1 the ratio changes nothing", "∇ (B, L)", rung_3, rung_2)
    demo.same("without a penalty, grpo_loss is rung 3 / |o|", "∇ (B, L)",
              rung_4, rung_3 / lengths_B1)
    log_p, log_ref = torch.randn(2, 8, device=demo.device).log_softmax(dim=1)
    kl, mean_k3 = ((log_p.exp() * each).sum() for each in (log_p - log_ref, k3(log_p, log_ref)))
    demo.same("the mean of k3 is KL(π ‖ π_ref)", "Σ over W", mean_k3, kl)


def check_loss(demo):
    """The batched loss equals the naive one; losses and gradients that must be zero are zero."""
    B, L = 6, 5
    mask = torch.arange(L) < torch.tensor([[5], [3], [1], [2], [4], [0]])
    logp = (torch.randn(B, L) - 2).requires_grad_()
    old_logp, ref_logp = (logp.detach() + 0.3 * torch.randn(B, L) for _ in range(2))
    rewards = torch.tensor([1.0, 0.0, 0.0, 2.0, 1.0, 1.0])
    for name, variant in VARIANTS.items():
        advantages = group_advantages(rewards, 3, variant.normalize_std)
        options = dict(kl_coef=0.1, variant=name)
        loss, figures = grpo_loss(logp, old_logp, ref_logp, advantages, mask, **options)
        naive = naive_grpo_loss(
            logp, old_logp, ref_logp, advantages, mask, max_length=L,
            clip_low=variant.clip_low, clip_high=variant.clip_high, **options,
        )
        clipped = figures["clip_low"] + figures["clip_high"]
        difference = (loss - naive).abs().item()
        demo.check(f"{name}: all at once = token by token", "(B, L) → ()",
                   f"{loss.item():+.4f}, off {difference:.0e}, {clipped:.0%} clipped",
                   difference < 1e-5)
    rewards = torch.tensor([1.0, 0.0, 0.5, 1.0, 0.25, 0.25])
    loss, _ = grpo_loss(logp, logp.detach(), None, group_advantages(rewards, 3), mask | True)
    (gradient,) = torch.autograd.grad(loss, logp)
    demo.check("at ρ = 1 the loss is 0, its gradient is not", "|∇|",
               f"loss {abs(loss.item()):.0e}, {gradient.norm():.3f}",
               abs(loss.item()) < 1e-6 < gradient.norm())
    loss, _ = grpo_loss(logp, old_logp, None, group_advantages(torch.full((6,), 0.1), 3), mask)
    (gradient,) = torch.autograd.grad(loss, logp)
    demo.check("equal rewards teach nothing", "|∇|", f"{gradient.norm():.0e}", gradient.norm() == 0)


def check_cached_logprobs(demo, policy, task, settings):
    """Cached decoding, token by token, gives the log-probabilities of the training pass."""
    one, other = (step_generator(settings.seed, 0, 15, demo.device) for _ in range(2))
    prompts = drawn_from(task.prompts, settings.prompts, one)
    rollout = judged(policy, prompts, task, settings, other)
    logp = fixed_logprobs(policy, rollout, settings)
    off = (logp - rollout.logp)[rollout.mask].abs().max()
    demo.check("π_old by cached passes ≈ π_old by a training pass", "(B, L)",
               f"log π off by {off:.0e} at most", off < 1e-3)


# %% The demonstration
@demonstration(__doc__, flag("steps", 300, "GRPO steps", at_least=1), settings=Settings,
               quick="a smoke test of a few seconds", picture="pictures/grpo.png")
def main(demo, arguments):
    settings, steps = arguments.settings, arguments.steps
    prompts, watched, held_out = addition_prompts()
    if arguments.quick:
        steps, held_out = min(steps, 8), held_out[:200]
        settings = replace(settings, prompts=min(settings.prompts, 16))
    check_baseline(demo)
    check_rungs(demo)
    torch.manual_seed(demo.seed)  # what was drawn so far changes nothing below
    check_loss(demo)
    policy = small_policy().to(demo.device)
    supervised = warm_up(policy, prompts, watched, demo.seed, 40 if arguments.quick else 400)
    demo.note(f"warmed up by {supervised} supervised steps of 128 sums")
    task = Task(exact_match, [encode(prompt) for prompt in prompts], decode, END)
    check_cached_logprobs(demo, policy, task, settings)
    start, before = sampled_accuracy(policy, held_out), answers(policy, held_out[:6])
    history = train(policy, task, settings, steps)
    end, greedy = (sampled_accuracy(policy, held_out, temperature) for temperature in (1.0, 0.0))
    demo.note(f"held-out sums, answer sampled before → after {steps} steps:")
    for prompt, one, other in zip(held_out, before, answers(policy, held_out[:6]), strict=False):
        demo.note(f"    {prompt}{one} → {prompt}{other} (right: {sum_of(prompt)})")
    as_documented = settings == Settings(seed=demo.seed) and steps == 300
    learnt = start <= 0.35 and end >= 0.85 or not as_documented
    demo.check(f"held-out sums right, sampled ({len(held_out):,})", "T = 1",
               f"{start:.1%} → {end:.1%} (greedy {greedy:.1%})", learnt)
    panels(arguments.picture, history, CURVES, xlabel="GRPO step", free=("length",))
    demo.note(f"reward, KL, entropy and length: {arguments.picture}")
    demo.finish(
        "--variant dr_grpo, --variant dapo: which learns faster?",
        "--learning-rate 4e-3: watch it collapse", "--kl-coef 0.04: what does the penalty cost?",
    )


if __name__ == "__main__":
    main()

"""Phase 9: group relative policy optimisation (GRPO), learning from a reward instead of a text.

A policy answers one prompt G times, and a rule that can be checked says how good each answer is.
An answer better than its group's mean becomes likelier, one that is worse becomes rarer: the group
takes the place of PPO's value network. The policy that answered and the policy that learns drift
apart during the updates, so each token's gradient is weighed by the ratio of their probabilities,
and clipped where it has moved far enough. A penalty can hold it near a frozen reference.

    Â_i = (r_i − mean(r)) / std(r)                              over the G answers of a prompt
    ρ_i,t = π(o_t) / π_old(o_t)
    k3_i,t = π_ref/π − log(π_ref/π) − 1                         ≥ 0, estimates KL(π ‖ π_ref)
    J = 1/G Σ_i 1/|o_i| Σ_t { min(ρ Â, clip(ρ, 1 − ε, 1 + ε) Â) − β k3 }         loss = −J

    dr_grpo   Â without std, sums divided by a constant length instead of |o_i|
    dapo      ε 0.2 below, 0.28 above; mean over all tokens; groups without signal drawn again;
              answers that run out of room are punished; β = 0
    gspo      ρ of the whole answer, (π(o)/π_old(o))^(1/|o|); ε 0.0003 below, 0.0004 above

Papers: DeepSeekMath (2024), section 4.1, equations 3–4; Dr. GRPO: Liu et al. (2025); DAPO: Yu et
al. (2025); GSPO: Zheng et al. (2025); the k3 estimator: Schulman (2020).
Simplified: the task is small enough to learn in two minutes, sums of two numbers from 0 to 99,
written last digit first (12+34=64).

Dimensions: B batch (all completions) · G completions of a prompt · L completion length · T query
positions · A active experts per token · W vocabulary.

Run:  python grpo_coded.py [--seed 1] [--variant dapo] [--steps 200]     under three minutes
      python grpo_coded.py --quick                                      the same as a smoke test
      python grpo_coded.py --compare                                    all variants, and a collapse
"""

import contextlib
import functools
import json
import math
import os
import pathlib
import random
import sys
import zipfile
from dataclasses import asdict, dataclass, fields

import numpy as np
import torch
import torch.nn.functional as F

from lesson import Demonstration, demonstration_parser, one_line_errors, parse_arguments
from moe_coded import MixtureOfExperts, TopKRouter, TransformerBlock, balance_within_sequences
from mtp_coded import CausalLM
from quantization_coded import copied
from rope_coded import RotaryEmbedding, RotaryLatentAttention

# %% Rewards to advantages: better or worse than the rest of the group
STD_EPSILON = 1e-6


def group_advantages(rewards, group_size, normalize_std=True):
    """Rewards (B,) → advantages (B,); `group_size` neighbours answer the same prompt.

    r − mean, and (`normalize_std`) divided by the sample standard deviation + 1e-6: DeepSeekMath,
    section 4.1.2. Exactly zero where all rewards of a group are equal, a group of one included.
    Raises: ValueError for rewards that are not (B,) or not finite, or a B that G does not divide.
    """
    rewards = torch.as_tensor(rewards)
    rewards = rewards if rewards.is_floating_point() else rewards.float()
    if rewards.dim() != 1:
        raise ValueError(f"rewards must be (B,), got {tuple(rewards.shape)}")
    if group_size < 1 or len(rewards) % group_size:
        raise ValueError(f"{len(rewards)} rewards must be divisible by group_size={group_size}")
    if not rewards.isfinite().all():
        raise ValueError(f"rewards must be finite, got {rewards.tolist()}")
    groups = rewards.view(-1, group_size)
    advantages = groups - groups.mean(dim=1, keepdim=True)
    if normalize_std and group_size > 1:
        advantages = advantages / (groups.std(dim=1, keepdim=True) + STD_EPSILON)
    # A mean of equals may differ from them in its last bit: over a std near 0 that would count.
    equal = groups.amin(dim=1, keepdim=True) == groups.amax(dim=1, keepdim=True)
    return advantages.masked_fill(equal, 0.0).flatten()


def overlong_penalty(lengths, max_length, buffer):
    """DAPO, equation 13: 0 up to max_length − buffer tokens, then linearly down to −1."""
    if not 1 <= buffer <= max_length:
        raise ValueError(f"buffer={buffer} must be from 1 to max_length={max_length}")
    return -((lengths - (max_length - buffer)) / buffer).clamp(0.0, 1.0)


# %% The variants: where each differs
@dataclass(frozen=True)
class Variant:
    """ε below and above 1, and what a variant does in its own way.

    `average`: "completion" (tokens of a completion first, then completions), "constant" (sums over
    a constant length) or "token" (all tokens alike). For the trainer: `resample`, groups without
    signal are drawn again; `overlong`, completions that run out of room are punished.
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


def variant_named(name):
    if name not in VARIANTS:
        raise ValueError(f"variant={name!r} must be one of {', '.join(VARIANTS)}")
    return VARIANTS[name]


# %% The loss, token by token: the naive reference
def naive_grpo_loss(
    logp, old_logp, ref_logp, advantages, mask, *, clip_low, clip_high, kl_coef, max_length, variant
):
    """`grpo_loss` completion by completion and token by token, all settings given."""
    total, completions, all_tokens = 0.0, len(mask), max(1, int(mask.sum()))
    for i in range(completions):
        counted = [t for t in range(mask.shape[1]) if mask[i, t]]
        divisor = {"completion": completions * max(1, len(counted)),
                   "constant": completions * max_length,
                   "token": all_tokens}[VARIANTS[variant].average]  # fmt: skip
        for t in counted:
            log_ratio = logp[i, t] - old_logp[i, t].detach()
            if VARIANTS[variant].sequence_ratio:
                log_ratio = sum(logp[i, u] - old_logp[i, u].detach() for u in counted)
                log_ratio = log_ratio / len(counted)
            ratio = log_ratio.exp()
            clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
            gain = torch.minimum(ratio * advantages[i], clipped * advantages[i])
            if kl_coef:
                log_odds = ref_logp[i, t] - logp[i, t]
                gain = gain - kl_coef * (log_odds.exp() - log_odds - 1)
            total = total - gain / divisor
    return torch.as_tensor(total)


# %% The loss, all at once
def grpo_loss(
    logp, old_logp, ref_logp, advantages, mask, *, clip_low=None, clip_high=None, kl_coef=0.0,
    max_length=None, variant="grpo",
):  # fmt: skip
    """−J of the equations above: (B, L) log-probabilities and (B,) advantages → (loss, figures).

    Args:
        logp: of the completions' tokens by the policy that learns; the only one with a gradient.
        old_logp: by the policy that drew them. ref_logp: by the reference; None if `kl_coef` is 0.
        mask: (B, L), True for the tokens that count: `completion_mask`. What stands elsewhere, NaN
            included, changes nothing.
        clip_low, clip_high: how far ρ may move below and above 1; None: as the variant published.
        kl_coef: β. max_length: the constant length of dr_grpo, default L.
    Returns: the loss, a scalar, and a dict of floats. `ratio`: mean ρ; `clip_low`, `clip_high`:
        shares of tokens (gspo: completions) whose gradient the clip has taken away; `kl`: mean k3,
        None without ref_logp; `entropy`: mean −log π of the tokens drawn, in nats.
    Raises: ValueError for wrong shapes, an unknown variant, or settings out of range.
    """
    setting = variant_named(variant)
    clip_low = setting.clip_low if clip_low is None else clip_low
    clip_high = setting.clip_high if clip_high is None else clip_high
    max_length = logp.shape[-1] if max_length is None else max_length
    check_loss_arguments(logp, old_logp, ref_logp, advantages, mask, kl_coef)
    if not (0 <= clip_low <= 1 and 0 <= clip_high < math.inf and max_length >= 1):
        raise ValueError(
            f"clip_low={clip_low} must be from 0 to 1, clip_high={clip_high} at least 0, "
            f"max_length={max_length} at least 1"
        )
    mask = mask.bool()
    lengths_B1 = mask.sum(dim=1, keepdim=True).clamp(min=1)

    log_ratio_BL = (logp - old_logp.detach()).masked_fill(~mask, 0.0)
    log_ratio_BL = log_ratio_BL.clamp(-20, 20)  # e^88 is too large for FP32
    if setting.sequence_ratio:
        log_ratio_BL = (log_ratio_BL.sum(dim=1, keepdim=True) / lengths_B1).expand_as(mask)
    ratio_BL, advantages_B1 = log_ratio_BL.exp(), advantages.detach().unsqueeze(1)
    clipped_BL = ratio_BL.clamp(1 - clip_low, 1 + clip_high)
    gain_BL = torch.minimum(ratio_BL * advantages_B1, clipped_BL * advantages_B1)
    k3_BL = None
    if ref_logp is not None:
        log_odds_BL = (ref_logp.detach() - logp).masked_fill(~mask, 0.0)
        k3_BL = log_odds_BL.exp() - log_odds_BL - 1
        if kl_coef:
            gain_BL = gain_BL - kl_coef * k3_BL
    gain_BL = gain_BL.masked_fill(~mask, 0.0)

    if setting.average == "completion":
        gain = (gain_BL.sum(dim=1, keepdim=True) / lengths_B1).mean()
    elif setting.average == "constant":
        gain = gain_BL.sum() / (len(mask) * max_length)
    else:
        gain = gain_BL.sum() / mask.sum().clamp(min=1)

    with torch.no_grad():
        # A ratio of a whole completion counts once.
        counted = mask.any(dim=1, keepdim=True) if setting.sequence_ratio else mask
        ratio_BL = ratio_BL[:, : counted.shape[1]]
        figures = {
            "ratio": masked_mean(ratio_BL, counted),
            "clip_low": masked_mean((ratio_BL < 1 - clip_low) & (advantages_B1 < 0), counted),
            "clip_high": masked_mean((ratio_BL > 1 + clip_high) & (advantages_B1 > 0), counted),
            "kl": None if k3_BL is None else masked_mean(k3_BL, mask),
            "entropy": masked_mean(-logp, mask),
        }
    return -gain, figures


def masked_mean(values, mask):
    """Mean of values (B, L) where mask is True, a float; 0 where nothing is."""
    return (values.masked_fill(~mask, 0).sum() / mask.sum().clamp(min=1)).item()


def check_loss_arguments(logp, old_logp, ref_logp, advantages, mask, kl_coef):
    if logp.dim() != 2 or not logp.numel():
        raise ValueError(f"logp must be (B, L), got {tuple(logp.shape)}")
    given = dict(old_logp=old_logp, ref_logp=ref_logp, mask=mask)
    for name, value in given.items():
        if value is not None and value.shape != logp.shape:
            raise ValueError(f"{name} must be {tuple(logp.shape)}, got {tuple(value.shape)}")
    if advantages.shape != logp.shape[:1]:
        raise ValueError(f"advantages must be ({len(logp)},), got {tuple(advantages.shape)}")
    if not 0 <= kl_coef < math.inf:
        raise ValueError(f"kl_coef={kl_coef} must be a number of at least 0")
    if kl_coef and ref_logp is None:
        raise ValueError(f"kl_coef={kl_coef} needs ref_logp")


# %% Which tokens count, and how likely the policy finds them
def completion_mask(completions, eos_token_id):
    """(B, L) ids → (B, L) bool: True up to and including the first end-of-sequence token.

    By position, not by value: padding may be the end-of-sequence token itself.
    """
    is_end_BL = completions == eos_token_id
    return is_end_BL.long().cumsum(dim=1) - is_end_BL.long() == 0


def token_logprobs(
    policy, ids, attention_mask, prompt_length, temperature=1.0, path="expanded",
    precision=torch.float32,
):  # fmt: skip
    """Prompts and completions (B, T) → log π of the completions' tokens (B, T − prompt_length).

    A token is predicted at the position before it: the first by the prompt's last. FP32 result.
    """
    with torch.autocast(ids.device.type, precision, enabled=precision != torch.float32):
        hidden = policy.hidden_states(ids, attention_mask, path=path)
        logits_BLW = policy.lm_head(hidden[:, prompt_length - 1 : -1])
    logits = logits_BLW.flatten(0, 1).float() / temperature
    completions = ids[:, prompt_length:]
    loss = F.cross_entropy(logits, completions.flatten(), reduction="none")
    return -loss.view(completions.shape)


# %% The rollout: G completions a prompt, by cached generation
@dataclass
class Rollout:
    """Completions of a step, a row each; rows of one prompt are neighbours.

    ids (B, P + L): prompts padded on the left, then completions. attention_mask (B, P + L): False
    for padding. logp (B, L): of the cached decoding. rewards (B,), advantages (B,): once judged.
    """

    ids: torch.Tensor
    attention_mask: torch.Tensor
    prompt_length: int
    logp: torch.Tensor
    rewards: torch.Tensor = None
    advantages: torch.Tensor = None

    @property
    def completions(self):
        return self.ids[:, self.prompt_length :]

    @property
    def mask(self):
        """(B, L): the tokens that count."""
        return self.attention_mask[:, self.prompt_length :]

    def rows(self, chosen):
        """The rollout of some rows; `chosen` indexes (B,)."""
        parts = [self.ids, self.attention_mask, self.logp, self.rewards, self.advantages]
        ids, mask, logp, rewards, advantages = (p if p is None else p[chosen] for p in parts)
        return Rollout(ids, mask, self.prompt_length, logp, rewards, advantages)

    @staticmethod
    def joined(rollouts):
        """One rollout of several; prompts are padded to the longest."""
        longest = max(rollout.prompt_length for rollout in rollouts)

        def join(name):
            return torch.cat(
                [F.pad(getattr(r, name), (longest - r.prompt_length, 0)) for r in rollouts]
            )

        def stack(name):
            return torch.cat([getattr(rollout, name) for rollout in rollouts])

        return Rollout(join("ids"), join("attention_mask"), longest, stack("logp"),
                       stack("rewards"), stack("advantages"))  # fmt: skip


def roll_out(
    policy, prompts, group_size, max_new_tokens, eos_token_id, temperature=1.0, generator=None
):
    """Draws `group_size` completions of each prompt (a list of lists of ids) → `Rollout`."""
    longest = max(map(len, prompts))
    rows = [[eos_token_id] * (longest - len(p)) + p for p in prompts for _ in range(group_size)]
    real = [[False] * (longest - len(p)) + [True] * len(p) for p in prompts]
    device = policy.lm_head.weight.device
    prompt_ids = torch.tensor(rows, device=device)
    real_BP = torch.tensor(real, device=device).repeat_interleave(group_size, dim=0)
    logprobs = []
    ids = policy.generate(
        prompt_ids, max_new_tokens, temperature,
        attention_mask=None if bool(real_BP.all()) else real_BP, eos_token_id=eos_token_id,
        pad_token_id=eos_token_id, generator=generator, logprobs=logprobs,
    )  # fmt: skip
    logp = torch.stack(logprobs, dim=1).clone()  # a clone may enter training
    logp = F.pad(logp, (0, max_new_tokens - logp.shape[1]))
    mask = completion_mask(ids[:, longest:], eos_token_id)
    return Rollout(ids, torch.cat([real_BP, mask], dim=1), longest, logp)


# %% The reward, checked
def checked_rewards(reward, prompt, completions):
    """reward(prompt, completions) → one finite number a completion, or ValueError with the prompt.

    prompt: a text; completions: the G texts of its group.
    """
    try:
        values = [float(value) for value in reward(prompt, completions)]
    except Exception as error:
        what = " ".join(str(error).split())
        raise ValueError(
            f"the reward function raised {type(error).__name__} ({what}) for prompt {prompt!r}"
        ) from error
    if len(values) != len(completions):
        raise ValueError(
            f"the reward function gave {len(values)} rewards for the {len(completions)} "
            f"completions of prompt {prompt!r}"
        )
    for value, completion in zip(values, completions, strict=True):
        if not abs(value) < 1e30:  # FP32 must hold their squares' mean, too
            raise ValueError(
                f"the reward function gave {value} for prompt {prompt!r}, completion {completion!r}"
            )
    return values


def check_prompts(prompts, decode, max_new_tokens, max_positions):
    if not prompts:
        raise ValueError("there are no prompts")
    for number, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise ValueError(f"prompt {number} is empty: a completion needs a token to follow")
        if max_positions is not None and len(prompt) + max_new_tokens > max_positions:
            raise ValueError(
                f"prompt {number}, {decode(prompt)!r}, has {len(prompt)} tokens: with "
                f"{max_new_tokens} new ones it exceeds the context of {max_positions}"
            )


# %% The trainer
@dataclass
class Settings:
    """One step: `prompts` × `group_size` completions, then `passes` × `minibatches` updates.

    `refresh_reference`: steps after which the policy becomes its own reference; 0: never.
    `rollout_logprobs`: π_old as the cached rollout gave it, instead of recomputed by the training
    forward. `precision`, `path`: of the training forward. `gamma`: how far the routing bias moves
    after a step's last update. `resamplings`: how often dapo may draw again. `overlong_buffer`:
    dapo's, in tokens.
    """

    variant: str = "grpo"
    prompts: int = 128
    group_size: int = 8
    max_new_tokens: int = 5
    temperature: float = 1.0
    minibatches: int = 2
    passes: int = 1
    learning_rate: float = 4e-4
    momentum: float = 0.0
    kl_coef: float = 0.0
    refresh_reference: int = 0
    rollout_logprobs: bool = False
    gamma: float = 0.0
    resamplings: int = 2
    overlong_buffer: int = 1
    precision: str = "float32"
    path: str = "expanded"
    seed: int = 0

    def __post_init__(self):
        variant_named(self.variant)
        lowest = dict(prompts=1, group_size=1, max_new_tokens=1, minibatches=1, passes=1,
                      refresh_reference=0, resamplings=0, overlong_buffer=1, kl_coef=0, gamma=0,
                      momentum=0, seed=0)  # fmt: skip
        for name, bound in lowest.items():
            if not bound <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {bound}")
        for name in ("temperature", "learning_rate"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} must be a number above 0")
        if self.prompts * self.group_size < self.minibatches:
            raise ValueError(
                f"minibatches={self.minibatches} exceed the {self.prompts * self.group_size} "
                "completions of a step"
            )
        if self.resamplings > 14:
            raise ValueError(f"resamplings={self.resamplings} must be at most 14")
        if self.momentum >= 1:
            raise ValueError(f"momentum={self.momentum} must be below 1")


class GRPOTrainer:
    """GRPO on a `CausalLM`.

    `reward(prompt, completions)`: texts of one group → a number each. `draw_prompts(count,
    generator)` → lists of token ids. `decode(ids)` → text. A step's randomness depends on seed and
    step number alone, so that a run goes on from `state` as if it had never stopped.
    """

    def __init__(self, policy, reward, draw_prompts, decode, eos_token_id, settings):
        self.policy, self.reward, self.settings = policy, reward, settings
        self.draw_prompts, self.decode, self.eos_token_id = draw_prompts, decode, eos_token_id
        self.device = policy.lm_head.weight.device
        self.reference = copied(policy).eval().requires_grad_(False)
        trained = [p for name, p in policy.named_parameters() if not name.startswith("mtp.")]
        # No momentum by default: it carries on the gradients of policies that are gone.
        self.optimizer = torch.optim.AdamW(
            trained, lr=settings.learning_rate, betas=(settings.momentum, 0.99), weight_decay=0.0,
            fused=True,
        )  # fmt: skip
        self.steps_done = 0

    def generator(self, purpose=0):
        """A generator of this step's own; on the policy's device."""
        number = (self.settings.seed * 1_000_003 + self.steps_done) * 16 + purpose
        return torch.Generator(device=self.device).manual_seed(number % 2**63)

    def step(self, rate=None):
        """Rollout, judgement, updates; `rate`: learning rate. Returns the step's figures."""
        rate = self.settings.learning_rate if rate is None else rate
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        rollout, drawn = self.collect()
        reference_logp = self.logprobs(self.reference, rollout)
        figures = self.describe(drawn, rollout, reference_logp)
        self.policy.train()
        figures |= self.update(rollout, reference_logp)
        for moe in moe_layers(self.policy):
            if hasattr(moe.gate, "update_bias"):
                moe.gate.update_bias(self.settings.gamma)
            moe.last_balance_loss = None  # it holds on to the last step
        self.steps_done += 1
        refresh = self.settings.refresh_reference
        if refresh and self.steps_done % refresh == 0:
            self.reference = copied(self.policy).eval().requires_grad_(False)
        return {"step": self.steps_done, **figures, "learning_rate": rate}

    # What is learnt from
    def collect(self):
        """(the rollout to learn from, all that was drawn): they differ where groups are redrawn."""
        setting, wanted = VARIANTS[self.settings.variant], self.settings.prompts
        drawn, kept = [], []
        for attempt in range(1 + self.settings.resamplings * setting.resample):
            generator = self.generator(attempt)
            prompts = self.draw_prompts(wanted, generator)
            rollout = self.judged(prompts, generator)
            drawn.append(rollout)
            signal = has_signal(rollout.rewards, self.settings.group_size)
            kept.append(rollout.rows(signal) if setting.resample else rollout)
            wanted -= len(kept[-1].ids) // self.settings.group_size
            if wanted == 0:
                break
        return Rollout.joined(kept), Rollout.joined(drawn)

    def judged(self, prompts, generator):
        s, setting = self.settings, VARIANTS[self.settings.variant]
        check_prompts(prompts, self.decode, s.max_new_tokens, self.policy.max_positions)
        self.policy.eval()
        rollout = roll_out(self.policy, prompts, s.group_size, s.max_new_tokens, self.eos_token_id,
                           s.temperature, generator)  # fmt: skip
        texts = self.texts(rollout)
        rewards = [
            value for i, prompt in enumerate(prompts)
            for value in checked_rewards(
                self.reward, self.decode(prompt),
                texts[i * s.group_size : (i + 1) * s.group_size],
            )
        ]  # fmt: skip
        rollout.rewards = torch.tensor(rewards, device=self.device)
        judged = rollout.rewards
        if setting.overlong:
            lengths = rollout.mask.sum(dim=1)
            judged = judged + overlong_penalty(lengths, s.max_new_tokens, s.overlong_buffer)
        rollout.advantages = group_advantages(judged, s.group_size, setting.normalize_std)
        return rollout

    def texts(self, rollout):
        """Completions as `decode` writes them, an end-of-sequence token that was drawn included."""
        rows = zip(rollout.completions.tolist(), rollout.mask.sum(dim=1).tolist(), strict=True)
        return [self.decode(row[:length]) for row, length in rows]

    @torch.no_grad()
    def logprobs(self, model, rollout):
        """(B, L) by the training forward, without gradient."""
        if not len(rollout.ids):  # dapo, and no group has signal
            return torch.zeros_like(rollout.logp)
        return torch.cat(
            [self._logprobs(model, rollout.rows(rows)) for rows in self.parts(rollout)]
        )

    def parts(self, rollout):
        """Row numbers in chunks of a minibatch, in order."""
        size = math.ceil(
            self.settings.prompts * self.settings.group_size / self.settings.minibatches
        )
        return torch.arange(len(rollout.ids), device=self.device).split(size)

    def _logprobs(self, model, rollout):
        return token_logprobs(
            model, rollout.ids, rollout.attention_mask, rollout.prompt_length,
            self.settings.temperature, self.settings.path,
            getattr(torch, self.settings.precision),
        )  # fmt: skip

    # The updates
    def update(self, rollout, reference_logp):
        """Minibatch by minibatch; returns the means of their figures."""
        s = self.settings
        # Without a KL term a row without advantage pulls on nothing: it is left out, and counted.
        learning = torch.arange(len(rollout.ids), device=self.device)
        if not s.kl_coef:
            learning = learning[rollout.advantages != 0]
        share = len(learning) / len(rollout.ids) if len(rollout.ids) else 0.0
        if VARIANTS[s.variant].average == "token":
            share = (rollout.mask[learning].sum() / rollout.mask.sum().clamp(min=1)).item()
        plan = [
            rows for number in range(s.passes)
            for rows in self.shuffled(learning, number).tensor_split(s.minibatches) if len(rows)
        ]  # fmt: skip
        old_logp = rollout.logp.clone()
        several = len(plan) > 1
        if several and not s.rollout_logprobs:  # the same minibatches: the first ratio is exactly 1
            with torch.no_grad():
                for rows in plan[: s.minibatches]:
                    old_logp[rows] = self._logprobs(self.policy, rollout.rows(rows))
        history = []
        for rows in plan:
            logp = self._logprobs(self.policy, rollout.rows(rows))
            old = old_logp[rows] if several or s.rollout_logprobs else logp.detach()
            loss, figures = grpo_loss(
                logp, old, reference_logp[rows], rollout.advantages[rows], rollout.mask[rows],
                kl_coef=s.kl_coef, max_length=s.max_new_tokens, variant=s.variant,
            )  # fmt: skip
            balance = [m.last_balance_loss for m in moe_layers(self.policy)]
            balance_loss = sum(loss for loss in balance if loss is not None)
            self.optimizer.zero_grad()
            (share * loss + balance_loss).backward()
            norm = torch.nn.utils.clip_grad_norm_(self.optimizer.param_groups[0]["params"], 1.0)
            if not math.isfinite(norm.item()):
                raise ValueError(f"the gradient is {norm.item()} at step {self.steps_done}")
            self.optimizer.step()
            history.append(
                {
                    "loss": share * loss.item(),
                    "gradient_norm": norm.item(),
                    **{name: figures[name] for name in ("ratio", "clip_low", "clip_high")},
                }
            )
        names = ("loss", "gradient_norm", "ratio", "clip_low", "clip_high")
        return {n: sum(h[n] for h in history) / max(1, len(history)) for n in names}

    def shuffled(self, rows, number):
        generator = torch.Generator().manual_seed(
            (self.settings.seed * 1_000_003 + self.steps_done * 64 + number) % 2**63
        )
        return rows[torch.randperm(len(rows), generator=generator).to(self.device)]

    # What is reported and stored
    def describe(self, drawn, rollout, reference_logp):
        """Figures of the policy that drew, over all it drew (KL: over what it learns from)."""
        log_odds = reference_logp - rollout.logp
        signal = has_signal(drawn.rewards, self.settings.group_size).float().mean().item()
        return {
            "reward": drawn.rewards.mean().item(),
            "kl": masked_mean(log_odds.exp() - log_odds - 1, rollout.mask),
            "entropy": masked_mean(-drawn.logp, drawn.mask),
            "length": drawn.mask.sum(dim=1).float().mean().item(),
            "signal": signal,
            "completions": len(drawn.ids),
        }

    def state(self):
        """All that a later run needs to go on: (numbers and names, {name: tensor})."""
        tensors = {
            **{f"policy/{name}": t for name, t in self.policy.state_dict().items()},
            **{f"reference/{name}": t for name, t in self.reference.state_dict().items()},
        }
        for i, values in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer/{i}/{name}": t for name, t in values.items()}
        return {"settings": asdict(self.settings), "steps_done": self.steps_done}, tensors

    def restore(self, numbers, tensors):
        """Puts back what `state` gave; ValueError if it is that of another run."""
        for field in fields(self.settings):
            mine, stored = getattr(self.settings, field.name), numbers["settings"].get(field.name)
            if mine != stored:
                raise ValueError(f"the stored run has {field.name}={stored}, this one {mine}")
        parts = {"policy": {}, "reference": {}, "optimizer": {}}
        for full_name, tensor in tensors.items():
            part, _, name = full_name.partition("/")
            parts[part][name] = tensor
        self.policy.load_state_dict(parts["policy"])
        self.reference.load_state_dict(parts["reference"])
        optimizer = self.optimizer.state_dict()
        for full_name, tensor in parts["optimizer"].items():
            i, _, name = full_name.partition("/")
            optimizer["state"].setdefault(int(i), {})[name] = tensor
        self.optimizer.load_state_dict(optimizer)
        self.steps_done = numbers["steps_done"]


def has_signal(rewards, group_size):
    """(B,) bool: whether the row's group has rewards that differ (DAPO, equation 12)."""
    groups = rewards.view(-1, group_size)
    return (groups.amin(dim=1) != groups.amax(dim=1)).repeat_interleave(group_size)


def moe_layers(model):
    return [layer.mlp for layer in model.layers if isinstance(layer.mlp, MixtureOfExperts)]


# %% Mixture of experts: does the token that is learnt from meet the experts that drew it?
@contextlib.contextmanager
def recorded_routing(model):
    """Yields {layer: [chosen experts (tokens, A) of each pass]}, filled while the context is open.

    Experts in ascending order: a decision is a set.
    """
    seen, handles = {}, []
    for i, moe in enumerate(moe_layers(model)):
        seen[i] = []

        def note(module, inputs, output, passes=seen[i]):
            passes.append(module.last_routing.indices.sort(dim=-1).values)

        handles.append(moe.register_forward_hook(note))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def training_routing(policy, rollout, temperature=1.0, precision=torch.float32):
    """By the training forward: log π (B, L); experts of completion tokens (layers, B, L − 1, A)."""
    policy.eval()  # no load for the routing bias
    with recorded_routing(policy) as seen:
        logp = token_logprobs(policy, rollout.ids, rollout.attention_mask, rollout.prompt_length,
                              temperature, precision=precision)  # fmt: skip
    routing = [passes[0].unflatten(0, rollout.ids.shape) for passes in seen.values()]
    return logp, torch.stack(routing)[:, :, rollout.prompt_length : -1]


def rollout_routing(policy, prompts, settings, eos_token_id, generator):
    """A rollout; the experts its decoding chose for completion tokens (layers, B, ≤ L − 1, A)."""
    policy.eval()
    with recorded_routing(policy) as seen:
        rollout = roll_out(policy, prompts, settings.group_size, settings.max_new_tokens,
                           eos_token_id, settings.temperature, generator)  # fmt: skip
    # The first pass read the prompts; each other one token a completion.
    if not seen or all(len(passes) == 1 for passes in seen.values()):
        raise ValueError("there is no routing to compare: no experts, or no token was decoded")
    return rollout, torch.stack([torch.stack(passes[1:], dim=1) for passes in seen.values()])


def routing_flips(one, other, mask):
    """(decisions that differ, decisions): for tokens i whose successor i + 1 counts, all layers."""
    count = min(one.shape[2], other.shape[2])
    differs = (one[:, :, :count] != other[:, :, :count]).any(dim=-1)
    counted = mask[:, 1 : count + 1].expand_as(differs)
    return int((differs & counted).sum()), int(counted.sum())


def routing_report(trainer, gamma=0.01):
    """What moves the routing, and with it π/π_old, between a rollout and its update.

    Returns: {what: (flipped decisions, decisions, mean |log ρ|, largest |log ρ|)}. The trainer
    stays as it is: a copy of its policy moves.
    """
    s = trainer.settings
    policy, generator = copied(trainer.policy), trainer.generator(15)
    prompts = trainer.draw_prompts(s.prompts, generator)
    rollout, drawn = rollout_routing(policy, prompts, s, trainer.eos_token_id, generator)
    mask, figures = rollout.mask, {}

    def compare(name, old_logp, old_routing, precision=torch.float32):
        logp, routing = training_routing(policy, rollout, s.temperature, precision)
        moved = (logp - old_logp).abs().masked_fill(~mask, 0.0)
        figures[name] = (*routing_flips(old_routing, routing, mask),
                         (moved.sum() / mask.sum()).item(), moved.max().item())  # fmt: skip
        return logp, routing

    before = compare("cached rollout → training forward, FP32", rollout.logp, drawn)
    compare("cached rollout → training forward, BF16", rollout.logp, drawn, torch.bfloat16)
    for moe in moe_layers(policy):
        bias = moe.gate.e_score_correction_bias
        bias += gamma * torch.randn(bias.shape, generator=generator, device=bias.device).sign()
    compare(f"routing bias moved by ±{gamma}", *before)
    policy = copied(trainer.policy)
    learner = GRPOTrainer(policy, trainer.reward, trainer.draw_prompts, trainer.decode,
                          trainer.eos_token_id, s)  # fmt: skip
    judged = learner.judged(prompts, trainer.generator(15))
    learner.policy.train()
    learner.update(judged, learner.logprobs(learner.reference, judged))
    compare("after the updates of one rollout", *before)
    return figures


# %% The task: sums of two numbers from 0 to 99, written down as on paper, last digit first
CHARACTERS = "0123456789+="
END = len(CHARACTERS)  # end of sequence, and padding


def encode(text):
    return [CHARACTERS.index(character) for character in text]


def decode(ids):
    return "".join(CHARACTERS[i] if i < END else "" for i in ids)


def exact_match(prompt, completions):
    """1 for the sum, 0 for anything else. prompt "12+34=", completions without their end: "64"."""
    return [float(completion == sum_of(prompt)) for completion in completions]


def sum_of(prompt):
    """The answer to "a+b=", its last digit first: so each digit needs one carry, not all."""
    first, second = prompt.rstrip("=").split("+")
    return str(int(first) + int(second))[::-1]


def addition_prompts():
    """All 10,000 prompts "a+b=" in three parts, the same for all runs.

    Returns: 8,000 to learn from, 1,000 that say when the warm-up is over, 1,000 held out.
    """
    prompts = [f"{first}+{second}=" for first in range(100) for second in range(100)]
    random.Random(0).shuffle(prompts)
    return prompts[2000:], prompts[1000:2000], prompts[:1000]


def prompt_source(prompts):
    """draw(count, generator) → ids of so many prompts, for `GRPOTrainer`."""

    def draw(count, generator):
        numbers = torch.randint(len(prompts), (count,), generator=generator,
                                device=generator.device)  # fmt: skip
        return [encode(prompts[i]) for i in numbers.tolist()]

    return draw


def small_policy(width=96, layers=3):
    """Phases 4 to 7 in small: rotary latent attention; two of four experts run, one is shared."""
    rotary = RotaryEmbedding(16)

    def block():
        attention = RotaryLatentAttention(width, 4, 48, 16, 16, 24, rotary=rotary)
        balance = functools.partial(balance_within_sequences, 1e-3)
        experts = MixtureOfExperts(width, width, TopKRouter(width, 4, 2), 1, balance)
        return TransformerBlock(attention, experts)

    policy = CausalLM(END + 1, width, [block() for _ in range(layers)], max_positions=16)
    # 1/√width nearly: with 0.02, as for large models, this one learns ten times more slowly.
    policy.init_weights(std=0.08)
    return policy


def warm_up(policy, prompts, watched, seed, most_steps=400, target=0.25, batch=128, progress=None):
    """Supervised steps on sums until `target` of the sampled answers are right; returns the steps.

    Looked at every five steps, on the `watched` prompts; at most `most_steps`.
    """
    device = policy.lm_head.weight.device
    source = random.Random(seed)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=2e-3, betas=(0.0, 0.99), weight_decay=0.0)
    for step in range(1, most_steps + 1):
        policy.train()
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1.0, step / 20)
        chosen = source.sample(prompts, batch)
        rows = [(encode(prompt), [*encode(sum_of(prompt)), END]) for prompt in chosen]
        ids = torch.full((batch, 10), END)
        real = torch.zeros(batch, 10, dtype=torch.bool)
        for i, (prompt, answer) in enumerate(rows):  # the answers begin at 6, as in a rollout
            ids[i, 6 - len(prompt) : 6 + len(answer)] = torch.tensor(prompt + answer)
            real[i, 6 - len(prompt) : 6 + len(answer)] = True
        ids, real = ids.to(device), real.to(device)
        logp = token_logprobs(policy, ids, real, prompt_length=6)
        balance_loss = sum(moe.last_balance_loss for moe in moe_layers(policy))
        optimizer.zero_grad()
        (-logp[real[:, 6:]].mean() + balance_loss).backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        if progress is not None:
            progress.update()
        if step % 5 == 0 and step >= 100 and sampled_accuracy(policy, watched) >= target:
            break
    for moe in moe_layers(policy):
        moe.last_balance_loss = None
        moe.gate.load.zero_()
    return step


def answers(policy, prompts, temperature=1.0, seed=0):
    """One completion a prompt, as text; None where it did not come to its end."""
    policy.eval()
    device = policy.lm_head.weight.device
    generator = torch.Generator(device=device).manual_seed(seed)
    ids = [encode(prompt) for prompt in prompts]
    rollout = roll_out(policy, ids, 1, 5, END, temperature, generator)
    return [decode(row) if END in row else None for row in rollout.completions.tolist()]


def sampled_accuracy(policy, prompts, temperature=1.0, seed=0):
    """Share of the prompts whose one sampled answer is the sum."""
    given = answers(policy, prompts, temperature, seed)
    right = [exact_match(p, [a])[0] for p, a in zip(prompts, given, strict=True)]
    return sum(right) / len(right)


# %% A run, and how it is stored
def train(trainer, steps, history, path=None, every=25, progress=None):
    """Steps up to `steps` in all, stored in `path` every so many; figures go into `history`."""
    while trainer.steps_done < steps:
        used = trainer.steps_done / steps
        rate = trainer.settings.learning_rate * min(1.0, (trainer.steps_done + 1) / 10)
        history.append(trainer.step(rate * (1 - 0.9 * used)))
        if progress is not None:
            progress.set_postfix_str(f"reward {history[-1]['reward']:.2f}", refresh=False)
            progress.update()
        if path is not None and (trainer.steps_done % every == 0 or trainer.steps_done == steps):
            save_run(path, trainer, history, steps)


def save_run(path, trainer, history, steps):
    """As a NumPy archive, whole or not at all: a kill during the write leaves the last file."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    numbers, tensors = trainer.state()
    text = json.dumps({**numbers, "history": history, "steps": steps})
    try:
        with temporary.open("wb") as file:
            np.savez(file, numbers=text, **{name: t.cpu().numpy() for name, t in tensors.items()})
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_run(path):
    """(numbers, tensors) that `save_run` wrote; ValueError if the file is something else."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        numbers = json.loads(str(arrays.pop("numbers")))
        numbers["settings"], numbers["steps_done"], numbers["history"], numbers["steps"]
    except (ValueError, KeyError, TypeError, AttributeError, zipfile.BadZipFile, EOFError) as error:
        raise ValueError(f"{path} is no run of this script: {type(error).__name__}") from None
    return numbers, {name: torch.from_numpy(array) for name, array in arrays.items()}


def draw_run(history, path):
    """Reward, KL to the reference, entropy and length over the steps, as a picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = {
        "reward": "mean reward",
        "kl": "KL to the reference (nats per token)",
        "entropy": "entropy (nats per token)",
        "length": "completion length (tokens)",
    }
    figure, axes = pyplot.subplots(2, 2, figsize=(9, 6), layout="constrained", sharex=True)
    steps = [line["step"] for line in history]
    for axis, (name, label) in zip(axes.flat, panels.items(), strict=True):
        values = [line[name] for line in history]
        recent = [sum(values[max(0, i - 4) : i + 1]) / min(5, i + 1) for i in range(len(values))]
        axis.plot(steps, values, color="tab:blue", alpha=0.3, linewidth=0.8)
        axis.plot(steps, recent, color="tab:blue")
        axis.set(title=label)
        axis.grid(alpha=0.3)
        if name != "length":
            axis.set_ylim(bottom=0)
    for axis in axes[1]:
        axis.set_xlabel("GRPO step")
    pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


# %% The demonstration
STEPS = 300


def check_loss(demo):
    """The batched loss is the naive one; what must be zero is zero."""
    B, L = 6, 5
    mask = torch.arange(L) < torch.tensor([[5], [3], [1], [2], [4], [0]])
    logp = (torch.randn(B, L) - 2).requires_grad_()
    old_logp, ref_logp = (logp.detach() + 0.3 * torch.randn(B, L) for _ in range(2))
    rewards = torch.tensor([1.0, 0.0, 0.0, 2.0, 1.0, 1.0])
    for name, setting in VARIANTS.items():
        advantages = group_advantages(rewards, 3, setting.normalize_std)
        options = dict(kl_coef=0.1, variant=name)
        loss, figures = grpo_loss(logp, old_logp, ref_logp, advantages, mask, **options)
        naive = naive_grpo_loss(
            logp, old_logp, ref_logp, advantages, mask, max_length=L,
            clip_low=setting.clip_low, clip_high=setting.clip_high, **options,
        )  # fmt: skip
        clipped = figures["clip_low"] + figures["clip_high"]
        difference = (loss - naive).abs().item()
        demo.check(f"{name}: all at once = token by token", "(B, L) → ()",
                   f"{loss.item():+.4f}, off {difference:.0e}, {clipped:.0%} clipped",
                   difference < 1e-5)  # fmt: skip
    rewards = torch.tensor([1.0, 0.0, 0.5, 1.0, 0.25, 0.25])
    loss, _ = grpo_loss(logp, logp.detach(), None, group_advantages(rewards, 3), mask | True)
    (gradient,) = torch.autograd.grad(loss, logp)
    demo.check("at ρ = 1 the loss is 0, its gradient is not", "|∇|",
               f"loss {abs(loss.item()):.0e}, {gradient.norm():.3f}",
               abs(loss.item()) < 1e-6 < gradient.norm())  # fmt: skip
    loss, _ = grpo_loss(logp, old_logp, None, group_advantages(torch.full((6,), 0.1), 3), mask)
    (gradient,) = torch.autograd.grad(loss, logp)
    demo.check("equal rewards teach nothing", "|∇|", f"{gradient.norm():.0e}", gradient.norm() == 0)


def show_routing(demo, trainer):
    figures = routing_report(trainer)
    demo.note("routing decisions that flip, and how far log π/π_old moves (mean, largest):")
    for name, (flipped, decisions, mean, largest) in figures.items():
        demo.note(f"    {name:<41} {flipped:>5} of {decisions:,} ({flipped / decisions:.2%}), "
                  f"{mean:.1e}, {largest:.1e}")  # fmt: skip
    return figures


def progress_bar(total, label):
    from tqdm import tqdm

    return tqdm(total=total, desc=f"  {label}", file=sys.stderr, leave=False,
                mininterval=0.5 if sys.stderr.isatty() else 15.0)  # fmt: skip


def compare_variants(demo, policy, reward, draw, held_out, settings, steps):
    """All variants from the same warmed-up policy with as many completions each, and a collapse."""
    base = dict(variant="grpo", kl_coef=0.0, passes=1, momentum=0.0)
    rows = {
        "grpo": {}, "grpo, β = 0.04": dict(kl_coef=0.04), "dr_grpo": dict(variant="dr_grpo"),
        "dapo": dict(variant="dapo"), "gspo": dict(variant="gspo"),
        "grpo, 4 passes": dict(passes=4),
        "grpo, momentum 0.9": dict(momentum=0.9),
        "grpo, learning rate 4e-3": dict(learning_rate=4e-3),
    }  # fmt: skip
    budget = steps * settings.prompts * settings.group_size
    demo.note(f"after {budget:,} completions each; KL and entropy in nats per token:")
    demo.note(f"    {'run':<29} held-out   KL      entropy  signal  clipped  worst reward")
    results = {}
    for name, changes in rows.items():
        torch.manual_seed(settings.seed)
        trainer = GRPOTrainer(copied(policy), reward, draw, decode, END,
                              Settings(**{**asdict(settings), **base, **changes}))  # fmt: skip
        history, drawn = [], 0
        with progress_bar(budget, name) as bar:
            while drawn < budget:
                rate = trainer.settings.learning_rate * min(1.0, (trainer.steps_done + 1) / 10)
                history.append(trainer.step(rate * (1 - 0.9 * drawn / budget)))
                drawn += history[-1]["completions"]
                bar.update(history[-1]["completions"])
        last = {key: sum(line[key] for line in history[-5:]) / len(history[-5:]) for key in
                ("kl", "entropy", "signal", "clip_low", "clip_high")}  # fmt: skip
        results[name] = sampled_accuracy(trainer.policy, held_out)
        clipped = last["clip_low"] + last["clip_high"]
        demo.note(f"    {name:<29} {results[name]:>8.1%} {last['kl']:>7.3f} "
                  f"{last['entropy']:>10.3f} {last['signal']:>7.0%} {clipped:>8.1%} "
                  f"{min(line['reward'] for line in history):>13.2f}")  # fmt: skip
    trace = ", ".join(f"{line['reward']:.2f}" for line in history[:: max(1, len(history) // 10)])
    demo.note(f"share of right answers in the last run, from its start on: {trace}")
    demo.note(
        "its steps are too long for all tokens at once: the clip bounds what a token can gain,"
    )
    demo.note(
        "not how far a step goes; once few answers are right, few groups have signal to go back"
    )
    return results


NUMBERS = ("prompts", "group_size", "minibatches", "passes", "learning_rate", "momentum",
           "kl_coef", "refresh_reference", "gamma")  # fmt: skip


def read_flags(argv):
    """The command line, checked → (arguments, `Settings`)."""
    defaults = Settings()
    parser = demonstration_parser(__doc__)
    parser.add_argument("--variant", choices=list(VARIANTS), default="grpo")
    parser.add_argument("--steps", type=int, help="GRPO steps (default: 300, to --compare 60)")
    for name in NUMBERS:
        value = getattr(defaults, name)
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value,
                            help=f"default: {value}, see `Settings`")  # fmt: skip
    parser.add_argument("--rollout-logprobs", action="store_true",
                        help="π_old as the cached rollout gave it")  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="a smoke test of a few seconds")
    parser.add_argument("--compare", action="store_true", help="all variants, and a collapse")
    parser.add_argument("--checkpoint", metavar="FILE",
                        help="store the run here, and go on from it if it is there")  # fmt: skip
    parser.add_argument("--picture", metavar="FILE", default="pictures/grpo.png")
    arguments = parse_arguments(parser, argv)
    if arguments.steps is None:
        arguments.steps = 60 if arguments.compare else STEPS
    if arguments.steps < 1:
        raise ValueError(f"--steps={arguments.steps} must be at least 1")
    if arguments.compare and arguments.checkpoint is not None:
        raise ValueError("--checkpoint stores one run: not with --compare")
    if pathlib.Path(arguments.picture).suffix not in (".png", ".pdf", ".svg"):
        raise ValueError(f"--picture={arguments.picture} must end in .png, .pdf or .svg")
    if arguments.quick:
        arguments.prompts, arguments.steps = min(arguments.prompts, 16), min(arguments.steps, 8)
    settings = Settings(
        variant=arguments.variant, seed=arguments.seed,
        rollout_logprobs=arguments.rollout_logprobs,
        **{name: getattr(arguments, name) for name in NUMBERS},
    )  # fmt: skip
    return arguments, settings


def begin_run(demo, arguments, settings):
    """(trainer, history) of a warmed-up policy, or of the run stored in --checkpoint."""
    path, steps = arguments.checkpoint, arguments.steps
    prompts, watched, _ = addition_prompts()
    policy = small_policy().to(arguments.device)
    if path is not None and pathlib.Path(path).exists():
        stored, tensors = load_run(path)
        if stored["steps"] != steps:
            raise ValueError(f"{path} holds a run of {stored['steps']} steps, not of {steps}")
    else:
        stored, most = None, 40 if arguments.quick else 400
        with progress_bar(most, "warm-up") as bar:
            supervised = warm_up(policy, prompts, watched, arguments.seed, most, progress=bar)
        demo.note(f"warmed up by {supervised} supervised steps of 128 sums")
    trainer = GRPOTrainer(policy, exact_match, prompt_source(prompts), decode, END, settings)
    if stored is None:
        return trainer, []
    trainer.restore(stored, tensors)
    demo.note(f"goes on at step {trainer.steps_done} of {path}")
    return trainer, stored["history"]


@one_line_errors
def main(argv=None):
    arguments, settings = read_flags(argv)
    demo = Demonstration("grpo_coded.py", arguments.device, arguments.seed)
    check_loss(demo)
    steps, held_out = arguments.steps, addition_prompts()[2]
    held_out = held_out[:200] if arguments.quick else held_out
    trainer, history = begin_run(demo, arguments, settings)
    policy, warmed_up = trainer.policy, trainer.reference
    start, before = sampled_accuracy(warmed_up, held_out), answers(warmed_up, held_out[:6])
    if not history:
        figures = show_routing(demo, trainer)
        exact = figures["cached rollout → training forward, FP32"]
        demo.check("π_old from the cache: nearly the training one", "(B, L)",
                   f"log π off by {exact[3]:.0e} at most", exact[3] < 1e-3)  # fmt: skip
    if arguments.compare:
        compare_variants(demo, policy, exact_match, trainer.draw_prompts, held_out, settings, steps)
        demo.finish("--steps 300 --compare: do the variants meet in the end?")
        return
    with progress_bar(steps, settings.variant) as bar:
        bar.update(trainer.steps_done)
        train(trainer, steps, history, arguments.checkpoint, progress=bar)
    end, greedy = (sampled_accuracy(policy, held_out, t) for t in (1.0, 0.0))
    after = answers(policy, held_out[:6])
    demo.note(f"held-out sums, answer sampled before → after {steps} steps:")
    for prompt, one, other in zip(held_out, before, after, strict=False):
        demo.note(f"    {prompt}{one} → {prompt}{other} (right: {sum_of(prompt)})")
    as_documented = settings == Settings(seed=arguments.seed) and steps == STEPS
    learnt = start <= 0.35 and end >= 0.85 or not as_documented
    demo.check(f"held-out sums right, sampled ({len(held_out):,})", "T = 1",
               f"{start:.1%} → {end:.1%} (greedy {greedy:.1%})", learnt)  # fmt: skip
    draw_run(history, arguments.picture)
    demo.note(f"reward, KL, entropy and length: {arguments.picture}")
    demo.finish(
        "--variant dr_grpo, --variant dapo: which learns faster?",
        "--learning-rate 4e-3: watch it collapse", "--kl-coef 0.04: what does the leash cost?",
    )  # fmt: skip


if __name__ == "__main__":
    main()

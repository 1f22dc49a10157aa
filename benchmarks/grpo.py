"""Learning from a reward: the variants of GRPO from one policy, and what happens to the routing.

`--compare`: each variant, and four changes of one setting, start from the same warmed-up policy of
phase 9 and get as many completions each. The last of them, ten times the learning rate, collapses.

`--routing`: a rollout decodes token by token through the latent cache, an update reads all tokens
at once. Both must send a token to the same experts, or the update trains experts that did not draw
it. The report counts the decisions that flip, and how far log π/π_old moves.

Run:  python benchmarks/grpo.py                      both, ~20 minutes
      python benchmarks/grpo.py --routing            under a minute
      python benchmarks/grpo.py --quick              a smoke test of both
"""

import dataclasses
import pathlib

import measure
import torch
import torch.nn.functional as F

from grpo_coded import (
    END,
    Settings,
    Task,
    addition_prompts,
    decode,
    encode,
    exact_match,
    judged,
    rate_of,
    roll_out,
    sampled_accuracy,
    small_policy,
    token_logprobs,
    update,
    warm_up,
)
from lesson import one_line_errors, progress_bar, require
from lesson.batches import drawn_from
from pipeline.trainer import GRPOTrainer

# %% The variants, with as many completions each
CHANGES = {
    "grpo": {},
    "grpo, β = 0.04": dict(kl_coef=0.04),
    "dr_grpo": dict(variant="dr_grpo"),
    "dapo": dict(variant="dapo"),
    "gspo": dict(variant="gspo"),
    "grpo, 4 passes": dict(passes=4),
    "grpo, momentum 0.9": dict(momentum=0.9),
    "grpo, learning rate 4e-3": dict(learning_rate=4e-3),
}


def compare_variants(trainer, held_out, budget):
    """{run: figures} of all CHANGES, from copies of the trainer's policy; prints them as a table.

    budget: completions of each run. KL (without a penalty: of one completion of each prompt) and
    entropy are in nats per token; "worst reward" is the lowest share of right answers in any step.
    """
    results, rows = {}, []
    for name, changes in CHANGES.items():
        torch.manual_seed(trainer.settings.seed)
        settings = dataclasses.replace(trainer.settings, **changes)
        history, accuracy = run(another(trainer, settings), held_out, budget, name)
        last = {
            key: sum(line[key] for line in history[-5:]) / len(history[-5:])
            for key in ("kl", "entropy", "signal", "clip_low", "clip_high")
        }
        rewards = [line["reward"] for line in history]
        results[name] = {"held_out": accuracy, **last, "rewards": rewards}
        rows.append({
            "run": name, "held-out": f"{accuracy:.1%}", "KL": f"{last['kl']:.3f}",
            "entropy": f"{last['entropy']:.3f}", "signal": f"{last['signal']:.0%}",
            "clipped": f"{last['clip_low'] + last['clip_high']:.1%}",
            "worst reward": f"{min(rewards):.2f}",
        })
    measure.print_table(f"after {budget:,} completions each", rows)
    trace = ", ".join(f"{reward:.2f}" for reward in rewards[:: max(1, len(rewards) // 10)])
    print(f"share of right answers in the last run, from its start on: {trace}\n"
          "Its steps are too long for all tokens at once: the clip bounds what a token can gain,\n"
          "not how far a step goes. Once few answers are right, few groups have signal to go back.")
    return results


def another(trainer, settings):
    """A trainer with other settings on a copy of the policy."""
    return GRPOTrainer(trainer.policy.copy(), trainer.given, settings)


def run(trainer, held_out, budget, label):
    """Trains until `budget` completions are drawn → (figures of all steps, held-out accuracy)."""
    history, drawn = [], 0
    with progress_bar(budget, label) as bar:
        while drawn < budget:
            rate = rate_of(trainer.settings, trainer.steps_done, drawn / budget)
            history.append(trainer.step(rate))
            drawn += history[-1]["completions"]
            bar.update(history[-1]["completions"])
    return history, sampled_accuracy(trainer.policy, held_out)


# %% The routing: does the token that is learnt from meet the experts that drew it?
def chosen_experts(routed, batch):
    """The experts of one pass over (B, T) tokens, in ascending order: (layers, B, T, A)."""
    require(routed, "there is no routing to compare: no experts")
    chosen = [each.routing.indices.sort(dim=-1).values for each in routed]
    return torch.stack(chosen).unflatten(1, (batch, -1))


@torch.no_grad()
def training_routing(policy, rollout, temperature=1.0, precision="float32"):
    """By the training forward: log π (B, L); experts of completion tokens (layers, B, L − 1, A)."""
    routed = []
    logp = token_logprobs(policy, rollout, temperature, precision, routed)
    chosen = chosen_experts(routed, len(rollout.mask))
    return logp, chosen[:, :, rollout.prompt_ids.shape[1] : -1]


@torch.no_grad()
def decoding_routing(policy, rollout):
    """The experts that decoding chooses for the completion tokens (layers, B, L − 1, A).

    The rollout is decoded once more as it was drawn: the prompts in one pass, then token by token
    through the cache.
    """
    caches = policy.new_caches()
    policy.hidden_states(rollout.prompt_ids, rollout.prompt_mask, caches)
    passes, real = [], rollout.prompt_mask
    for t in range(rollout.mask.shape[1] - 1):
        # Decoding, too, cuts a row's padding off only at its end.
        routed, real = [], F.pad(real, (0, 1), value=True)
        policy.hidden_states(
            rollout.completions[:, t : t + 1], real, caches, path="absorbed", routed=routed
        )
        passes.append(chosen_experts(routed, len(real)))
    require(passes, "there is no routing to compare: no token was decoded")
    return torch.cat(passes, dim=2)


def routing_flips(one, other, mask):
    """(decisions that differ, decisions): for tokens i whose successor i + 1 counts, all layers."""
    differs = (one != other).any(dim=-1)
    counted = mask[:, 1 : one.shape[2] + 1].expand_as(differs)
    return int((differs & counted).sum()), int(counted.sum())


def routing_report(trainer, gamma=0.01):
    """What moves the routing, and with it π/π_old, between a rollout and its update.

    Returns: {what: (flipped decisions, decisions, mean |log ρ|, largest |log ρ|)}. The trainer
    stays as it is: copies of its policy move.
    """
    s, generator = trainer.settings, trainer.generator(15)
    policy = trainer.policy.copy().eval()
    prompts = drawn_from(trainer.task.prompts, s.prompts, generator)
    rollout = roll_out(policy, prompts, s.group_size, s.max_new_tokens, trainer.task.eos_token_id,
                       s.temperature, generator)
    mask, drawn, figures = rollout.mask, decoding_routing(policy, rollout), {}

    def compare(name, policy, old_logp, old_routing, precision="float32"):
        logp, routing = training_routing(policy, rollout, s.temperature, precision)
        moved = (logp - old_logp).abs().masked_fill(~mask, 0.0)
        mean, largest = (moved.sum() / mask.sum()).item(), moved.max().item()
        figures[name] = (*routing_flips(old_routing, routing, mask), mean, largest)
        return logp, routing

    forward = "cached rollout → training forward"
    before = compare(f"{forward}, FP32", policy, rollout.logp, drawn)
    compare(f"{forward}, BF16", policy, rollout.logp, drawn, "bfloat16")
    for moe in policy.moe_layers().values():
        bias = moe.gate.e_score_correction_bias
        bias += gamma * torch.randn(bias.shape, generator=generator, device=bias.device).sign()
    compare(f"routing bias moved by ±{gamma}", policy, *before)
    learner = another(trainer, dataclasses.replace(s, gamma=0.0))
    again = judged(learner.policy, prompts, learner.task, learner.settings, trainer.generator(15))
    update(learner.policy, learner.reference, learner.optimizer, again, learner.settings,
           learner.steps_done)
    compare("after the updates of one rollout", learner.policy, *before)
    return figures


def print_routing(figures):
    measure.print_table("routing decisions that flip, and how far log π/π_old moves", [
        {"between a rollout and": name, "flipped": f"{flipped:,} of {decisions:,}",
         "share": f"{flipped / decisions:.2%}", "mean": f"{mean:.1e}", "largest": f"{largest:.1e}"}
        for name, (flipped, decisions, mean, largest) in figures.items()
    ])


# %% The run
@one_line_errors
def main(argv=None):
    parser = measure.flags(__doc__)
    parser.add_argument("--compare", action="store_true", help="the variants only")
    parser.add_argument("--routing", action="store_true", help="the routing only")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=60, help="GRPO steps of each run")
    arguments = measure.parse(parser, argv)
    require(arguments.steps >= 1, f"--steps={arguments.steps} must be at least 1")
    quick, both = arguments.quick, arguments.compare == arguments.routing
    settings = Settings(seed=arguments.seed, prompts=16 if quick else 128)
    facts = {**measure.machine(), "seed": arguments.seed}
    measure.print_header("grpo.py", facts)
    torch.manual_seed(arguments.seed)
    prompts, watched, held_out = addition_prompts()
    for _ in range(3):  # as the demonstration of phase 9 draws before it makes its policy: so this
        torch.randn(6, 5)  # is the same policy
    policy = small_policy()
    supervised = warm_up(policy, prompts, watched, arguments.seed, 40 if quick else 400)
    print(f"warmed up by {supervised} supervised steps of 128 sums: "
          f"{sampled_accuracy(policy, held_out):.1%} of the held-out sums right")
    task = Task(exact_match, [encode(prompt) for prompt in prompts], decode, END)
    trainer = GRPOTrainer(policy, task, settings)
    results = {}
    if both or arguments.routing:
        results["routing"] = routing_report(trainer)
        print_routing(results["routing"])
    if both or arguments.compare:
        steps = 2 if quick else arguments.steps
        budget = steps * settings.prompts * settings.group_size
        held_out = held_out[:100] if quick else held_out
        results["compare"] = compare_variants(trainer, held_out, budget)
    out = pathlib.Path(arguments.out) / "grpo.json"
    measure.save(out, {"machine": facts, "quick": quick, "results": results})
    print(f"\nwritten: {out}")


if __name__ == "__main__":
    main()

"""A trainer around phase 9's step. It keeps state between steps and checks task and rewards."""

import functools

from grpo_coded import grpo_step, policy_optimizer
from lesson import require
from lesson.batches import step_generator


class GRPOTrainer:
    """Trains a `CausalLM` on a `Task` with GRPO.

    A step's randomness depends only on the seed and the step's number. So a run goes on as if it
    had never stopped once its weights, optimizer and `steps_done` are restored. A ValueError names
    a prompt that cannot be used or a reward that is not a finite number.
    """

    def __init__(self, policy, task, settings):
        self.policy, self.settings, self.given = policy, settings, task
        check_task(task, settings.max_new_tokens, policy.max_positions)
        self.task = task._replace(reward=functools.partial(checked_rewards, task.reward))
        self.device = policy.lm_head.weight.device
        self.reference = policy.copy().requires_grad_(False)
        self.optimizer = policy_optimizer(policy, settings)
        self.steps_done = 0

    def step(self, rate=None):
        """Draws, judges and updates, at the learning rate `rate`. Returns the step's figures."""
        rate = self.settings.learning_rate if rate is None else rate
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        figures = grpo_step(self.policy, self.reference, self.optimizer, self.task, self.settings,
                            self.steps_done)
        self.steps_done += 1
        return figures

    def generator(self, purpose=0):
        """This step's own random generator, on the policy's device."""
        return step_generator(self.settings.seed, self.steps_done, purpose, self.device)


def check_task(task, new_tokens, context):
    """ValueError unless there are prompts, and each is followed by room for a completion."""
    require(task.prompts, "there are no prompts")
    for i, prompt in enumerate(task.prompts):
        T = len(prompt)
        require(T, f"prompt {i} is empty: a completion needs a token to follow")
        if context is not None and T + new_tokens > context:
            raise ValueError(
                f"prompt {i}, {task.decode(prompt)!r}, has {T} tokens: with {new_tokens} new ones "
                f"it exceeds the context of {context}"
            )


def checked_rewards(reward, prompt, completions):
    """reward(prompt, completions), all texts → a finite number for each, else ValueError."""
    try:
        values = [float(value) for value in reward(prompt, completions)]
    except Exception as error:
        failure = f"raised {type(error).__name__} ({' '.join(str(error).split())})"
        raise ValueError(f"the reward function {failure} for prompt {prompt!r}") from error
    gave, got, want = "the reward function gave", len(values), len(completions)
    require(got == want, f"{gave} {got} rewards for the {want} completions of prompt {prompt!r}")
    for value, text in zip(values, completions, strict=True):
        fits = abs(value) < 1e18  # FP32 must hold the mean of their squares
        require(fits, f"{gave} {value} for prompt {prompt!r}, completion {text!r}")
    return values

"""Alignment: phase 9 on a trained checkpoint, rewarded by Python's own compiler.

`AlignmentRun` is a `Run` whose step is the trainer's. Phase 10 gives it the class of its model.
"""

import collections
import math
import sys
from dataclasses import dataclass

import torch

from grpo_coded import CURVES, VARIANTS, Settings, Task, roll_out
from lesson import panels, require, setting
from pipeline import checkpoint, compiler, corpus, training
from pipeline.generating import print_marked
from pipeline.released import load_with_tokenizer
from pipeline.run import (
    PRECISIONS,
    Run,
    fastest_precision,
    learning_rate,
    read_metrics,
    training_record,
)
from pipeline.scoring import score
from pipeline.trainer import GRPOTrainer

DEFAULT_MINUTES = 3.4
HELD_OUT_PROMPTS = 256


@dataclass
class AlignOptions:
    """The options of an alignment. Its checkpoint stores them, so that it can resume.

    `source`: the directory of the checkpoint that it starts from and keeps as its reference.
    `once`: each text earns its reward only once. `Settings` checks the numbers.
    """

    source: str | None = setting(None, "the trained model", flag="--checkpoint", metavar="DIR")
    data: list | None = setting(
        None, "Python for prompts (default: the training text)", metavar="FILE"
    )
    steps: int | None = setting(None, "align for so many steps")
    minutes: float | None = setting(
        None, f"align for so many minutes (default: {DEFAULT_MINUTES})"
    )
    seed: int = setting(0)
    variant: str = setting("grpo", choices=tuple(VARIANTS))
    learning_rate: float = setting(1.4e-4)
    kl_coef: float = setting(0.03)
    prompts: int = setting(16)
    group_size: int = setting(16)
    max_new_tokens: int = setting(24)
    minibatches: int = setting(2)
    precision: str = setting(
        "auto", "of the updates' products (default: auto, the faster)", choices=PRECISIONS
    )
    once: bool = setting(
        True, "reward a text every time it comes, not only once", flag="--pay-again"
    )

    def settle(self, device):
        """Replaces "auto" by the faster precision on `device`; a resumed run keeps it."""
        if self.precision == "auto":
            self.precision = fastest_precision(device)

    def settings(self):
        """The trainer's `Settings`."""
        return Settings(
            variant=self.variant, prompts=self.prompts, group_size=self.group_size,
            max_new_tokens=self.max_new_tokens, minibatches=self.minibatches,
            learning_rate=self.learning_rate, kl_coef=self.kl_coef, precision=self.precision,
            seed=self.seed, overlong_buffer=max(1, self.max_new_tokens // 4),
        )


class NoPrompts(ValueError):
    """The text is not Python, or has too little Python for prompts."""


class AlignmentRun(Run):
    """Aligns a trained checkpoint and writes the result to `directory`/checkpoint.

    It learns from prompts of the training part. The report is about held-out prompts.
    """

    model_class = None
    options_class, record = AlignOptions, "align.json"
    kind, command, doing, done = "alignment", "align", "aligning", "aligned"
    default_minutes, default_directory = DEFAULT_MINUTES, "aligned"

    def __init__(self, directory, options, device, resume=False):
        require(options.source is not None, "want --checkpoint DIR or --resume RUN")
        super().__init__(directory, options, device)
        model, self.tokenizer, source = load_with_tokenizer(
            self.model_class, options.source, device
        )
        require(model.quantization is None, f"{source} is quantised: it cannot be trained")
        options.source = str(source.resolve())
        options.settle(device)
        self.fingerprint = checkpoint.fingerprint(source)
        self.training = training_record(source)
        self.corpus = self.load_corpus()
        self.separator = self.tokenizer.token_to_id(corpus.SEPARATOR)
        self.prompts, self.held_out = self.find_prompts(model.max_positions)
        self.reward = compiler.CompilerReward(memory=options.once)
        task = Task(self.reward, self.prompts, self.decode, self.separator)
        self.trainer = GRPOTrainer(model, task, options.settings())
        if resume:
            self.restore()

    @property
    def model(self):
        return self.trainer.policy

    @property
    def optimizers(self):
        return [self.trainer.optimizer]

    def load_corpus(self):
        trained, data = self.training, self.options.data
        text = corpus.load_corpus(data or trained.get("options", {}).get("data"))
        if trained and not data and trained["corpus"] != text.fingerprint:
            print("note: the text has changed since training, held-out parts may have been seen",
                  file=sys.stderr)
        return text

    def find_prompts(self, context):
        """(prompts to learn from, held-out prompts), as token ids."""
        new_tokens = self.options.max_new_tokens
        longest = min(32, context - new_tokens)
        require(longest >= 2, f"max_new_tokens={new_tokens} leaves no room for a prompt in the "
                f"context of {context}")
        prompts, held_out = (
            compiler.line_end_prompts(self.tokenizer, part, min(12, longest), longest)
            for part in (self.corpus.train, self.corpus.test)
        )
        learnt = set(map(tuple, prompts))  # many files repeat a text, such as a licence
        held_out = [prompt for prompt in held_out if tuple(prompt) not in learnt]
        if not prompts or not held_out:
            raise NoPrompts(
                f"of the text, {len(prompts)} prompts to learn from and {len(held_out)} held "
                "out are Python that ends at a line's end: want at least one of each"
            )
        return prompts, compiler.sample_of(held_out, HELD_OUT_PROMPTS)

    def decode(self, ids):
        """Ids → text without the first separator, cut to whole lines unless it ended by itself."""
        ids = ids[1:] if ids[:1] == [self.separator] else ids
        return compiler.whole_lines(self.tokenizer.decode(ids, skip_special_tokens=False))

    def step(self, number, used):
        rate = learning_rate(used, self.options.learning_rate, floor=0.1)
        figures = self.trainer.step(rate)
        tokens = round(figures["completions"] * figures["length"])
        return {**figures, "tokens": tokens, "step": number + 1}

    def sample(self, policy):
        """(prompts, completions) as texts: one completion of each held-out prompt."""
        generator = torch.Generator(device=self.trainer.device).manual_seed(0)
        rollout = roll_out(
            policy, self.held_out, 1, self.options.max_new_tokens, self.separator,
            generator=generator,
        )
        return list(map(self.decode, self.held_out)), rollout.texts(self.decode)

    def records(self):
        """The reference is the source: its hash is stored, not its weights."""
        records = super().records()
        records[self.record] |= {"paid": sorted(self.reward.paid), "source": self.fingerprint}
        if self.training:  # so that `evaluate` finds the text
            records[Run.record] = self.training
        return records

    def restore(self):
        stored = self.read_record()
        try:
            source, self.reward.paid = stored["source"], set(stored["paid"])
        except (KeyError, TypeError) as error:
            raise ValueError(f"{self.checkpoint / self.record} is damaged: {error}") from None
        require(source == self.fingerprint,
                f"{self.options.source}, the reference of {self.directory}, is not what it was "
                "when the alignment was started")
        aligned = self.model_class.from_pretrained(self.checkpoint)
        self.model.load_state_dict(aligned.state_dict())
        if checkpoint.tensor_files(self.checkpoint / "optimizer"):  # none before the first update
            self.restore_optimizers()
        self.trainer.steps_done = self.state.step

    def describe(self):
        o = self.options
        print(
            f"aligning {o.source}: {o.variant}, {o.prompts} prompts × {o.group_size} completions "
            f"a step, temperature 1, {o.max_new_tokens} tokens cut to whole lines, {o.precision}\n"
            f"reward 1 if Python parses prompt + completion and the completion adds a statement "
            f"that does something, {self.reward.first_step} if this holds only for its first lines"
            f"{', each text once' if o.once else ''}; "
            f"{len(self.prompts):,} prompts, {len(self.held_out)} held out"
        )


# %% The command, and its report
def align(run, before=None):
    """Aligns, and compares before and after on held-out prompts and on held-out text.

    before: the figures of `score` for the source on the test part, if they are known.
    """
    run.describe()
    documents, policy, reference = run.corpus.test, run.trainer.policy, run.trainer.reference
    if before is None:
        before = score(reference, run.tokenizer, documents)
    sampled = [run.sample(reference)]
    run.go()
    sampled.append(run.sample(policy))
    after = score(policy, run.tokenizer, documents)
    shares = [compiler.shares(*pair) for pair in sampled]
    print(f"completions of {len(run.held_out)} held-out prompts, before → after "
          f"{run.state.step} steps in {run.state.seconds:.0f} s:")
    for name in shares[0]:
        print(f"  {name.replace('_', ', '):<16} {shares[0][name]:6.1%} → {shares[1][name]:6.1%}")
    rates = [figures["bits_per_byte"] for figures in (before, after)]
    print(f"bits per byte, test part: {rates[0]:.4f} → {rates[1]:.4f} "
          f"({rates[1] / rates[0] - 1:+.2%})")
    if before["mtp_acceptance"] is not None:
        drafts = [figures["mtp_acceptance"] for figures in (before, after)]
        print(f"MTP acceptance, its module left as it was: {drafts[0]:.1%} → {drafts[1]:.1%}")
    show_completions(*sampled)
    panels(run.directory / "alignment.png", read_metrics(run.metrics), CURVES,
           xlabel="GRPO step", free=("length",))
    checkpoint.write_json(
        run.directory / "results.json",
        {"before": {**shares[0], "test": before}, "after": {**shares[1], "test": after},
         "steps": run.state.step, "seconds": run.state.seconds},
    )
    print(f"checkpoint: {run.checkpoint}   picture: {run.directory / 'alignment.png'}")


def align_after_training(run, scores, run_class):
    """The last step of the main job. Its budget grows and shrinks with that of the training.

    run: the training run; scores: of its model's test part; run_class: the kind of alignment.
    """
    steps, minutes = run.options.steps, run.options.minutes
    options = AlignOptions(
        str(run.checkpoint), run.options.data,
        steps=steps and math.ceil(steps / 10),
        minutes=minutes and minutes * DEFAULT_MINUTES / training.DEFAULT_MINUTES,
        seed=run.options.seed, precision=run.options.precision,
        max_new_tokens=min(AlignOptions.max_new_tokens, run.model.max_positions // 2),
    )
    try:
        alignment = run_class(run.directory / "aligned", options, run.device)
    except NoPrompts as error:
        print(f"not aligned: {error}")
        return
    align(alignment, scores)


def show_completions(before, after, examples=4):
    """Prints completions before and after, then the shortest and most common valid ones."""
    verdicts = [
        [compiler.verdict(prompt, text) for prompt, text in zip(*pair, strict=True)]
        for pair in (before, after)
    ]
    learnt = [
        i for i, (was, now) in enumerate(zip(*verdicts, strict=True))
        if was != "valid" and now == "valid"
    ]
    for i in learnt[:examples]:
        print_marked("│", "\n".join(before[0][i].splitlines()[-3:]))
        for when, judged, text in (("before", verdicts[0][i], before[1][i]),
                                   ("after", verdicts[1][i], after[1][i])):
            print(f"  {when}: {judged}")
            print_marked("▌", text or "(no whole line)")
        print()
    paid = [text for text, v in zip(after[1], verdicts[1], strict=True) if v == "valid"]
    if not paid:
        print("no completion is valid")
        return
    cheapest = sorted(set(paid), key=lambda text: (len(text.strip()), text))[:examples]
    commonest = collections.Counter(text.strip() for text in paid).most_common(3)
    print(f"the shortest valid completions: {', '.join(repr(t.strip()) for t in cheapest)}")
    print("the most common: " + ", ".join(f"{text!r} ({count} of {len(paid)})"
                                          for text, count in commonest))

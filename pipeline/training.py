"""Training: a `Run` that makes a checkpoint from a text. Phase 10 adds the model and its step."""

import pathlib
from dataclasses import dataclass
from typing import ClassVar

import torch

from lesson import check_settings, require, setting
from pipeline import corpus, report
from pipeline.run import PRECISIONS, Run, fastest_precision
from pipeline.scoring import print_scores, score

SMALL_CONFIG = pathlib.Path(__file__).parent.parent / "configs" / "small.json"
OPTIMIZERS = ("muon", "adamw")
DEFAULT_MINUTES = 4.6


@dataclass
class RunOptions:
    """The options of a training run. They are stored with its checkpoint, so that it can resume.

    `earlier` has the values for runs that were stored before a field existed.
    """

    earlier: ClassVar = {"mtp_from": 0.0, "beta2": 0.95}

    config: str = setting(
        str(SMALL_CONFIG), "config.json of the model (default: configs/small.json)"
    )
    data: list | None = setting(
        None, "your own UTF-8 text (default: Python's standard library)", metavar="FILE"
    )
    steps: int | None = setting(None, "train for so many steps")
    minutes: float | None = setting(
        None, f"train for so many minutes (default: {DEFAULT_MINUTES})"
    )
    seed: int = setting(0, "seed of weights and batches", at_least=0)
    batch_size: int = setting(4, "sequences in a step", at_least=1)
    sequence_length: int = setting(256, "tokens in a sequence", at_least=3)
    learning_rate: float = setting(3e-3, "its highest value, after the warm-up", above=0)
    precision: str = setting(
        "auto", "precision of matrix products (default: auto, the faster one)", choices=PRECISIONS
    )
    optimizer: str = setting("muon", "muon is Muon beside AdamW", choices=OPTIMIZERS)
    beta2: float = setting(0.99, "AdamW's β₂", at_least=0, below=1)
    mtp_weight: float = setting(0.3, "weight of the MTP loss", at_least=0)
    mtp_from: float = setting(
        0.7, "share of the run after which the MTP module learns as well", at_least=0, below=1
    )
    gamma: float = setting(0.005, "how far a step moves the routing biases", at_least=0)

    def __post_init__(self):
        check_settings(self, as_flags=True)

    def settle(self, device):
        """Replaces "auto" by the faster precision on `device`. A resumed run keeps it."""
        if self.precision == "auto":
            self.precision = fastest_precision(device)


class TrainingRun(Run):
    """Trains a model as the options say, and writes it to `directory`/checkpoint.

    A subclass sets `model_class`, and defines `build_optimizers`, `costs` and `step`.
    """

    model_class = None
    options_class, default_minutes = RunOptions, DEFAULT_MINUTES
    look_ahead = 6

    def __init__(self, directory, options, device, resume=False):
        super().__init__(directory, options, device)
        options.settle(device)
        self.corpus = corpus.load_corpus(options.data)
        torch.manual_seed(options.seed)
        self.tokenizer, self.model = self.stored() if resume else self.fresh()
        self.model.to(device)
        self.optimizers = self.build_optimizers()
        if resume:
            self.restore_optimizers()
        stream = corpus.token_stream(self.tokenizer, self.corpus.train)
        self.batches = corpus.Batches(
            stream, options.batch_size, options.sequence_length, options.seed
        )

    def build_optimizers(self):
        raise NotImplementedError

    def costs(self):
        """A dict of parameter counts (`total`, `active`, `mtp`), and cached numbers a token."""
        raise NotImplementedError

    def fresh(self):
        """Tokenizer and model of a new run. A short text may give a smaller vocabulary."""
        config = self.model_class.config_class.from_file(self.options.config)
        require(config.quantization_config is None,
                f"{self.options.config}: a quantised model cannot be trained")
        self.check_length(config)
        tokenizer = corpus.train_tokenizer(self.corpus.train, config.vocab_size)
        config.vocab_size = tokenizer.get_vocab_size()
        return tokenizer, self.model_class(config)

    def stored(self):
        """Tokenizer and model of the run's checkpoint."""
        require(not (self.checkpoint / "align.json").exists(),
                f"{self.directory} is an alignment: go on with align --resume")
        self.read_record()
        tokenizer = corpus.load_tokenizer(self.checkpoint / "tokenizer.json")
        model = self.model_class.from_pretrained(self.checkpoint)
        require(model.quantization is None,
                f"{self.checkpoint} is quantised: it cannot be trained")
        self.check_length(model.config)
        return tokenizer, model

    def check_length(self, config):
        length, context = self.options.sequence_length, config.max_position_embeddings
        require(length <= context,
                f"--sequence-length={length} exceeds max_position_embeddings={context}")

    def batch(self, number):
        """(ids, document_ids) of step `number`, (B, T) each."""
        return tuple(part.to(self.device) for part in self.batches[number])

    def go(self):
        report.print_header(self, *self.costs())
        super().go()
        step, tokens, seconds = self.state.step, self.state.tokens, self.state.seconds
        print(f"trained {step} steps, {tokens:,} tokens in {seconds:.0f} s: "
              f"{tokens / seconds:,.0f} tokens/s")


def train(run):
    """Runs the train command: trains, then scores the validation part."""
    run.go()
    validation = run.corpus.validation
    scores = score(run.model, run.tokenizer, validation)
    print_scores(scores, validation, run.tokenizer, "validation part")
    print(f"checkpoint: {run.checkpoint}")

"""A dense model as a user would take it, beside the main job: equal seconds, bits per byte.

The contenders are transformers' GPT2LMHeadModel and LlamaForCausalLM with fused AdamW (betas 0.9
and 0.95, weight decay 0.1 on matrices), a cosine with warm-up, gradients clipped to 1, no dropout.
All read the same text with the same tokenizer, context and precision as the run of --checkpoint.

Short runs choose for each class one of two batches (at the middle size), one of three sizes and one
of three learning rates, on short files of the validation part. The winners then train in full, and
this model beside them, and are scored on the test part. All train by turns, a few steps each, until
each has had its seconds: a busy machine slows all alike. Seconds count training steps only.

Run:  python benchmarks/dense.py --checkpoint runs/default      ~55 minutes, 40 of them the grid
      python benchmarks/dense.py --checkpoint runs/default --grid-seconds 30
      python benchmarks/dense.py --checkpoint runs/default --quick    a smoke test, no figures
"""

import dataclasses
import math
import pathlib
import tempfile
import time

import measure
import torch
import torch.nn.functional as F
from tqdm import tqdm

from deepseek_full_model import RunOptions, TrainingRun
from lesson import one_line_errors, require
from pipeline import corpus
from pipeline.released import load_with_tokenizer
from pipeline.run import learning_rate, training_record
from pipeline.scoring import score

SIZES = {"small": (128, 3), "middle": (192, 3), "large": (256, 4)}  # width, layers; heads of 64
RATES = (5e-4, 1e-3, 2e-3)
BATCHES = (4, 8)  # sequences
TURN = 5  # steps


# %% The contenders: each has `name`, `model`, `seconds`, `tokens` and `step(used)` → tokens
class Dense:
    """A model of transformers in training. size: key of SIZES; rate: peak learning rate."""

    def __init__(self, kind, size, rate, batch, run):
        self.kind, self.size, self.rate, self.batch = kind, size, rate, batch
        self.name = f"{kind} {size}, {rate:g}, {batch} sequences"
        self.seconds = self.tokens = self.steps = 0
        options = run.options
        self.precision = getattr(torch, options.precision)
        torch.manual_seed(options.seed)
        self.model = dense_model(kind, size, run.model.config.vocab_size, options.sequence_length)
        self.batches = corpus.Batches(
            (run.batches.ids, run.batches.document_ids), batch, options.sequence_length,
            options.seed,
        )
        matrices = [p for p in self.model.parameters() if p.dim() >= 2]
        others = [p for p in self.model.parameters() if p.dim() < 2]
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
            lr=rate, betas=(0.9, 0.95), fused=True,
        )

    def step(self, used):
        self.model.train()
        ids, _ = self.batches[self.steps]
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(used, self.rate, warmup=0.04, floor=0.05)
        self.optimizer.zero_grad()
        with torch.autocast("cpu", self.precision, enabled=self.precision != torch.float32):
            loss = self.model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        require(math.isfinite(loss.item()), f"{self.name}: the loss is {loss.item()}")
        self.steps += 1
        return ids.numel()

    def rate_of(self, run, documents):
        """Bits per byte."""
        return bits_per_byte(self.model, run.tokenizer, documents, run.options.sequence_length)


class Ours:
    """The main job's own training, by its `TrainingRun`."""

    kind, size, batch = "this model", "default", None

    def __init__(self, run):
        self.run, self.model, self.rate = run, run.model, run.options.learning_rate
        self.name, self.batch = self.kind, run.options.batch_size
        self.seconds = self.tokens = self.steps = 0

    def step(self, used):
        tokens = self.run.step(self.steps, used)["tokens"]
        self.steps += 1
        state = self.run.state  # kept as `Run.go` would
        state.step, state.seconds, state.tokens = self.steps, self.seconds, self.tokens + tokens
        return tokens

    def rate_of(self, run, documents):
        return score(run.model, run.tokenizer, documents)["bits_per_byte"]


def dense_model(kind, size, vocabulary, context):
    """An untrained model of a class of transformers; W `vocabulary`, no dropout."""
    import transformers

    width, layers = SIZES[size]
    if kind == "GPT2LMHeadModel":
        config = transformers.GPT2Config(
            vocab_size=vocabulary, n_positions=context, n_embd=width, n_layer=layers,
            n_head=width // 64, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
            bos_token_id=0, eos_token_id=0,
        )
    else:
        config = transformers.LlamaConfig(
            vocab_size=vocabulary, max_position_embeddings=context, hidden_size=width,
            num_hidden_layers=layers, num_attention_heads=width // 64,
            intermediate_size=64 * round(8 / 3 * width / 64), bos_token_id=0, eos_token_id=0,
        )
    return getattr(transformers, kind)(config)


@torch.no_grad()
def bits_per_byte(model, tokenizer, documents, context, batch_size=16):
    """`pipeline.scoring.score` for a model of transformers: the same windows, the same sum."""
    model.eval()
    nats = 0.0
    for ids, target, _ in corpus.scoring_batches(tokenizer, documents, context, batch_size):
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        logits = model.lm_head(hidden[:, :-1][target[:, 1:]])
        losses = F.cross_entropy(logits.float(), ids[:, 1:][target[:, 1:]], reduction="none")
        nats += losses.double().sum().item()
    return nats / math.log(2) / sum(document.size for document in documents)


# %% Training by turns
def by_turns(contenders, budget, label):
    """Trains all, `TURN` steps each in turn, until each has had `budget` seconds of steps."""
    total = budget * len(contenders)
    form = "{desc} {percentage:3.0f}% |{bar:20}| {remaining}"
    with tqdm(total=total, desc=label, bar_format=form) as bar:
        while waiting := [each for each in contenders if each.seconds < budget]:
            for each in waiting:
                for _ in range(TURN):
                    if each.seconds < budget:
                        start = time.perf_counter()
                        each.tokens += each.step(each.seconds / budget)
                        each.seconds += time.perf_counter() - start
            bar.n = min(total, sum(each.seconds for each in contenders))
            bar.refresh()


def short_documents(documents, count, least=1000):
    """The shortest documents of at least so many bytes: scored in seconds."""
    longer = [document for document in documents if document.size >= least]
    return sorted(longer or documents, key=lambda document: document.size)[:count]


def grid(run, kind, seconds, documents):
    """(the best settings {size, rate, batch}, rows of all runs, each with its bits per byte)."""
    rows = []

    def stage(settings):
        contenders = [Dense(kind, *each, run) for each in settings]
        by_turns(contenders, seconds, f"{kind}, {len(contenders)} runs of {seconds:g} s")
        for each in contenders:
            rows.append({"size": each.size, "rate": each.rate, "batch": each.batch,
                         "tokens": each.tokens, "bits per byte": each.rate_of(run, documents)})
        return min(rows, key=lambda row: row["bits per byte"])

    middle = stage([("middle", rate, batch) for rate in RATES for batch in BATCHES])
    best = stage([(size, rate, middle["batch"]) for size in SIZES if size != "middle"
                  for rate in RATES])
    return {name: best[name] for name in ("size", "rate", "batch")}, rows


def edges(best):
    """The names of settings whose best value is the first or last that was tried."""
    sizes = list(SIZES)
    ends = {"size": (sizes[0], sizes[-1]), "rate": (RATES[0], RATES[-1])}
    return [name for name, values in ends.items() if best[name] in values]


# %% The run
def main_run(checkpoint, seconds, directory):
    """(a new run as the checkpoint's was asked for, seconds of training): same text, same model."""
    _, tokenizer, source = load_with_tokenizer(TrainingRun.model_class, checkpoint, "cpu")
    record = training_record(source)
    require(record, f"{source} holds no training: no run.json in it")
    seconds = seconds or record["state"]["seconds"]
    options = dataclasses.replace(
        RunOptions(**record["options"]), steps=None, minutes=seconds / 60
    )
    run = TrainingRun(directory, options, "cpu")
    require(run.corpus.fingerprint == record["corpus"], "the text has changed since the training")
    require(run.tokenizer.to_str() == tokenizer.to_str(), f"{source} has another tokenizer")
    return run, seconds


def in_full(run, settings, seconds, documents):
    """Trains the winners and this model by turns; rows with bits per byte of the documents."""
    contenders = [Dense(kind, **best, run=run) for kind, best in settings.items()] + [Ours(run)]
    by_turns(contenders, seconds, f"{len(contenders)} runs of {seconds:.0f} s")
    return [
        {"model": each.kind, "size": each.size,
         "parameters": sum(p.numel() for p in each.model.parameters()), "learning rate": each.rate,
         "batch": each.batch, "tokens": each.tokens,
         "bits per byte": round(each.rate_of(run, documents), 4)}
        for each in contenders
    ]


def fewer(rows):
    """{row of the aims: % of bits per byte that the last row has fewer than another}."""
    ours = rows[-1]["bits per byte"]
    return {measure.FEWER.format(row["model"]): 100 * (1 - ours / row["bits per byte"])
            for row in rows[:-1]}


def shown(rows, percent):
    values = [f"{value:.1f} %" for value in percent] + [""]
    return [
        {**row, "parameters": f"{row['parameters']:,}", "tokens": f"{row['tokens']:,}",
         "ours fewer by": value} for row, value in zip(rows, values, strict=True)
    ]


@one_line_errors
def main(argv=None):
    parser = measure.flags(__doc__)
    parser.add_argument("--checkpoint", required=True, help="the run of the main job")
    parser.add_argument("--seconds", type=float, help="of the full runs (default: as that run)")
    parser.add_argument("--grid-seconds", type=float, default=90.0, help="of each run of the grid")
    arguments = measure.parse(parser, argv)
    quick = arguments.quick
    seconds, grid_seconds = arguments.seconds, arguments.grid_seconds
    if quick:
        seconds, grid_seconds = 0.5, 0.05
    require(grid_seconds > 0 and (seconds is None or seconds > 0), "the seconds must be above 0")
    from sides import quiet_transformers

    facts = {**measure.machine(), "transformers": quiet_transformers()}
    measure.print_header("dense.py", facts)
    settings, grids = {}, {}
    with tempfile.TemporaryDirectory() as directory:
        run, seconds = main_run(arguments.checkpoint, seconds, pathlib.Path(directory) / "run")
        facts["precision"] = run.options.precision
        validation = short_documents(run.corpus.validation, 1 if quick else 20)
        test = short_documents(run.corpus.test, 1) if quick else run.corpus.test
        for kind in measure.DENSE:
            settings[kind], grids[kind] = grid(run, kind, grid_seconds, validation)
            measure.print_table(f"{kind}, {grid_seconds:g} s a run, by turns", [
                {**row, "tokens": f"{row['tokens']:,}",
                 "bits per byte": f"{row['bits per byte']:.4f}"} for row in grids[kind]
            ])
            for name in edges(settings[kind]):
                print(f"the best {name} is at the edge of what was tried: {settings[kind][name]}")
        rows = in_full(run, settings, seconds, test)
    ratios = fewer(rows)
    measure.print_table(f"test part, {seconds:.0f} s of training each, {run.options.precision}",
                        shown(rows, ratios.values()))
    measure.print_table("against the aims", [
        measure.judged(name, value, facts["mode"], digits=1) for name, value in ratios.items()
    ])
    out = pathlib.Path(arguments.out) / "dense.json"
    measure.save(out, {"machine": facts, "quick": quick, "seconds": seconds, "ratios": ratios,
                       "grid_seconds": grid_seconds, "grid": grids, "rows": rows})
    print(f"\nwritten: {out}")


if __name__ == "__main__":
    main()

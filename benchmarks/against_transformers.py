"""This model against transformers' DeepseekV3ForCausalLM: the same weights, threads and run.

Ratios of medians of interleaved repeats. Those with transformers are its time over ours: above 1,
ours is faster. The others say in their name what is over what. Both sides train with fused AdamW,
each at its better precision, FP32 or BF16 autocast; everything else is FP32 on both sides. Ratios
travel better than seconds, but they, too, move from run to run. Memory: benchmarks/scaling.py.

Run:  python benchmarks/against_transformers.py --checkpoint runs/default
      python benchmarks/against_transformers.py --quick          under a minute, few repeats

Without --checkpoint (a trained run), speculative decoding is left out: an untrained module drafts
at random.
"""

import pathlib

import measure
import sides
import torch
from sides import best_of, both_sides, default_config

import deepseek_full_model as full
from deepseek_full_model import DeepSeekModel
from lesson import one_line_errors
from moe_coded import MixtureOfExperts, TopKRouter
from mtp_coded import Sampling
from pipeline import corpus
from pipeline.fast import speed_up
from pipeline.released import load_with_tokenizer
from pipeline.run import training_record


# %% Training
def training(repeats):
    """One step of 4 × 256 tokens on both sides, in FP32 and BF16, and the matrix rate."""
    model, theirs = both_sides(default_config())
    ids = torch.randint(model.config.vocab_size, (4, 256))
    products, operations = measure.matrix_rate()
    works = {"FP32 matrix products": products, **sides.training_works(model, theirs, ids)}
    seconds = measure.interleaved(works, repeats)
    ours, other = best_of(seconds, "ours"), best_of(seconds, "transformers")
    rate = operations / seconds["FP32 matrix products"]
    work = full.training_flops_per_token(model, ids.shape[1]) * ids.numel()
    return {
        "training step": other / ours,
        "training step / FP32 matrix rate": work / ours / rate,
    }, seconds


# %% Reading and writing
def their_generate(model, ids, new):
    return model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new,
        do_sample=False, eos_token_id=None, pad_token_id=0,
    )


def reading_and_writing(repeats, contexts, new):
    """Prefill and decode. `contexts`: {row: (batch, tokens before)}."""
    longest = max(tokens for _, tokens in contexts.values())
    config = default_config(max_position_embeddings=longest + 64)
    model, theirs = both_sides(config)

    def random_ids(batch, tokens):
        return torch.randint(config.vocab_size, (batch, tokens))

    ids = random_ids(1, 1024 if longest > 1024 else 64)

    ratios, all_seconds = {}, {}
    seconds = measure.interleaved(
        {"prefill, ours": sides.our_prefill(model, ids),
         "prefill, transformers": sides.their_prefill(theirs, ids)},
        repeats,
    )
    all_seconds |= seconds
    ratios["prefill, 1024 tokens"] = seconds["prefill, transformers"] / seconds["prefill, ours"]
    short = random_ids(1, 16)
    seconds = measure.interleaved(
        {
            "generate, ours": lambda: model.generate(short, new),
            "generate, transformers": lambda: their_generate(theirs, short, new),
        },
        repeats,
    )
    all_seconds |= seconds
    ratios["decode, batch 1, short context"] = (
        seconds["generate, transformers"] / seconds["generate, ours"]
    )
    for row, (batch, tokens) in contexts.items():
        ids = random_ids(batch, tokens)
        ours, other = sides.our_decoder(model, ids), sides.their_decoder(theirs, ids)
        seconds = measure.interleaved(
            {f"{row}, ours": lambda: ours(8), f"{row}, transformers": lambda: other(8)},  # noqa: B023
            repeats,
        )
        all_seconds |= seconds
        ratios[row] = seconds[f"{row}, transformers"] / seconds[f"{row}, ours"]
    return ratios, all_seconds


# %% Speculation
class Trained:
    """A trained run on both sides, and the first 32 tokens of held-out files as prompts."""

    def __init__(self, checkpoint, files):
        from transformers import DeepseekV3ForCausalLM

        self.model, tokenizer, directory = load_with_tokenizer(
            DeepSeekModel, checkpoint, "cpu"
        )
        if not len(self.model.mtp):
            raise ValueError(f"{directory}: the model has no MTP module to draft with")
        self.theirs = DeepseekV3ForCausalLM.from_pretrained(directory).eval()
        data = training_record(directory)["options"]["data"]
        documents = [d for d in corpus.load_corpus(data).test if d.size > 2000][:files]
        separator = tokenizer.token_to_id(corpus.SEPARATOR)
        self.prompts = [
            torch.tensor([[separator, *corpus.encode(tokenizer, d.text)][:32]]) for d in documents
        ]


def speculation(repeats, trained, new, depth):
    """Greedy continuations, plain and with drafts."""
    model, prompts = trained.model, trained.prompts
    texts = [
        model.complete(ids, new, Sampling(), speculative=True, depth=depth) for ids in prompts
    ]
    same = sum(
        torch.equal(text.ids, model.generate(ids, new))
        for text, ids in zip(texts, prompts, strict=True)
    )
    forwards, drafted, accepted = (
        sum(getattr(text, name) for text in texts) for name in ("forwards", "drafted", "accepted")
    )

    def each(write):
        return lambda: [write(ids) for ids in prompts]

    seconds = measure.interleaved(
        {
            "trained, ours plain": each(lambda ids: model.generate(ids, new)),
            "trained, ours speculative": each(
                lambda ids: model.generate(ids, new, speculative=True, depth=depth)
            ),
            "trained, transformers": each(lambda ids: their_generate(trained.theirs, ids, new)),
        },
        repeats,
    )
    plain, speculative, other = seconds.values()
    written = new * len(prompts)
    print(
        f"\nspeculation, {len(prompts)} held-out files, {written} tokens: "
        f"{accepted} of {drafted} drafts accepted, "
        f"{written / forwards:.2f} tokens a pass, {same} of {len(prompts)} texts the "
        "same as plain"
    )
    return {
        "decode with speculation, trained model": other / speculative,
        "speculative / plain decoding, trained model": plain / speculative,
    }, seconds


# %% Experts
def experts(repeats, tokens):
    """A layer of the default model with 16 and with 128 experts, 2 active and 1 shared: forward."""
    x = torch.randn(tokens, 256)
    layers = {}
    for number in (16, 128):
        layer = MixtureOfExperts(256, 256, TopKRouter(256, number, 2), n_shared_experts=1)
        layers[number] = speed_up(layer).eval()

    def run(number):
        with torch.inference_mode():
            layers[number](x)

    seconds = measure.interleaved(
        {"16 experts": lambda: run(16), "128 experts": lambda: run(128)}, repeats
    )
    ratio = seconds["128 experts"] / seconds["16 experts"]
    return {"MoE layer with 16 → 128 experts: time ×": ratio}, seconds


# %% The tables
def draw(ratios, mode, path):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(9, 4.5), layout="constrained")
    names = list(ratios)[::-1]
    reached = [ratios[name] for name in names]
    aims = {name: measure.AIMS[name].value(mode) for name in names if name in measure.AIMS}
    axis.barh(names, reached, color="tab:blue")
    axis.scatter(aims.values(), aims.keys(), color="black", marker="|", s=300, label="aim")
    for name, value in zip(names, reached, strict=True):
        axis.text(max(value, aims.get(name, 0)), name, f"  {value:.2f}", va="center")
    axis.margins(x=0.1)
    axis.axvline(1, color="gray", linewidth=0.8)
    axis.set(title=mode, xlabel="ratio (transformers' time over ours, except where the row says "
             "otherwise)")
    axis.legend()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def print_ratios(ratios, mode, quick):
    rows = [measure.judged(name, value, mode) for name, value in ratios.items()]
    if quick:
        rows = [{**row, "": ""} for row in rows]
    title = "ratios (short work and few repeats: a smoke test, no figures)" if quick else "ratios"
    measure.print_table(title, rows)
    if note := measure.note_on_aims(mode):
        print(note)


@one_line_errors
def main(argv=None):
    parser = measure.flags(__doc__)
    parser.add_argument("--checkpoint", help="a trained run, for speculative decoding")
    parser.add_argument("--depth", type=int, help="drafts a pass (default: follows what held)")
    arguments = measure.parse(parser, argv)
    quick, repeats = arguments.quick, arguments.repeats
    version = sides.quiet_transformers()
    facts = {**measure.machine(), "transformers": version, "repeats": repeats}
    measure.print_header("against_transformers.py", facts)
    measure.print_config(default_config())
    files, new = (1, 32) if quick else (12, 128)
    trained = Trained(arguments.checkpoint, files) if arguments.checkpoint else None
    contexts = {
        "decode, batch 1, 4096 tokens before": (1, 512 if quick else 4096),
        "decode, batch 16, 1024 tokens before": (16, 128 if quick else 1024),
    }
    ratios, seconds = {}, {}
    parts = [
        lambda: training(repeats),
        lambda: reading_and_writing(repeats, contexts, 16 if quick else 64),
        lambda: experts(repeats, 512 if quick else 4096),
    ]
    if trained:
        parts.append(lambda: speculation(repeats, trained, new, arguments.depth))
    for part in parts:
        more_ratios, more_seconds = part()
        ratios |= more_ratios
        seconds |= more_seconds
    measure.print_table(
        "medians", [{"work": name, "ms": f"{1e3 * value:.2f}"} for name, value in seconds.items()]
    )
    print_ratios(ratios, facts["mode"], quick)
    out = pathlib.Path(arguments.out)
    measure.save(
        out / "against_transformers.json",
        {"machine": facts, "quick": quick, "ratios": ratios, "seconds": seconds,
         "config": default_config().to_dict()},
    )
    draw(ratios, facts["mode"], out / "against_transformers.png")
    print(f"\nwritten: {out}/against_transformers.json and .png")


if __name__ == "__main__":
    main()

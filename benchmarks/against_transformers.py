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

import dataclasses
import functools
import pathlib
import tempfile
import warnings

import measure
import torch

import deepseek_full_model as full
from deepseek_full_model import DeepSeekConfig, DeepSeekModel
from lesson import one_line_errors
from moe_coded import MixtureOfExperts, TopKRouter
from mtp_coded import Sampling
from pipeline import corpus
from pipeline.decoding import new_caches, read
from pipeline.fast import decoding_head, speed_up
from pipeline.released import load_with_tokenizer
from pipeline.run import fastest_precision, training_record

# The least that each row should reach, as a ratio.
TARGETS = {
    "training step": 1.25,
    "training step / FP32 matrix rate": 1.2,
    "prefill, 1024 tokens": 1.2,
    "decode, batch 1, short context": 2.0,
    "decode, batch 1, 4096 tokens before": 5.0,
    "decode, batch 16, 1024 tokens before": 3.0,
    "decode with speculation, trained model": 3.0,
    "speculative / plain decoding, trained model": 1.25,
    "MoE layer with 16 → 128 experts: time ×": 1.4,
}


def both_sides(config, directory):
    """(ours, transformers') with the same random weights, through files."""
    from transformers import DeepseekV3ForCausalLM

    torch.manual_seed(0)
    model = DeepSeekModel(config).eval()
    model.save_pretrained(directory)
    return model, DeepseekV3ForCausalLM.from_pretrained(directory).eval()


def default_config(**changes):
    """The default model without its MTP module, which transformers' class does not have."""
    config = DeepSeekConfig.from_file(measure.ROOT / "configs" / "small.json")
    return dataclasses.replace(config, num_nextn_predict_layers=0, **changes)


# %% Training
def training(repeats, directory):
    """One step of 4 × 256 tokens on both sides, in FP32 and BF16, and the matrix rate."""
    model, theirs = both_sides(default_config(), directory)
    ids = torch.randint(model.config.vocab_size, (4, 256))
    documents = torch.zeros_like(ids)
    ours_adamw = [torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)]
    their_adamw = torch.optim.AdamW(theirs.parameters(), lr=1e-4, fused=True)
    theirs.train()

    def our_step(precision):
        full.training_step(
            model, ours_adamw, ids, documents, rate=1e-4, mtp_weight=0.0, gamma=0.0,
            precision=precision,
        )

    def their_step(precision):
        with torch.autocast("cpu", precision, enabled=precision != torch.float32):
            loss = theirs(input_ids=ids, labels=ids, use_cache=False).loss
        their_adamw.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        their_adamw.step()
        loss.item()

    products, operations = measure.matrix_rate()
    works = {"FP32 matrix products": products}
    for name in {"float32", fastest_precision("cpu")}:  # BF16 where it is not the slower one
        precision = getattr(torch, name)
        works[f"ours {name}"] = functools.partial(our_step, precision)
        works[f"transformers {name}"] = functools.partial(their_step, precision)
    seconds = measure.interleaved(works, repeats)
    best = {
        side: min(value for name, value in seconds.items() if name.startswith(side))
        for side in ("ours", "transformers")
    }
    rate = operations / seconds["FP32 matrix products"]
    work = full.training_flops_per_token(model, ids.shape[1]) * ids.numel()
    return {
        "training step": best["transformers"] / best["ours"],
        "training step / FP32 matrix rate": work / best["ours"] / rate,
    }, seconds


# %% Reading and writing
@torch.inference_mode()
def our_decoder(model, ids):
    """Reads the prompts; returns a function that writes `new` tokens as `generate` does.

    Caches and packed head are made beforehand, as transformers' cache is.
    """
    caches, past = new_caches(model, capacity=ids.shape[1] + 64), ids.shape[1]
    model.hidden_states(ids, caches=caches)
    head = decoding_head(model.lm_head, tokens=64)

    @torch.inference_mode()
    def write(new):
        fresh = ids[:, -1:]
        for i in range(new):
            hidden = read(model, fresh, caches, start=past + i)
            fresh = head(hidden[:, -1]).argmax(dim=-1, keepdim=True)

    return write


@torch.inference_mode()
def their_decoder(model, ids):
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)

    @torch.inference_mode()
    def write(new):
        fresh = ids[:, -1:]
        for _ in range(new):
            output = model(fresh, past_key_values=cache, use_cache=True, logits_to_keep=1)
            fresh = output.logits[:, -1].argmax(dim=-1, keepdim=True)
        cache.crop(-new)

    return write


def their_generate(model, ids, new):
    return model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new,
        do_sample=False, eos_token_id=None, pad_token_id=0,
    )


def reading_and_writing(repeats, directory, contexts, new):
    """Prefill and decode. `contexts`: {row: (batch, tokens before)}."""
    longest = max(tokens for _, tokens in contexts.values())
    config = default_config(max_position_embeddings=longest + 64)
    model, theirs = both_sides(config, directory)

    def random_ids(batch, tokens):
        return torch.randint(config.vocab_size, (batch, tokens))

    ids = random_ids(1, 1024 if longest > 1024 else 64)

    @torch.inference_mode()
    def their_prefill():
        theirs(ids, use_cache=True, logits_to_keep=1)

    ratios, all_seconds = {}, {}
    seconds = measure.interleaved(
        {"prefill, ours": lambda: model.generate(ids, 1), "prefill, transformers": their_prefill},
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
        ours, other = our_decoder(model, ids), their_decoder(theirs, ids)
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
def draw(ratios, path):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(9, 4.5), layout="constrained")
    names = list(ratios)[::-1]
    reached = [ratios[name] for name in names]
    axis.barh(names, reached, color="tab:blue")
    axis.scatter([TARGETS[name] for name in names], names, color="black", marker="|", s=300,
                 label="aim")
    for name, value in zip(names, reached, strict=True):
        axis.text(max(value, TARGETS[name]), name, f"  {value:.2f}", va="center")
    axis.margins(x=0.1)
    axis.axvline(1, color="gray", linewidth=0.8)
    axis.set(xlabel="ratio (transformers' time over ours, except where the row says otherwise)")
    axis.legend()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def print_ratios(ratios, quick):
    rows = []
    for name, value in ratios.items():
        at_most = name.startswith("MoE")
        fits = value <= TARGETS[name] if at_most else value >= TARGETS[name]
        aim = f"{'at most' if at_most else 'at least'} {TARGETS[name]}"
        verdict = "" if quick else ("reached" if fits else "falls short")
        rows.append({"work": name, "ratio": f"{value:.2f}", "aim": aim, "": verdict})
    title = "ratios (short work and few repeats: a smoke test, no figures)" if quick else "ratios"
    measure.print_table(title, rows)


@one_line_errors
def main(argv=None):
    parser = measure.flags(__doc__)
    parser.add_argument("--checkpoint", help="a trained run, for speculative decoding")
    parser.add_argument("--depth", type=int, help="drafts a pass (default: follows what held)")
    arguments = measure.parse(parser, argv)
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", "Mismatch dtype between input and weight")  # theirs in BF16
    quick, repeats = arguments.quick, arguments.repeats
    facts = {**measure.machine(), "transformers": transformers.__version__, "repeats": repeats}
    measure.print_header("against_transformers.py", facts)
    measure.print_config(default_config())
    files, new = (1, 32) if quick else (12, 128)
    trained = Trained(arguments.checkpoint, files) if arguments.checkpoint else None
    contexts = {
        "decode, batch 1, 4096 tokens before": (1, 512 if quick else 4096),
        "decode, batch 16, 1024 tokens before": (16, 128 if quick else 1024),
    }
    ratios, seconds = {}, {}
    with tempfile.TemporaryDirectory() as directory:
        parts = [
            lambda: training(repeats, directory),
            lambda: reading_and_writing(repeats, directory, contexts, 16 if quick else 64),
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
    print_ratios(ratios, quick)
    out = pathlib.Path(arguments.out)
    measure.save(
        out / "against_transformers.json",
        {"machine": facts, "quick": quick, "ratios": ratios, "seconds": seconds,
         "config": default_config().to_dict()},
    )
    draw(ratios, out / "against_transformers.png")
    print(f"\nwritten: {out}/against_transformers.json and .png")


if __name__ == "__main__":
    main()

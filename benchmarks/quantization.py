"""What quantisation saves and costs: kernels, a wide model, and the trained default model.

Speed: medians of interleaved repeats in one run, as ratios to FP32. Quality: bits per byte of the
whole validation part, each window scored by both models, so that the standard error is that of the
difference.

Run:  python benchmarks/quantization.py --checkpoint runs/default     ~25 minutes
      python benchmarks/quantization.py --checkpoint runs/default --parts kernels table
      python benchmarks/quantization.py --quick                       speed only, short
"""

import copy
import math
import pathlib
import tempfile

import measure
import torch
import torch.nn.functional as F

import deepseek_full_model as full
from deepseek_full_model import DeepSeekConfig, DeepSeekModel
from lesson import one_line_errors, picture
from pipeline import corpus
from pipeline.fast import pack_int4, quick_int8
from pipeline.quantizing import calibration_ids
from pipeline.released import load_with_tokenizer
from pipeline.run import learning_rate, training_record
from quantization_coded import (
    SCHEMES,
    IntegerLinear,
    Scheme,
    W8A8Linear,
    block_quantize,
    convert_qat,
    matrix_bytes,
    prepare_fp8_training,
    prepare_qat,
    quantize_cache,
    quantize_model,
)

# The least that each ratio to FP32 (or to BF16) should reach.
TARGETS = {
    "W8A8, 256 rows / FP32": 3.0,
    "W8A8, 256 rows / BF16": 1.4,
    "INT4 weights, 1 row / FP32": 3.0,
    "INT8 weights, 1 row / FP32": 2.5,
    "wide model, decode, best of INT8 and INT4 / FP32": 2.5,
}


# %% One matrix, with more of them than any cache holds
def kernels(repeats, size, count):
    """`count` matrices of size × size by turns, so that each comes from memory."""
    weights = [torch.randn(size, size) / size**0.5 for _ in range(count)]
    kinds = {
        "INT8 weights": lambda: IntegerLinear(size, size),
        "INT4 weights": lambda: IntegerLinear(size, size, bits=4, group_size=128),
        "W8A8": lambda: W8A8Linear(size, size),
    }
    layers = {
        name: [pack_int4(quick_int8(make().fill_nearest(w))) for w in weights]
        for name, make in kinds.items()
    }
    # INT4 takes an eighth of the bytes: more copies, so that these come from memory, too.
    layers["INT4 weights"] += [copy.deepcopy(layer) for layer in layers["INT4 weights"]]
    in_bf16 = [weight.bfloat16() for weight in weights]
    in_fp8 = [fp8_rows(weight) for weight in weights]
    ratios, all_seconds = {}, {}
    for rows, inputs in ((1, 40), (256, 4)):
        x = torch.randn(rows, size)
        x_bf16 = x.bfloat16()
        works = {
            "FP32": each(weights, lambda w, x=x: F.linear(x, w), inputs),
            "BF16": each(in_bf16, lambda w, x=x_bf16: F.linear(x, w), inputs),
            **{
                name: each(stack, lambda layer, x=x: layer(x), inputs)
                for name, stack in layers.items()
            },
        }
        if rows > 1:
            works["FP8, a scale a row"] = each(
                in_fp8, lambda w, x=x: scaled_mm_by_rows(x, *w), inputs
            )
        with torch.inference_mode():
            seconds = measure.interleaved(works, repeats)
        seconds = {name: s / inputs for name, s in seconds.items()}
        table = [
            {"work": name, "ms": f"{1e3 * s:.3f}", "× FP32": f"{seconds['FP32'] / s:.2f}",
             "× BF16": f"{seconds['BF16'] / s:.2f}"} for name, s in seconds.items()
        ]
        measure.print_table(f"{rows} row{'s' * (rows > 1)} times {size} × {size}", table)
        all_seconds |= {f"{rows} rows, {name}": s for name, s in seconds.items()}
        if rows == 1:
            for name in ("INT4 weights", "INT8 weights"):
                ratios[f"{name}, 1 row / FP32"] = seconds["FP32"] / seconds[name]
        else:
            for name in ("FP32", "BF16"):
                ratios[f"W8A8, 256 rows / {name}"] = seconds[name] / seconds["W8A8"]
    return {"ratios": ratios, "seconds": all_seconds}


def fp8_rows(x):
    """x (R, C) → E4M3 codes (R, C) and one FP32 scale a row (R, 1)."""
    return block_quantize(x, 1, x.shape[1])


def scaled_mm_by_rows(x, weight_codes, weight_scale):
    """x Wᵀ by PyTorch's FP8 product, which on a CPU takes one scale a row (or a tensor)."""
    codes, scale = fp8_rows(x)
    by_row = F.ScalingType.RowWise
    return F.scaled_mm(codes, weight_codes.T, scale, by_row, weight_scale.T, by_row,
                       output_dtype=torch.float32)


def each(stack, work, times):
    """A function that does `work` on the next `times` of the stack's members, round and round."""
    place = 0

    def run():
        nonlocal place
        for _ in range(times):
            work(stack[place % len(stack)])
            place += 1

    return run


# %% A model whose weights, not its calls, take the time
def wide_config(quick):
    small = DeepSeekConfig.from_file(measure.ROOT / "configs" / "small.json").to_dict()
    sizes = dict(
        hidden_size=2048, intermediate_size=5632, moe_intermediate_size=1408,
        num_attention_heads=16, q_lora_rank=512, kv_lora_rank=256, qk_nope_head_dim=64,
        qk_rope_head_dim=32, v_head_dim=64, max_position_embeddings=512,
        num_hidden_layers=2 if quick else 4, num_nextn_predict_layers=0,
    )
    return DeepSeekConfig.from_dict({**small, **sizes})


def wide(repeats, quick):
    """Decoding and reading with random weights, ≥ 100M of them active."""
    torch.manual_seed(0)
    models = {"FP32": DeepSeekModel(wide_config(quick)).eval()}
    active = full.parameter_counts(models["FP32"])["active"]
    measure.print_config(models["FP32"].config)
    print(f"{active:,} parameters active a token")
    for scheme in ("int8", "int4", "w8a8"):
        models[scheme] = quantize_model(models["FP32"], scheme)
    vocabulary = models["FP32"].config.vocab_size
    prompt, long = (torch.randint(vocabulary, (1, tokens)) for tokens in (16, 256))
    rows, result = speed_rows(models, prompt, long, 8 if quick else 32, repeats)
    for row in rows:
        stored, before = matrix_bytes(models[row["scheme"]])
        row["matrices' bytes × FP32"] = f"{stored / before:.4f}" if before else "1"
    measure.print_table("the wide model, ratios to FP32", rows)
    best = max(result["int8"]["decode"], result["int4"]["decode"])
    ratios = {"wide model, decode, best of INT8 and INT4 / FP32": best}
    return {"ratios": ratios, "active": active, "speed": result}


def speed_rows(models, prompt, long, new, repeats):
    """Decode (`generate` behind a short prompt) and prefill of all models by turns."""
    works = {name: lambda m=m: m.generate(prompt, new) for name, m in models.items()}
    decode = measure.interleaved(works, repeats)
    works = {name: lambda m=m: m.generate(long, 1) for name, m in models.items()}
    prefill = measure.interleaved(works, repeats)
    result = {
        name: {"decode": decode["FP32"] / decode[name], "prefill": prefill["FP32"] / prefill[name],
               "decode seconds": decode[name], "prefill seconds": prefill[name]}
        for name in models
    }
    rows = [
        {"scheme": name, "tokens/s": f"{new / decode[name]:.0f}",
         "decode ×": f"{result[name]['decode']:.2f}", "prefill ×": f"{result[name]['prefill']:.2f}"}
        for name in models
    ]
    return rows, result


# %% The trained model
class Trained:
    """A run's model, its validation part in scoring windows, and its training text."""

    def __init__(self, directory, quick):
        loaded = load_with_tokenizer(DeepSeekModel, directory, "cpu")
        self.model, self.tokenizer, self.directory = loaded
        self.text = corpus.load_corpus(training_record(self.directory)["options"]["data"])
        documents = self.text.validation
        if quick:
            documents = sorted(documents, key=lambda document: document.size)[:2]
        self.bytes = sum(document.size for document in documents)
        context = self.model.max_positions
        self.batches = list(corpus.scoring_batches(self.tokenizer, documents, context, 16))
        self.reference = self.nats(self.model)

    @torch.no_grad()
    def nats(self, model):
        """Summed loss of every scoring window, the same windows for every model."""
        model.eval()
        windows = []
        for ids_BT, target_BT, _ in self.batches:
            caches = model.new_caches() if model.cache_bits else None
            hidden_BTD = model.hidden_states(ids_BT, caches=caches)
            scored_BT = target_BT[:, 1:]
            logits = model.lm_head(hidden_BTD[:, :-1][scored_BT])
            losses = F.cross_entropy(logits, ids_BT[:, 1:][scored_BT], reduction="none").double()
            sums = torch.zeros(len(ids_BT), dtype=torch.float64)
            windows.append(sums.index_add(0, scored_BT.nonzero()[:, 0], losses))
        return torch.cat(windows)

    def rate(self, nats):
        """Bits per byte."""
        return nats.sum().item() / math.log(2) / self.bytes

    def difference(self, nats, reference=None):
        """(bits per byte more than the reference, default FP32; its standard error, paired)."""
        more = nats - (self.reference if reference is None else reference)
        unit = math.log(2) * self.bytes
        return more.sum().item() / unit, more.std().item() * len(more) ** 0.5 / unit

    def calibration(self, seed, sequences=128):
        return calibration_ids(
            self.tokenizer, self.text.train, sequences, self.model.max_positions, seed
        )

    def row(self, name, nats):
        change, error = self.difference(nats)
        return {
            "": name,
            "bits per byte": f"{self.rate(nats):.4f}",
            "change": f"{change:+.5f} ± {error:.5f}",
            "relative": f"{change / self.rate(self.reference):+.3%}",
        }


def all_bytes(model):
    tensors = [*model.parameters(), *model.buffers()]
    return sum(tensor.nbytes for tensor in {t.data_ptr(): t for t in tensors}.values())


def table(repeats, trained):
    """Every scheme: bytes on disk and in memory, bits per byte, speed."""
    models = {"FP32": trained.model}
    for scheme in SCHEMES:
        models[scheme] = quantize_model(trained.model, scheme, trained.calibration(seed=0))
    ids = trained.batches[-1][0][:1, :-1]  # one place is left for the token that is generated
    rows, speed = speed_rows(models, ids[:, :16], ids, 64, repeats)
    result = {}
    for row, (name, model) in zip(rows, models.items(), strict=True):
        with tempfile.TemporaryDirectory() as directory:
            model.save_pretrained(directory)
            (file,) = pathlib.Path(directory).glob("*.safetensors")
            disk = file.stat().st_size
        stored, before = matrix_bytes(model) if name != "FP32" else (1, 1)
        nats = trained.nats(model)
        change, error = trained.difference(nats)
        rate = trained.rate(nats)
        row |= {"disk MB": f"{disk / 1e6:.1f}", "memory MB": f"{all_bytes(model) / 1e6:.1f}",
                "matrices ×": f"{stored / before:.4f}", "bits/byte": f"{rate:.4f}",
                "change": f"{change:+.5f} ± {error:.5f}",
                "relative": f"{change / trained.rate(trained.reference):+.3%}"}
        result[name] = {**speed[name], "disk": disk, "memory": all_bytes(model),
                        "matrices": stored / before, "bits_per_byte": rate, "change": change,
                        "standard_error": error}
    measure.print_table("the trained model", rows)
    return {"schemes": result}


def methods(trained, seeds):
    """Rounding to nearest, AWQ and GPTQ at 4 and 3 bits, on several draws of calibration text."""
    rows, result = [], {}
    for bits in (4, 3):
        nearest = trained.nats(quantize_model(trained.model, Scheme("weights", bits, "auto")))
        rows.append({**trained.row(f"{bits} bits, nearest", nearest), "against nearest": ""})
        result[f"{bits} nearest"] = trained.difference(nearest)
        for method in ("awq", "gptq"):
            scheme = Scheme("weights", bits, "auto", method)
            for seed in range(seeds):
                calibration = trained.calibration(seed)
                nats = trained.nats(quantize_model(trained.model, scheme, calibration))
                less, error = trained.difference(nats, nearest)
                name = f"{bits} bits, {method}, seed {seed}"
                rows.append({**trained.row(name, nats),
                             "against nearest": f"{less:+.5f} ± {error:.5f}"})
                result[name] = (*trained.difference(nats), less, error)
    measure.print_table("methods, a scale every 128 weights (kv_b_proj: 32)", rows)
    return {"differences": result}


def caches(trained):
    """Latent caches of 8, 6 and 4 bits, bytes with their scales."""
    rows, result, config = [], {}, trained.model.config
    width = config.kv_lora_rank + config.qk_rope_head_dim
    for bits in (8, 6, 4):
        model = quantize_cache(trained.model, bits)
        nats = trained.nats(model)
        used = model.new_caches()
        model.hidden_states(trained.batches[-1][0][:1], caches=used)
        size = sum(cache.used_bytes() for cache in used) / len(used) / used[0].length
        change = trained.difference(nats)
        rows.append({**trained.row(f"cache in {bits} bits", nats),
                     "bytes a token and layer": f"{size:.0f}",
                     "in place of (BF16)": str(2 * width)})
        result[bits] = {"difference": change, "bytes": size}
    quantize_cache(trained.model, None)
    measure.print_table("the latent cache", rows)
    return {"bits": result}


# %% Training with rounded numbers
def training_run(model, trained, steps, precision=torch.float32, rate=3e-4, seed=1, warm=False):
    """`steps` of the default training on the run's text; the losses."""
    stream = corpus.token_stream(trained.tokenizer, trained.text.train)
    batches = corpus.Batches(stream, 4, trained.model.max_positions, seed)
    optimizers = full.build_optimizers(model, rate, muon=False)
    losses = []
    for step in measure.tqdm(range(steps), leave=False, desc="training"):
        now = rate * (1 - step / steps) if warm else learning_rate(step / steps, rate)
        figures = full.training_step(model, optimizers, *batches[step], now, 0.3, 0.0, precision)
        losses.append(figures["loss"])
    return losses


def qat(trained, steps):
    """INT3 a row: rounding, a control trained on and rounded, and QAT, each with as many steps."""
    scheme = Scheme("weights", 3)
    control, rounded = trained.model.copy(), prepare_qat(trained.model, scheme)
    training_run(control, trained, steps, warm=True)
    training_run(rounded, trained, steps, warm=True)
    nats = {
        "the model, rounded": trained.nats(quantize_model(trained.model, scheme)),
        f"{steps} steps more in FP32": trained.nats(control),
        "the same, rounded (control)": trained.nats(quantize_model(control, scheme)),
        f"{steps} steps of QAT, converted": trained.nats(convert_qat(rounded)),
    }
    measure.print_table("INT3, one scale a row", [trained.row(*item) for item in nats.items()])
    _, unrounded, control, converted = (trained.rate(n) for n in nats.values())
    share = (control - converted) / (control - unrounded)
    print(f"QAT recovers {share:.0%} of what rounding the control lost "
          f"({control - unrounded:.5f} bits per byte)")
    return {"rates": {name: trained.rate(n) for name, n in nats.items()}, "recovered": share}


def fp8_training(trained, steps):
    """Training in FP32, in BF16 and in simulated FP8 on the same batches.

    From scratch, where runs that differ in the last bit already drift apart (FP32 beside BF16 shows
    how far), and on from the trained model at a tenth of the learning rate, where they do not.
    """
    results = {}
    for start, rate in (("from scratch", 3e-3), ("from the trained model", 3e-4)):
        losses, nats = {}, {}
        for name in ("FP32", "BF16", "FP8"):
            torch.manual_seed(0)
            scratch = start == "from scratch"
            model = DeepSeekModel(trained.model.config) if scratch else trained.model.copy()
            model = prepare_fp8_training(model) if name == "FP8" else model
            precision = torch.bfloat16 if name == "BF16" else torch.float32
            values = training_run(model, trained, steps, precision, rate, warm=not scratch)
            last = values[-min(50, steps) :]
            losses[name] = sum(last) / len(last)
            nats[name] = trained.nats(model)
        rows, base = [], trained.rate(nats["BF16"])
        for name, value in nats.items():
            change, error = trained.difference(value, nats["BF16"])
            rows.append({
                "products in": name,
                "last 50 steps, nats": f"{losses[name]:.4f}",
                "over BF16": f"{losses[name] / losses['BF16'] - 1:+.3%}",
                "validation, bits per byte": f"{trained.rate(value):.4f}",
                "over that of BF16": f"{change / base:+.3%} ± {error / base:.3%}",
            })
        measure.print_table(f"{steps} steps {start}", rows)
        rates = {name: trained.rate(value) for name, value in nats.items()}
        results[start] = {"losses": losses, "bits_per_byte": rates}
    return results


# %% The picture
def draw(schemes, path):
    """Bytes of the matrices against what is lost (± 2 standard errors), and speed, by scheme."""
    names = [name for name in schemes if name != "FP32"]
    places = range(len(names))
    with picture(path, columns=2, size=(13, 4.5)) as (left, right):
        for name in names:
            scheme = schemes[name]
            stored, lost, error = (scheme[k] for k in ("matrices", "change", "standard_error"))
            left.errorbar(stored, 1e3 * lost, 2e3 * error, fmt="o", label=name)
        left.axhline(0, color="gray", linewidth=0.8)
        left.set(xlabel="bytes of the matrices over FP32's",
                 ylabel="thousandths of a bit per byte over FP32")
        left.legend()
        for shift, what in ((-0.2, "decode"), (0.2, "prefill")):
            speeds = [schemes[name][what] for name in names]
            right.bar([place + shift for place in places], speeds, width=0.4, label=what)
        right.axhline(1, color="gray", linewidth=0.8)
        right.set_xticks(places, names, rotation=30)
        right.set(ylabel="speed over FP32's")
        right.margins(y=0.25)
        right.legend(loc="upper right", ncols=2)


# %% The run
PARTS = ("kernels", "wide", "table", "methods", "caches", "qat", "fp8_training")


def print_ratios(ratios, quick):
    rows = [
        {"ratio": name, "value": f"{value:.2f}", "aim": f"at least {TARGETS[name]}",
         "": "" if quick else ("reached" if value >= TARGETS[name] else "falls short")}
        for name, value in ratios.items()
    ]
    measure.print_table("ratios", rows)


@one_line_errors
def main(argv=None):
    parser = measure.flags(__doc__)
    parser.add_argument("--checkpoint", help="a trained run; without it, speed only")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="default: all")
    parser.add_argument("--steps", type=int, default=200, help="training steps of QAT and FP8")
    parser.add_argument("--seeds", type=int, default=3, help="draws of calibration text")
    arguments = measure.parse(parser, argv)
    quick, repeats = arguments.quick, arguments.repeats
    steps, seeds = (2, 1) if quick else (arguments.steps, arguments.seeds)
    facts = {**measure.machine(), "repeats": repeats}
    measure.print_header("quantization.py", facts)
    if "AVX-512" not in facts["mode"]:
        print("note: without AVX-512 these kernels were not measured; the ratios may be others")
    trained = Trained(arguments.checkpoint, quick) if arguments.checkpoint else None
    parts = {
        "kernels": lambda: kernels(repeats, 1024 if quick else 4096, 2 if quick else 8),
        "wide": lambda: wide(repeats, quick),
    }
    if trained:
        print(f"the trained model on {trained.bytes:,} bytes of the validation part: "
              f"{trained.rate(trained.reference):.4f} bits per byte in FP32")
        parts |= {
            "table": lambda: table(repeats, trained),
            "methods": lambda: methods(trained, seeds),
            "caches": lambda: caches(trained),
            "qat": lambda: qat(trained, steps),
            "fp8_training": lambda: fp8_training(trained, steps),
        }
    results = {name: part() for name, part in parts.items() if name in arguments.parts}
    ratios = {}
    for result in results.values():
        ratios |= result.get("ratios", {})
    if ratios:
        print_ratios(ratios, quick)
    out = pathlib.Path(arguments.out)
    measure.save(out / "quantization.json", {"machine": facts, "quick": quick, "results": results})
    print(f"\nwritten: {out}/quantization.json")
    if "table" in results:
        draw(results["table"]["schemes"], out / "quantization.png")
        print(f"picture: {out}/quantization.png")


if __name__ == "__main__":
    main()

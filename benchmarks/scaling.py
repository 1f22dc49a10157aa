"""What costs grow with: context length, tokens a pass, experts, batch. Memory beside time.

Each table is one run of interleaved repeats; `×` is the median time over that of the first row of
its kind. Weights are random, widths those of the default model; everything in FP32 but the training
step, which runs in the faster precision. Bytes are counted, not measured: what the caches hold, and
what the backward pass of a training step keeps from the forward pass.

Run:  python benchmarks/scaling.py
      python benchmarks/scaling.py --quick          under a minute, few repeats
"""

import dataclasses
import pathlib
import re

import measure
import torch

import deepseek_full_model as full
from deepseek_full_model import DeepSeekConfig, DeepSeekModel
from lesson import one_line_errors
from mla_coded import cache_elements_per_token
from moe_coded import MixtureOfExperts, TopKRouter
from pipeline.decoding import EXPAND_FROM, new_caches
from pipeline.fast import speed_up


def default_model(**changes):
    config = DeepSeekConfig.from_file(measure.ROOT / "configs" / "small.json")
    torch.manual_seed(0)
    return DeepSeekModel(dataclasses.replace(config, num_nextn_predict_layers=0, **changes)).eval()


@torch.inference_mode()
def filled_caches(model, batch, context):
    """Caches that hold `context` tokens a sequence; their content does not matter to the time."""
    caches = new_caches(model, capacity=context + 256)
    width = model.config.kv_lora_rank + model.config.qk_rope_head_dim
    for cache in caches:
        cache.append(torch.randn(batch, context, width))
    return caches


CALLS = 4  # passes a timed call makes, so that what ran before it does not count for much


def reader(model, caches, tokens, path):
    """Reads `tokens` (B, T) behind what the caches hold and forgets them, `CALLS` times a call."""

    @torch.inference_mode()
    def read():
        past = caches[0].length
        for _ in range(CALLS):
            model.lm_head(model.hidden_states(tokens, caches=caches, path=path)[:, -1])
            for cache in caches:
                cache.truncate(past)

    return read


def table(works, repeats, columns, calls=1):
    """Rows of {work, ms, ×, *columns} for works {key: function} and columns {key: {…}}."""
    seconds = measure.interleaved({str(key): work for key, work in works.items()}, repeats)
    seconds = {key: value / calls for key, value in seconds.items()}
    first = next(iter(seconds.values()))
    return [
        {"work": str(key), "ms": round(1e3 * seconds[str(key)], 3),
         "×": round(seconds[str(key)] / first, 2), **columns[key]}
        for key in works
    ]


# %% The tables
def by_context(model, contexts, repeats):
    """One token decoded after so many: absorbed and expanded; the caches beside MHA's."""
    config, token = model.config, torch.zeros(1, 1, dtype=torch.long)
    mha = 4 * cache_elements_per_token(
        "MHA", config.num_hidden_layers, heads=config.num_attention_heads,
        head_width=config.v_head_dim,
    )
    works, columns = {}, {}
    for path in ("absorbed", "expanded"):
        for context in contexts:
            caches = filled_caches(model, 1, context)
            works[f"{path}, {context}"] = reader(model, caches, token, path)
            columns[f"{path}, {context}"] = {
                "cache KB": sum(cache.used_bytes() for cache in caches) // 1000,
                "MHA's KB": mha * context // 1000,
            }
    return table(works, repeats, columns, CALLS)


def by_tokens_a_pass(model, counts, context, repeats):
    """T tokens read after `context`: where expanding gets faster than absorbing."""
    works = {}
    caches = filled_caches(model, 1, context)
    for count in counts:
        tokens = torch.zeros(1, count, dtype=torch.long)
        for path in ("absorbed", "expanded"):
            works[count, path] = reader(model, caches, tokens, path)
    seconds = measure.interleaved({str(key): work for key, work in works.items()}, repeats)
    rows = []
    for count in counts:
        absorbed, expanded = (
            seconds[str((count, path))] / CALLS for path in ("absorbed", "expanded")
        )
        rows.append(
            {"work": f"{count} tokens", "absorbed ms": round(1e3 * absorbed, 3),
             "expanded ms": round(1e3 * expanded, 3),
             "absorbed / expanded": round(absorbed / expanded, 2),
             "taken": "absorbed" if count < EXPAND_FROM else "expanded"}
        )
    return rows


def by_experts(numbers, tokens, repeats):
    """A layer of E experts of width 256, 2 active, 1 shared: forward, and forward with backward."""
    x = torch.randn(tokens, 256)
    works, columns = {}, {}
    for kind in ("forward", "both"):
        for number in numbers:
            layer = MixtureOfExperts(256, 256, TopKRouter(256, number, 2), n_shared_experts=1)
            speed_up(layer)

            def run(layer=layer, backward=kind != "forward"):
                layer.train(backward)
                with torch.set_grad_enabled(backward):
                    output = layer(x)
                if backward:
                    layer.zero_grad()
                    output.square().mean().backward()

            key = f"{kind}, {number} experts"
            size = sum(p.nbytes for p in layer.parameters())
            works[key], columns[key] = run, {"weights MB": round(size / 1e6, 1)}
    rows = table(works, repeats, columns)
    for row in rows[len(numbers) :]:  # relative to the first of their own kind
        row["×"] = round(row["ms"] / rows[len(numbers)]["ms"], 2)
    return rows


def by_batch(model, batches, context, repeats):
    """One token for each of B sequences, `context` tokens in: tokens a second and cache."""
    works, columns = {}, {}
    for batch in batches:
        caches = filled_caches(model, batch, context)
        works[batch] = reader(model, caches, torch.zeros(batch, 1, dtype=torch.long), "absorbed")
        columns[batch] = {"cache KB": sum(cache.used_bytes() for cache in caches) // 1000}
    rows = table(works, repeats, columns, CALLS)
    for row in rows:
        row["tokens a second ×"] = round(int(row["work"]) / row["×"] / batches[0], 2)
        row["work"] = f"batch {row['work']}"
    return rows


class KeptBytes:
    """Counts the bytes that autograd keeps for the backward pass, each piece of memory once."""

    def __enter__(self):
        self.pieces = {}
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor)
        self.hooks.__enter__()
        return self

    def _keep(self, tensor):
        storage = tensor.untyped_storage()
        self.pieces[storage.data_ptr()] = storage.nbytes()
        return tensor

    def __exit__(self, *error):
        self.hooks.__exit__(*error)

    def total(self, model):
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        return sum(size for place, size in self.pieces.items() if place not in weights)


def by_training_batch(batches, repeats):
    """A training step of B × 256 tokens: tokens a second, and what the backward pass needs."""
    model, options = default_model(), full.RunOptions()
    options.settle("cpu")
    optimizers = full.build_optimizers(model, 1e-4, options.optimizer == "muon")
    works, columns = {}, {}
    for batch in batches:
        ids = torch.randint(model.config.vocab_size, (batch, 256))

        def step(ids=ids):
            full.training_step(
                model, optimizers, ids, torch.zeros_like(ids), rate=1e-4, mtp_weight=0.0,
                gamma=0.0, precision=getattr(torch, options.precision),
            )

        with KeptBytes() as kept:
            step()
        works[batch], columns[batch] = step, {"kept MB": round(kept.total(model) / 1e6, 1)}
    rows = table(works, repeats, columns)
    for row in rows:
        row["tokens a second ×"] = round(int(row["work"]) / row["×"] / batches[0], 2)
        row["work"] = f"{row['work']} × 256, {options.precision}, {options.optimizer}"
    return rows


def draw(tables, path):
    """One panel a table, milliseconds against the number in a row's name, one line a kind."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 3, figsize=(14, 7), layout="constrained")
    for axis, (title, rows) in zip(axes.flat, tables.items(), strict=False):
        lines = {}
        for row in rows:
            kind = row["work"].split(",")[0]
            kind = kind if kind.isalpha() else ""  # such as "absorbed"
            place = int(re.search(r"\d+", row["work"]).group())
            for column in ("ms", "absorbed ms", "expanded ms"):
                if column in row:
                    name = column.removesuffix(" ms") if column != "ms" else kind
                    lines.setdefault(name, []).append((place, row[column]))
        for name, points in lines.items():
            axis.plot(*zip(*points, strict=True), marker="o", label=name)
        axis.set_title(title, fontsize=10)
        axis.set(xscale="log", ylabel="milliseconds")
        axis.set_xticks([place for place, _ in points], [place for place, _ in points], fontsize=8)
        axis.minorticks_off()
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        if len(lines) > 1:
            axis.legend(fontsize=8)
    for axis in list(axes.flat)[len(tables) :]:
        axis.remove()
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


@one_line_errors
def main(argv=None):
    arguments = measure.parse(measure.flags(__doc__), argv)
    quick, repeats = arguments.quick, arguments.repeats
    facts = {**measure.machine(), "repeats": repeats}
    measure.print_header("scaling.py", facts)
    model = default_model(max_position_embeddings=32768)
    measure.print_config(model.config)
    contexts = [64, 256] if quick else [256, 1024, 4096, 16384]
    counts = [1, 8, 32] if quick else [1, 2, 4, 8, 12, 16, 24, 32, 64, 128]
    numbers, tokens = ([16, 32], 512) if quick else ([8, 16, 32, 64, 128, 256], 4096)
    batches = [1, 4] if quick else [1, 2, 4, 8, 16, 32]
    middle = 256 if quick else 1024
    tables = {
        "one token decoded, by context": by_context(model, contexts, repeats),
        f"T tokens read after {middle}": by_tokens_a_pass(model, counts, middle, repeats),
        f"MoE layer, {tokens} tokens, by experts": by_experts(numbers, tokens, repeats),
        f"one token a sequence after {middle}, by batch": by_batch(model, batches, middle, repeats),
        "training step, by batch": by_training_batch(batches[:4], repeats),
    }
    for title, rows in tables.items():
        measure.print_table(title, rows)
    out = pathlib.Path(arguments.out)
    measure.save(
        out / "scaling.json",
        {"machine": facts, "quick": quick, "tables": tables, "config": model.config.to_dict()},
    )
    draw(tables, out / "scaling.png")
    print(f"\nwritten: {out}/scaling.json and .png")


if __name__ == "__main__":
    main()

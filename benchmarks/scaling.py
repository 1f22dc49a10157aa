"""What costs grow with: context, tokens a pass, experts, batch, width, depth. Memory beside time.

Each table is one run of interleaved repeats; `×` is the median time over that of the first row of
its kind. Weights are random, widths those of the default model; everything in FP32 but the training
step, which runs in the faster precision. Bytes of caches are counted, and so is what the backward
pass of a training step keeps from the forward pass.

By width and by depth: this model beside transformers' DeepseekV3ForCausalLM in one process;
"ratio" is its time over ours. Peak memory is that of a fresh process which does nothing else, in MB
(10⁶ bytes); the libraries alone have a row of their own.

Run:  python benchmarks/scaling.py                  ~15 minutes, up to 6 GB of memory
      python benchmarks/scaling.py --quick          under two minutes, few repeats
"""

import argparse
import functools
import json
import pathlib
import re
import subprocess
import sys

import measure
import sides
import torch

import deepseek_full_model as full
from deepseek_full_model import DeepSeekModel
from lesson import one_line_errors
from mla_coded import cache_elements_per_token
from moe_coded import MixtureOfExperts, TopKRouter
from pipeline.decoding import EXPAND_FROM, new_caches
from pipeline.fast import speed_up
from pipeline.run import fastest_precision


def default_model(**changes):
    torch.manual_seed(0)
    return DeepSeekModel(sides.default_config(**changes)).eval()


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
def their_cache(model, context):
    """A cache of transformers that holds `context` random tokens."""
    from transformers import DynamicCache

    config, cache = model.config, DynamicCache(config=model.config)
    for layer in range(config.num_hidden_layers):  # latents, too, as if of one head
        cache.update(*(torch.randn(1, 1, context, width)
                       for width in (config.kv_lora_rank, config.qk_rope_head_dim)), layer)
    return cache


def by_context(model, theirs, contexts, repeats):
    """One token decoded after so many: absorbed, expanded, transformers; caches beside MHA's."""
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
    for context in contexts:
        key, cache = f"transformers, {context}", their_cache(theirs, context)
        write = sides.their_writer(theirs, token, cache)
        works[key] = functools.partial(write, CALLS)
        size = sum(part.nbytes for layer in cache.layers for part in (layer.keys, layer.values))
        columns[key] = {"cache KB": size // 1000, "MHA's KB": mha * context // 1000}
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


# %% Width and depth, beside transformers
def widened(width):
    """Changes of the default configuration to another width: heads and ranks in proportion."""
    names = ("hidden_size", "intermediate_size", "moe_intermediate_size", "num_attention_heads",
             "num_key_value_heads", "q_lora_rank", "kv_lora_rank")
    config = sides.default_config()
    return {name: getattr(config, name) * width // config.hidden_size for name in names}


def deepened(layers):
    return {"num_hidden_layers": layers}


def by_size(sizes, tokens, repeats):
    """sizes {name: changes} → rows: `tokens` read, one token written after them, a training step.

    The step reads 4 sequences of `tokens`; both sides in their better precision.
    """
    rows = []
    for name, changes in sizes.items():
        model, theirs = sides.both_sides(sides.default_config(**changes))
        ids = torch.randint(model.config.vocab_size, (1, tokens))
        ours, other = sides.our_decoder(model, ids), sides.their_decoder(theirs, ids)
        works = {
            "read ours": sides.our_prefill(model, ids),
            "read transformers": sides.their_prefill(theirs, ids),
            "write ours": functools.partial(ours, CALLS),
            "write transformers": functools.partial(other, CALLS),
        }
        seconds = measure.interleaved(works, repeats)
        seconds |= measure.interleaved(
            {f"step {key}": work for key, work in sides.training_works(
                model, theirs, ids.expand(4, -1).contiguous()).items()}, repeats)
        row = {"work": name, "parameters": sum(p.numel() for p in model.parameters())}
        for work, calls in (("read", 1), ("write", CALLS), ("step", 1)):
            mine, its = (sides.best_of(seconds, f"{work} {side}") / calls
                         for side in ("ours", "transformers"))
            row |= {f"{work} ms": round(1e3 * mine, 2), "its": round(1e3 * its, 2),
                    f"{work} ratio": round(its / mine, 2)}
            row[f"{work}, its ms"] = row.pop("its")
        rows.append(row)
    return rows


# %% Peak memory, each figure in a process of its own
CHILDREN = ("nothing", "write", "step")


def child(side, work, changes, tokens):
    """Does one kind of work once or twice; returns the peak memory of this process in MB."""
    sides.quiet_transformers()
    if work == "nothing":
        return measure.own_peak()
    config = sides.default_config(**changes)
    model, ids = side_alone(side, config), torch.randint(config.vocab_size, (1, tokens))
    if work == "write":
        decoder = sides.our_decoder if side == "ours" else sides.their_decoder
        decoder(model, ids)(4)
    else:
        make = sides.our_step if side == "ours" else sides.their_step
        step = make(model, ids.expand(4, -1).contiguous(), fastest_precision("cpu"))
        step()
        step()  # the first one had no state of AdamW yet
    return measure.own_peak()


def side_alone(side, config):
    """One side's model with random weights, the other never built."""
    if side == "ours":
        return DeepSeekModel(config).eval()
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    return DeepseekV3ForCausalLM(DeepseekV3Config(**config.to_dict())).eval()


def peak_of_child(side, work, changes, tokens):
    """Peak memory in MB of a fresh process that does this work; None where unknown."""
    command = [sys.executable, __file__, "--child", side, work, json.dumps(changes), str(tokens)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise ValueError(f"the process for {side}, {work} failed: {result.stderr[-500:]}")
    return json.loads(result.stdout.splitlines()[-1])


def by_memory(sizes, tokens):
    """Rows of peak memory in MB: writing after `tokens`, and a training step of 4 × `tokens`."""
    rows = []
    for name, changes in {"libraries alone": None, **sizes}.items():
        works = CHILDREN[1:] if changes is not None else CHILDREN[:1]
        row = {"work": name}
        for work in CHILDREN[1:]:
            for side in ("ours", "transformers"):
                peak = peak_of_child(side, work if work in works else works[0], changes or {},
                                     tokens)
                row[f"{work} MB, {side}"] = peak and round(peak)
        rows.append(row)
    return rows


# %% The picture
def columns_to_draw(rows):
    """{column: name of its line}: ratios where there are any, else milliseconds, else MB."""
    for end in (" ratio", " ms"):
        found = [column for column in rows[0] if column.endswith(end) and ", its" not in column]
        if found:
            return {column: column.removesuffix(end) for column in found}
    return {column: column for column in rows[0] if column == "ms" or " MB, " in column}


def numbered(rows):
    """The rows whose work names a number."""
    return [row for row in rows if re.search(r"\d", row["work"])]


def draw(tables, path):
    """One panel a table, against the number in a row's name, one line a kind."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(3, 3, figsize=(14, 10), layout="constrained")
    for axis, (title, rows) in zip(axes.flat, tables.items(), strict=False):
        lines, columns = {}, columns_to_draw(rows)
        for row in numbered(rows):
            kind = row["work"].split(",")[0]
            kind = kind if kind.isalpha() else ""  # such as "absorbed"
            place = int(re.search(r"\d+", row["work"]).group())
            for column, name in columns.items():
                if row[column] is not None:
                    name = name if column != "ms" else kind
                    lines.setdefault(name, []).append((place, row[column]))
        if not lines:
            continue
        for name, points in lines.items():
            axis.plot(*zip(*points, strict=True), marker="o", label=name)
        axis.set_title(title, fontsize=10)
        unit = next(iter(columns))
        axis.set(xscale="log", ylabel="transformers' time / ours" if "ratio" in unit
                 else "MB" if "MB" in unit else "milliseconds")
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
    parser = measure.flags(__doc__)
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)  # side, work, changes, tokens
    arguments = measure.parse(parser, argv)
    if arguments.child:
        side, work, changes, tokens = arguments.child
        print(json.dumps(child(side, work, json.loads(changes), int(tokens))))
        return
    quick, repeats = arguments.quick, arguments.repeats
    version = sides.quiet_transformers()
    facts = {**measure.machine(), "transformers": version, "repeats": repeats}
    measure.print_header("scaling.py", facts)
    model, theirs = sides.both_sides(sides.default_config(max_position_embeddings=32768 + 256))
    measure.print_config(model.config)
    contexts = [64, 256] if quick else [256, 1024, 4096, 16384, 32768]
    counts = [1, 8, 32] if quick else [1, 2, 4, 8, 12, 16, 24, 32, 64, 128]
    numbers, tokens = ([16, 32], 512) if quick else ([8, 16, 32, 64, 128, 256], 4096)
    batches = [1, 4] if quick else [1, 2, 4, 8, 16, 32]
    middle, read = (256, 32) if quick else (1024, 256)
    widths, depths = ([64, 128], [2]) if quick else ([256, 512, 768, 1024], [4, 8, 16])
    widths = {f"width {width}": widened(width) for width in widths}
    depths = {f"{layers} layers": deepened(layers) for layers in depths}
    memory = dict(list(widths.items())[:1]) if quick else {**widths, **depths}
    largest = min(repeats, 5)  # these take seconds a call
    tables = {
        "one token decoded, by context": by_context(model, theirs, contexts, repeats),
        f"T tokens read after {middle}": by_tokens_a_pass(model, counts, middle, repeats),
        f"MoE layer, {tokens} tokens, by experts": by_experts(numbers, tokens, repeats),
        f"one token a sequence after {middle}, by batch": by_batch(model, batches, middle, repeats),
        "training step, by batch": by_training_batch(batches[:4], repeats),
        "by width, beside transformers": by_size(widths, read, largest),
        "by depth, beside transformers": by_size(depths, read, largest),
        "peak memory": by_memory(memory, read),
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

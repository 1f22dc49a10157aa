"""What both benchmarks share: interleaved medians, the machine, tables, files."""

import argparse
import json
import os
import pathlib
import platform
import statistics
import sys
import time

import torch
from tqdm import tqdm

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # the phases, for a script started from anywhere


def flags(description):
    """A parser with the flags that all benchmarks have."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="few repeats, small sizes")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--out", default="benchmark_results", help="directory of JSON and PNG")
    return parser


def parse(parser, argv):
    arguments = parser.parse_args(argv)
    if arguments.repeats < 1:
        raise ValueError(f"--repeats={arguments.repeats} must be at least 1")
    if arguments.quick:
        arguments.repeats = 2
    return arguments


def interleaved(works, repeats):
    """{name: function} → {name: median seconds}, one call of each in turn, `repeats` times.

    In turn, so that a busy machine slows all alike; a first round warms up and does not count.
    """
    seconds = {name: [] for name in works}
    for round_number in tqdm(range(repeats + 1), desc=" | ".join(works)[:50], leave=False):
        for name, work in works.items():
            start = time.perf_counter()
            work()
            if round_number:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def machine():
    """What a figure depends on besides the code."""
    name = platform.processor() or platform.machine()
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        name = lines[0].split(":")[1].strip() if lines else name
    return {
        "processor": name,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def matrix_rate(size=1024, products=10):
    """A function that does `products` FP32 products of size³, and its floating-point operations."""
    a, b = torch.randn(size, size), torch.randn(size, size)

    def work():
        for _ in range(products):
            a @ b

    return work, products * 2 * size**3


def print_header(script, facts):
    print(f"{script} · " + " · ".join(f"{key} {value}" for key, value in facts.items()))


def print_config(config):
    """The sizes of the model on one line."""
    sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "q_lora_rank",
             "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim",
             "intermediate_size", "moe_intermediate_size", "n_routed_experts",
             "num_experts_per_tok", "n_shared_experts", "vocab_size")
    print("configuration: " + ", ".join(f"{name} {getattr(config, name)}" for name in sizes))


def print_table(title, rows):
    """rows: dicts with the same keys, printed in columns."""
    print(f"\n{title}")
    columns = list(rows[0])
    cells = [[str(row[column]) for column in columns] for row in rows]
    widths = [max(len(line[i]) for line in [columns, *cells]) for i in range(len(columns))]
    for line in [columns, *cells]:
        print(
            "  " + "  ".join(f"{cell:<{w}}" for cell, w in zip(line, widths, strict=True)).rstrip()
        )


def save(path, content):
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2), encoding="utf-8")

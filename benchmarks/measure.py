"""What the benchmarks share: interleaved medians, machine, aims, peak memory, tables, files."""

import argparse
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import time
from typing import NamedTuple

import torch
from tqdm import tqdm

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # the phases, for a script started from anywhere

# %% The processor's mode, and what must hold in it
FAST_BF16 = "AVX-512 with BF16"  # the mode of the first column of aims


def mode():
    """"AVX2", "AVX-512" or "AVX-512 with BF16"; elsewhere PyTorch's name for the instructions.

    "with BF16" is measured: its products take at most 2/3 of the time of FP32 ones. "AVX2 with
    BF16" is no such processor: a newer one, told to do without AVX-512, whose BF16 units still run.
    """
    from pipeline.run import fastest_precision

    capability = torch.backends.cpu.get_cpu_capability().replace("AVX512", "AVX-512")
    return capability + (" with BF16" if fastest_precision("cpu") == "bfloat16" else "")


class Aim(NamedTuple):
    """What a row must reach: "≥", "≤" or "<" a value, which depends on the mode."""

    sign: str
    fast_bf16: float
    others: float

    def value(self, mode):
        return self.fast_bf16 if mode == FAST_BF16 else self.others

    def reached(self, figure, mode):
        value = self.value(mode)
        return {"≥": figure >= value, "≤": figure <= value, "<": figure < value}[self.sign]


LZMA = "bits per byte over those of lzma -9"
FEWER = "fewer bits per byte than {}, %"
DENSE = ("GPT2LMHeadModel", "LlamaForCausalLM")
AIMS = {
    "main job, minutes": Aim("≤", 10, 10),
    "bits per byte, test part": Aim("≤", 1.45, float("inf")),  # elsewhere the next row counts
    LZMA: Aim("<", 1, 1),
    "alignment: valid completions, %": Aim("≥", 25, 25),
    "alignment: valid completions, after over before": Aim("≥", 3, 3),
    "alignment: distinct completions, %": Aim("≥", 50, 50),
    "alignment: more bits per byte, %": Aim("≤", 5, 5),
    "grpo_coded.py, minutes": Aim("≤", 3, 3),
    "grpo_coded.py, correct before, %": Aim("≤", 35, 35),
    "grpo_coded.py, correct after, %": Aim("≥", 85, 85),
    "training step": Aim("≥", 1.5, 1.25),
    "prefill, 1024 tokens": Aim("≥", 3, 1.5),
    "decode, batch 1, short context": Aim("≥", 2, 1.5),
    "decode, batch 1, 4096 tokens before": Aim("≥", 5, 4),
    "decode, batch 16, 1024 tokens before": Aim("≥", 8, 3),
    "speculative / plain decoding, trained model": Aim("≥", 1.25, 1.25),
    **{FEWER.format(name): Aim("≥", 12, 10) for name in DENSE},
}


def judged(work, figure, mode, digits=2, aim=None):
    """A row {work, figure, aim, ""} of a table; aim: key of `AIMS` where it is not `work`."""
    aim = AIMS.get(aim or work)
    if aim is None or aim.value(mode) == float("inf"):
        aim_text, verdict = "", ""
    else:
        aim_text = f"{aim.sign} {aim.value(mode):g}"
        verdict = "reached" if aim.reached(figure, mode) else "falls short"
    return {"work": work, "figure": f"{figure:,.{digits}f}", "aim": aim_text, "": verdict}


def note_on_aims(mode):
    """One sentence where the mode is not one of the two that the aims were made for."""
    if mode in (FAST_BF16, "AVX2"):
        return ""
    return f"{mode}: the aims are those for AVX2 alone, for BF16 must be faster for the others."


# %% Peak memory
def own_peak():
    """The most memory that this process has held, in MB (10⁶ bytes); None where unknown.

    Linux's VmHWM counts from the start of the program: ru_maxrss would begin with the memory of
    the process that started it.
    """
    status = pathlib.Path("/proc/self/status")
    if status.exists():
        lines = status.read_text().splitlines()
        kilobytes = next(line.split()[1] for line in lines if line.startswith("VmHWM"))
        return int(kilobytes) * 1024 / 1e6
    try:
        import resource
    except ImportError:  # Windows
        return None
    return megabytes(resource.getrusage(resource.RUSAGE_SELF))


def megabytes(usage):
    """ru_maxrss in MB: macOS counts bytes, others units of 1,024."""
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6


def measured_process(command, log, folder=None, every=0.5):
    """Runs a command to its end; what it prints goes to the file `log`.

    Returns: dict with `returncode`, `seconds`, `peak_mb` of its largest process and `all_mb` of
        all its processes at one time, looked at `every` seconds; None where the system cannot tell.
    """
    start, most, code, peak = time.perf_counter(), 0, None, None
    with open(log, "w", encoding="utf-8") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, cwd=folder,
                                   start_new_session=True)
        try:
            if not hasattr(os, "wait4"):  # Windows
                code = process.wait()
            while code is None:
                most = max(most, session_memory(process.pid))
                time.sleep(every)
                ended, status, usage = os.wait4(process.pid, os.WNOHANG)
                if ended:
                    code, peak = os.waitstatus_to_exitcode(status), round(megabytes(usage))
                    process.returncode = code  # it was waited for here
        finally:
            if code is None:  # Ctrl-C reaches no session but ours
                process.terminate()
    return {"returncode": code, "seconds": time.perf_counter() - start, "peak_mb": peak,
            "all_mb": round(most / 1e6) or None}


def session_memory(session):
    """Bytes of memory that the processes of a session hold now; 0 without /proc."""
    total = 0
    for stat in pathlib.Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # it has just ended
            continue
        if int(fields[3]) == session:
            total += int(fields[21]) * os.sysconf("SC_PAGE_SIZE")
    return total


# %% Flags, medians, tables, files


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
        "mode": mode(),
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


def read(path):
    """A saved JSON file; None if there is none."""
    path = pathlib.Path(path)
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def save(path, content):
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2), encoding="utf-8")

"""Writes docs/transcripts/: the text that each phase prints when it runs.

    python docs/transcripts.py                  # all phases, about two minutes
    python docs/transcripts.py moe_coded.py     # only the named ones

The first line of a transcript is the command. The rest is its standard output, so it has no
progress bars. The tests run each phase by the same command and compare: `difference` is empty as
long as the transcript is right. Before that, `mask` hides in both texts what changes from one
machine to another. Shapes, counts, verdicts and words are never hidden.
"""

import argparse
import difflib
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parent.parent
FOLDER = ROOT / "docs" / "transcripts"
ONE_THREAD = {"OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1"}  # torch and NumPy; tokenizers


class Phase(NamedTuple):
    """How a phase is run. From the first line with the word `trained` on, a model is trained."""

    arguments: tuple = ()
    trained: str | None = None


PHASES = {
    "self_attention_coded.py": Phase(),
    "causal_attention_coded.py": Phase(),
    "multihead_attention_coded.py": Phase(),
    "mla_coded.py": Phase(),
    "moe_coded.py": Phase(trained="busiest"),
    "mtp_coded.py": Phase(trained="held-out"),
    "rope_coded.py": Phase(),
    "quantization_coded.py": Phase(trained="nats"),
    "grpo_coded.py": Phase(("--quick",), trained="warmed up"),
    "deepseek_full_model.py": Phase(("check",)),
}


# %% The mask
FIRST_COLUMN = 54  # characters of a check line that say what is checked: words, never hidden
HEADER = re.compile(r"· torch \S+ · \w+")  # version and device
CLOCK = re.compile(
    r"\d[\d.,:]*(?= ?(ms|s|seconds|minutes|tokens/s|tokens a second|GFLOP/s|threads?)\b)"
)
POWER_OF_TEN = re.compile(r"\d(\.\d+)?e[+-]\d+")  # 1.2e-07: the size of rounding errors
DECIMAL = re.compile(r"([+-]?\d+)\.(\d+)")
DRAFTS = re.compile(r"\d+ of \d+(?= accepted)")
ANSWER = re.compile(r"(\d\+\d+=)\S*")  # a policy's completion of a sum


def mask(text, trained=None):
    """The text with "#" in place of what differs between machines.

    Hidden everywhere: version and device in the header, times and rates, numbers such as 1.2e-07.
    A decimal keeps two digits after the point, but never its last one: 0.1353 → 0.13##, 2.5 → 2.#.
    Processors round differently, and training enlarges this. So from the first line with the word
    `trained` on, a decimal only keeps its number of digits (-0.135 → #.###), and drafts accepted
    and answers written by a policy are hidden. Nothing is hidden from "Try changing:" on.
    """
    lines, loose = text.splitlines(), False
    end = lines.index("Try changing:") if "Try changing:" in lines else len(lines)
    for number, line in enumerate(lines[:end]):
        loose = loose or (trained is not None and trained in line)
        words = FIRST_COLUMN if line.endswith((" ok", " FAILED")) else 0
        lines[number] = line[:words] + masked_figures(line[words:], loose)
    return "\n".join(lines)


def masked_figures(text, loose):
    """`mask` of a line's figures; `loose`: those of a trained model."""
    text = HEADER.sub("· torch # · #", text)
    text = CLOCK.sub("#", POWER_OF_TEN.sub("#", text))
    if not loose:
        return DECIMAL.sub(without_last_digits, text)
    text = DECIMAL.sub(lambda found: f"#.{'#' * len(found[2])}", text)
    text = ANSWER.sub(r"\1#", DRAFTS.sub("# of #", text))
    return re.sub(r"(?<=\S)  +", "  ", text)  # 9.9 takes less room than 10.1


def without_last_digits(found):
    whole, digits = found.groups()
    kept = min(2, len(digits) - 1)
    return f"{whole}.{digits[:kept]}{'#' * (len(digits) - kept)}"


# %% A transcript
def path_of(script):
    """docs/transcripts/moe.txt for moe_coded.py, full_model.txt for deepseek_full_model.py."""
    name = script.removesuffix(".py").removesuffix("_coded").removeprefix("deepseek_")
    return FOLDER / f"{name}.txt"


def transcript(script, printed):
    """The command, then what it printed."""
    return f"$ python {' '.join((script, *PHASES[script].arguments))}\n{printed}"


def difference(script, printed, most_lines=20):
    """A short diff of the transcript and of what a script printed now; "" if they are the same.

    It ends with the command that renews the transcript. An accelerator draws other random numbers
    than a processor does, so what it printed is not compared.
    """
    if re.search(r" · (cuda|mps)\S* · ", printed.partition("\n")[0]):
        return ""
    path, trained = path_of(script), PHASES[script].trained
    stored = path.read_text(encoding="utf-8") if path.exists() else ""
    texts = [mask(text, trained).splitlines() for text in (stored, transcript(script, printed))]
    diff = list(difflib.unified_diff(*texts, path.name, "printed now", lineterm="", n=0))
    if len(diff) > most_lines:
        diff[most_lines:] = [f"… and {len(diff) - most_lines} more lines"]
    renew = f"If the new text is right, renew it: python docs/transcripts.py {script}"
    return "\n".join([*diff, renew]) if diff else ""


# %% The command
def run(script, *arguments, folder, timeout=None):
    """Runs a script as a user does, in this folder, with one thread; returns the process."""
    return subprocess.run(
        [sys.executable, str(ROOT / script), *map(str, arguments)],
        cwd=folder, capture_output=True, encoding="utf-8", timeout=timeout,
        env={**os.environ, **ONE_THREAD, "PYTHONDONTWRITEBYTECODE": "1",
             "PYTHONIOENCODING": "utf-8"},
    )


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("scripts", nargs="*", help="names of scripts (default: all phases)")
    scripts = parser.parse_args(argv).scripts or list(PHASES)
    unknown = [script for script in scripts if script not in PHASES]
    if unknown:
        parser.error(f"{', '.join(unknown)}: must be among {', '.join(PHASES)}")
    FOLDER.mkdir(exist_ok=True)
    for script in scripts:
        with tempfile.TemporaryDirectory() as folder:  # for the pictures
            done = run(script, *PHASES[script].arguments, "--device", "cpu", folder=folder)
        if done.returncode:
            sys.exit(f"{script} failed with status {done.returncode}, "
                     f"so its transcript stays as it was\n{done.stderr}")
        path_of(script).write_text(transcript(script, done.stdout), encoding="utf-8")
        print(path_of(script))


if __name__ == "__main__":
    main()

"""Everything that is measured, in order and unattended, and the tables of docs/results.md.

The main job; phase 9 with three seeds; this model against transformers; what costs grow with; dense
models beside the main job; the test suite. Each is a process of its own, with its wall time and its
peak memory. A part that fails is named in the tables, and the others go on.

Figures of a processor mode go to benchmark_results/<mode>/everything.json, what a part prints to
<part>.log beside it. docs/results.md has one section a mode: those found there, and those that the
file already has from other machines.

Run:  python benchmarks/everything.py                    ~90 minutes, 35 of them dense.py's grid
      python benchmarks/everything.py --grid-seconds 30            about an hour
      python benchmarks/everything.py --only scaling suite         some parts anew, others kept
      python benchmarks/everything.py --only                       the tables from what is saved
      python benchmarks/everything.py --quick                      a smoke test, no figures

A newer processor as an older one, for its own section (Linux, macOS):
      ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 \\
          python benchmarks/everything.py
"""

import datetime
import importlib.metadata
import pathlib
import re
import signal
import sys
from typing import NamedTuple

import measure
from measure import LZMA, judged

from lesson import one_line_errors, require
from pipeline.run import matrix_rates, new_directory

SEEDS = (0, 1, 2)
BENCHMARKS = measure.ROOT / "benchmarks"


class Place(NamedTuple):
    """Where a run's figures go, and how long it may take."""

    folder: pathlib.Path
    quick: bool
    checkpoint: str | None  # of the main job
    grid_seconds: float

    def script(self, name, path, *arguments, folder=None):
        """Runs a script; `measured_process`'s dict, with `failed`: its last line, or None."""
        log = self.folder / f"{name}.log"
        command = [sys.executable, *map(str, path), *map(str, arguments)]
        if self.quick and path[0] != "-m":
            command += ["--steps", "4"] if "deepseek_full_model.py" in command[1] else ["--quick"]
        record = measure.measured_process(command, log, folder)
        lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
        last = next((line for line in reversed(lines) if line.strip()), "it printed nothing")
        record["failed"] = last.split("\r")[-1].strip()[-200:] if record["returncode"] else None
        return record

    def benchmark(self, name, *arguments):
        """Runs a benchmark of this folder; its saved figures stand under `saved`."""
        saved = self.folder / f"{name}.json"
        saved.unlink(missing_ok=True)  # no figures of an earlier run if this one fails
        record = self.script(name, [BENCHMARKS / f"{name}.py"], *arguments, "--out", self.folder)
        return {**record, "saved": measure.read(saved)}

    def trained(self):
        require(self.checkpoint, "there is no run of the main job: give --checkpoint")
        return ["--checkpoint", self.checkpoint]


# %% The parts: place → record
def machine(place):
    """The rates of FP32 and BF16 products of 512³, in GFLOP/s: what a run prints at its start."""
    return {"gflops": {name: rate / 1e9 for name, rate in matrix_rates("cpu").items()}}


def main_job(place):
    """The bare last script: its results and those of its alignment."""
    name = f"{place.folder.name}-smoke-test" if place.quick else place.folder.name
    directory = new_directory(None, name)
    record = place.script("main_job", [measure.ROOT / "deepseek_full_model.py"], "--out", directory)
    return {**record, "directory": str(directory.resolve()),
            "results": measure.read(directory / "results.json"),
            "aligned": measure.read(directory / "aligned" / "results.json")}


def grpo(place):
    """Phase 9 as it stands, three seeds: {seed: record with `before` and `after`, shares}."""
    seeds = {}
    for seed in SEEDS[:1] if place.quick else SEEDS:
        picture = place.folder / f"grpo-{seed}.png"
        record = place.script(f"grpo-{seed}", [measure.ROOT / "grpo_coded.py"], "--seed", seed,
                              "--picture", picture)
        text = (place.folder / f"grpo-{seed}.log").read_text(encoding="utf-8", errors="replace")
        seeds[str(seed)] = {**record, **learnt(text)}
    failed = [f"seed {seed}: {record['failed']}" for seed, record in seeds.items()
              if record["failed"] and "before" not in record]
    return {"seeds": seeds, "failed": "; ".join(failed) or None}


def learnt(text):
    """{"before", "after"}: shares of right held-out sums that phase 9 prints; {} if it does not."""
    found = re.search(r"held-out sums right, sampled.*?([\d.]+)% → ([\d.]+)%", text)
    return {"before": float(found[1]) / 100, "after": float(found[2]) / 100} if found else {}


def against_transformers(place):
    return place.benchmark("against_transformers", *place.trained())


def scaling(place):
    return place.benchmark("scaling")


def dense(place):
    return place.benchmark("dense", *place.trained(), "--grid-seconds", place.grid_seconds)


def suite(place):
    """The test suite; a smoke test runs one file of it."""
    few = ["-n", "0", "tests/test_house.py"] if place.quick else []
    record = place.script("suite", ["-m", "pytest", "-q"], *few, folder=measure.ROOT)
    text = (place.folder / "suite.log").read_text(encoding="utf-8", errors="replace")
    counts = {kind: int(number)
              for number, kind in re.findall(r"(\d+) (passed|failed|skipped|errors?)\b", text)}
    return {**record, "counts": counts}


PARTS = {part.__name__: part
         for part in (machine, main_job, grpo, against_transformers, scaling, dense, suite)}


def run_part(name, place, facts):
    """A part's record, with date and machine; what stops it becomes its `failed`."""
    try:
        record = PARTS[name](place)
    except Exception as error:  # whatever it is, the other parts go on
        record = {"failed": f"{type(error).__name__}: {error}"}
    return {"date": datetime.date.today().isoformat(), "machine": facts, **record}


# %% The rows of the table, each from one part's record
def rows_of_machine(record, mode):
    names = {"float32": "FP32", "bfloat16": "BF16"}
    return [judged(f"{names[name]} matrix products, GFLOP/s", rate, mode, digits=0)
            for name, rate in record["gflops"].items()]


def rows_of_main_job(record, mode):
    results, aligned = record["results"], record["aligned"]
    rates, trained = results["bits_per_byte"], results["training"]
    rows = [
        judged("main job, minutes", record["seconds"] / 60, mode, digits=1),
        *rows_of_memory("main job", record, mode),
        judged("training, tokens", trained["tokens"], mode, digits=0),
        judged("training, tokens a second", trained["tokens"] / trained["seconds"], mode, digits=0),
        judged("bits per byte, test part", rates["this model"], mode, digits=4),
        judged("bits per byte, lzma -9 on the same bytes", rates["lzma -9"], mode, digits=4),
        judged("bits per byte, zlib -9 on the same bytes", rates["zlib -9"], mode, digits=4),
        judged(LZMA, rates["this model"] / rates["lzma -9"], mode, digits=3),
    ]
    return rows + (rows_of_alignment(aligned, mode) if aligned else [])


def rows_of_alignment(aligned, mode):
    before, after = aligned["before"], aligned["after"]
    more = after["test"]["bits_per_byte"] / before["test"]["bits_per_byte"] - 1
    times = float("inf") if after["valid"] else 1.0  # from nothing
    if before["valid"]:
        times = after["valid"] / before["valid"]
    return [
        judged("alignment: steps", aligned["steps"], mode, digits=0),
        judged("alignment: valid completions before, %", 100 * before["valid"], mode, digits=1),
        judged("alignment: valid completions, %", 100 * after["valid"], mode, digits=1),
        judged("alignment: valid completions, after over before", times, mode, digits=1),
        judged("alignment: distinct completions, %", 100 * after["distinct"], mode, digits=1),
        judged("alignment: more bits per byte, %", 100 * more, mode),
    ]


def rows_of_grpo(record, mode):
    rows = []
    for seed, each in record["seeds"].items():
        aims = {"grpo_coded.py, minutes": each["seconds"] / 60}
        if "before" in each:
            aims |= {"grpo_coded.py, correct before, %": 100 * each["before"],
                     "grpo_coded.py, correct after, %": 100 * each["after"]}
        rows += [judged(name.replace(",", f", seed {seed},", 1), figure, mode, digits=1, aim=name)
                 for name, figure in aims.items()]
    return rows


def rows_of_against_transformers(record, mode):
    ratios = record["saved"]["ratios"]
    return [judged(name, value, mode) for name, value in ratios.items()]


def rows_of_dense(record, mode):
    ratios = record["saved"]["ratios"]
    return [judged(name, value, mode, digits=1) for name, value in ratios.items()]


def rows_of_scaling(record, mode):
    return []  # tables of their own


def rows_of_suite(record, mode):
    return [
        judged("test suite, minutes", record["seconds"] / 60, mode, digits=1),
        *rows_of_memory("test suite", record, mode),
        *(judged(f"tests {kind}", count, mode, digits=0)
          for kind, count in record["counts"].items()),
    ]


def rows_of_memory(what, record, mode):
    names = {"peak_mb": "largest process", "all_mb": "all its processes"}
    return [judged(f"{what}, peak memory of {name}, MB", record[key], mode, digits=0)
            for key, name in names.items() if record.get(key)]


ROWS = dict(zip(PARTS, (
    rows_of_machine, rows_of_main_job, rows_of_grpo, rows_of_against_transformers, rows_of_scaling,
    rows_of_dense, rows_of_suite,
), strict=True))


def rows_of(name, record, mode):
    """Rows of one part. What it measured stands even where it failed, and so does the failure."""
    rows = []
    if record.get("failed"):
        rows.append({"work": name, "figure": f"failed: {record['failed']}", "aim": "", "": ""})
    try:
        return rows + ROWS[name](record, mode)
    except (KeyError, TypeError):  # it failed before it had figures
        return rows or [{"work": name, "figure": "its figures are incomplete", "aim": "", "": ""}]


# %% docs/results.md
def markdown(rows):
    """A table of dicts with the same keys. Thousands have commas; None is a dash."""
    def cell(value):
        text = f"{value:,}" if isinstance(value, (int, float)) else str(value)
        return "–" if value is None else text.replace("|", "\\|").replace("\n", " ")

    columns = list(rows[0])
    lines = [columns, ["---"] * len(columns), *([cell(row[c]) for c in columns] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def section(mode, records):
    """The section of one mode: {part: record} → text."""
    lines, rows = [f"## {mode}", ""], []
    for facts in list({str(r["machine"]): r["machine"] for r in records.values()}.values()):
        dates = sorted({r["date"] for r in records.values() if r["machine"] == facts})
        lines.append(" to ".join(dict.fromkeys((dates[0], dates[-1]))) + ": "
                     + ", ".join(f"{k} {v}" for k, v in facts.items()) + ".")
    if note := measure.note_on_aims(mode):
        lines.append(note)
    if missing := [name for name in PARTS if name not in records]:
        lines.append(f"Not run: {', '.join(missing)}.")
    for name in PARTS:
        if name in records:
            rows += rows_of(name, records[name], mode)
    lines += ["", markdown(rows)] if rows else []
    for title, table in further_tables(records):
        lines += ["", f"### {title[0].upper()}{title[1:]}", "", markdown(table)]
    return "\n".join(lines) + "\n"


def further_tables(records):
    """[(title, rows)] of dense.py and scaling.py."""
    tables = []
    if saved := records.get("dense", {}).get("saved"):
        tables.append((f"Dense models, {saved['seconds']:.0f} s of training each", saved["rows"]))
        for kind, rows in saved["grid"].items():
            rounded = [{**row, "bits per byte": round(row["bits per byte"], 4)} for row in rows]
            tables.append((f"{kind}, {saved['grid_seconds']:g} s a run, validation part", rounded))
    if saved := records.get("scaling", {}).get("saved"):
        tables += [(title, rows) for title, rows in saved["tables"].items() if rows]
    return tables


HEAD = """# Results

Written by `python benchmarks/everything.py`; no figure is copied by hand. Ratios with transformers
are its time over this model's. MB are 10⁶ bytes. An aim that a row does not reach is said to fall
short; what was tried for it stands in [benchmarks/LOG.md](../benchmarks/LOG.md).
"""


def write_results(path, sections):
    """Writes sections {mode: text}; those of other modes that the file has already stay."""
    path = pathlib.Path(path)
    if path.exists():
        parts = re.split(r"^## (.*)\n", path.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
        kept = {mode: f"## {mode}\n{text}"
                for mode, text in zip(parts[::2], parts[1::2], strict=True)}
        sections = {**kept, **sections}
    path.parent.mkdir(parents=True, exist_ok=True)
    texts = [HEAD, *(text.rstrip("\n") + "\n" for _, text in sorted(sections.items()))]
    path.write_text("\n".join(texts), encoding="utf-8")


def stored_sections(out, quick):
    """{mode: text} of all results below a directory; those of smoke tests only with `quick`."""
    found = {}
    for path in sorted(pathlib.Path(out).glob("*/everything.json")):
        stored = measure.read(path)
        if stored["quick"] == quick:
            found[stored["mode"]] = section(stored["mode"], stored["parts"])
    return found


# %% The run
def arguments_of(argv):
    parser = measure.flags(__doc__)
    parser.add_argument("--only", nargs="*", metavar="PART", help=f"some of: {', '.join(PARTS)}")
    parser.add_argument("--checkpoint", help="a run of the main job (default: the one it makes)")
    parser.add_argument("--grid-seconds", type=float, default=90.0, help="of dense.py's short runs")
    parser.add_argument("--docs", help="where the tables go (default: docs/results.md; with --quick"
                        " results.md in the directory of --out)")
    arguments = measure.parse(parser, argv)
    unknown = [name for name in arguments.only or [] if name not in PARTS]
    require(not unknown, f"--only {' '.join(unknown)}: want some of {', '.join(PARTS)}")
    return arguments


def facts_of_machine():
    return {**measure.machine(), "transformers": importlib.metadata.version("transformers")}


@one_line_errors
def main(argv=None):
    arguments = arguments_of(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no part is left running
    quick, facts = arguments.quick, facts_of_machine()
    mode, out = facts["mode"], pathlib.Path(arguments.out)
    measure.print_header("everything.py", facts)
    folder = out / (re.sub(r"\W+", "-", mode.lower()) + ("-quick" if quick else ""))
    file = folder / "everything.json"
    stored = measure.read(file) or {"mode": mode, "quick": quick, "parts": {}}
    checkpoint = arguments.checkpoint
    for name in PARTS if arguments.only is None else arguments.only:
        folder.mkdir(parents=True, exist_ok=True)
        checkpoint = checkpoint or stored["parts"].get("main_job", {}).get("directory")
        place = Place(folder.resolve(), quick, checkpoint, arguments.grid_seconds)
        print(f"{datetime.datetime.now():%H:%M} {name} …", flush=True)
        record = stored["parts"][name] = run_part(name, place, facts)
        if record.get("failed"):
            print(f"  failed: {record['failed']}", file=sys.stderr)
        if name == "main_job" and not arguments.checkpoint:
            checkpoint = record.get("directory")
        measure.save(file, stored)
    docs = arguments.docs or (out / "results.md" if quick else measure.ROOT / "docs/results.md")
    sections = stored_sections(out, quick)
    require(sections, f"there are no results in {out}")
    write_results(docs, sections)
    if stored["parts"]:
        measure.print_table("a smoke test, no figures" if quick else f"what must hold, {mode}", [
            row for name in PARTS if name in stored["parts"]
            for row in rows_of(name, stored["parts"][name], mode)
        ] or [{"work": "", "figure": "no rows", "aim": "", "": ""}])
    print(f"\nwritten: {file}, {docs}")


if __name__ == "__main__":
    main()

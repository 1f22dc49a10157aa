"""The house: what imports what, by reading every Python file and running none.

`lesson/` → phases 1–9 in order → `pipeline/` → phase 10 → `beyond/` → `benchmarks/`: each imports
only what stands before it. The rules are functions of {path: source}, so that each is also shown to
find what it forbids.
"""

import ast
import graphlib
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PHASES = [
    "self_attention_coded", "causal_attention_coded", "multihead_attention_coded", "mla_coded",
    "moe_coded", "mtp_coded", "rope_coded", "quantization_coded", "grpo_coded",
]
FULL_MODEL = "deepseek_full_model"
SCRIPTS = [*PHASES, FULL_MODEL]
FLOORS = ["lesson", *PHASES, "pipeline", FULL_MODEL, "beyond", "benchmarks", "exercises", "docs",
          "tests"]
OF_THE_WHOLE = {"house", "earlier_directories"}  # tests that belong to no single lesson or room


def house():
    """{path: source} of every Python file that git knows or would take."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    paths = sorted(set(listed.stdout.split()))
    return {path: (ROOT / path).read_text(encoding="utf-8") for path in paths
            if (ROOT / path).exists()}


HOUSE = house()


# %% What a file imports
def imports(source):
    """[(module, inside a function)] of all absolute imports; `from a import b` gives a and a.b."""
    found = []

    def visit(node, inside):
        if isinstance(node, ast.Import):
            found.extend((alias.name, inside) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            found.append((module, inside))
            found.extend((f"{module}.{alias.name}", inside) for alias in node.names)
        inside = inside or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for child in ast.iter_child_nodes(node):
            visit(child, inside)

    visit(ast.parse(source), False)
    return found


def file_of(module, files):
    """The file of a module of ours, or None: `a.b` is a/b.py or a/b/__init__.py."""
    path = module.replace(".", "/")
    return next((file for file in (f"{path}.py", f"{path}/__init__.py") if file in files), None)


def imported_files(path, files):
    """The files of ours that a file imports, itself left out."""
    found = {file_of(module, files) for module, _ in imports(files[path])}
    return found - {None, path}


def floor(path):
    """Where a file stands in the order of the house."""
    name = path.split("/")[0].removesuffix(".py")
    return FLOORS.index(name) if name in FLOORS else None


def folder(path):
    """A file's folder; a script of the top level stands for itself."""
    return path.rpartition("/")[0] or path


# %% The rules: each gives the list of what breaks it
def out_of_order(files):
    return [
        f"{path} imports {target}"
        for path in files
        for target in sorted(imported_files(path, files))
        if None not in (floor(path), floor(target)) and floor(path) < floor(target)
    ]


def circle(files, by=lambda path: path):
    """A circle of imports between files, or between what `by` makes of them; empty if none."""
    graph = {}
    for path in files:
        targets = {by(target) for target in imported_files(path, files)} - {by(path)}
        graph.setdefault(by(path), set()).update(targets)
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


def foreign_imports_of_lessons(files):
    """Lessons know torch, numpy, the standard library, `lesson` and each other; their functions may
    draw and show progress."""
    known = {"torch", "numpy", "lesson", *PHASES} | sys.stdlib_module_names
    wrong = []
    for path in (f"{phase}.py" for phase in PHASES if f"{phase}.py" in files):
        for module, inside in imports(files[path]):
            top = module.split(".")[0]
            if top not in known and not (inside and top in ("matplotlib", "tqdm")):
                wrong.append(f"{path} imports {module}")
    return wrong


def imports_by_name(files):
    """Imports that the other rules cannot see, and relative ones, which they do not read."""
    hidden = re.compile(r"\b(import_module|__import__|runpy)\b|^\s*from \.", re.MULTILINE)
    return [
        f"{path}: {found[0]}" for path, source in files.items()
        if not path.startswith("tests/") and (found := hidden.search(source))
    ]


def stray_scripts(files):
    """Files of the top level that are no lesson, and folders that are no room."""
    return [path for path in files if floor(path) is None]


def format_markers(files):
    marker = re.compile(r"#\s*fmt" r":\s*(skip|off|on)\b")  # in two parts: this file is read, too
    return [
        f"{path}:{number}" for path, source in files.items()
        for number, line in enumerate(source.splitlines(), start=1) if marker.search(line)
    ]


def without_docstring(files):
    return [path for path, source in files.items() if not ast.get_docstring(ast.parse(source))]


def homeless_tests(files):
    """Test files that are named after no lesson, no room and no module of a room."""
    names = {name.removesuffix("_coded").removeprefix("deepseek_") for name in SCRIPTS}
    names |= OF_THE_WHOLE
    for path in files:
        room, *rest = path.removesuffix(".py").removesuffix("/__init__").split("/")
        if "/" in path:  # pipeline/fast/int4.py: pipeline, fast, fast_int4, pipeline_fast_int4
            modules = {"_".join(rest[:end]) for end in range(1, len(rest) + 1)}
            names |= {room, *modules} | {f"{room}_{module}" for module in modules}
    tests = [path for path in files if re.fullmatch(r"tests/test_\w+\.py", path)]
    return [path for path in tests
            if path.removeprefix("tests/test_").removesuffix(".py") not in names]


def untested(files):
    """Lessons without a test file, and rooms without one for them or for a module of theirs."""
    wanted = {name.removesuffix("_coded").removeprefix("deepseek_"): set() for name in SCRIPTS}
    for path in files:
        room, _, module = path.removesuffix(".py").partition("/")
        if module and room != "tests":
            wanted.setdefault(room, set()).add(module.replace("/", "_"))
    return [name for name, modules in wanted.items()
            if not any(f"tests/test_{each}.py" in files for each in (name, *modules))]


RULES = [
    out_of_order, circle, foreign_imports_of_lessons, imports_by_name, stray_scripts,
    format_markers, without_docstring, homeless_tests, untested,
]


# %% The house keeps them
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_house_keeps_the_rule(rule):
    broken = rule(HOUSE)
    assert not broken, "\n".join(broken)


def test_no_circle_between_folders():
    assert circle(HOUSE, by=folder) == []


def test_every_lesson_is_read():
    assert {f"{name}.py" for name in SCRIPTS} <= HOUSE.keys()


# %% Each rule finds what it forbids
BROKEN = [
    (out_of_order, {"mla_coded.py": "from rope_coded import RotaryEmbedding", "rope_coded.py": ""}),
    (out_of_order, {"lesson/checks.py": "import mla_coded", "mla_coded.py": ""}),
    (out_of_order, {"grpo_coded.py": "from pipeline import loop", "pipeline/loop.py": ""}),
    (out_of_order, {"pipeline/run.py": "def f():\n    import deepseek_full_model",
                    "deepseek_full_model.py": ""}),
    (out_of_order, {"deepseek_full_model.py": "from benchmarks import measure",
                    "benchmarks/measure.py": ""}),
    (circle, {"pipeline/a.py": "from pipeline import b", "pipeline/b.py": "import pipeline.a"}),
    (lambda files: circle(files, by=folder),
     {"pipeline/a.py": "import pipeline.fast.b", "pipeline/fast/b.py": "import pipeline.c",
      "pipeline/c.py": ""}),
    (foreign_imports_of_lessons, {"moe_coded.py": "import matplotlib"}),
    (foreign_imports_of_lessons, {"moe_coded.py": "try:\n    import scipy\nexcept OSError: 0"}),
    (foreign_imports_of_lessons, {"moe_coded.py": "def main():\n    import pipeline.loop"}),
    (imports_by_name, {"pipeline/run.py": "importlib.import_module('deepseek_full_model')"}),
    (imports_by_name, {"pipeline/run.py": "from . import loop"}),
    (stray_scripts, {"utils.py": ""}),
    (stray_scripts, {"helpers/utils.py": ""}),
    (format_markers, {"moe_coded.py": "f()  # fmt" ": skip"}),
    (without_docstring, {"moe_coded.py": "import torch"}),
    (homeless_tests, {"tests/test_odds_and_ends.py": "", "pipeline/loop.py": ""}),
    (untested, {"tests/test_moe.py": ""}),
]


@pytest.mark.parametrize(("rule", "files"), BROKEN)
def test_a_rule_finds_what_it_forbids(rule, files):
    assert rule(files)


def test_rules_let_through_what_they_should():
    files = {
        "lesson/__init__.py": "from lesson.checks import require",
        "lesson/checks.py": "import torch",
        "mla_coded.py": "import math\nfrom lesson import require",
        "rope_coded.py": "def main():\n    import tqdm\nfrom mla_coded import LatentCache",
        "pipeline/run.py": "from rope_coded import RotaryEmbedding\nfrom pipeline import loop",
        "pipeline/loop.py": "import matplotlib",
        "pipeline/fast/int4.py": "import rope_coded",
        "tests/test_rope.py": "import scipy",
        "tests/test_loop.py": "",
        "tests/test_fast.py": "",
        "tests/test_fast_int4.py": "",
        "tests/test_pipeline.py": "",
        "tests/test_pipeline_loop.py": "",
    }
    rules = (out_of_order, circle, foreign_imports_of_lessons, stray_scripts, homeless_tests)
    assert [rule(files) for rule in rules] == [[]] * len(rules)
    assert circle(files, by=folder) == []

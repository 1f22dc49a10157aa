"""Shared by all tests: seeds, and scripts run as a user runs them."""

import os
import pathlib
import subprocess
import sys

import pytest
import torch

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.fixture
def run_script(tmp_path):
    """run_script(name, *arguments) → the finished process; it runs in an empty directory."""

    def run(name, *arguments, timeout=120):
        return subprocess.run(
            [sys.executable, str(ROOT / name), *map(str, arguments)],
            cwd=tmp_path, capture_output=True, text=True, timeout=timeout,
            env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"},
        )  # fmt: skip

    return run


@pytest.fixture
def check_script(run_script):
    """The promises of every phase script: checks pass, `--help` works, a mistake is one line."""

    def check(name, arguments, bad_arguments, message):
        result = run_script(name, *arguments)
        assert result.returncode == 0, result.stderr
        assert result.stdout.startswith(name) and "Try changing:" in result.stdout
        assert " ok" in result.stdout and "FAILED" not in result.stdout
        assert "Run:" in run_script(name, "--help").stdout
        wrong = run_script(name, *bad_arguments)
        assert wrong.returncode == 2
        assert wrong.stderr.startswith("error: ") and wrong.stderr.count("\n") == 1
        assert message in wrong.stderr

    return check

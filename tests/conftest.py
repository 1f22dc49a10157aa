"""Shared by all tests: one thread a process, seeds, and scripts run as a user runs them."""

import importlib
import json
import os
import pathlib
import shutil

from docs import transcripts

# Several test processes run side by side. Each gets one thread, and this before torch starts its
# own: two processes that both use all cores slow each other down tenfold.
os.environ.update(transcripts.ONE_THREAD)

import pytest  # noqa: E402
import torch  # noqa: E402

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.fixture
def run_script(tmp_path):
    """run_script(name, *arguments) → the finished process; it runs in an empty directory."""

    def run(name, *arguments, timeout=300):
        return transcripts.run(name, *arguments, folder=tmp_path, timeout=timeout)

    return run


@pytest.fixture
def check_script(run_script, capsys):
    """The promises of every phase script: checks pass, it prints its transcript, `--help` works,
    and a mistake is one line.

    The script runs as a user runs it; the other two are asked of its `main`, which spares two
    starts of torch.
    """

    def check(name, bad_arguments, message):
        result = run_script(name, *transcripts.PHASES[name].arguments)
        assert result.returncode == 0, result.stderr
        assert result.stdout.startswith(name) and "Try changing:" in result.stdout
        assert " ok" in result.stdout and "FAILED" not in result.stdout
        difference = transcripts.difference(name, result.stdout)
        assert not difference, difference
        main = importlib.import_module(name.removesuffix(".py")).main
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_info:
            main(["--help"])
        assert exit_info.value.code == 0 and "Run:" in capsys.readouterr().out
        with pytest.raises(SystemExit) as exit_info:
            main(list(map(str, bad_arguments)))
        error = capsys.readouterr().err
        assert exit_info.value.code == 2
        assert error.startswith("error: ") and error.count("\n") == 1
        assert message in error

    return check


# A run that takes seconds, for phase 10 and the rooms around it
@pytest.fixture(scope="session")
def small_run(tmp_path_factory):
    """(folder, options): those of a run on a text of its own, stored in the folder."""
    folder = tmp_path_factory.mktemp("run")
    text = folder / "text.py"
    text.write_text("".join(f"def f_{i}(x):\n    return x + {i}\n" for i in range(1500)))
    config = json.loads((ROOT / "configs" / "small.json").read_text())
    config |= {
        "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "moe_intermediate_size": 16, "num_attention_heads": 2, "kv_lora_rank": 16,
        "q_lora_rank": 16, "max_position_embeddings": 64,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder, {
        "config": str(folder / "config.json"), "data": [str(text)], "batch_size": 2,
        "sequence_length": 32,
    }


@pytest.fixture(scope="session")
def trained_once(small_run):
    """The directory of a run of two steps; nobody may change it.

    Its blocks are not silent at first: two steps would leave them so.
    """
    from deepseek_full_model import RunOptions, TrainingRun

    folder, options = small_run
    torch.manual_seed(0)
    run = TrainingRun(folder / "trained", RunOptions(**options, steps=2), "cpu")
    run.model.init_weights(std=0.05)
    run.go()
    return folder / "trained"


@pytest.fixture
def trained(trained_once, tmp_path):
    """A copy of it."""
    return pathlib.Path(shutil.copytree(trained_once, tmp_path / "trained"))

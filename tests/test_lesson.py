"""The room below the lessons: checks, flags, settings, one-line errors, pictures."""

import argparse
import contextlib
import copy
import dataclasses
import io
import re
import sys
import types

import numpy as np
import pytest
import torch
from torch import nn

from lesson import (
    Demonstration,
    add_flags,
    bands,
    check_settings,
    chosen_settings,
    command_line,
    curves,
    demonstration,
    draw_bands,
    flag,
    one_line_errors,
    panels,
    parse_arguments,
    pick_device,
    picture,
    progress_bar,
    require,
    require_shapes,
    setting,
    shown_steps,
    surgery,
)
from lesson.checks import check_count, entry_of


# %% Checks
def test_require_names_a_mistake_and_lets_the_rest_pass():
    require(2 > 1, "not raised")
    with pytest.raises(ValueError, match="^width=3 must be even$"):
        require(3 % 2 == 0, "width=3 must be even")


def test_a_count_is_named_that_is_none():
    check_count("auto", one=1, none=None, word="auto")
    for value in (0, 1.5, "big", True):
        with pytest.raises(ValueError, match=f"^size={value!r} must be a number above 0, None or"):
            check_count("auto", size=value)
    with pytest.raises(ValueError, match="^size=0 must be a number above 0 or None$"):
        check_count(size=0)


def test_an_entry_is_found_by_its_name_or_is_given_itself():
    assert entry_of({"a": 1.5}, size="a") == entry_of({"a": 1.5}, size=1.5) == 1.5
    for value in ("b", ["a"], None):
        with pytest.raises(ValueError, match=re.escape(f"size={value!r} must be one of a, c")):
            entry_of({"a": 1.5, "c": 2.5}, size=value)


def test_a_tensor_of_another_shape_is_named_and_none_is_not_checked():
    require_shapes((2, 3), one=torch.zeros(2, 3), absent=None)
    with pytest.raises(ValueError, match=r"^mask must be \(2, 3\), got \(3,\)$"):
        require_shapes(torch.Size([2, 3]), one=torch.zeros(2, 3), mask=torch.zeros(3))


def test_a_failed_check_exits_with_status_1(capsys):
    demo = Demonstration("x.py", "cpu", 0)
    demo.check("right", "", "", True)
    demo.check("wrong", "", "", False)
    with pytest.raises(SystemExit) as exit_info:
        demo.finish("--more: of it")
    assert exit_info.value.code == 1
    output = capsys.readouterr()
    assert "FAILED: wrong" in output.err and "Try changing:\n  --more: of it" in output.out


def test_a_header_names_script_versions_and_seed_and_fixes_the_seed(capsys):
    demo = Demonstration("x.py", "cpu", 7)
    first = torch.rand(3)
    assert torch.equal(first, torch.rand(3, generator=torch.Generator().manual_seed(7)))
    assert (demo.device, demo.seed) == ("cpu", 7)
    header = f"x.py · torch {torch.__version__} · cpu · torch.float32 · seed 7\n"
    assert capsys.readouterr().out == header


def test_same_allows_rounding_and_no_more(capsys):
    demo = Demonstration("x.py", "cpu", 0)
    demo.same("close", "(T,)", torch.ones(2), torch.ones(2) + 1e-6)
    demo.same("far", "(T,)", torch.ones(2), torch.ones(2) + 1e-3)
    assert demo.failures == ["far"]
    assert "largest difference 1.0e-03" in capsys.readouterr().out


def test_columns_line_up_whatever_the_length_of_a_text(capsys):
    checks = [("short", "(T, V)", "figure 1"), ("a name " * 12, "(B, T, V) " * 4, "figure " * 9)]
    demo, starts = Demonstration("x.py", "cpu", 0), [2]
    for width in Demonstration.WIDTHS:
        starts.append(starts[-1] + width + 1)
    capsys.readouterr()
    for check in checks:
        demo.check(*check, True)
        lines = capsys.readouterr().out.splitlines()
        assert lines[0][starts[-1] :] == "ok"
        for text, start, end in zip(check, starts, starts[1:], strict=False):
            column = " ".join(line[start:end].strip() for line in lines)
            assert column.strip() == text.strip()


# %% The command line
@demonstration("The docstring.\n\n  Run: so.\n", flag("most-steps", 3, "how many", at_least=2),
               flag("bits", 4, "how wide", at_least=2, at_most=8))
def sample(demo, arguments):
    demo.note(f"{arguments.most_steps} steps")
    return demo


def test_a_demonstration_has_its_flags_and_those_of_all(capsys):
    assert sample(["--device", "cpu", "--seed", "5"]).seed == 5
    output = capsys.readouterr().out
    assert output.startswith("test_lesson.py · torch") and "  3 steps\n" in output
    assert sample([]).seed == 0
    sample(["--most-steps", "2", "--bits", "2"])  # the least that is allowed
    sample(["--bits", "8"])  # the most
    with pytest.raises(SystemExit):
        sample(["--help"])
    text = capsys.readouterr().out
    assert "The docstring.\n\n  Run: so.\n" in text and "how many (default: 3)" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--most-steps", "1"], "error: --most-steps=1 must be at least 2\n"),
        (["--bits", "1"], "error: --bits=1 must be from 2 to 8\n"),
        (["--bits", "9"], "error: --bits=9 must be from 2 to 8\n"),
        (["--device", "abacus"], "error: device 'abacus' is not available, got here: "),
        (["--most-steps", "x"], "error: argument --most-steps: invalid int value: 'x'"),
        (["--nonsense"], "error: unrecognized arguments: --nonsense (see --help)\n"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line_and_status_2(capsys, arguments, message):
    with pytest.raises(SystemExit) as exit_info:
        sample(arguments)
    error = capsys.readouterr().err
    assert exit_info.value.code == 2 and error.startswith(message) and error.count("\n") == 1


def test_a_demonstration_makes_its_settings_from_the_flags_given(capsys):
    @dataclasses.dataclass
    class Options:
        width: int = setting(8, "how wide", at_least=1)
        depth: int = setting(2)
        seed: int = 0

        def __post_init__(self):
            check_settings(self)

    @demonstration("Docs.", settings=Options, names=["width"], quick="a few seconds",
                   picture="a.png")
    def main(demo, arguments):
        return arguments

    given = main(["--width", "3", "--seed", "7", "--quick", "--picture", "b.pdf"])
    assert given.settings == Options(width=3, seed=7) and given.quick and given.picture == "b.pdf"
    assert main([]).settings == Options() and not main([]).quick and main([]).picture == "a.png"
    for wrong, line in ((["--width", "0"], "width=0 must be at least 1"),
                        (["--picture", "b.txt"], "--picture=b.txt must end in .png, .pdf or .svg")):
        with pytest.raises(SystemExit) as exit_info:
            main(wrong)
        assert exit_info.value.code == 2 and capsys.readouterr().err == f"error: {line}\n"
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    assert "how wide (default: 8)" in text and "a few seconds" in text and "--depth" not in text

    @demonstration("Docs.", settings=Options)
    def without_names(demo, arguments):
        return arguments

    given = without_names(["--width", "3"])
    assert given.settings == Options(width=3) and not hasattr(given, "quick")
    for other in ("--depth", "--quick", "--picture"):  # those without a help text are no flags
        with pytest.raises(SystemExit):
            without_names([other, "4"])


@pytest.mark.parametrize(
    ("error", "line", "status"),
    [(ValueError("no"), "error: no", 2), (OSError("gone"), "error: gone", 2),
     (KeyboardInterrupt(), "stopped", 130)],
)
def test_errors_of_a_user_end_in_one_line(capsys, error, line, status):
    @one_line_errors
    def main(argv):
        raise error

    with pytest.raises(SystemExit) as exit_info:
        main()
    assert exit_info.value.code == status and capsys.readouterr().err == f"{line}\n"


def test_a_console_that_lacks_a_character_shows_another(monkeypatch):
    console = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", console)
    one_line_errors(lambda argv: print("√2"))()
    console.flush()
    assert console.buffer.getvalue() == b"?2\n"


def test_errors_of_ours_keep_their_traceback():
    @one_line_errors
    def main(argv):
        raise TypeError("a bug")

    with pytest.raises(TypeError):
        main()


def test_inside_ipython_there_are_no_arguments(monkeypatch):
    monkeypatch.setitem(sys.modules, "IPython", types.ModuleType("IPython"))
    monkeypatch.setattr("builtins.get_ipython", lambda: None, raising=False)
    monkeypatch.setattr(sys, "argv", ["ipykernel", "-f", "kernel.json"])
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=3)
    assert parse_arguments(parser, None).steps == 3
    assert parse_arguments(parser, ["--steps", "4"]).steps == 4
    monkeypatch.delattr("builtins.get_ipython")  # imported, but a script runs
    monkeypatch.setattr(sys, "argv", ["script", "--steps", "5"])
    assert parse_arguments(parser, None).steps == 5


@pytest.mark.parametrize(
    ("cuda", "mps", "there"),
    [(True, True, "cuda, mps, cpu"), (False, True, "mps, cpu"), (False, False, "cpu")],
)
def test_the_device_is_named_or_the_best_there_is(monkeypatch, cuda, mps, there):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert pick_device("cpu") == "cpu" and pick_device() == there.split(",")[0]
    for name in ["abacus", *({"cuda", "mps"} - set(there.split(", ")))]:
        with pytest.raises(ValueError, match=f"'{name}' is not available, got here: {there}$"):
            pick_device(name)
    parser = argparse.ArgumentParser()
    parser.add_argument("--device")
    assert parse_arguments(parser, ["--device", "cpu"]).device == "cpu"
    assert parse_arguments(parser, []).device == pick_device()


def test_a_progress_bar_writes_to_stderr(capsys):
    with progress_bar(3, "steps", leave=True) as bar:
        bar.update(3)
    output = capsys.readouterr()
    assert output.out == "" and "  steps" in output.err and "3/3" in output.err


def test_a_file_gets_fewer_lines_of_a_bar_than_a_terminal(monkeypatch):
    with progress_bar(3, "steps") as bar:
        pause = bar.mininterval
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with progress_bar(3, "steps") as bar:
        assert bar.mininterval < pause / 10 and not bar.leave


def test_shown_steps_count_and_show_the_newest_figure(capsys, monkeypatch):
    history, shown = [], []
    assert list(shown_steps(2, "more")) == [0, 1]
    bar = types.SimpleNamespace(
        set_postfix_str=lambda text, refresh: shown.append((text, refresh)),
        update=lambda: shown.append("step"),
    )
    monkeypatch.setattr(
        command_line, "progress_bar", lambda *named: contextlib.nullcontext(bar)
    )
    for step in shown_steps(3, "steps", history, "reward", start=1):
        history.append({"reward": step / 2})
    assert [line["reward"] for line in history] == [0.5, 1.0, 1.5]
    assert shown[::2] == [("reward 0.50", False), ("reward 1.00", False), ("reward 1.50", False)]
    assert shown[1::2] == ["step"] * 3
    output = capsys.readouterr()
    assert output.out == "" and "  more" in output.err


# %% Settings
@dataclasses.dataclass
class Sample:
    learning_rate: float = setting(0.1, "size of a step", above=0)
    steps: int | None = setting(None, "how long", at_least=1)
    dropout: float = setting(0.0, at_least=0, below=1)
    share: float | None = setting(None, above=0, at_most=1)
    scheme: str = setting("int8", "which grid", choices=("int8", "int4"))
    quick: bool = setting(False, "a short run")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": 0.0}, "learning_rate=0.0 must be a number above 0"),
        ({"learning_rate": float("nan")}, "learning_rate=nan must be a number above 0"),
        ({"learning_rate": float("inf")}, "learning_rate=inf must be a number above 0"),
        ({"steps": 0}, "steps=0 must be at least 1"),
        ({"dropout": 1.0}, "dropout=1.0 must be below 1"),
        ({"dropout": -0.5}, "dropout=-0.5 must be at least 0"),
        ({"share": 1.5}, "share=1.5 must be at most 1"),
        ({"share": 0.0}, "share=0.0 must be a number above 0"),
        ({"share": float("nan")}, "share=nan must be a number above 0"),
        ({"scheme": "int3"}, "scheme=int3 must be one of int8, int4"),
    ],
)
def test_a_setting_outside_its_bounds_is_named(changes, message):
    with pytest.raises(ValueError) as raised:
        check_settings(Sample(**changes))
    assert str(raised.value) == message
    name, rest = message.split("=", 1)
    with pytest.raises(ValueError) as raised:
        check_settings(Sample(**changes), as_flags=True)
    assert str(raised.value) == f"--{name.replace('_', '-')}={rest}"


def test_settings_within_their_bounds_pass():
    check_settings(Sample())
    check_settings(Sample(learning_rate=1e-9, steps=1, dropout=0.999, share=1.0, scheme="int4"))


def test_fields_become_flags_and_only_flags_that_are_given_are_chosen(capsys):
    parser = argparse.ArgumentParser()
    add_flags(parser, Sample, ["learning_rate", "steps", "scheme", "quick"])
    assert chosen_settings(parser.parse_args([]), Sample) == {}
    given = parser.parse_args(["--learning-rate", "0.5", "--steps", "7", "--quick"])
    assert chosen_settings(given, Sample) == {"learning_rate": 0.5, "steps": 7, "quick": True}
    with pytest.raises(SystemExit):
        parser.parse_args(["--scheme", "int3"])
    with pytest.raises(SystemExit):
        parser.parse_args(["--dropout", "0.5"])  # not among the names
    assert "unrecognized arguments: --dropout" in capsys.readouterr().err
    text = " ".join(parser.format_help().split())
    assert "size of a step (default: 0.1)" in text and "{int8,int4}" in text


@dataclasses.dataclass
class FromFile:
    source: str = setting(help="where it is", flag="--checkpoint", metavar="DIR")
    data: list | None = setting(None, "text (default: ours)", metavar="FILE")
    once: bool = setting(True, "pay again", flag="--pay-again")
    width: int = setting(8, at_least=1)
    scale: float = setting(1.0, above=0)
    rope: dict | None = None
    token: int | None = None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 2.0}, "width=2.0 must be an integer of at least 1"),
        ({"width": True}, "width=True must be an integer of at least 1"),
        ({"width": 0}, "width=0 must be an integer of at least 1"),
        ({"width": None}, "width=None must be an integer of at least 1"),
        ({"scale": "1"}, "scale='1' must be a number above 0"),
        ({"scale": float("nan")}, "scale=nan must be a number above 0"),
        ({"once": 1}, "once=1 must be true or false"),
        ({"rope": []}, "rope=[] must be an object"),
    ],
)
def test_types_of_a_file_are_checked(changes, message):
    with pytest.raises(ValueError) as raised:
        check_settings(FromFile("a", **changes), types=True)
    assert str(raised.value) == message


def test_values_of_the_right_type_pass_and_numbers_without_bounds_may_be_anything():
    check_settings(FromFile("a", width=3, scale=2, rope={}, token=[1, 2]), types=True)


def test_flags_by_another_name_required_lists_and_turned_defaults(capsys):
    parser = argparse.ArgumentParser()
    add_flags(parser, FromFile, ["source", "data", "once", "width"])
    given = parser.parse_args(["--checkpoint", "a", "--data", "b", "c", "--pay-again"])
    assert chosen_settings(given, FromFile) == {"source": "a", "data": ["b", "c"], "once": False}
    with pytest.raises(SystemExit):
        parser.parse_args([])
    assert "the following arguments are required: --checkpoint" in capsys.readouterr().err
    text = " ".join(parser.format_help().split())
    assert "--checkpoint DIR" in text and "text (default: ours)" in text
    assert text.count("default: ours") == 1 and "default: 8" in text
    assert "None" not in text and "True" not in text


# %% Pictures
def test_curves_are_running_means_with_the_values_behind_them(tmp_path):
    path = tmp_path / "very" / "deep" / "picture.png"
    with picture(path) as axis:
        curves(axis, range(4), {"loss": [4.0, 2.0, 6.0, 0.0]}, window=2, title="a", xlabel="step")
        values, means = axis.lines
        assert list(values.get_ydata()) == [4, 2, 6, 0]
        assert list(means.get_ydata()) == [4, 3, 4, 3]
        assert values.get_color() == means.get_color() and means.get_label() == "loss"
        assert axis.get_title() == "a" and axis.get_xlabel() == "step"
    assert path.read_bytes().startswith(b"\x89PNG")


def test_curves_without_a_window_are_the_values_in_the_colours_given(tmp_path):
    with picture(tmp_path / "picture.png", columns=2) as axes:
        curves(axes[0], [1, 2], {"a": [5.0, 7.0], "b": [1.0, 1.0]}, colors=["red", "blue"])
        assert [line.get_color() for line in axes[0].lines] == ["red", "blue"]
        assert list(axes[0].lines[0].get_ydata()) == [5, 7]


def test_panels_show_each_figure_of_a_history_against_its_step(tmp_path, monkeypatch):
    from matplotlib import figure

    drawn = []
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, *a, **k: drawn.extend(self.axes))
    history = [{"step": 3, "a": 4.0, "b": 5.0, "c": 0}, {"step": 5, "a": 2.0, "b": 6.0, "c": 0}]
    panels(tmp_path / "picture.png", history, {"a": "the first", "b": "the second"}, free=("b",))
    assert [axis.get_title() for axis in drawn] == ["the first", "the second"]
    assert [axis.get_xlabel() for axis in drawn] == ["step"] * 2
    assert [list(axis.lines[0].get_xdata()) for axis in drawn] == [[3, 5]] * 2
    assert [list(axis.lines[1].get_ydata()) for axis in drawn] == [[4, 3], [5, 5.5]]
    assert drawn[0].get_ylim()[0] == 0 < drawn[1].get_ylim()[0]
    one_row = drawn[0].figure.get_figheight()
    drawn.clear()
    three = {"a": "the first", "b": "the second", "step": "the third"}
    panels(tmp_path / "picture.png", history, three, x="a", xlabel="x", window=1)
    places = [axis.get_subplotspec().rowspan.start for axis in drawn]
    assert places == [0, 0, 1, 1]  # two columns
    assert drawn[0].figure.get_figheight() == 2 * one_row
    assert drawn[0].get_shared_x_axes().joined(drawn[0], drawn[2])
    assert [axis.get_xlabel() for axis in drawn] == ["x"] * 3 + [""]
    assert [len(axis.lines) for axis in drawn] == [1, 1, 1, 0]
    assert list(drawn[2].lines[0].get_xdata()) == [4, 2]


def test_bands_side_by_side_share_their_labels(tmp_path, monkeypatch):
    from matplotlib import figure

    drawn = []
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, *a, **k: drawn.extend(self.axes))
    shares = {"even": np.array([[0.5, 0.5]] * 3), "uneven": np.array([[0.25, 0.75]] * 4)}
    draw_bands(tmp_path / "picture.png", shares, "share", xlabel="step")
    assert [axis.get_title() for axis in drawn] == ["even", "uneven"]
    assert [axis.get_xlabel() for axis in drawn] == ["step"] * 2
    assert [axis.get_ylabel() for axis in drawn] == ["share", ""]
    assert [axis.get_xlim() for axis in drawn] == [(0, 2), (0, 3)]
    assert drawn[0].get_ylim() == (0, 1) and drawn[0].get_shared_y_axes().joined(*drawn)


def test_bands_stand_on_top_of_each_other(tmp_path):
    shares = np.array([[0.25, 0.75], [0.5, 0.5], [1.0, 0.0]])
    with picture(tmp_path / "picture.png") as axis:
        bands(axis, shares, ylabel="share")
        tops = [band.get_paths()[0].vertices[:, 1].max() for band in axis.collections]
    assert tops == [1.0, 1.0] and axis.get_ylabel() == "share"


def test_a_drawing_that_fails_leaves_no_picture_and_no_open_figure(tmp_path):
    from matplotlib import pyplot

    with pytest.raises(RuntimeError), picture(tmp_path / "picture.png"):
        raise RuntimeError
    assert not list(tmp_path.iterdir()) and not pyplot.get_fignums()


# Surgery
def test_a_linear_around_a_weight_shares_its_memory():
    weight = torch.randn(3, 5)
    linear = surgery.linear_around(weight)
    assert linear.weight.data_ptr() == weight.data_ptr() and not linear.weight.requires_grad
    torch.testing.assert_close(linear(torch.eye(5)), weight.T)
    assert (linear.in_features, linear.out_features) == (5, 3)


def test_stacked_matrices_become_linears_in_the_same_memory():
    class Stack(nn.Module):
        def __init__(self):
            super().__init__()
            self.stack, self.inner = nn.Parameter(torch.randn(3, 2, 5)), nn.BatchNorm1d(2)

    class Apart(Stack):
        pass

    model = nn.Sequential(Stack(), nn.Linear(2, 2))
    stack = model[0].stack
    for _ in range(2):  # the second time it finds nothing to change
        assert surgery.matrices_apart(model, Stack, Apart) is model and type(model[0]) is Apart
        assert list(surgery.linears_of(model)) == ["0.stack.0", "0.stack.1", "0.stack.2", "1"]
        for linear, matrix in zip(model[0].stack, stack, strict=True):
            assert linear.weight.data_ptr() == matrix.data_ptr() and linear.weight.requires_grad


def test_matrices_are_read_through_a_function_and_nothing_else_is():
    class Doubled(nn.Module):
        def forward(self, matrix):
            return 2 * matrix

    model = nn.Sequential(nn.Linear(2, 3), nn.Sequential(nn.Embedding(3, 3)), nn.Bilinear(2, 2, 3))
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    surgery.read_matrices_through(Doubled(), model, (nn.Linear, nn.Bilinear, nn.Sequential))
    for name, times in (("0.weight", 2), ("0.bias", 1), ("1.0.weight", 1), ("2.weight", 2)):
        module, kind = name.rsplit(".", 1)
        assert torch.equal(getattr(model.get_submodule(module), kind), times * before[name])
    assert surgery.without_parametrizations(model) is model
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_inputs_are_watched_within_the_block_only():
    linear, seen, x = nn.Linear(2, 2), [], torch.randn(1, 2)
    with pytest.raises(ZeroDivisionError), surgery.inputs_watched({linear: seen.append}):
        linear(x)
        raise ZeroDivisionError
    linear(x)
    assert len(seen) == 1 and seen[0] is x


def test_taking_a_parametrization_from_a_copy_leaves_its_original_alone():
    linear = nn.Linear(2, 2)
    nn.utils.parametrize.register_parametrization(linear, "weight", nn.Tanh())
    plain = surgery.without_parametrizations(copy.deepcopy(linear))
    assert type(plain) is nn.Linear
    assert torch.equal(plain.weight, linear.parametrizations.weight.original)
    assert torch.equal(linear.weight, plain.weight.tanh())


def test_a_cast_moves_buffers_and_keeps_their_types():
    module = surgery.TypesKept()
    module.hold(codes=torch.ones(2, dtype=torch.int8), scale=torch.ones(2), bias=None)
    assert list(module.state_dict()) == ["codes", "scale"]
    assert module.bfloat16().scale.tolist() == module.codes.tolist() == [1, 1]
    module.to("meta")
    assert module.codes.dtype == torch.int8 and module.scale.dtype == torch.float32
    assert module.codes.is_meta and module.scale.is_meta


def test_parameters_beside_kept_buffers_are_cast_and_memory_can_be_given_later():
    module = surgery.TypesKept()
    module.weight, module.child = nn.Parameter(torch.ones(2)), nn.BatchNorm1d(2)
    module.register_buffer("bias", torch.ones(2))
    module.register_buffer("nothing", None)
    module.bfloat16()
    assert module.weight.dtype == module.child.weight.dtype == torch.bfloat16
    assert module.bias.dtype == torch.float32 and module.nothing is None
    assert module.child.running_mean.dtype == torch.bfloat16  # only its own buffers keep them
    assert list(module.state_dict())[:2] == ["weight", "bias"]
    assert len(list(module.buffers())) == 1 + 3
    module.to("meta").to_empty(device="cpu")
    assert module.bias.dtype == torch.float32 and not module.bias.is_meta


def test_a_copy_to_change_is_refused_for_the_wrong_kind_and_for_parts_that_refuse():
    class Model(nn.Sequential):
        copy = copy.deepcopy

    model, finished = Model(nn.Linear(2, 2)), nn.Linear(2, 2)
    copied = surgery.changeable_copy(model, nn.Module)
    assert type(copied) is Model and copied[0].weight is not model[0].weight
    with pytest.raises(ValueError, match="the model must be a Embedding, got Linear"):
        surgery.changeable_copy(nn.Linear(2, 2), nn.Embedding)
    finished.refusal = "finished"
    with pytest.raises(ValueError, match="the model is finished"):
        surgery.changeable_copy(Model(finished), nn.Module)

"""Generating from the command line: what is refused before anything is printed."""

import pytest

import deepseek_full_model as full


@pytest.fixture
def generate(trained, capsys):
    """generate(*arguments) → (text on stdout, figures on stderr)."""

    def run(*arguments):
        capsys.readouterr()
        full.main(["generate", "--checkpoint", str(trained), "--prompt", "def f",
                   "--max-new-tokens", "20", "--device", "cpu", *map(str, arguments)])
        return capsys.readouterr()

    return run


@pytest.mark.integration
def test_drafts_leave_the_greedy_text_as_it_is(generate):
    plain, drafted = generate().out, generate("--speculative").out
    assert plain.startswith("def f") and plain == drafted


@pytest.mark.integration
def test_sampled_text_follows_the_seed_and_its_cost_goes_to_stderr(generate):
    sampling = ("--temperature", 0.9, "--top-k", 50, "--top-p", 0.9, "--prefill-chunk", 2)
    one, again, other = (generate(*sampling, "--seed", seed) for seed in (1, 1, 2))
    assert one.out == again.out != other.out
    drafted = generate(*sampling, "--seed", 1, "--speculative", "--depth", 2)
    for promised in ("tokens/s", "drafts accepted", "tokens a pass", "cache ", " bytes"):
        assert promised in drafted.err


@pytest.mark.integration
def test_prompt_past_the_context_is_one_line(trained, capsys):
    for prompt, new in (("word " * 200, 4), ("word", 64)):
        with pytest.raises(SystemExit) as exit_info:
            full.main(["generate", "--checkpoint", str(trained), "--prompt", prompt,
                       "--max-new-tokens", str(new)])
        error = capsys.readouterr().err
        assert exit_info.value.code == 2 and "exceed the context of 64" in error
        assert error.count("\n") == 1
    for wrong, message in (
        (["--top-p", "0", "--temperature", "1"], "top_p=0.0 must be a number above 0"),
        (["--top-k", "0", "--temperature", "1"], "top_k=0 must be at least 1"),
        (["--top-k", "5"], "--top-k and --top-p need a --temperature above 0"),
        (["--depth", "2"], "--depth needs --speculative"),
        (["--speculative", "--depth", "0"], "depth=0 must be at least 1"),
        (["--temperature", "nan"], "temperature=nan must be at least 0"),
    ):
        with pytest.raises(SystemExit):
            full.main(["generate", "--checkpoint", str(trained), *wrong])
        printed = capsys.readouterr()
        assert message in printed.err and printed.err.count("\n") == 1 and not printed.out

"""Generating from the command line, and the sample that a run shows after training."""

import io
import sys
from types import SimpleNamespace

import pytest
import torch

import deepseek_full_model as full
from lesson.writing import Generation
from pipeline import corpus, generating


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


# With a model that repeats the last token, asks nothing of a processor and notes what it is asked
class Repeating:
    max_positions = 40

    def __init__(self, modules=1, different=False):
        self.lm_head, self.mtp, self.training = torch.nn.Linear(1, 1), [None] * modules, True
        self.different, self.asked = different, []

    def eval(self):
        self.training = False

    def generate(self, ids, new_tokens, temperature=0.0, generator=None):
        assert not self.training
        self.asked.append((ids.tolist(), new_tokens, temperature, generator))
        return torch.cat([ids, ids[:, -1:].expand(-1, new_tokens)], dim=1)

    def complete(self, ids, new_tokens, sampling, speculative=False, stream=None, **options):
        self.options = options | dict(sampling=sampling, speculative=speculative)
        whole = Repeating.generate(self, ids, new_tokens) + self.different * (len(self.asked) > 4)
        for token in whole[:, ids.shape[1] :].T.tolist() if stream else []:
            stream([token])
        return Generation(whole, forwards=3, drafted=8, accepted=6, tokens=new_tokens)


@pytest.fixture(scope="module")
def bytes_alone():
    """A tokenizer whose tokens are single bytes."""
    return corpus.train_tokenizer([corpus.Document("a", "a")], 257)


@pytest.mark.parametrize(
    ("sizes", "shown"),
    [([10, 4001, 4000, 5000], [1, 3]), ([4001] * 6, [0, 1, 2, 3]), ([10, 4000], [0])],
)
def test_a_run_shows_a_sample_and_drafts_for_up_to_four_large_files(
    sizes, shown, bytes_alone, capsys
):
    documents = [corpus.Document(f"{i}.py", "abcdefg"[i] * n) for i, n in enumerate(sizes)]
    model = Repeating()
    generating.show_continuation(model, bytes_alone, documents, prompt_tokens=9, new_tokens=5)
    prompts = [[0, *corpus.encode(bytes_alone, 8 * "abcdefg"[i])] for i in shown]
    ids, new_tokens, temperature, generator = model.asked[0]
    assert (ids, new_tokens) == (prompts[:1], 5) and temperature > 0 and generator is not None
    assert sorted(asked[0][0] for asked in model.asked[1:]) == sorted(2 * prompts)
    assert all(asked[1:] == (5, 0.0, None) for asked in model.asked[1:])
    assert model.options["speculative"] and model.options["sampling"].greedy
    printed, count, letter = capsys.readouterr().out, len(shown), "abcdefg"[shown[0]]
    assert f"of {shown[0]}.py, temperature {temperature} " in printed
    assert f"│ {8 * letter}\n" in printed and f"▌ {5 * letter}\n" in printed
    assert f"of {count} files: {5 * count} tokens in {3 * count} passes" in printed
    assert f"{6 * count} of {8 * count} drafts accepted, the same text as plain" in printed


def test_a_run_says_when_drafts_change_the_text_and_shows_none_without_mtp(bytes_alone, capsys):
    documents = 4 * [corpus.Document("a.py", 5000 * "a")]
    generating.show_continuation(Repeating(different=True), bytes_alone, documents)
    assert "NOT the same text as plain" in capsys.readouterr().out
    model = Repeating(modules=0)
    generating.show_continuation(model, bytes_alone, documents)
    assert "draft" not in capsys.readouterr().out
    ((ids, new_tokens, *_),) = model.asked
    assert len(ids[0]) == new_tokens == 20  # half the context each


@pytest.mark.parametrize(
    ("prompt", "wanted", "limit", "new_tokens"),
    [("ab", 7, 40, 7), ("ab", None, 40, 37), ("ab", None, 500, 128), (39 * "a", None, 40, 1)],
)
def test_a_prompt_is_printed_with_its_continuation_of_as_many_tokens_as_asked_or_fit(
    prompt, wanted, limit, new_tokens, bytes_alone, capsys, monkeypatch
):
    model, clock = Repeating(), iter([100.0, 102.0])
    monkeypatch.setattr(generating.time, "perf_counter", lambda: next(clock))
    model.max_positions, model.training = limit, False
    options = generating.GenerateOptions(
        "x", prompt, wanted, temperature=0.5, top_k=3, top_p=0.7, seed=5, speculative=True,
        depth=2, prefill_chunk=4,
    )
    generating.generate((model, bytes_alone, None), options)
    printed = capsys.readouterr()
    assert printed.out == prompt + new_tokens * prompt[-1] + "\n"
    assert f"{new_tokens} tokens, {new_tokens / 2} tokens/s" in printed.err
    assert "6 of 8 drafts accepted" in printed.err
    sampling = model.options.pop("sampling")
    assert (sampling.temperature, sampling.top_k, sampling.top_p) == (0.5, 3, 0.7)
    assert sampling.generator.initial_seed() == 5
    assert model.options == dict(
        eos_token_id=0, pad_token_id=0, speculative=True, depth=2, prefill_chunk=4
    )


def test_the_separator_is_not_printed_and_a_prompt_without_continuation_is(bytes_alone, capsys):
    model = Repeating()
    model.training = False
    for prompt, new_tokens in (("", 3), ("ab", 0)):  # an empty prompt: the separator, repeated
        options = generating.GenerateOptions("x", prompt, new_tokens)
        generating.generate((model, bytes_alone, None), options)
        printed = capsys.readouterr()
        assert printed.out == prompt + "\n" and "drafts" not in printed.err
        assert model.options["sampling"].greedy and not model.options["speculative"]


def test_text_appears_while_it_is_written_and_half_a_character_at_the_end(bytes_alone, monkeypatch):
    class Watched(io.StringIO):
        def flush(self):
            shown.append(self.getvalue())

    shown, model = [], Repeating()
    model.training = False
    for prompt, appears in (("a", ["aa", "aaa", "aaaa"]), ("é", [])):  # the last byte, repeated
        shown.clear()
        monkeypatch.setattr("sys.stdout", Watched())
        generating.generate((model, bytes_alone, None), generating.GenerateOptions("x", prompt, 3))
        assert shown[: len(appears)] == appears
        rest = 3 * ("a" if prompt == "a" else "\N{REPLACEMENT CHARACTER}")
        assert sys.stdout.getvalue() == f"{prompt}{rest}\n"


def test_the_cache_is_quantised_as_asked(bytes_alone, monkeypatch):
    model, asked = Repeating(), []
    model.training = False
    monkeypatch.setattr(generating, "quantize_cache", lambda *given: asked.append(given))
    for bits in (None, 8):
        options = generating.GenerateOptions("x", "a", 1, cache_bits=bits)
        generating.generate((model, bytes_alone, None), options)
    assert asked == [(model, 8)]


def test_the_cost_of_a_text_by_hand(capsys):
    cost = SimpleNamespace(tokens=6, forwards=4, drafted=8, accepted=6, cache_bytes=1234)
    generating.print_cost(cost, seconds=2.0, speculative=True)
    printed = capsys.readouterr()
    assert not printed.out and printed.err.count("\n") == 1
    for figure in ("6 tokens, 3.0 tokens/s", "(75%)", "1.50 tokens a pass", "1,234 bytes"):
        assert figure in printed.err
    nothing = SimpleNamespace(tokens=0, forwards=0, drafted=0, accepted=0, cache_bytes=0)
    generating.print_cost(nothing, seconds=2.0, speculative=True)
    assert "0 of 0 drafts accepted (0%), 0.00 tokens a pass" in capsys.readouterr().err

"""Corpus, tokenizer, batches, windows, run loop, checkpoint files, verdicts, pictures."""

import json
import math
import os
import signal

import pytest
import torch

from pipeline import checkpoint, compiler, corpus, report
from pipeline.loop import Budget, State, learning_rate, read_metrics, run_steps

SENTENCES = [f"def function_{i}(x):\n    return x * {i} + {i * i}\n\n" for i in range(2000)]


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "text.py"
    path.write_text("".join(SENTENCES))
    return path


# Corpus
def test_default_corpus_is_the_standard_library_without_its_tests():
    documents = corpus.standard_library()
    names = [document.name for document in documents]
    assert "argparse.py" in names and "json/decoder.py" in names
    folders = {folder for name in names for folder in name.split("/")[:-1]}
    assert not folders & corpus.LEFT_OUT_FOLDERS
    assert "html/entities.py" not in names
    assert sum(document.size for document in documents) > 5_000_000


def test_parts_are_disjoint_complete_and_repeatable():
    one, two = corpus.load_corpus(), corpus.load_corpus()
    assert one == two
    texts = [d.text for part in ("train", "validation", "test") for d in one.part(part)]
    assert len(texts) == len(set(texts))
    assert set(texts) == {d.text for d in corpus.standard_library()}
    total = sum(d.size for d in corpus.standard_library())
    for part in ("validation", "test"):
        assert 0.05 <= sum(d.size for d in one.part(part)) / total < 0.09


def test_a_text_given_twice_is_used_once(text_file):
    once, twice = corpus.load_corpus([text_file]), corpus.load_corpus([text_file, text_file])
    assert [d.text for d in once.test] == [d.text for d in twice.test]
    assert once.fingerprint == twice.fingerprint


def test_one_file_is_cut_at_lines_and_nothing_is_lost(text_file):
    text = corpus.load_corpus([text_file])
    pieces = [d for part in ("train", "validation", "test") for d in text.part(part)]
    assert all(piece.text.endswith("\n") for piece in pieces)
    pieces.sort(key=lambda d: int(d.name.rsplit("#")[-1]))
    assert "".join(piece.text for piece in pieces) == text_file.read_text()
    assert text.train and text.validation and text.test


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no text"),
        (b" \n\n", "holds no text"),
        (b"short\n", "too short: 6 bytes in 1 pieces"),
        (b"\xff\xfe" * 20_000, r"not UTF-8 text \(byte 0\)"),
        (b"x" * 50_000, "too short: 50000 bytes in 1 pieces"),
        (b"x" * 50_000 + b"\n" + b"".join(b"%d\n" % i for i in range(2000)), "cannot be split"),
    ],
)
def test_bad_data_files_are_named(tmp_path, content, message):
    path = tmp_path / "bad.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        corpus.load_corpus([path])


def test_missing_data_file_is_named(tmp_path):
    with pytest.raises(OSError, match=r"nowhere\.txt"):
        corpus.load_corpus([tmp_path / "nowhere.txt"])


# Tokenizer
def test_tokenizer_gives_every_text_back(tmp_path):
    tokenizer = corpus.train_tokenizer([corpus.Document("a", "".join(SENTENCES))], 400)
    path = tmp_path / "tokenizer.json"
    tokenizer.save(str(path))
    for text in ("x = 'né 日本 🙂'\r\n\t  y\x00", "def f(x):\n", "<|end_of_text|>"):
        for each in (tokenizer, corpus.load_tokenizer(path)):
            ids = corpus.encode(each, text)
            assert each.decode(ids, skip_special_tokens=False) == text
            assert each.token_to_id(corpus.SEPARATOR) not in ids


def test_tokenizer_learns_from_the_documents_it_is_given_only():
    held_out = "zyzzogeton " * 200
    tokenizer = corpus.train_tokenizer([corpus.Document("a", "".join(SENTENCES))], 600)
    assert len(corpus.encode(tokenizer, "zyzzogeton")) > 4
    seen = corpus.train_tokenizer([corpus.Document("a", held_out)], 600)
    assert len(corpus.encode(seen, "zyzzogeton")) == 1


def test_no_tokenizer_is_named(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json is no tokenizer"):
        corpus.load_tokenizer(tmp_path / "tokenizer.json")
    with pytest.raises(ValueError, match="no tokenizer"):
        corpus.load_tokenizer(tmp_path / "absent.json")


# Batches
def stream_of(tokens):
    return torch.arange(tokens), torch.arange(tokens) // 50


def test_batches_depend_on_seed_and_step_alone():
    one, two = (corpus.Batches(stream_of(1000), 4, 16, seed=3) for _ in range(2))
    later = one[37]
    assert all(torch.equal(a, b) for a, b in zip(later, two[37], strict=True))
    assert not torch.equal(later[0], corpus.Batches(stream_of(1000), 4, 16, seed=4)[37][0])


def test_an_epoch_visits_every_chunk_once():
    batches = corpus.Batches(stream_of(16 * 21), 4, 16, seed=0)
    assert batches.per_epoch == 20
    ids = torch.cat([batches[step][0] for step in range(5)])
    starts = sorted(ids[:, 0].tolist())
    assert len(set(starts)) == 20 and all(
        b - a == 16 for a, b in zip(starts, starts[1:], strict=False)
    )
    assert torch.equal(ids, ids[:, :1] + torch.arange(16))


def test_documents_are_numbered_at_their_separators():
    tokenizer = corpus.train_tokenizer([corpus.Document("a", "".join(SENTENCES))], 300)
    documents = [corpus.Document("a", "def f"), corpus.Document("b", "return x")]
    ids, document_ids = corpus.token_stream(tokenizer, documents)
    separators = (ids == 0).nonzero().flatten().tolist()
    assert separators[0] == 0 and separators[-1] == len(ids) - 1 and len(separators) == 3
    assert document_ids.tolist() == (torch.cumsum(ids == 0, 0) - 1).tolist()
    with pytest.raises(ValueError, match="want at least 200 for sequences of 100"):
        corpus.Batches((ids, document_ids), 2, 100, 0)


# Scoring windows
@pytest.mark.parametrize("tokens", [1, 2, 5, 8, 9, 37, 64])
@pytest.mark.parametrize("context", [2, 3, 8, 9])
def test_windows_score_every_target_once_with_half_a_context_before(tokens, context):
    scored = []
    for start, first, end in corpus.scoring_windows(tokens, context):
        assert end - start <= context and start < first < end
        if start > 0:
            assert first - start >= context - context // 2 - 1
        scored.extend(range(first, end))
    assert scored == list(range(1, tokens))


def test_windows_by_hand():
    assert corpus.scoring_windows(7, 4) == [(0, 1, 4), (2, 4, 6), (4, 6, 7)]


def test_yardsticks():
    documents = [corpus.Document("a", "".join(SENTENCES))]
    rates = corpus.compressor_rates(documents)
    assert 0 < rates["lzma -9"] < rates["zlib -9"] < 8
    assert corpus.uniform_rate(100, 300, 4096) == pytest.approx(4.0)


# Loop
def run_for(tmp_path, budget, state=None, losses=None, stop_at=None, saves=None):
    def step(number, used):
        if number == stop_at:
            signal.raise_signal(signal.SIGINT)  # Ctrl-C in the middle of a step
        return {"loss": losses[number] if losses else 1.0 / (number + 1), "tokens": 10}

    state = state or State()
    save = (saves if saves is not None else []).append
    metrics = tmp_path / "metrics.jsonl"
    finished = run_steps(step, state, budget, metrics, lambda: save(state.step))
    assert finished == (stop_at is None)
    return state


def test_loop_spends_its_budget_and_writes_every_step(tmp_path, capsys):
    saves = []
    state = run_for(tmp_path, Budget(steps=7), saves=saves)
    assert (state.step, state.tokens, saves) == (7, 70, [7])
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 8))
    assert lines[3]["loss"] == 0.25 and lines[3]["tokens"] == 40
    progress = capsys.readouterr().err
    assert "step 7" in progress and "tokens/s" in progress and "left" in progress


def test_minutes_budget_stops(tmp_path):
    state = run_for(tmp_path, Budget(minutes=1e-5))
    assert state.step >= 1


def test_interrupted_loop_saves_and_a_resumed_one_drops_lost_lines(tmp_path):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have it ignored
    saves = []
    run_for(tmp_path, Budget(steps=9), stop_at=5, saves=saves)
    assert saves == [6]  # the step under way is finished first
    with pytest.raises(KeyboardInterrupt):  # afterwards Ctrl-C means what it always does
        signal.raise_signal(signal.SIGINT)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "lo\n[1]\n{"a": 1}\n')  # cut off, or not ours
    run_for(tmp_path, Budget(steps=9), state=State(step=3, tokens=30, seconds=1.0))
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 10))


def test_a_loss_that_is_no_number_ends_the_run(tmp_path):
    with pytest.raises(ValueError, match="the loss is nan at step 1"):
        run_for(tmp_path, Budget(steps=3), losses=[1.0, math.nan, 1.0])


def test_budget_and_schedule():
    wrong_budgets = ({}, {"steps": 1, "minutes": 1}, {"steps": 0}, {"minutes": -1})
    for wrong in (*wrong_budgets, {"minutes": math.inf}, {"minutes": math.nan}):
        with pytest.raises(ValueError, match=r"want steps or minutes|must be above 0"):
            Budget(**wrong)
    rates = [learning_rate(i / 100, 1.0) for i in range(101)]
    assert 0 < rates[0] < 0.2 and max(rates) == pytest.approx(1.0, abs=0.01)
    assert rates[100] == pytest.approx(0.05)
    peak = rates.index(max(rates))
    assert rates[:peak] == sorted(rates[:peak]) and rates[peak:] == sorted(
        rates[peak:], reverse=True
    )


# Checkpoint files
def test_tensors_and_json_round_trip_and_leave_no_temporary_files(tmp_path):
    shared = torch.arange(6.0).view(2, 3)
    checkpoint.write_tensors(tmp_path / "model.safetensors", {"a": shared, "b": shared.T})
    read = dict(checkpoint.read_tensors(checkpoint.tensor_files(tmp_path)))
    assert torch.equal(read["a"], shared) and torch.equal(read["b"], shared.T)
    checkpoint.write_json(tmp_path / "x.json", {"a": 1})
    assert checkpoint.read_json(tmp_path / "x.json") == {"a": 1}
    assert sorted(os.listdir(tmp_path)) == ["model.safetensors", "x.json"]


def test_a_failed_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "x.json"
    checkpoint.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        checkpoint.write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1} and os.listdir(tmp_path) == ["x.json"]


def test_sharded_checkpoints_are_read(tmp_path):
    checkpoint.write_tensors(tmp_path / "one.safetensors", {"a": torch.ones(2)})
    checkpoint.write_tensors(tmp_path / "two.safetensors", {"b": torch.zeros(3)})
    weight_map = {"a": "one.safetensors", "b": "two.safetensors"}
    checkpoint.write_json(tmp_path / checkpoint.INDEX, {"weight_map": weight_map})
    read = dict(checkpoint.read_tensors(checkpoint.tensor_files(tmp_path)))
    assert set(read) == {"a", "b"} and torch.equal(read["b"], torch.zeros(3))
    checkpoint.write_json(tmp_path / checkpoint.INDEX, {"weight_map": {"c": "one.safetensors"}})
    with pytest.raises(ValueError, match="does not hold c, which the index promises"):
        list(checkpoint.read_tensors(checkpoint.tensor_files(tmp_path)))
    for wrong in ([], {"a": 1}, {"a": "../one.safetensors"}, None):
        checkpoint.write_json(tmp_path / checkpoint.INDEX, {"weight_map": wrong})
        with pytest.raises(ValueError, match="must give a file name a tensor"):
            checkpoint.tensor_files(tmp_path)


def test_optimizer_state_must_be_whole_and_fit():
    model = torch.nn.Linear(2, 3)

    def fresh():
        return [torch.optim.AdamW([model.bias]), torch.optim.Muon([model.weight])]

    optimizers = fresh()
    model(torch.ones(1, 2)).sum().backward()
    for optimizer in optimizers:
        optimizer.step()
    state = checkpoint.optimizer_tensors(model, optimizers)
    assert len(state) == 4  # AdamW: step and two moments; Muon: one
    restored = fresh()
    checkpoint.restore_optimizers(model, restored, state.items())
    again = checkpoint.optimizer_tensors(model, restored)
    assert set(again) == set(state) and all(torch.equal(again[k], state[k]) for k in state)
    wrong_states = {
        "incomplete": [{}, {k: v for k, v in state.items() if not k.startswith("weight/")}],
        "fits no parameter": [
            {**state, "nope/exp_avg": torch.ones(1)}, {**state, "bias/exp_avg": torch.ones(7)}
        ],
    }  # fmt: skip
    for message, states in wrong_states.items():
        for wrong in states:
            with pytest.raises(ValueError, match=message):
                checkpoint.restore_optimizers(model, fresh(), wrong.items())


def test_optimizer_state_of_one_kind_is_whole_for_all_its_parameters():
    model = torch.nn.Linear(2, 3)
    optimizers = [torch.optim.AdamW(model.parameters())]
    model(torch.ones(1, 2)).sum().backward()
    optimizers[0].step()
    state = checkpoint.optimizer_tensors(model, optimizers)
    del state["bias/exp_avg"]
    with pytest.raises(ValueError, match="incomplete"):
        checkpoint.restore_optimizers(model, [torch.optim.AdamW(model.parameters())], state.items())


def test_streamed_text_is_the_text_and_never_cuts_a_character():
    text = "naïve π ≤ 日本 🙂 end"
    tokenizer = corpus.train_tokenizer([corpus.Document("a", "abc")], 260)  # a token a byte
    pieces = []
    stream = corpus.TextStream(tokenizer, pieces.append)
    for token in corpus.encode(tokenizer, text):
        stream.add([token])
    stream.finish()
    assert "".join(pieces) == text and "\N{REPLACEMENT CHARACTER}" not in "".join(pieces)
    stream = corpus.TextStream(tokenizer, pieces.append)
    stream.add(corpus.encode(tokenizer, "π")[:1])
    stream.finish()  # cut off in the middle: shown, not lost
    assert pieces[-1] == "\N{REPLACEMENT CHARACTER}"


def test_unreadable_files_are_named(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"not tensors")
    with pytest.raises(ValueError, match="is no safetensors file"):
        checkpoint.tensor_files(tmp_path)
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(ValueError, match=r"x\.json is no JSON"):
        checkpoint.read_json(tmp_path / "x.json")
    (tmp_path / "x.json").write_text("[1]")
    with pytest.raises(ValueError, match="must hold a JSON object, got list"):
        checkpoint.read_json(tmp_path / "x.json")
    with pytest.raises(ValueError, match="cannot be read"):
        checkpoint.read_json(tmp_path / "y.json")


def test_directory_is_replaced_as_a_whole_or_not_at_all(tmp_path):
    target = tmp_path / "checkpoint"
    for content in ("first", "second"):
        with checkpoint.replaced_directory(target) as fresh:
            (fresh / "file").write_text(content)
        assert (target / "file").read_text() == content
    with pytest.raises(RuntimeError), checkpoint.replaced_directory(target) as fresh:
        (fresh / "file").write_text("half")
        raise RuntimeError
    assert (target / "file").read_text() == "second" and os.listdir(tmp_path) == ["checkpoint"]


def test_a_replacement_killed_between_its_renames_is_finished(tmp_path):
    target = tmp_path / "checkpoint"
    for name, content in ((".old", "before"), (".new", "after")):
        (tmp_path / f"checkpoint{name}").mkdir()
        (tmp_path / f"checkpoint{name}" / "file").write_text(content)
    checkpoint.recover_directory(target)
    assert (target / "file").read_text() == "after"
    (tmp_path / "checkpoint").rename(tmp_path / "other.old")  # nothing new: the old one comes back
    checkpoint.recover_directory(tmp_path / "other")
    assert (tmp_path / "other" / "file").read_text() == "after"


def test_nothing_in_the_project_unpickles():
    root = os.path.dirname(os.path.dirname(__file__))
    sources = [os.path.join(root, name) for name in os.listdir(root) if name.endswith(".py")]
    folder = os.path.join(root, "pipeline")
    sources += [os.path.join(folder, name) for name in os.listdir(folder) if name.endswith(".py")]
    assert len(sources) > 10
    for path in sources:
        with open(path) as file:
            text = file.read()
        assert "torch.load" not in text and "import pickle" not in text, path


def test_pictures_are_drawn(tmp_path):
    metrics = [
        {"tokens": 1000 * i, "loss": 5.0 / i, "mtp_loss": 6.0 / i, "max_load": {"layer 1": 1.5}}
        for i in range(1, 40)
    ]
    report.draw_losses(metrics, tmp_path / "loss.png")
    report.draw_expert_load(metrics, tmp_path / "load.png")
    for line in metrics:
        line["mtp_loss"], line["max_load"] = None, {}
    report.draw_losses(metrics, tmp_path / "dense_loss.png")
    report.draw_expert_load(metrics, tmp_path / "dense_load.png")
    assert all(
        (tmp_path / n).read_bytes()[:4] == b"\x89PNG" for n in ("loss.png", "dense_load.png")
    )


# Python's compiler as a judge
PROMPT = "def f(x):\n    y = x\n"


@pytest.mark.parametrize(
    ("completion", "wanted"),
    [
        ("    return y + 1\n", "valid"),
        ("    y += 1\n", "valid"),
        ("    print(y)\n", "valid"),
        ("    raise ValueError\n", "valid"),
        ("    yield y\n", "valid"),
        ("    z: int = 3\n", "valid"),
        ("\nlimit = 3\n", "valid"),
        ("\ndef g():\n    return 1\n", "valid"),
        ("    if y:\n        y = 2\n", "valid"),
        ("", "trivial"),
        ("\n\n", "trivial"),
        ("    # y = 3\n", "trivial"),
        ("    pass\n", "trivial"),
        ("    ...\n", "trivial"),
        ('    """y = 3"""\n', "trivial"),
        ("    y\n", "trivial"),
        ("    3\n", "trivial"),
        ("    return\n", "trivial"),
        ("    z: int\n", "trivial"),
        ("    import os\n", "trivial"),
        ("\nfrom os import path\n", "trivial"),
        ("    global z\n", "trivial"),
        ("\nclass A:\n    pass\n", "trivial"),
        ("\ndef g():\n    '''Nothing.'''\n", "trivial"),
        ("    while y:\n        break\n", "trivial"),
        ("  return y\n", "invalid"),
        ("    return y +\n", "invalid"),
        ("    if y:\n", "invalid"),
        ("    print('\n", "invalid"),
        ("    y = '\0'\n", "invalid"),
        ("    y = " + 300 * "(" + 300 * ")" + "\n", "invalid"),
        ("    y = '\ud800'\n", "invalid"),
        ("    y = " + 5000 * "-" + "1\n", "invalid"),
    ],
)
def test_verdicts(completion, wanted):
    assert compiler.verdict(PROMPT, completion) == wanted


def test_what_the_prompt_does_is_not_the_completions_merit():
    assert compiler.verdict("import os\nprint(os)\n", "# done\n") == "trivial"
    assert compiler.verdict("x = (1 +\n", "2)\n") == "trivial"  # begun in the prompt
    assert compiler.verdict("x = 1\r\ny = 2\rz = 3\n", "# done\n") == "trivial"
    assert compiler.verdict("x = 1\n\f\n", "y = 2\n") == "valid"


def test_completions_are_never_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    reward = compiler.CompilerReward()
    assert reward("import pathlib\n", ["pathlib.Path('made').touch()\n"]) == [1.0]
    assert not list(tmp_path.iterdir())


def test_a_text_is_paid_once():
    reward = compiler.CompilerReward()
    assert reward(PROMPT, ["    return 1\n", "    return 1\n", "    return 2\n"]) == [1, 0, 1]
    assert reward(PROMPT, ["\n    return   1\n\n", "    return 3\n", "    pass\n"]) == [0, 1, 0]
    assert reward("x = 1\n", ["return 1\n", "x = 3\n"]) == [0, 1]
    resumed = compiler.CompilerReward(reward.paid)
    assert resumed(PROMPT, ["    return 2\n", "    return 4\n"]) == [0, 1]
    assert compiler.CompilerReward(memory=False)(PROMPT, 2 * ["    return 1\n"]) == [1, 1]


def test_completions_are_cut_to_whole_lines_unless_they_ended():
    assert compiler.whole_lines("a = 1\nb = ") == "a = 1\n"
    assert compiler.whole_lines("a = 1") == ""
    assert compiler.whole_lines("a = 1\nb = 2" + corpus.SEPARATOR) == "a = 1\nb = 2"


def test_shares_by_hand():
    texts = ["    return 1\n", "    return 1\n", "    pass\n", "  x\n"]
    assert compiler.shares(4 * [PROMPT], texts) == {
        "valid": 0.5, "trivial": 0.25, "invalid": 0.25, "distinct": 0.75, "distinct_valid": 0.5,
    }  # fmt: skip


def test_prompts_are_python_and_end_at_a_line_end():
    documents = corpus.load_corpus().test[:6]
    tokenizer = corpus.train_tokenizer(documents, 600)
    documents = [*documents, corpus.Document("broken.py", "def f(:\n" * 50)]
    prompts = compiler.line_end_prompts(tokenizer, documents, 16, 40)
    assert len(prompts) > 10
    separator = tokenizer.token_to_id(corpus.SEPARATOR)
    whole, place = "".join(d.text for d in documents), 0
    for prompt in prompts:
        assert prompt[0] == separator and separator not in prompt[1:]
        assert 16 <= len(prompt) <= 40
        text = tokenizer.decode(prompt)
        assert text.endswith("\n") and compiler.parsed(text) is not None
        place = whole.index(text, place) + len(text)  # in order, not overlapping
    assert compiler.sample_of(prompts, 5) == compiler.sample_of(prompts, 5)
    assert len(compiler.sample_of(prompts, 10_000)) == len(prompts)


def test_prompts_come_from_pieces_of_files_too():
    text = "".join(f"def f_{i}(x):\n    return x + {i}\n" for i in range(60))
    tokenizer = corpus.train_tokenizer([corpus.Document("a.py", text)], 300)
    piece = corpus.Document("a.py#1", text[text.index("    return x + 3") : text.rindex("    ")])
    assert compiler.parsed(piece.text) is None
    prompts = compiler.line_end_prompts(tokenizer, [piece], 12, 32)
    assert len(prompts) > 20 and all(tokenizer.decode(p) in piece.text for p in prompts)
    assert compiler.line_end_prompts(tokenizer, [corpus.Document("x", "a b c\n" * 99)]) == []

"""Corpus, tokenizer, batches, scoring windows, streamed text."""

import lzma
import zlib

import pytest
import torch
from tokenizers import processors

from pipeline import corpus

SENTENCES = [f"def function_{i}(x):\n    return x * {i} + {i * i}\n\n" for i in range(2000)]


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "text.py"
    path.write_text("".join(SENTENCES))
    return path


def test_default_corpus_is_the_standard_library_without_its_tests():
    documents = corpus.standard_library()
    names = [document.name for document in documents]
    assert "argparse.py" in names and "json/decoder.py" in names
    folders = {folder for name in names for folder in name.split("/")[:-1]}
    assert not folders & corpus.LEFT_OUT_FOLDERS
    assert "html/entities.py" not in names
    assert sum(document.size for document in documents) > 5_000_000


def test_tests_tables_and_unreadable_files_of_a_standard_library_are_left_out(
    tmp_path, monkeypatch
):
    files = {
        "b.py": b"b", "a/tests.py": "π".encode(), "a/test/c.py": b"c", "config-3/d.py": b"d",
        "_sysconfigdata_x.py": b"e", "html/entities.py": b"f", "html/parser.py": b"g",
        "old.py": b"\xe9", "empty.py": b"\n", "notes.txt": b"h", "tests/deep/i.py": b"i",
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    monkeypatch.setattr(corpus.sysconfig, "get_path", {"stdlib": tmp_path}.get)
    documents = corpus.standard_library()
    assert [d.name for d in documents] == ["a/tests.py", "b.py", "html/parser.py"]
    assert [d.size for d in documents] == [2, 1, 1]  # bytes


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
    other = corpus.load_corpus([text_file, __file__])
    assert len(once.fingerprint) == 12 and other.fingerprint != once.fingerprint


@pytest.mark.parametrize(
    ("lines", "bytes_a_line", "lines_a_piece"),
    [(400, 1024, 16), (60, 100, 3), (62, 10, 4), (3, 5, 1)],  # PIECE; total / 20, rounded up; all
)
def test_size_of_pieces(lines, bytes_a_line, lines_a_piece):
    line = "π" + "x" * (bytes_a_line - 3) + "\n"
    cut = corpus.cut_at_lines(corpus.Document("a", line * lines))
    starts = range(0, lines, lines_a_piece)
    assert [piece.text for piece in cut] == [
        line * min(lines_a_piece, lines - start) for start in starts
    ]
    assert [piece.name for piece in cut[:2]] == ["a#0", "a#1"]


def test_twenty_files_are_documents_and_fewer_are_cut(tmp_path):
    paths = [tmp_path / f"{i}.txt" for i in range(20)]
    for path in paths:
        path.write_text("one\ntwo\n")
    assert [d.name for d in corpus.read_files(paths)] == list(map(str, paths))
    assert len(corpus.read_files(paths[:19])) == 2 * 19


def documents_of(*sizes):
    return [corpus.Document(str(i), f"{i:05}" * (size // 5)) for i, size in enumerate(sizes)]


def test_the_smallest_corpus(monkeypatch):
    documents = documents_of(10_000, 5000, 5000)  # the shuffle leaves the first for training
    monkeypatch.setattr(corpus, "standard_library", lambda: documents)
    text = corpus.load_corpus()
    assert [len(text.part(name)) for name in ("train", "validation", "test")] == [1, 1, 1]
    assert text.train == documents[:1]
    for fewer in (documents_of(10_000, 5000, 4995), documents_of(10_000, 10_000)):
        monkeypatch.setattr(corpus, "standard_library", lambda fewer=fewer: fewer)
        with pytest.raises(ValueError, match="too short"):
            corpus.load_corpus()


@pytest.mark.parametrize(("options", "each"), [({}, 5), ({"held_out": 0.1}, 10)])
def test_held_out_parts_have_their_share_of_the_bytes(monkeypatch, options, each):
    documents = documents_of(*[300] * 100)
    monkeypatch.setattr(corpus, "standard_library", lambda: documents)
    text = corpus.load_corpus(**options)
    assert (len(text.validation), len(text.test)) == (each, each)
    assert len(text.train) == 100 - 2 * each and text.train != documents[: len(text.train)]


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


def test_tokenizer_gives_every_text_back(tmp_path):
    tokenizer = corpus.train_tokenizer([corpus.Document("a", "".join(SENTENCES))], 400)
    assert tokenizer.get_vocab_size() == 400
    path = tmp_path / "tokenizer.json"
    tokenizer.save(str(path))
    for text in ("x = 'né 日本 🙂'\r\n\t  y\x00", "def f(x):\n", "<|end_of_text|>"):
        for each in (tokenizer, corpus.load_tokenizer(path)):
            ids = corpus.encode(each, text)
            assert each.decode(ids, skip_special_tokens=False) == text
            assert each.token_to_id(corpus.SEPARATOR) not in ids
    ids = corpus.encode(tokenizer, "abc")
    tokenizer.post_processor = processors.TemplateProcessing(  # as some released tokenizers have
        single=f"{corpus.SEPARATOR} $A", special_tokens=[(corpus.SEPARATOR, 0)]
    )
    assert corpus.encode(tokenizer, "abc") == ids
    with pytest.raises(ValueError, match="surrogates not allowed"):
        corpus.encode(tokenizer, "\udcff")


def test_tokenizer_learns_from_the_documents_it_is_given_only():
    held_out = "zyzzogeton " * 200
    tokenizer = corpus.train_tokenizer([corpus.Document("a", "".join(SENTENCES))], 600)
    assert len(corpus.encode(tokenizer, "zyzzogeton")) > 4
    seen = corpus.train_tokenizer([corpus.Document("a", held_out)], 600)
    assert len(corpus.encode(seen, "zyzzogeton")) == 1


def test_no_tokenizer_is_named(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a tokenizer"):
        corpus.load_tokenizer(tmp_path / "tokenizer.json")
    with pytest.raises(ValueError, match="tokenizer cannot be read"):
        corpus.load_tokenizer(tmp_path / "absent.json")


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
    second = torch.cat([batches[step][0] for step in range(5, 10)])[:, 0].tolist()
    assert len(set(second)) == 20 and sorted(second) != starts  # its own offset and its own order
    offsets = [start - min(each) for each in (second, ids[:, 0].tolist()) for start in each]
    assert offsets[:20] != offsets[20:]


def test_the_shortest_stream_is_two_chunks_and_every_offset_occurs():
    starts = {int(corpus.Batches(stream_of(8), 1, 4, seed)[0][0][0, 0]) for seed in range(30)}
    assert starts == {0, 1, 2, 3}
    with pytest.raises(ValueError, match="7 training tokens, want at least 8"):
        corpus.Batches(stream_of(7), 1, 4, 0)


def test_documents_are_numbered_at_their_separators():
    tokenizer = corpus.train_tokenizer([corpus.Document("a", "".join(SENTENCES))], 300)
    documents = [corpus.Document("a", "def f"), corpus.Document("b", "return x")]
    ids, document_ids = corpus.token_stream(tokenizer, documents)
    separators = (ids == 0).nonzero().flatten().tolist()
    assert separators[0] == 0 and separators[-1] == len(ids) - 1 and len(separators) == 3
    assert document_ids.tolist() == (torch.cumsum(ids == 0, 0) - 1).tolist()
    with pytest.raises(ValueError, match="want at least 200 for sequences of 100"):
        corpus.Batches((ids, document_ids), 2, 100, 0)


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


def test_scored_windows_are_padded_little_and_on_the_right():
    texts = ("zz", "a" * 6, "zz", "a" * 6, "nnnn", "b" * 18)  # the short ones are last in ABC
    documents = [corpus.Document("a", text) for text in texts]
    tokenizer = corpus.train_tokenizer([corpus.Document("a", "xy")], 259)  # a token a byte
    batches = list(corpus.scoring_batches(tokenizer, documents, context=8, batch_size=2))
    scored, padding = [], 0
    for ids, target, real in batches:
        assert real[0].sum() <= real[1].sum() == ids.shape[1] if len(ids) == 2 else real.all()
        assert (real.long().diff(dim=1) <= 0).all() and (ids[~real] == 0).all()
        scored += ids[target].tolist()
        padding += int((~real).sum())
    assert sorted(scored) == sorted([0] * 6 + corpus.encode(tokenizer, "".join(texts)))
    # Windows of 4, 4 | 6, 8 | 8, 8 | 8, 8 | 8 tokens: those of one length stand together.
    assert [ids.shape for ids, _, _ in batches] == [(2, 4), (2, 8), (2, 8), (2, 8), (1, 8)]
    assert padding == 2


def test_yardsticks(monkeypatch):
    documents = [corpus.Document("a", "".join(SENTENCES)), corpus.Document("b", "π" * 99)]
    rates = corpus.compressor_rates(documents)
    assert 0 < rates["lzma -9"] < rates["zlib -9"] < 8
    data = "".join(document.text for document in documents).encode()
    for name, small, other in (
        ("zlib -9", zlib.compress(data, 9), zlib.compress(data, 1)),
        ("lzma -9", lzma.compress(data, preset=9), lzma.compress(data, preset=0)),
    ):
        assert rates[name] == 8 * len(small) / len(data) < 8 * len(other) / len(data)
    asked = []  # up to 8 MB of text, preset 9 of lzma gives what its default gives
    monkeypatch.setattr(lzma, "compress", lambda data, preset=6: asked.append(preset) or b"")
    corpus.compressor_rates(documents)
    assert asked == [9]
    assert corpus.uniform_rate(100, 300, 4096) == pytest.approx(4.0)


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

"""From text to token ids: the corpus, its three parts, the tokenizer, batches, scoring windows.

The default text is the source of Python's own standard library: it is real text, it is on every
machine, and it needs no download. A document is a file, or a piece of one. Each document is in one
part only, so training never sees held-out text. The tokenizer learns from the training part alone.
"""

import hashlib
import lzma
import math
import pathlib
import random
import sysconfig
import zlib
from dataclasses import dataclass, field

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

SEPARATOR = "<|end_of_text|>"
LEFT_OUT_FOLDERS = {
    "site-packages", "dist-packages", "test", "tests", "idle_test", "idlelib", "lib2to3",
    "encodings", "pydoc_data", "__pycache__",
}
GENERATED = {"html/entities.py"}
SMALLEST_CORPUS = 20_000  # bytes: with fewer, a part would be a page or less
SPLIT_SEED = 0  # all runs split alike: no run is tested on text that another was trained on
PIECE = 16_384  # bytes: if a user has few files, they are cut into documents of about this size


@dataclass(frozen=True)
class Document:
    name: str
    text: str

    @property
    def size(self):
        return len(self.text.encode())


@dataclass(frozen=True)
class Corpus:
    """Three lists of `Document`s, and a hash of all their texts."""

    train: list
    validation: list
    test: list
    fingerprint: str = field(default="")

    def part(self, name):
        return {"train": self.train, "validation": self.validation, "test": self.test}[name]


# Reading
def standard_library():
    """The .py files of this Python's standard library, without tests and generated tables."""
    root = pathlib.Path(sysconfig.get_path("stdlib"))
    documents = []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root).as_posix()
        folders = relative.split("/")[:-1]
        generated = relative in GENERATED or path.name.startswith("_sysconfigdata")
        if generated or any(f in LEFT_OUT_FOLDERS or f.startswith("config-") for f in folders):
            continue
        try:
            text = path.read_bytes().decode()
        except (OSError, UnicodeDecodeError):  # a few old files are not UTF-8
            continue
        if text.strip():
            documents.append(Document(relative, text))
    return documents


def read_files(paths):
    """Reads the user's own UTF-8 text files. Fewer than 20 files are cut into pieces."""
    documents = []
    for path in paths:
        data = pathlib.Path(path).read_bytes()
        try:
            text = data.decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"--data {path}: not UTF-8 text (byte {error.start})") from None
        if not text.strip():
            raise ValueError(f"--data {path}: the file holds no text")
        documents.append(Document(str(path), text))
    if len(documents) < 20:
        documents = [piece for document in documents for piece in cut_at_lines(document)]
    return documents


def cut_at_lines(document):
    """Cuts a document at line ends into pieces of about PIECE bytes.

    The pieces of a short document are smaller, so that there are about 20.
    """
    total = document.size
    piece_size = min(PIECE, total // 20)
    pieces, lines, size = [], [], 0
    for line in document.text.splitlines(keepends=True):
        lines.append(line)
        size += len(line.encode())
        if size >= piece_size:
            pieces.append("".join(lines))
            lines, size = [], 0
    if lines:
        pieces.append("".join(lines))
    return [Document(f"{document.name}#{i}", piece) for i, piece in enumerate(pieces)]


def load_corpus(paths=None, held_out=0.05):
    """Reads and splits the corpus. Validation and test each get about `held_out` of the bytes.

    Raises: ValueError, which says what is wrong with the text; OSError if a file cannot be read.
    """
    # A text that occurs twice could get into two parts, so it is kept once.
    unique = {d.text: d for d in (read_files(paths) if paths else standard_library())}
    documents = list(unique.values())
    total = sum(document.size for document in documents)
    if total < SMALLEST_CORPUS or len(documents) < 3:
        raise ValueError(
            f"the text is too short: {total} bytes in {len(documents)} pieces, want at least "
            f"{SMALLEST_CORPUS} bytes and 3 pieces (a piece ends at the end of a line)"
        )
    digest = hashlib.sha256("\0".join(document.text for document in documents).encode())
    order = list(documents)
    random.Random(SPLIT_SEED).shuffle(order)
    parts = {"test": [], "validation": []}
    for part in parts.values():
        while order and sum(document.size for document in part) < held_out * total:
            part.append(order.pop())
    if sum(document.size for document in order) < total / 2:
        raise ValueError("the text cannot be split: one piece is most of it")
    return Corpus(order, parts["validation"], parts["test"], digest.hexdigest()[:12])


# Tokens
def train_tokenizer(documents, vocab_size):
    """Trains a byte-level BPE tokenizer of at most `vocab_size` entries.

    Byte-pair encoding (BPE) starts from single bytes. It makes the most frequent pair of entries a
    new entry, again and again. Id 0 is the separator between documents.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[SEPARATOR],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((document.text for document in documents), trainer)
    return tokenizer


def load_tokenizer(path):
    """Reads a tokenizer.json. Raises ValueError if this fails."""
    try:
        return Tokenizer.from_str(pathlib.Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"the tokenizer cannot be read: {error}") from None
    except Exception as error:  # the library raises plain Exception
        raise ValueError(f"{path} is not a tokenizer: {error}") from None


def encode(tokenizer, text):
    """Token ids of a text. If the text contains the separator's name, it is plain text there."""
    text.encode()  # ValueError if it is not Unicode, for example a stray byte from the shell
    tokenizer.encode_special_tokens = True
    return tokenizer.encode(text, add_special_tokens=False).ids


class TextStream:
    """Turns token ids into text while they arrive. `write` gets each new piece of the text.

    A character may need several tokens. It is written when the last of them has arrived.
    """

    def __init__(self, tokenizer, write):
        self.tokenizer, self.write = tokenizer, write
        self.ids, self.written = [], ""

    def add(self, ids):
        self.ids.extend(ids)
        text = self.tokenizer.decode(self.ids)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            self._write_rest(text)

    def finish(self):
        self._write_rest(self.tokenizer.decode(self.ids))

    def _write_rest(self, text):
        self.write(text[len(self.written) :])
        self.written = text


def token_stream(tokenizer, documents):
    """(ids, document_ids), int64. A separator stands before each document and at the very end."""
    separator = tokenizer.token_to_id(SEPARATOR)
    ids, document_ids = [], []
    for i, document in enumerate(documents):
        document_tokens = [separator, *encode(tokenizer, document.text)]
        ids.extend(document_tokens)
        document_ids.extend([i] * len(document_tokens))
    ids.append(separator)
    document_ids.append(len(documents))
    return torch.from_numpy(np.array(ids)), torch.from_numpy(np.array(document_ids))


class Batches:
    """Batches of chunks of a token stream. A batch depends only on the seed and its step.

    An epoch visits every chunk once. Each epoch has its own order, and cuts at its own offset.
    """

    def __init__(self, stream, batch_size, length, seed):
        self.ids, self.document_ids = stream
        self.batch_size, self.length, self.seed = batch_size, length, seed
        self.per_epoch = len(self.ids) // length - 1
        if self.per_epoch < 1:
            raise ValueError(
                f"the text is too short: {len(self.ids)} training tokens, want at least "
                f"{2 * length} for sequences of {length}"
            )

    def __getitem__(self, step):
        """(ids, document_ids) of this step, (B, T) each."""
        numbers = range(step * self.batch_size, (step + 1) * self.batch_size)
        starts = [self._start(*divmod(number, self.per_epoch)) for number in numbers]
        return tuple(
            torch.stack([stream[start : start + self.length] for start in starts])
            for stream in (self.ids, self.document_ids)
        )

    def _start(self, epoch, place):
        random_state = np.random.default_rng((self.seed, epoch))
        offset = int(random_state.integers(self.length))
        return offset + self.length * int(random_state.permutation(self.per_epoch)[place])


# Scoring
def scoring_windows(token_count, context):
    """Windows [(start, first target, end)] that score each target once.

    A window has at most `context` tokens. Tokens are numbered from 0: token 0 is given, and tokens
    1 … token_count − 1 are targets. A window reads tokens start … end − 1 and scores those from
    first target on. Windows overlap by half, so that all but the first targets have at least
    context / 2 tokens before them. With 7 tokens and context 4, the windows are
    [(0, 1, 4), (2, 4, 6), (4, 6, 7)].
    """
    windows, scored, start = [], 1, 0
    stride = max(1, context // 2)
    while scored < token_count:
        end = min(start + context, token_count)
        windows.append((start, scored, end))
        scored, start = end, start + stride
    return windows


def scoring_batches(tokenizer, documents, context, batch_size):
    """Yields (ids, target, real), (B, T) each, that score every token of every document once.

    A separator stands before and after each document. The one after it is scored as well. `target`
    marks the tokens to score, and `real` marks all tokens but padding. Padding is on the right, so
    no real token can attend to it.
    """
    separator, windows = tokenizer.token_to_id(SEPARATOR), []
    for document in documents:
        ids = [separator, *encode(tokenizer, document.text), separator]
        windows += [(ids[s:end], first - s) for s, first, end in scoring_windows(len(ids), context)]
    windows.sort(key=lambda window: len(window[0]))  # similar lengths need little padding
    for i in range(0, len(windows), batch_size):
        batch = windows[i : i + batch_size]
        width = max(len(ids) for ids, _ in batch)
        padded = torch.tensor([ids + [separator] * (width - len(ids)) for ids, _ in batch])
        place = torch.arange(width)
        real = place < torch.tensor([[len(ids)] for ids, _ in batch])
        yield padded, real & (place >= torch.tensor([[first] for _, first in batch])), real


def compressor_rates(documents):
    """Bits per byte of zlib -9 and lzma -9 on the documents' concatenated bytes."""
    data = "".join(document.text for document in documents).encode()
    return {
        "zlib -9": 8 * len(zlib.compress(data, 9)) / len(data),
        "lzma -9": 8 * len(lzma.compress(data, preset=9)) / len(data),
    }


def uniform_rate(tokens, size, vocab_size):
    """Bits per byte if every token is guessed with equal probabilities."""
    return tokens * math.log2(vocab_size) / size

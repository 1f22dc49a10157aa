"""Quantising a checkpoint: calibration texts, the smaller model, what it saves."""

import pathlib
import shutil
import sys
from dataclasses import dataclass

import torch

from lesson import require, setting
from pipeline import checkpoint, corpus
from pipeline.released import QUANTIZED_WEIGHTS
from pipeline.run import training_record
from quantization_coded import SCHEMES, matrix_bytes, quantize_cache, quantize_model

CACHE_HELP = "bits per number of the latent cache, 2 to 8 (default: as in the model)"


def describe_quantization(model):
    stored, before = matrix_bytes(model)
    settings = ", ".join(f"{key} {value}" for key, value in model.quantization.items())
    cache = f"; latent cache in {model.cache_bits} bits" if model.cache_bits else ""
    return (
        f"quantised ({settings}): matrices {before:,} → {stored:,} bytes, "
        f"{stored / before:.4f} of FP32's{cache}"
    )


def calibration_ids(tokenizer, documents, sequences, length, seed):
    """Draws pieces of the documents with a seed: token ids (≤ sequences, length)."""
    ids, _ = corpus.token_stream(tokenizer, documents)
    if len(ids) < length:
        return ids[None]
    pieces = ids[: len(ids) // length * length].view(-1, length)
    generator = torch.Generator().manual_seed(seed)
    return pieces[torch.randperm(len(pieces), generator=generator)[:sequences]]


# %% The command
@dataclass
class QuantizeOptions:
    checkpoint: str = setting(metavar="DIR")
    scheme: str = setting(choices=tuple(SCHEMES))
    out: str = setting(help="directory of the new model", metavar="DIR")
    cache_bits: int | None = setting(None, CACHE_HELP, metavar="N")
    calibration_sequences: int = setting(
        128, "calibration texts, each as long as the context, if the scheme calibrates", metavar="N"
    )
    data: list | None = setting(
        None, "files with the calibration texts (default: the training text)", metavar="FILE"
    )
    seed: int = setting(0, "seed that draws the calibration texts")


def quantize(loaded, options):
    """Writes the checkpoint's quantised copy to --out."""
    model, tokenizer, directory = loaded
    out, count = pathlib.Path(options.out), options.calibration_sequences
    require(not out.exists(), f"--out {out} exists already: choose another")
    require(count >= 1, f"--calibration-sequences={count} must be at least 1")
    calibration = None
    if SCHEMES[options.scheme].method == "nearest":
        require(not options.data,
                f"--data is for schemes that calibrate; {options.scheme} does not")
    else:
        documents = calibration_documents(directory, options.data)
        calibration = calibration_ids(
            tokenizer, documents, count, length=model.max_positions, seed=options.seed
        ).to(model.lm_head.weight.device)
    quantize_cache(model, options.cache_bits)  # the copy inherits it
    quantized = quantize_model(model, options.scheme, calibration)
    with checkpoint.new_directory(out) as fresh:
        quantized.save_pretrained(fresh)
        for name in ("tokenizer.json", "run.json"):
            if (directory / name).is_file():
                shutil.copyfile(directory / name, fresh / name)
    print(describe_quantization(quantized))
    before, after = directory / checkpoint.WEIGHTS, out / QUANTIZED_WEIGHTS
    size = f"{after.stat().st_size:,} bytes"
    if before.is_file():
        size = f"{before.stat().st_size:,} → {size}"
    print(f"{after}: {size} (embedding, head, router and norms stay as before)")


def calibration_documents(directory, data):
    """Returns the training part of --data, or else of the checkpoint's own training text."""
    trained = training_record(directory)
    if not trained and not data:
        print("note: no run.json names the training text, so the standard library is used for "
              "calibration", file=sys.stderr)
    return corpus.load_corpus(data or trained.get("options", {}).get("data")).train

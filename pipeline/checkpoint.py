"""Checkpoint files hold safetensors or JSON, never pickle. A file is complete or absent."""

import contextlib
import hashlib
import json
import os
import pathlib
import shutil

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def write_json(path, content):
    _write_then_rename(
        path,
        lambda temporary: temporary.write_text(json.dumps(content, indent=2), encoding="utf-8"),
    )


def write_tensors(path, tensors):
    """Writes {name: tensor} as safetensors. It copies each, so views and shared memory are fine."""
    copies = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    _write_then_rename(
        path, lambda temporary: save_file(copies, temporary, metadata={"format": "pt"})
    )


def _write_then_rename(path, write):
    path = pathlib.Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    except SafetensorError as error:  # for example, a full disk
        raise OSError(f"{path} cannot be written: {error}") from None
    finally:
        temporary.unlink(missing_ok=True)


def read_json(path):
    """Reads a JSON object. A ValueError names the file if it is missing or holds anything else."""
    try:
        content = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(content).__name__}")
    return content


def tensor_files(directory, weights=WEIGHTS):
    """{tensor name: file} of a checkpoint, which is one file, or several files with an index."""
    directory = pathlib.Path(directory)
    if weights == WEIGHTS and (directory / INDEX).exists():
        weight_map = read_json(directory / INDEX).get("weight_map")
        files = weight_map.values() if isinstance(weight_map, dict) else [None]
        if not all(isinstance(file, str) and pathlib.Path(file).name == file for file in files):
            raise ValueError(f"{directory / INDEX}: weight_map must give each tensor a file name")
        return {name: directory / file for name, file in weight_map.items()}
    if not (directory / weights).exists():
        raise ValueError(f"{directory} is not a checkpoint: it has no {weights}")
    return dict.fromkeys(_open(directory / weights).keys(), directory / weights)


def fingerprint(directory):
    """A hash of a checkpoint's weights."""
    digest = hashlib.sha256()
    for file in sorted(set(tensor_files(directory).values())):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def read_tensors(files):
    """Yields (name, tensor) for {name: file}, one at a time."""
    for file in sorted(set(files.values())):
        reader = _open(file)
        present = set(reader.keys())
        for name in (name for name, where in files.items() if where == file):
            if name not in present:
                raise ValueError(f"{file} does not hold {name}, which the index lists")
            yield name, reader.get_tensor(name)


def _open(file):
    try:
        return safe_open(file, framework="pt")
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file} is not a safetensors file: {error}") from None


@contextlib.contextmanager
def replaced_directory(directory):
    """Yields a new directory to fill. On success, it replaces `directory` as a whole."""
    directory = pathlib.Path(directory)
    fresh, old = (directory.with_name(directory.name + end) for end in (".new", ".old"))
    for leftover in (fresh, old):
        shutil.rmtree(leftover, ignore_errors=True)
    fresh.mkdir(parents=True)
    try:
        yield fresh
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    if directory.exists():
        os.rename(directory, old)
    os.rename(fresh, directory)
    shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def new_directory(directory):
    """Yields a directory with a private name to fill. On success, it is renamed, else deleted."""
    directory = pathlib.Path(directory)
    private = directory.with_name(f".{directory.name}.{os.getpid()}.new")
    private.mkdir(parents=True)
    try:
        yield private
        os.rename(private, directory)
    finally:
        shutil.rmtree(private, ignore_errors=True)


def recover_directory(directory):
    """Finishes the work of a `replaced_directory` that was killed between its two renames."""
    directory = pathlib.Path(directory)
    fresh = directory.with_name(directory.name + ".new")
    old = directory.with_name(directory.name + ".old")
    if not directory.exists() and old.exists():
        os.rename(fresh if fresh.exists() else old, directory)


# The state of a run that is not in the model
def optimizer_tensors(model, optimizers):
    """Returns the optimizers' states as {parameter name/state name: tensor}."""
    return {
        f"{name}/{key}": value
        for optimizer in optimizers
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


STATES = {"AdamW": {"step", "exp_avg", "exp_avg_sq"}, "Muon": {"momentum_buffer"}}


def restore_optimizers(model, optimizers, tensors):
    """Restores the states of `optimizer_tensors`, given as pairs of name and tensor.

    A parameter must have exactly the states that its optimizer (AdamW or Muon) keeps, and moments
    must have the shape of the parameter. Otherwise, it raises ValueError. MTP modules may have no
    states if they have not been trained yet.
    """
    parameters, found = dict(model.named_parameters()), {}
    owners = {p: o for o in optimizers for group in o.param_groups for p in group["params"]}
    for full_name, value in tensors:
        name, _, key = full_name.rpartition("/")
        parameter = parameters.get(name)
        if parameter not in owners or value.shape not in ((), parameter.shape):
            raise ValueError(f"optimizer state {full_name} {tuple(value.shape)} fits no parameter")
        owners[parameter].state[parameter][key] = value.to(parameter.device)
        found.setdefault(name, set()).add(key)
    begun = any(name.startswith("mtp.") for name in found)
    for name, parameter in parameters.items():
        if parameter not in owners or (name.startswith("mtp.") and not begun):
            continue
        kind = type(owners[parameter]).__name__
        if found.get(name) != STATES[kind]:
            raise ValueError(
                f"the optimizer state of {name} is incomplete or not {kind}'s: "
                "the run cannot go on from it"
            )

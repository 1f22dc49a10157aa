"""Checkpoint files: complete or absent, never unpickled; the optimizers' state."""

import json
import os

import pytest
import torch
from safetensors import SafetensorError, safe_open

from pipeline import checkpoint


def test_tensors_and_json_round_trip_and_leave_no_temporary_files(tmp_path):
    shared = torch.arange(6.0).view(2, 3)
    tensors = {"a": shared, "b": shared.T, "c": shared, "d": torch.nn.Parameter(shared)}
    checkpoint.write_tensors(tmp_path / "model.safetensors", tensors)
    read = dict(checkpoint.read_tensors(checkpoint.tensor_files(tmp_path)))
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}  # transformers reads no others
    checkpoint.write_json(tmp_path / "x.json", {"a": 1})
    assert checkpoint.read_json(tmp_path / "x.json") == {"a": 1}
    assert sorted(os.listdir(tmp_path)) == ["model.safetensors", "x.json"]


def test_a_failed_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "x.json"
    checkpoint.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        checkpoint.write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1} and os.listdir(tmp_path) == ["x.json"]


def test_a_full_disk_is_an_error_of_the_system_and_leaves_nothing(tmp_path, monkeypatch):
    def full(tensors, path, metadata):
        path.write_text("half of it")
        raise SafetensorError("no space left")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match=r"x\.safetensors cannot be written: no space left"):
        checkpoint.write_tensors(tmp_path / "x.safetensors", {"a": torch.ones(1)})
    assert not os.listdir(tmp_path)


def test_sharded_checkpoints_are_read(tmp_path):
    checkpoint.write_tensors(tmp_path / "one.safetensors", {"a": torch.ones(2)})
    checkpoint.write_tensors(tmp_path / "two.safetensors", {"b": torch.zeros(3)})
    weight_map = {"a": "one.safetensors", "b": "two.safetensors"}
    checkpoint.write_json(tmp_path / checkpoint.INDEX, {"weight_map": weight_map})
    read = dict(checkpoint.read_tensors(checkpoint.tensor_files(tmp_path)))
    assert set(read) == {"a", "b"} and torch.equal(read["b"], torch.zeros(3))
    checkpoint.write_json(tmp_path / checkpoint.INDEX, {"weight_map": {"c": "one.safetensors"}})
    with pytest.raises(ValueError, match="does not hold c, which the index lists"):
        list(checkpoint.read_tensors(checkpoint.tensor_files(tmp_path)))
    for wrong in ([], {"a": "one.safetensors", "b": 1}, {"a": "../one.safetensors"}, None):
        checkpoint.write_json(tmp_path / checkpoint.INDEX, {"weight_map": wrong})
        with pytest.raises(ValueError, match="must give each tensor a file name"):
            checkpoint.tensor_files(tmp_path)


def test_the_fingerprint_is_that_of_all_weights(tmp_path):
    def written(name, value):
        checkpoint.write_tensors(tmp_path / name, {name[0]: torch.full((2,), value)})
        return checkpoint.fingerprint(tmp_path)

    weight_map = {"a": "a.safetensors", "b": "b.safetensors", "bb": "b.safetensors"}
    checkpoint.write_json(tmp_path / checkpoint.INDEX, {"weight_map": weight_map})
    checkpoint.write_tensors(tmp_path / "a.safetensors", {})
    prints = [written(*each) for each in (
        ("b.safetensors", 1.0), ("a.safetensors", 1.0), ("a.safetensors", 2.0),
        ("b.safetensors", 2.0), ("b.safetensors", 1.0), ("a.safetensors", 1.0),
    )]
    assert prints[1] == prints[5] and prints[2] == prints[4] and len(set(prints)) == 4
    assert all(len(each) == 16 for each in prints)


def test_the_index_is_that_of_the_released_weights_only(tmp_path):
    checkpoint.write_tensors(tmp_path / "other.safetensors", {"b": torch.zeros(3)})
    checkpoint.write_json(tmp_path / checkpoint.INDEX, {"weight_map": {"a": "one.safetensors"}})
    assert list(checkpoint.tensor_files(tmp_path, "other.safetensors")) == ["b"]
    with pytest.raises(ValueError, match=r"it has no more\.safetensors"):
        checkpoint.tensor_files(tmp_path, "more.safetensors")


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
    }
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


def test_mtp_modules_have_no_state_before_they_are_trained_and_all_of_it_then():
    model = torch.nn.ModuleDict({"head": torch.nn.Linear(2, 3), "mtp": torch.nn.Linear(2, 3)})
    optimizers = [torch.optim.AdamW(model.parameters())]
    for trained in (["head"], ["head", "mtp"]):
        for name in trained:
            model[name](torch.ones(1, 2)).sum().backward()
        optimizers[0].step()
        state = checkpoint.optimizer_tensors(model, optimizers)
        assert {name.split(".")[0] for name in state} == set(trained)
        fresh = [torch.optim.AdamW(model.parameters())]
        checkpoint.restore_optimizers(model, fresh, state.items())
        assert checkpoint.optimizer_tensors(model, fresh).keys() == state.keys()
    half = {name: value for name, value in state.items() if not name.startswith("mtp.bias")}
    with pytest.raises(ValueError, match=r"mtp\.bias is incomplete"):
        checkpoint.restore_optimizers(model, [torch.optim.AdamW(model.parameters())], half.items())


def test_unreadable_files_are_named(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"not tensors")
    with pytest.raises(ValueError, match="is not a safetensors file"):
        checkpoint.tensor_files(tmp_path)
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(ValueError, match=r"x\.json is not JSON"):
        checkpoint.read_json(tmp_path / "x.json")
    (tmp_path / "x.json").write_text("[1]")
    with pytest.raises(ValueError, match="must hold a JSON object, got list"):
        checkpoint.read_json(tmp_path / "x.json")
    with pytest.raises(ValueError, match="cannot be read"):
        checkpoint.read_json(tmp_path / "y.json")


def test_directory_is_replaced_as_a_whole_or_not_at_all(tmp_path):
    target = tmp_path / "deep" / "checkpoint"
    for content in ("first", "second"):
        with checkpoint.replaced_directory(target) as fresh:
            (fresh / "file").write_text(content)
        assert (target / "file").read_text() == content
        assert os.listdir(target.parent) == ["checkpoint"]
    with pytest.raises(RuntimeError), checkpoint.replaced_directory(target) as fresh:
        (fresh / "file").write_text("half")
        raise RuntimeError
    assert (target / "file").read_text() == "second"
    assert os.listdir(target.parent) == ["checkpoint"]


def test_what_a_killed_replacement_left_is_in_nobodys_way(tmp_path):
    target = tmp_path / "deep" / "checkpoint"
    for end in (".new", ".old"):
        (tmp_path / "deep" / f"checkpoint{end}" / "half").mkdir(parents=True)
    with checkpoint.replaced_directory(target) as fresh:
        (fresh / "file").write_text("whole")
    assert os.listdir(target) == ["file"] and os.listdir(target.parent) == ["checkpoint"]


def test_a_new_directory_is_whole_or_absent(tmp_path):
    target = tmp_path / "deep" / "model"
    with pytest.raises(RuntimeError), checkpoint.new_directory(target) as fresh:
        (fresh / "file").write_text("half")
        raise RuntimeError
    assert not os.listdir(target.parent)
    with checkpoint.new_directory(target) as fresh:
        (fresh / "file").write_text("whole")
        assert not target.exists()
    assert os.listdir(target) == ["file"] and os.listdir(target.parent) == ["model"]


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
    checkpoint.recover_directory(tmp_path / "absent")  # nothing to do
    (tmp_path / "other.old").mkdir()  # killed after both renames
    checkpoint.recover_directory(tmp_path / "other")
    assert os.listdir(tmp_path / "other") == ["file"]


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

"""Released checkpoints, with their tensor names and settings, and our layout of quantised models.

A model is not stored as it is in memory. In memory, one tensor holds the matrices of all experts,
and one holds gate and up projections. In files, each matrix is a tensor of its own. Phase 10's
classes inherit from `ReleasedConfig` and `ReleasedModel`. The other functions take the model as an
argument, or its class to load one.
"""

import pathlib
import re
import sys
import warnings
from dataclasses import MISSING, asdict, fields
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.utils import parametrize

from lesson import check_settings, require
from pipeline import checkpoint, corpus, decoding
from pipeline.fast import speed_up
from quantization_coded import Scheme, empty_layer, linears_of, listed_experts, quantize_cache
from rope_coded import YarnScaling

QUANT_METHOD = "quantization_coded"
QUANTIZED_WEIGHTS = "quantized.safetensors"  # other programs do not look for this name


# %% The settings in config.json
def spelled_as_released(raw):
    """A config.json's content with rotary settings as released. Refuses what no model has."""
    raw = dict(raw)
    rope = raw.pop("rope_parameters", None)
    require(rope is None or isinstance(rope, dict), f"rope_parameters={rope!r} must be an object")
    if rope is not None:  # transformers' spelling
        rope = {key: value for key, value in rope.items() if value is not None}
        raw["rope_theta"] = rope.pop("rope_theta", 10000.0)
        kind = rope.pop("rope_type", rope.pop("type", "default"))
        raw["rope_scaling"] = None if kind == "default" else {"type": kind, **rope}
    require(raw.get("rope_interleave") is not False,
            "rope_interleave=False is not supported: released models rotate neighbouring pairs")
    require(not raw.get("mlp_bias"), "mlp_bias=True is not supported: no released model has it")
    for name in ("n_group", "topk_group"):
        if raw.get(name, 1) is None:
            raw[name] = 1
    return raw


def yarn_scaling(rope_scaling):
    """The `YarnScaling` that a config.json's rope_scaling describes, or None."""
    if rope_scaling is None:
        return None
    settings = dict(rope_scaling)
    kind = settings.pop("type", settings.pop("rope_type", None))
    require(kind == "yarn", f"rope_scaling type={kind!r} is not supported, want 'yarn'")
    known = {field.name for field in fields(YarnScaling)}
    unknown = sorted(set(settings) - known)
    missing = sorted({"factor", "original_max_position_embeddings"} - set(settings))
    require(not unknown and not missing,
            f"rope_scaling has unknown fields {unknown} and lacks {missing}")
    settings = {key: value for key, value in settings.items() if value is not None}
    for key, value in settings.items():
        require(type(value) in (int, float), f"rope_scaling {key}={value!r} must be a number")
    return YarnScaling(**settings)


# The settings that depend on `model_type`. The first value is used if the file gives none.
ROUTING = {
    "deepseek_v2": {
        "scoring_func": ("softmax",),
        "topk_method": ("greedy", "group_limited_greedy"),
        "norm_topk_prob": (False, True),
    },
    "deepseek_v3": {
        "scoring_func": ("sigmoid",),
        "topk_method": ("noaux_tc",),
        "norm_topk_prob": (True, False),
    },
}
# The settings that are the same in all released models.
ALWAYS = {"hidden_act": ("silu",), "tie_word_embeddings": (False,), "attention_dropout": (0.0,)}
ARCHITECTURES = {"deepseek_v2": "DeepseekV2ForCausalLM", "deepseek_v3": "DeepseekV3ForCausalLM"}


class ReleasedConfig:
    """The base class of a configuration: it checks, reads and writes the fields of a config.json.

    Raises ValueError for a combination that no released model has.
    """

    def __post_init__(self):
        kind = self.model_type
        require(kind in ROUTING,
                f"model_type={kind!r} is not supported, want deepseek_v2 or deepseek_v3")
        for name, values in ROUTING[kind].items():
            if getattr(self, name) is None:
                setattr(self, name, values[0])
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        check_settings(self, types=True)
        for name, values in {**ROUTING[kind], **ALWAYS}.items():
            value, wanted = getattr(self, name), " or ".join(map(repr, values))
            require(value in values,
                    f"{name}={value!r} is not supported for {kind}, want {wanted}")
        rotary = self.qk_rope_head_dim
        require(rotary % 2 == 0, f"qk_rope_head_dim={rotary} must be even: it rotates pairs")
        self.yarn  # noqa: B018 - a wrong rope_scaling raises its error here

    @property
    def yarn(self):
        """The `YarnScaling` that rope_scaling describes, or None."""
        return yarn_scaling(self.rope_scaling)

    @classmethod
    def from_dict(cls, raw):
        """Takes the content of a config.json. Ignores fields that do not shape the model."""
        raw, known = spelled_as_released(raw), fields(cls)
        missing = [f.name for f in known if f.default is MISSING and raw.get(f.name) is None]
        missing += ["model_type"] if "model_type" not in raw else []
        require(not missing, f"the configuration lacks {', '.join(missing)}")
        return cls(**{field.name: raw[field.name] for field in known if field.name in raw})

    @classmethod
    def from_file(cls, path):
        """Reads a config.json. A ValueError names the file and says what is wrong."""
        raw = checkpoint.read_json(path)
        try:
            return cls.from_dict(raw)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def to_dict(self):
        """The content of a config.json in the released spelling."""
        values = {key: value for key, value in asdict(self).items() if value is not None}
        # These are written even as null, because a reader's own default may differ.
        explicit = ("q_lora_rank", "rope_scaling", "bos_token_id", "eos_token_id", "pad_token_id")
        return {
            "architectures": [ARCHITECTURES[self.model_type]],
            **values,
            **{key: getattr(self, key) for key in explicit},
            "torch_dtype": "float32",
        }


# %% The names of tensors
def released_tensors(model):
    """{released name: tensor} of all parameters and stored buffers, as views of their memory."""
    tensors = {
        "model.embed_tokens.weight": model.embed_tokens.weight,
        "model.norm.weight": model.norm.weight,
        "lm_head.weight": model.lm_head.weight,
    }
    for i, block in enumerate(model.layers):
        tensors |= block_tensors(f"model.layers.{i}", block)
    for k, predictor in enumerate(model.mtp):
        prefix = f"model.layers.{len(model.layers) + k}"
        tensors |= block_tensors(prefix, predictor.block)
        for name in ("enorm", "hnorm", "eh_proj"):
            tensors[f"{prefix}.{name}.weight"] = getattr(predictor, name).weight
        tensors[f"{prefix}.shared_head.norm.weight"] = predictor.norm.weight
    return tensors


def block_tensors(prefix, block):
    """The tensors of one layer. Each expert and half of gate_up_proj is a tensor of its own."""
    tensors = {}
    for name, tensor in block.state_dict().items():
        apart = {name: tensor}
        # Phase 8 may have put each expert's matrix in a layer of its own.
        listed = re.fullmatch(r"mlp\.experts\.(\w+)\.(\d+)\.weight", name)
        if listed:
            apart = {f"mlp.experts.{listed[2]}.{listed[1]}.weight": tensor}
        elif name.startswith("mlp.experts."):
            part = name.removeprefix("mlp.experts.")
            apart = {f"mlp.experts.{e}.{part}.weight": one for e, one in enumerate(tensor)}
        for name, tensor in apart.items():
            if name.endswith(".gate_up_proj.weight"):
                for part, half in zip(("gate_proj", "up_proj"), tensor.chunk(2), strict=True):
                    tensors[f"{prefix}.{name.replace('gate_up_proj', part)}"] = half
            else:
                tensors[f"{prefix}.{name}"] = tensor
    return tensors


def mtp_copies(model):
    """The copies of embedding and head that released files store with each MTP layer."""
    copies = {}
    for k in range(len(model.mtp)):
        prefix = f"model.layers.{len(model.layers) + k}"
        copies[f"{prefix}.embed_tokens.weight"] = model.embed_tokens.weight
        copies[f"{prefix}.shared_head.head.weight"] = model.lm_head.weight
    return copies


def quantized_tensors(model):
    """The state of a quantised model by its own names. Tensors shared with MTP are in it once."""
    mtp = range(len(model.mtp))
    shared = tuple(f"mtp.{k}.{part}." for k in mtp for part in ("embedding", "head"))
    state = model.state_dict()
    return {name: tensor for name, tensor in state.items() if not name.startswith(shared)}


# %% Saving
def save(model, directory):
    """Does the work of `ReleasedModel.save_pretrained`."""
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    require(not any(map(parametrize.is_parametrized, model.modules())),
            "the model is prepared for QAT: convert it by convert_qat before you save it")
    content, name = model.config.to_dict(), checkpoint.WEIGHTS
    if model.quantization is None:
        tensors = {**released_tensors(model), **mtp_copies(model)}
    else:
        tensors, name = quantized_tensors(model), QUANTIZED_WEIGHTS
        content["quantization_config"] = {
            "quant_method": QUANT_METHOD, **model.quantization, "cache_bits": model.cache_bits,
        }
    checkpoint.write_tensors(directory / name, tensors)
    checkpoint.write_json(directory / "config.json", content)


# %% Loading
def load(model_class, directory):
    """Does the work of `ReleasedModel.from_pretrained`."""
    directory = pathlib.Path(directory)
    require((directory / "config.json").is_file(),
            f"{directory} is not a checkpoint: it has no config.json")
    config = model_class.config_class.from_file(directory / "config.json")
    if config.quantization_config is not None:
        return load_quantized(model_class, config, directory)
    files = {
        name: file for name, file in checkpoint.tensor_files(directory).items()
        if not name.endswith("rotary_emb.inv_freq")  # old files store this table; we compute it
    }
    layers = range(config.num_hidden_layers,
                   config.num_hidden_layers + config.num_nextn_predict_layers)
    mtp_prefixes = tuple(f"model.layers.{i}." for i in layers)
    if mtp_prefixes and not any(name.startswith(mtp_prefixes) for name in files):
        warnings.warn(f"{directory} holds no MTP tensors: loaded without MTP", stacklevel=3)
        config.num_nextn_predict_layers = 0
    model = model_class(config)
    fill_from_files(model, files, directory)
    return model


@torch.no_grad()
def fill_from_files(model, files, directory):
    """Copies the tensors of {name: file} into the model. Names and shapes must be the model's."""
    wanted, copies = released_tensors(model), mtp_copies(model)
    check_names(files, wanted, directory, optional=copies)
    for name, tensor in fitting_tensors(files, wanted, directory):
        wanted[name].copy_(tensor)
    for name, tensor in fitting_tensors(files, copies, directory):
        require(torch.equal(tensor.to(copies[name].dtype), copies[name].cpu()),
                f"{directory}: {name} differs from the main model's tensor: it must be a copy")


def check_names(files, wanted, directory, optional=()):
    """ValueError if {name: file} lacks a wanted tensor, or has one that is not even optional."""
    missing, extra = wanted.keys() - files.keys(), files.keys() - wanted.keys() - set(optional)
    for problem, names in (("lacks", missing), ("holds unexpected", extra)):
        some = ", ".join(sorted(names)[:3])
        require(not names, f"{directory} {problem} {len(names)} tensors: {some}, …")


def fitting_tensors(files, targets, directory):
    """Yields (name, tensor) for each target in the files. ValueError if the shapes differ."""
    for name, tensor in checkpoint.read_tensors({n: f for n, f in files.items() if n in targets}):
        shape, wanted = tuple(tensor.shape), tuple(targets[name].shape)
        require(shape == wanted, f"{directory}: {name} has shape {shape}, want {wanted}")
        yield name, tensor


def load_quantized(model_class, config, directory):
    """Loads a model that `save` wrote after `quantize_model`."""
    settings, where = dict(config.quantization_config), f"{directory} is quantised"
    method = settings.pop("quant_method", None)
    require(method == QUANT_METHOD, f"{where} ({method}): only {QUANT_METHOD} can be loaded")
    try:
        cache_bits, scheme = settings.pop("cache_bits"), Scheme(**settings)
        config.quantization_config = None
        model = quantize_cache(quantized_skeleton(model_class(config), scheme), cache_bits)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{where}, but its quantization_config is damaged: {error}") from None
    files = checkpoint.tensor_files(directory, QUANTIZED_WEIGHTS)
    wanted = quantized_tensors(model)
    check_names(files, wanted, directory)
    state = dict(fitting_tensors(files, wanted, directory))
    for name, tensor in state.items():  # weights may have another precision, codes may not
        held, got = wanted[name].dtype, tensor.dtype
        require(got == held or name.endswith((".weight", ".bias", "correction_bias")),
                f"{directory}: {name} is {got}, want {held}")
    model.load_state_dict(state, strict=False)  # MTP's shared parts are not stored twice
    return model.prepared()


def quantized_skeleton(model, scheme):
    """Puts empty layers where `quantize_model` puts full ones. Files can then fill them."""
    for block in listed_experts(model).blocks():
        for name, linear in linears_of(block).items():
            block.set_submodule(name, empty_layer(linear, scheme, name))
    model.quantization = asdict(scheme)
    return model.eval().requires_grad_(False)


# %% The model around it
class ReleasedModel:
    """Adds faster layers, faster decoding and files to a `CausalLM`.

    A subclass sets `config_class`, a subclass of `ReleasedConfig`. Its `__init__` stores its own
    configuration as `config`, and calls `prepared()` at the end.
    """

    config_class = None
    quantization = cache_bits = None  # phase 8 stores its settings here

    def prepared(self):
        """Gives the model faster layers, and returns it: see pipeline/fast."""
        return speed_up(self)

    def complete(self, input_ids, max_new_tokens, sampling, **options):
        """A faster `CausalLM.complete`, with drafts and streams: see pipeline/decoding.

        So `generate` also takes `speculative`, `depth`, `prefill_chunk` and `stream`.
        """
        return decoding.complete(self, input_ids, max_new_tokens, sampling, **options)

    @classmethod
    def from_pretrained(cls, directory):
        """Reads a model in FP32 from the released layout, or a quantised model from our own.

        If a checkpoint has no MTP tensors at all, it loads without MTP and warns. Raises ValueError
        for missing, extra or mis-shaped tensors, an unsupported configuration or no checkpoint.
        """
        return load(cls, directory)

    def save_pretrained(self, directory):
        """Writes config.json and model.safetensors in the released layout.

        A quantised model has a layout of its own, with the codes and scales of its layers.
        """
        save(self, directory)


# %% A model with its tokenizer
class Loaded(NamedTuple):
    model: nn.Module
    tokenizer: object
    directory: pathlib.Path


def load_with_tokenizer(model_class, directory, device):
    """Loads the checkpoint in a directory, or the one in the directory of a run."""
    directory = pathlib.Path(directory)
    if not (directory / "config.json").exists() and (directory / "checkpoint").is_dir():
        directory = directory / "checkpoint"
    checkpoint.recover_directory(directory)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = model_class.from_pretrained(directory).to(device).eval()
    for warning in caught:
        print(f"note: {warning.message}", file=sys.stderr)
    tokenizer = corpus.load_tokenizer(directory / "tokenizer.json")
    entries, known = tokenizer.get_vocab_size(), model.config.vocab_size
    require(entries <= known,
            f"{directory}: the tokenizer has {entries} entries, the model only {known}")
    require(tokenizer.token_to_id(corpus.SEPARATOR) is not None,
            f"{directory}: the tokenizer has no {corpus.SEPARATOR}")
    return Loaded(model, tokenizer, directory)

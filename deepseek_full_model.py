"""Phase 10: the complete model. All phases composed, trained on real text, scored and generating.

Each layer is phase 5's block around phase 7's attention: latent KV cache, decoupled rotary
positions. The first layers have a dense feed-forward, the others shared and routed experts whose
balance is kept by a bias. One multi-token prediction module learns a token further ahead and
drafts for speculative decoding. A model is described by the fields of the released config.json
and stored in the released layout, so transformers reads what this script writes, and back.

    h = Emb(t);   per layer: h += RotaryMLA(RMSNorm(h)), h += MoE(RMSNorm(h));   Head(RMSNorm(h))
    L = L_next + λ L_mtp + L_balance;   after each step  b_i ± γ  for the routing bias

Papers: DeepSeek-V2 (2024), DeepSeek-V3 (2024). Attention, MoE, MTP and RoPE: phases 4 to 7.
Simplified: one device; documents packed without attention masks between them.

Dimensions: B batch · T query positions · D model width · E routed experts · A active experts per
token · W vocabulary.

Run:  python deepseek_full_model.py                    train, score, draw, generate, align: ~9 min
      python deepseek_full_model.py --steps 20         the same as a smoke test, under a minute
      python deepseek_full_model.py train --data my.txt --minutes 10 --out runs/mine
      python deepseek_full_model.py train --resume runs/mine
      python deepseek_full_model.py evaluate --checkpoint runs/mine/checkpoint
      python deepseek_full_model.py generate --checkpoint runs/mine/checkpoint --prompt "def "
      python deepseek_full_model.py quantize --checkpoint runs/mine --scheme int4 --out runs/int4
      python deepseek_full_model.py align --checkpoint runs/mine --out runs/aligned
"""

import argparse
import collections
import functools
import math
import pathlib
import re
import shutil
import sys
import time
import types
import warnings
from dataclasses import MISSING, asdict, dataclass, fields

import torch
from torch import nn
from torch.nn.utils import parametrize

from grpo_coded import VARIANTS, GRPOTrainer, Settings, draw_run, roll_out
from lesson import one_line_errors, parse_arguments
from mla_coded import cache_elements_per_token
from moe_coded import (
    MixtureOfExperts,
    SwiGLU,
    TopKRouter,
    TransformerBlock,
    balance_over_batch,
    balance_within_sequences,
    expert_counts,
)
from mtp_coded import CausalLM, speculative_generate
from pipeline import checkpoint, compiler, corpus
from pipeline.loop import Budget, State, learning_rate, read_metrics, run_steps
from quantization_coded import (
    SCHEMES,
    Scheme,
    matrix_bytes,
    quantize_cache,
    quantize_model,
    quantized_skeleton,
)
from rope_coded import RotaryEmbedding, RotaryLatentAttention, YarnScaling

HERE = pathlib.Path(__file__).parent


# %% The configuration: the fields of config.json
@dataclass
class DeepSeekConfig:
    """Fields as in the released config.json. `model_type` decides what V2 and V3 do differently.

    `from_file` and `from_dict` read both spellings of the rotary settings and fill in what
    transformers leaves out. Raises ValueError for a combination that no released model has.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    moe_intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    n_routed_experts: int
    num_experts_per_tok: int
    model_type: str = "deepseek_v3"
    num_key_value_heads: int | None = None
    q_lora_rank: int | None = None
    n_shared_experts: int = 1
    first_k_dense_replace: int = 0
    moe_layer_freq: int = 1
    n_group: int = 1
    topk_group: int = 1
    topk_method: str | None = None
    scoring_func: str | None = None
    norm_topk_prob: bool | None = None
    routed_scaling_factor: float = 1.0
    aux_loss_alpha: float = 0.001
    seq_aux: bool = True
    num_nextn_predict_layers: int = 0
    max_position_embeddings: int = 4096
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    hidden_act: str = "silu"
    attention_bias: bool = False
    attention_dropout: float = 0.0
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None
    quantization_config: dict | None = None

    def __post_init__(self):
        v3 = self.model_type == "deepseek_v3"
        if not v3 and self.model_type != "deepseek_v2":
            raise ValueError(
                f"model_type={self.model_type!r} is not supported, want deepseek_v2 or deepseek_v3"
            )
        # transformers' config.json omits what its classes imply.
        if self.scoring_func is None:
            self.scoring_func = "sigmoid" if v3 else "softmax"
        if self.topk_method is None:
            self.topk_method = "noaux_tc" if v3 else "greedy"
        if self.norm_topk_prob is None:
            self.norm_topk_prob = v3
        if self.num_key_value_heads is None:  # latent attention has none: without effect
            self.num_key_value_heads = self.num_attention_heads
        self._check_types()
        self._check_only_supported("scoring_func", "sigmoid" if v3 else "softmax")
        methods = ("noaux_tc",) if v3 else ("greedy", "group_limited_greedy")
        self._check_only_supported("topk_method", *methods)
        self._check_only_supported("hidden_act", "silu")
        self._check_only_supported("tie_word_embeddings", False)
        self._check_only_supported("attention_dropout", 0.0)
        if self.qk_rope_head_dim % 2:
            raise ValueError(
                f"qk_rope_head_dim={self.qk_rope_head_dim} must be even: it rotates pairs"
            )
        self.yarn  # noqa: B018 - wrong rope_scaling is reported here

    def _check_types(self):
        may_be_zero = {"n_shared_experts", "first_k_dense_replace", "num_nextn_predict_layers"}
        may_be_zero |= {"aux_loss_alpha", "initializer_range", "attention_dropout"}
        not_sizes = {"bos_token_id", "eos_token_id", "pad_token_id"}
        for field in fields(self):
            name, value = field.name, getattr(self, field.name)
            optional = isinstance(field.type, types.UnionType) and value is None
            if optional or name in not_sizes:
                continue
            lowest = 0 if name in may_be_zero else 1
            if field.type in (int, int | None) and (type(value) is not int or value < lowest):
                raise ValueError(f"{name}={value!r} must be an integer of at least {lowest}")
            if field.type is float:
                number = type(value) in (int, float) and math.isfinite(value)
                if not number or value < 0 or (value == 0 and name not in may_be_zero):
                    raise ValueError(f"{name}={value!r} must be a number above 0")
            if field.type in (bool, bool | None) and type(value) is not bool:
                raise ValueError(f"{name}={value!r} must be true or false")
            if field.type == dict | None and not isinstance(value, dict):
                raise ValueError(f"{name}={value!r} must be an object")

    def _check_only_supported(self, name, *supported):
        value = getattr(self, name)
        if value not in supported:
            wanted = " or ".join(map(repr, supported))
            raise ValueError(
                f"{name}={value!r} is not supported for {self.model_type}, want {wanted}"
            )

    @property
    def yarn(self):
        """The `YarnScaling` that rope_scaling describes, or None."""
        if self.rope_scaling is None:
            return None
        settings = dict(self.rope_scaling)
        kind = settings.pop("type", settings.pop("rope_type", None))
        if kind != "yarn":
            raise ValueError(f"rope_scaling type={kind!r} is not supported, want 'yarn'")
        known = {field.name for field in fields(YarnScaling)}
        unknown = sorted(set(settings) - known)
        missing = sorted({"factor", "original_max_position_embeddings"} - set(settings))
        if unknown or missing:
            raise ValueError(f"rope_scaling has unknown fields {unknown} and lacks {missing}")
        settings = {key: value for key, value in settings.items() if value is not None}
        for key, value in settings.items():
            if type(value) not in (int, float):
                raise ValueError(f"rope_scaling {key}={value!r} must be a number")
        return YarnScaling(**settings)

    @classmethod
    def from_dict(cls, raw):
        """From the content of a config.json; fields that do not shape the model are ignored."""
        raw = dict(raw)
        rope = raw.pop("rope_parameters", None)
        if rope is not None and not isinstance(rope, dict):
            raise ValueError(f"rope_parameters={rope!r} must be an object")
        if rope is not None:  # transformers' spelling
            rope = {key: value for key, value in rope.items() if value is not None}
            raw["rope_theta"] = rope.pop("rope_theta", 10000.0)
            kind = rope.pop("rope_type", rope.pop("type", "default"))
            raw["rope_scaling"] = None if kind == "default" else {"type": kind, **rope}
        if raw.get("rope_interleave") is False:
            raise ValueError(
                "rope_interleave=False is not supported: released weights rotate pairs"
            )
        if raw.get("mlp_bias"):
            raise ValueError("mlp_bias=True is not supported: no released model has it")
        for name in ("n_group", "topk_group"):
            if raw.get(name, 1) is None:
                raw[name] = 1
        known = {field.name for field in fields(cls)}
        kept = {key: value for key, value in raw.items() if key in known}
        required = [field.name for field in fields(cls) if field.default is MISSING]
        missing = [name for name in required if kept.get(name) is None]
        if "model_type" not in raw:
            missing.append("model_type")
        if missing:
            raise ValueError(f"the configuration lacks {', '.join(missing)}")
        return cls(**kept)

    @classmethod
    def from_file(cls, path):
        """Reads a config.json. ValueError naming the file if it is none."""
        raw = checkpoint.read_json(path)
        try:
            return cls.from_dict(raw)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def to_dict(self):
        """The content of a config.json in the released spelling."""
        name = {"deepseek_v2": "DeepseekV2ForCausalLM", "deepseek_v3": "DeepseekV3ForCausalLM"}
        values = {key: value for key, value in asdict(self).items() if value is not None}
        # null where a reader's own default would differ
        explicit = ("q_lora_rank", "rope_scaling", "bos_token_id", "eos_token_id", "pad_token_id")
        return {
            "architectures": [name[self.model_type]],
            **values,
            **{key: getattr(self, key) for key in explicit},
            "torch_dtype": "float32",
        }

    def is_moe_layer(self, index):
        return index >= self.first_k_dense_replace and index % self.moe_layer_freq == 0


# %% The model
class DeepSeekModel(CausalLM):
    """DeepSeek-V2 or V3 by its configuration: `CausalLM` with rotary MLA, experts and MTP modules.

    `model(input_ids)` (B, T) → logits (B, T, W). `generate`, `hidden_states` and `mtp_logits` are
    those of `CausalLM`. Build it under `torch.device("meta")` to count without memory.
    """

    quantization = cache_bits = None  # phase 8 says here what it did

    def __init__(self, config):
        rotary = RotaryEmbedding(config.qk_rope_head_dim, config.rope_theta, config.yarn)
        layers = range(config.num_hidden_layers)
        super().__init__(
            config.vocab_size,
            config.hidden_size,
            blocks=[build_block(config, rotary, config.is_moe_layer(i)) for i in layers],
            mtp_blocks=[
                build_block(config, rotary, moe=True)
                for _ in range(config.num_nextn_predict_layers)
            ],
            norm_eps=config.rms_norm_eps,
            max_positions=config.max_position_embeddings,
        )
        self.config = config
        self.init_weights(config.initializer_range)

    def moe_layers(self):
        """{name: MixtureOfExperts} of all layers that have experts, MTP modules included."""
        blocks = {f"layer {i}": block for i, block in enumerate(self.layers)}
        blocks |= {f"MTP {k}": predictor.block for k, predictor in enumerate(self.mtp, start=1)}
        return {
            name: block.mlp for name, block in blocks.items()
            if isinstance(block.mlp, MixtureOfExperts)
        }  # fmt: skip

    @classmethod
    def from_pretrained(cls, directory):
        """Reads config.json and safetensors in the released layout, in FP32, or a quantised model.

        A checkpoint without any MTP tensors loads without MTP and warns. Raises: ValueError for
        missing, extra or mis-shaped tensors, unsupported configurations, or no checkpoint.
        """
        directory = pathlib.Path(directory)
        if not (directory / "config.json").is_file():
            raise ValueError(f"{directory} is no checkpoint: it has no config.json")
        config = DeepSeekConfig.from_file(directory / "config.json")
        if config.quantization_config is not None:
            return load_quantized(config, directory)
        files = {
            name: file for name, file in checkpoint.tensor_files(directory).items()
            if not name.endswith("rotary_emb.inv_freq")  # a table that old files carry along
        }  # fmt: skip
        mtp_prefixes = tuple(
            f"model.layers.{config.num_hidden_layers + k}."
            for k in range(config.num_nextn_predict_layers)
        )
        if mtp_prefixes and not any(name.startswith(mtp_prefixes) for name in files):
            warnings.warn(f"{directory} holds no MTP tensors: loaded without MTP", stacklevel=2)
            config.num_nextn_predict_layers = 0
        model = cls(config)
        fill_from_files(model, files, directory)
        return model

    def save_pretrained(self, directory):
        """Writes config.json and model.safetensors in the released layout.

        A quantised model goes to a layout of its own: every integer layer's codes and scales.
        """
        directory = pathlib.Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        content, name = self.config.to_dict(), checkpoint.WEIGHTS
        if any(map(parametrize.is_parametrized, self.modules())):
            raise ValueError("the model is prepared for QAT: save what convert_qat makes of it")
        if self.quantization is None:
            tensors = {**released_tensors(self), **mtp_copies(self)}
        else:
            tensors, name = quantized_tensors(self), QUANTIZED_WEIGHTS
            content["quantization_config"] = {
                "quant_method": QUANT_METHOD, **self.quantization, "cache_bits": self.cache_bits
            }  # fmt: skip
        checkpoint.write_tensors(directory / name, tensors)
        checkpoint.write_json(directory / "config.json", content)


def build_block(config, rotary, moe):
    """One layer: rotary latent attention, then experts (`moe`) or a dense feed-forward."""
    attention = RotaryLatentAttention(
        config.hidden_size, config.num_attention_heads, config.kv_lora_rank,
        config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim,
        config.q_lora_rank, config.attention_bias, rotary=rotary,
    )  # fmt: skip
    if not moe:
        feed_forward = SwiGLU(config.hidden_size, config.intermediate_size)
        return TransformerBlock(attention, feed_forward, config.rms_norm_eps)
    router = TopKRouter(
        config.hidden_size, config.n_routed_experts, config.num_experts_per_tok,
        config.scoring_func, config.topk_method, config.n_group, config.topk_group,
        config.norm_topk_prob, config.routed_scaling_factor,
    )  # fmt: skip
    balance = balance_within_sequences if config.seq_aux else balance_over_batch
    experts = MixtureOfExperts(
        config.hidden_size, config.moe_intermediate_size, router, config.n_shared_experts,
        functools.partial(balance, config.aux_loss_alpha),
    )  # fmt: skip
    return TransformerBlock(attention, experts, config.rms_norm_eps)


# %% Names and shapes of the released checkpoints
def released_tensors(model):
    """{released name: view of the model's own memory} of every parameter and stored buffer.

    Experts are one tensor each in the files, gate and up two: here they are slices of fused ones.
    """
    tensors = {
        "model.embed_tokens.weight": model.embed_tokens.weight,
        "model.norm.weight": model.norm.weight,
        "lm_head.weight": model.lm_head.weight,
    }
    for i, block in enumerate(model.layers):
        tensors |= _block_tensors(f"model.layers.{i}", block)
    for k, predictor in enumerate(model.mtp):
        prefix = f"model.layers.{len(model.layers) + k}"
        tensors |= _block_tensors(prefix, predictor.block)
        for name in ("enorm", "hnorm", "eh_proj"):
            tensors[f"{prefix}.{name}.weight"] = getattr(predictor, name).weight
        tensors[f"{prefix}.shared_head.norm.weight"] = predictor.norm.weight
    return {name: tensor.detach() for name, tensor in tensors.items()}


def _block_tensors(prefix, block):
    tensors = {}
    for name, tensor in block.state_dict().items():
        fused = {name: tensor}
        # Phase 8 may have put each expert's matrix in a layer of its own.
        listed = re.fullmatch(r"mlp\.experts\.(\w+)\.(\d+)\.weight", name)
        if listed:
            fused = {f"mlp.experts.{listed[2]}.{listed[1]}.weight": tensor}
        elif name.startswith("mlp.experts."):
            part = name.removeprefix("mlp.experts.")
            fused = {f"mlp.experts.{e}.{part}.weight": one for e, one in enumerate(tensor)}
        for name, tensor in fused.items():
            if name.endswith(".gate_up_proj.weight"):
                for part, half in zip(("gate_proj", "up_proj"), tensor.chunk(2), strict=True):
                    tensors[f"{prefix}.{name.replace('gate_up_proj', part)}"] = half
            else:
                tensors[f"{prefix}.{name}"] = tensor
    return tensors


def mtp_copies(model):
    """The copies of embedding and head that released files repeat in each MTP layer."""
    copies = {}
    for k in range(len(model.mtp)):
        prefix = f"model.layers.{len(model.layers) + k}"
        copies[f"{prefix}.embed_tokens.weight"] = model.embed_tokens.weight
        copies[f"{prefix}.shared_head.head.weight"] = model.lm_head.weight
    return copies


@torch.no_grad()
def fill_from_files(model, files, directory):
    """Copies the tensors of {name: file} into the model; every one must be there and fit."""
    wanted, copies = released_tensors(model), mtp_copies(model)
    check_names(files, wanted, directory, optional=copies)
    for name, tensor in fitting_tensors(files, wanted, directory):
        wanted[name].copy_(tensor)
    for name, tensor in fitting_tensors(files, copies, directory):
        if not torch.equal(tensor.to(copies[name].dtype), copies[name].cpu()):
            raise ValueError(f"{directory}: {name} differs from the main model's, which it repeats")


def check_names(files, wanted, directory, optional=()):
    """ValueError if {name: file} lacks a wanted tensor or holds one that is not even optional."""
    missing, extra = wanted.keys() - files.keys(), files.keys() - wanted.keys() - set(optional)
    for problem, names in (("lacks", missing), ("holds unexpected", extra)):
        if names:
            some = ", ".join(sorted(names)[:3])
            raise ValueError(f"{directory} {problem} {len(names)} tensors: {some}, …")


def fitting_tensors(files, targets, directory):
    """Yields (name, tensor) of the targets' names; ValueError if a shape is not the target's."""
    for name, tensor in checkpoint.read_tensors({n: f for n, f in files.items() if n in targets}):
        shape, wanted = tuple(tensor.shape), tuple(targets[name].shape)
        if shape != wanted:
            raise ValueError(f"{directory}: {name} has shape {shape}, want {wanted}")
        yield name, tensor


# %% Quantised checkpoints: ours, no one else's
QUANT_METHOD = "quantization_coded"
QUANTIZED_WEIGHTS = "quantized.safetensors"  # a name under which no one else looks for weights


def quantized_tensors(model):
    """The state of a quantised model by its own names; what MTP modules share stands there once."""
    mtp = range(len(model.mtp))
    shared = tuple(f"mtp.{k}.{part}." for k in mtp for part in ("embedding", "head"))
    state = model.state_dict()
    return {name: tensor for name, tensor in state.items() if not name.startswith(shared)}


def load_quantized(config, directory):
    """The model that `save_pretrained` wrote after `quantize_model`."""
    settings, where = dict(config.quantization_config), f"{directory} is quantised"
    method = settings.pop("quant_method", None)
    if method != QUANT_METHOD:
        raise ValueError(f"{where} ({method}): of these, only {QUANT_METHOD} loads")
    try:
        cache_bits, scheme = settings.pop("cache_bits"), Scheme(**settings)
        config.quantization_config = None
        model = quantize_cache(quantized_skeleton(DeepSeekModel(config), scheme), cache_bits)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{where}, but its quantization_config is damaged: {error}") from None
    files = checkpoint.tensor_files(directory, QUANTIZED_WEIGHTS)
    wanted = quantized_tensors(model)
    check_names(files, wanted, directory)
    state = dict(fitting_tensors(files, wanted, directory))
    for name, tensor in state.items():  # weights may have another precision, codes may not
        held = wanted[name].dtype
        if tensor.dtype != held and not name.endswith((".weight", ".bias", "correction_bias")):
            raise ValueError(f"{directory}: {name} is {tensor.dtype}, want {held}")
    model.load_state_dict(state, strict=False)  # MTP's shared parts are not stored twice
    return model


# %% The cost of a configuration
def parameter_counts(model):
    """Parameters of the main model, in all and as a token uses them; MTP's own apart.

    Returns: dict with `total`, `active`, `active_without_embedding`,
        `active_without_embedding_and_head` and `mtp` (0 without). Routing biases are buffers and
        count nowhere.
    """

    def size(module):
        return sum(parameter.numel() for parameter in module.parameters())

    embedding, head = model.embed_tokens.weight.numel(), model.lm_head.weight.numel()
    total = embedding + head + size(model.norm) + size(model.layers)
    share = 1 - model.config.num_experts_per_tok / model.config.n_routed_experts
    idle = sum(
        round(size(block.mlp.experts) * share) for block in model.layers
        if isinstance(block.mlp, MixtureOfExperts)
    )  # fmt: skip
    return {
        "total": total,
        "active": total - idle,
        "active_without_embedding": total - idle - embedding,
        "active_without_embedding_and_head": total - idle - embedding - head,
        "mtp": size(model.mtp) - embedding - head if len(model.mtp) else 0,
    }


def cache_elements(config):
    """Numbers that one token leaves in the latent caches of all layers."""
    return cache_elements_per_token(
        "MLA", config.num_hidden_layers, latent=config.kv_lora_rank, rotary=config.qk_rope_head_dim
    )


def training_flops_per_token(model, context):
    """6 · active parameters without the embedding, plus causal attention at `context` tokens."""
    config = model.config
    head_widths = config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim
    attention = config.num_hidden_layers * config.num_attention_heads * head_widths * context * 3
    return 6 * parameter_counts(model)["active_without_embedding"] + attention


# %% The training step
def build_optimizers(model, peak_rate, muon=True):
    """AdamW, and (`muon`) Muon for eh_proj and the matrices of attention, dense and shared FFN.

    Muon replaces a matrix' momentum by roughly the nearest orthogonal matrix, so that every
    direction learns at the same pace; `match_rms_adamw` scales its steps to AdamW's, so one
    learning rate serves both. Embedding and head are no maps between hidden states and the router
    is a few rows: they stay with AdamW, and so do the experts, whose many matrices would make a
    step 40 % longer. Gate and up count as one matrix. Norms and the router do not decay.
    """
    named = dict(model.named_parameters())
    spared = (".gate.", "embed_tokens", "lm_head", ".experts.")
    matrices = {
        name: p for name, p in named.items()
        if muon and p.dim() == 2 and not any(part in name for part in spared)
    }  # fmt: skip
    rest = {name: p for name, p in named.items() if name not in matrices}
    decayed = [p for name, p in rest.items() if p.dim() >= 2 and ".gate." not in name]
    others = [p for name, p in rest.items() if p.dim() < 2 or ".gate." in name]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizers = [torch.optim.AdamW(groups, lr=peak_rate, betas=(0.9, 0.95), fused=True)]
    if matrices:
        optimizers.append(
            torch.optim.Muon(matrices.values(), lr=peak_rate, weight_decay=0.1,
                             adjust_lr_fn="match_rms_adamw")
        )  # fmt: skip
    return optimizers


def training_step(
    model, optimizers, ids, document_ids, rate, mtp_weight, gamma, precision=torch.float32
):
    """One step on a batch of tokens (B, T); returns its figures. Losses in nats per token.

    λ = `mtp_weight` weighs the MTP loss; γ = `gamma` is how far the routing bias moves; `rate` is
    the learning rate of all optimizers, `precision` that of the matrix products.
    """
    model.train()
    for optimizer in optimizers:
        optimizer.zero_grad()
        for group in optimizer.param_groups:
            group["lr"] = rate
    # Autocast: matrix products in `precision`, weights, norms, router and losses in FP32.
    with torch.autocast(ids.device.type, precision, enabled=precision != torch.float32):
        # "products" stores all scores. One sequence of 1,024: 0.30 s a step against 0.33 expanded;
        # of 2,048: 1.07 against 0.80, and 827 MB against 544. A GPU's own kernels are faster.
        short = ids.device.type == "cpu" and ids.shape[1] <= 1024
        path = "products" if short and precision == torch.bfloat16 else "expanded"
        hidden_BTD = model.hidden_states(ids, path=path)
        next_loss = model.head_loss(hidden_BTD, ids, shift=1)
        further_losses = [
            model.head_loss(states, ids, k + 1, document_ids)
            for k, states in enumerate(model.mtp_hidden_states(hidden_BTD, ids, path=path), start=1)
        ]
    further_loss = torch.stack(further_losses).mean() if further_losses else 0.0
    balance_loss = sum(moe.last_balance_loss for moe in model.moe_layers().values())

    (next_loss + mtp_weight * further_loss + balance_loss).backward()
    gradient_norm = nn.utils.clip_grad_norm_(model.parameters(), max_norm=1.0)
    for optimizer in optimizers:
        optimizer.step()

    max_load = {}
    for name, moe in model.moe_layers().items():
        load_E = moe.gate.load.float()
        max_load[name] = round((load_E.max() / load_E.mean()).item(), 4)
        moe.gate.update_bias(gamma)
        moe.last_balance_loss = None  # it holds on to the whole step
    return {
        "loss": next_loss.item(),
        "mtp_loss": further_loss.item() if len(model.mtp) else None,
        "balance_loss": torch.as_tensor(balance_loss).item(),
        "gradient_norm": gradient_norm.item(),
        "learning_rate": rate,
        "max_load": max_load,
        "tokens": ids.numel(),
    }


# %% Scoring
@torch.no_grad()
def score(model, tokenizer, documents, batch_size=16):
    """Bits per byte of the documents, each byte scored once, and what else can be read off.

    Windows of the model's context overlap by half: `corpus.scoring_batches`.

    Returns: dict with `bits_per_byte`, `tokens`, `bytes`, `mtp_acceptance` (share of the
        MTP module's greedy drafts that are the main model's own greedy choice; None without MTP)
        and `max_load` ({layer: busiest expert's load over the mean}).
    """
    model.eval()
    device, context = model.lm_head.weight.device, model.config.max_position_embeddings
    nats, tokens, agreed, drafted, loads = 0.0, 0, 0, 0, {}
    for batch in corpus.scoring_batches(tokenizer, documents, context, batch_size):
        ids_BT, target_BT, real_BT = (part.to(device) for part in batch)
        # A quantised cache enters the score: each token attends to what it holds.
        caches = model.new_caches(capacity=ids_BT.shape[1]) if model.cache_bits else None
        hidden_BTD = model.hidden_states(ids_BT, caches=caches)
        # The head runs on the scored rows only: about half, and it is the widest matrix.
        scored_BT, targets = target_BT[:, 1:], ids_BT[:, 1:][target_BT[:, 1:]]
        logits = model.lm_head(hidden_BTD[:, :-1][scored_BT])
        losses = nn.functional.cross_entropy(logits.float(), targets, reduction="none")
        nats += losses.cpu().double().sum().item()
        tokens += len(targets)
        for name, moe in model.moe_layers().items():
            if not name.startswith("MTP"):
                chosen, real_M = moe.last_routing.indices, real_BT.flatten()
                loads[name] = loads.get(name, 0) + expert_counts(
                    chosen, moe.gate.num_experts, real_M
                )
        if len(model.mtp) and ids_BT.shape[1] > 2:
            choice_BT = torch.zeros_like(ids_BT[:, 1:])
            choice_BT[scored_BT] = logits.argmax(dim=-1)
            further_BTD = model.mtp[0](hidden_BTD[:, :-1], ids_BT[:, 1:])
            drafted_BT = target_BT[:, 2:]
            drafts = model.lm_head(further_BTD[:, :-1][drafted_BT]).argmax(dim=-1)
            agreed += int((drafts == choice_BT[:, 1:][drafted_BT]).sum())
            drafted += len(drafts)
    size = sum(document.size for document in documents)
    return {
        "bits_per_byte": nats / math.log(2) / size,
        "tokens": tokens,
        "bytes": size,
        "mtp_acceptance": agreed / drafted if drafted else None,
        "max_load": {
            name: (load.max() / load.float().mean()).item() for name, load in loads.items()
        },
    }


def print_scores(scores, documents, tokenizer, part):
    """The scores beside honest yardsticks on the same bytes; returns all rates."""
    rates = {"this model": scores["bits_per_byte"], **corpus.compressor_rates(documents)}
    rates["uniform"] = corpus.uniform_rate(
        scores["tokens"], scores["bytes"], tokenizer.get_vocab_size()
    )
    print(f"bits per byte, {part}: {len(documents)} documents, {scores['bytes']:,} bytes, "
          f"{scores['tokens']:,} tokens")  # fmt: skip
    for name, rate in sorted(rates.items(), key=lambda item: item[1]):
        print(f"  {name:<12} {rate:.4f}")
    if scores["mtp_acceptance"] is not None:
        print(
            f"MTP acceptance: {scores['mtp_acceptance']:.1%} of the drafts are the model's choice"
        )
    if scores["max_load"]:
        loads = ", ".join(f"{name} {value:.2f}" for name, value in scores["max_load"].items())
        print(f"busiest expert / mean load: {loads}")
    return rates


# %% A run: corpus, tokenizer, model, steps, checkpoints
PRECISIONS = ("auto", "float32", "bfloat16")
OPTIMIZERS = ("auto", "muon", "adamw")


def fastest_precision(device):
    """Name of the faster precision of matrix products: "bfloat16" or "float32".

    On a CPU "bfloat16" if it takes at most 2/3 of the time, measured; on CUDA where the hardware
    has it.
    """
    if device == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    if device != "cpu":
        return "float32"
    seconds = {}
    for _ in range(5):  # the first are slow: the least counts
        for name in ("float32", "bfloat16"):
            matrix = torch.ones(512, 512, dtype=getattr(torch, name))
            start = time.perf_counter()
            matrix @ matrix
            seconds[name] = min(time.perf_counter() - start, seconds.get(name, math.inf))
    return "bfloat16" if seconds["bfloat16"] < seconds["float32"] / 1.5 else "float32"


@dataclass
class RunOptions:
    """What a training run was asked for; stored with its checkpoint, so that it can resume."""

    config: str = str(HERE / "configs" / "small.json")
    data: list | None = None
    steps: int | None = None
    minutes: float | None = None
    seed: int = 0
    batch_size: int = 4
    sequence_length: int = 256
    learning_rate: float = 3e-3
    precision: str = "auto"
    optimizer: str = "auto"
    mtp_weight: float = 0.3
    gamma: float = 0.005

    def __post_init__(self):
        lowest = {"seed": 0, "batch_size": 1, "sequence_length": 3, "mtp_weight": 0, "gamma": 0}
        for name, bound in lowest.items():
            value = getattr(self, name)
            if not bound <= value < math.inf:
                flag = name.replace("_", "-")
                raise ValueError(f"--{flag}={value} must be a number of at least {bound}")
        for name, known in (("precision", PRECISIONS), ("optimizer", OPTIMIZERS)):
            if getattr(self, name) not in known:
                wanted = ", ".join(known)
                raise ValueError(f"--{name}={getattr(self, name)} must be one of {wanted}")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"--learning-rate={self.learning_rate} must be a number above 0")

    def settle(self, device):
        """Replaces each "auto" by what is faster on `device`; a resumed run keeps it."""
        if "auto" in (self.precision, self.optimizer):
            faster = fastest_precision(device)
            self.precision = faster if self.precision == "auto" else self.precision
            if self.optimizer == "auto":
                # Muon orthogonalises in BF16: without units for it, a step takes seconds.
                self.optimizer = "muon" if faster == "bfloat16" else "adamw"


class TrainingRun:
    """Everything between the options and a trained checkpoint in `directory`/checkpoint."""

    def __init__(self, directory, options, device, resume=False):
        self.directory, self.options, self.device = pathlib.Path(directory), options, device
        self.checkpoint = self.directory / "checkpoint"
        self.budget = Budget(options.steps, options.minutes)
        options.settle(device)
        self.state = State()
        self.corpus = corpus.load_corpus(options.data)
        stored = read_run(self.checkpoint) if resume else None
        if resume and (self.checkpoint / "align.json").exists():
            raise ValueError(f"{self.directory} is an alignment: go on with align --resume")
        if resume and stored["corpus"] != self.corpus.fingerprint:
            raise ValueError(
                f"the text has changed since {self.directory} was started: its hash is "
                f"{self.corpus.fingerprint}, was {stored['corpus']}"
            )
        torch.manual_seed(options.seed)
        if resume:
            self.tokenizer = corpus.load_tokenizer(self.checkpoint / "tokenizer.json")
            self.model = DeepSeekModel.from_pretrained(self.checkpoint).to(device)
            self.state = State(**stored["state"])
            if self.model.quantization is not None:
                raise ValueError(f"{self.checkpoint} is quantised: it cannot be trained")
        else:
            config = DeepSeekConfig.from_file(options.config)
            if config.quantization_config is not None:
                raise ValueError(f"{options.config}: a quantised model cannot be trained")
            self.tokenizer = corpus.train_tokenizer(self.corpus.train, config.vocab_size)
            config.vocab_size = self.tokenizer.get_vocab_size()
            self.model = DeepSeekModel(config).to(device)
        if options.sequence_length > self.model.config.max_position_embeddings:
            raise ValueError(
                f"--sequence-length={options.sequence_length} exceeds max_position_embeddings="
                f"{self.model.config.max_position_embeddings}"
            )
        self.optimizers = build_optimizers(
            self.model, options.learning_rate, options.optimizer == "muon"
        )
        if resume:
            files = checkpoint.tensor_files(self.checkpoint / "optimizer")
            stored = checkpoint.read_tensors(files)
            checkpoint.restore_optimizers(self.model, self.optimizers, stored)
        stream = corpus.token_stream(self.tokenizer, self.corpus.train)
        self.batches = corpus.Batches(
            stream, options.batch_size, options.sequence_length, options.seed
        )

    def describe(self):
        config, counts = self.model.config, parameter_counts(self.model)
        print(
            f"deepseek_full_model.py · Python {sys.version.split()[0]} · torch {torch.__version__} "
            f"· {self.device} · {self.options.precision} · {self.options.optimizer} "
            f"· {torch.get_num_threads()} threads · seed {self.options.seed}"
        )
        sizes = [sum(d.size for d in self.corpus.part(p)) for p in ("train", "validation", "test")]
        print(
            f"corpus {self.corpus.fingerprint}: {sizes[0]:,} bytes to train on, {sizes[1]:,} "
            f"validation, {sizes[2]:,} test; {len(self.batches.ids):,} training tokens of "
            f"{config.vocab_size}"
        )
        print(
            f"model: {counts['total']:,} parameters, {counts['active']:,} active a token, "
            f"{counts['mtp']:,} more in MTP; {cache_elements(config)} cached numbers a token"
        )

    def step(self, number, used):
        ids, document_ids = (part.to(self.device) for part in self.batches[number])
        # V3's schedules: λ falls to a third after two thirds of the training, γ ends at 0.
        mtp_weight = self.options.mtp_weight / (1 if used < 2 / 3 else 3)
        gamma = self.options.gamma if used < 0.95 else 0.0
        rate = learning_rate(used, self.options.learning_rate)
        return training_step(
            self.model, self.optimizers, ids, document_ids, rate, mtp_weight, gamma,
            getattr(torch, self.options.precision),
        )  # fmt: skip

    def save(self):
        """The whole checkpoint directory at once: an interrupted save leaves the last one whole."""
        self.directory.mkdir(parents=True, exist_ok=True)
        with checkpoint.replaced_directory(self.checkpoint) as fresh:
            self.model.save_pretrained(fresh)
            self.tokenizer.save(str(fresh / "tokenizer.json"))
            (fresh / "optimizer").mkdir()
            checkpoint.write_tensors(
                fresh / "optimizer" / checkpoint.WEIGHTS,
                checkpoint.optimizer_tensors(self.model, self.optimizers),
            )
            checkpoint.write_json(
                fresh / "run.json",
                {"options": asdict(self.options), "state": asdict(self.state),
                 "corpus": self.corpus.fingerprint},
            )  # fmt: skip

    def train(self):
        self.directory.mkdir(parents=True, exist_ok=True)
        metrics = self.directory / "metrics.jsonl"
        if self.budget.used(self.state) >= 1:
            print(f"already trained for the whole budget ({self.state.step} steps): ask for more")
        elif not run_steps(self.step, self.state, self.budget, metrics, self.save):
            print(
                f"stopped at step {self.state.step}; go on with: python deepseek_full_model.py "
                f"train --resume {self.directory}", file=sys.stderr,
            )  # fmt: skip
            raise SystemExit(130)
        print(
            f"trained {self.state.step} steps, {self.state.tokens:,} tokens in "
            f"{self.state.seconds:.0f} s: {self.state.tokens / self.state.seconds:,.0f} tokens/s"
        )


# %% What the commands do
def open_run(arguments):
    """The `TrainingRun` that the command line describes, new or resumed."""
    chosen = chosen_options(arguments, RunOptions)
    if arguments.resume is not None:
        directory = directory_to_resume(arguments, chosen, "run.json", "training run")
        options = RunOptions(**read_run(directory / "checkpoint")["options"])
        replace_budget(options, chosen)
        return TrainingRun(directory, options, arguments.device, resume=True)
    options = RunOptions(**chosen)
    if options.steps is None and options.minutes is None:
        options.minutes = DEFAULT_MINUTES
    directory = new_directory(getattr(arguments, "out", None))
    return TrainingRun(directory, options, arguments.device)


def chosen_options(arguments, options_class):
    """{field of `options_class`: value} of the flags given; files by their absolute paths."""
    chosen = {
        field.name: getattr(arguments, field.name)
        for field in fields(options_class)
        if hasattr(arguments, field.name)
    }
    if "data" in chosen:  # so that the run resumes from any directory
        chosen["data"] = [str(pathlib.Path(path).resolve()) for path in chosen["data"]]
    return chosen


def directory_to_resume(arguments, chosen, stored, kind):
    """The directory of --resume; ValueError if it holds no such run or other flags are given."""
    directory = pathlib.Path(arguments.resume)
    checkpoint.recover_directory(directory / "checkpoint")
    if not (directory / "checkpoint" / stored).is_file():
        raise ValueError(f"{directory} holds no {kind}: no checkpoint/{stored} in it")
    fixed = sorted(chosen.keys() - {"steps", "minutes"})
    fixed += [name for name in ("out", "checkpoint") if hasattr(arguments, name)]
    if fixed:
        raise ValueError(f"--resume goes on with the run's own options: leave out {fixed}")
    return directory


def replace_budget(options, chosen):
    """Another budget for a resumed run, where one is given."""
    if chosen:
        options.steps, options.minutes = chosen.get("steps"), chosen.get("minutes")


def read_run(directory):
    """The content of a checkpoint's run.json: its options, state and corpus hash."""
    path = directory / "run.json"
    stored = checkpoint.read_json(path)
    try:
        RunOptions(**stored["options"]), State(**stored["state"]), stored["corpus"]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    return stored


DEFAULT_MINUTES = 4.6


def new_directory(asked, default="default"):
    """A run directory that holds no run yet: the one asked for, or the next free default."""
    if asked is not None:
        if pathlib.Path(asked).is_file():
            raise ValueError(f"--out {asked} is a file, want a directory")
        checkpoint.recover_directory(pathlib.Path(asked) / "checkpoint")
        if (pathlib.Path(asked) / "checkpoint").exists():
            raise ValueError(f"--out {asked} already holds a run: resume it or choose another")
        return pathlib.Path(asked)
    number = 1
    while True:
        directory = pathlib.Path("runs") / (default if number == 1 else f"{default}-{number}")
        if not directory.exists():
            return directory
        number += 1


def train_command(arguments):
    run = open_run(arguments)
    run.describe()
    run.train()
    scores = score(run.model, run.tokenizer, run.corpus.validation)
    print_scores(scores, run.corpus.validation, run.tokenizer, "validation part")
    print(f"checkpoint: {run.checkpoint}")


def whole_pipeline(arguments):
    """The main job: train, read the checkpoint back, score the test part, draw, generate."""
    from pipeline import report

    run = open_run(arguments)
    run.describe()
    run.train()
    model = DeepSeekModel.from_pretrained(run.checkpoint).to(run.device)
    scores = score(model, run.tokenizer, run.corpus.test)
    rates = print_scores(scores, run.corpus.test, run.tokenizer, "test part")
    metrics = read_metrics(run.directory / "metrics.jsonl")
    pictures = [run.directory / "loss.png", run.directory / "expert_load.png"]
    report.draw_losses(metrics, pictures[0])
    report.draw_expert_load(metrics, pictures[1])
    checkpoint.write_json(
        run.directory / "results.json",
        {"bits_per_byte": rates, "test": scores, "training": asdict(run.state),
         "python": sys.version.split()[0], "corpus": run.corpus.fingerprint},
    )  # fmt: skip
    show_continuation(model, run.tokenizer, run.corpus.test)
    print(f"checkpoint: {run.checkpoint}   pictures: {', '.join(map(str, pictures))}")
    align_after_training(run, scores)


def show_continuation(model, tokenizer, documents, prompt_tokens=96, new_tokens=96):
    """Prints how the model goes on with a held-out file, and what speculation saves on four."""
    model.eval()
    documents = [d for d in documents if d.size > 4000][:4] or documents[:1]
    separator, half_context = tokenizer.token_to_id(corpus.SEPARATOR), model.max_positions // 2
    prompt_tokens, new_tokens = min(prompt_tokens, half_context), min(new_tokens, half_context)
    prompts = [
        [separator, *corpus.encode(tokenizer, document.text)][:prompt_tokens]
        for document in documents
    ]
    device = model.lm_head.weight.device
    generator = torch.Generator(device=device).manual_seed(0)
    prompt = torch.tensor([prompts[0]], device=device)
    sampled = model.generate(prompt, new_tokens, temperature=0.6, generator=generator)[0]
    print(f"continuation of {documents[0].name}, temperature 0.6 (│ prompt, ▌ model):")
    print_marked("│", tokenizer.decode(prompts[0]))
    print_marked("▌", tokenizer.decode(sampled[len(prompts[0]) :].tolist()))
    if not len(model.mtp):
        return
    same, totals = True, {"forwards": 0, "drafted": 0, "accepted": 0}
    for ids in prompts:
        prompt = torch.tensor([ids], device=device)
        text, figures = speculative_generate(model, prompt, new_tokens)
        same &= torch.equal(text, model.generate(prompt, new_tokens))
        totals = {name: count + figures[name] for name, count in totals.items()}
    print(f"speculative decoding of {len(prompts)} files: {new_tokens * len(prompts)} tokens in "
          f"{totals['forwards']} passes, {totals['accepted']} of {totals['drafted']} drafts taken, "
          f"{'the same text as' if same else 'NOT the text of'} plain greedy decoding")  # fmt: skip


def print_marked(mark, text):
    for line in text.splitlines():
        print(f"  {mark} {line}")


def load_with_tokenizer(directory, device):
    """(model, tokenizer) of a checkpoint directory; a run's directory will do as well."""
    directory = pathlib.Path(directory)
    if not (directory / "config.json").exists() and (directory / "checkpoint").is_dir():
        directory = directory / "checkpoint"
    checkpoint.recover_directory(directory)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = DeepSeekModel.from_pretrained(directory).to(device).eval()
    for warning in caught:
        print(f"note: {warning.message}", file=sys.stderr)
    tokenizer = corpus.load_tokenizer(directory / "tokenizer.json")
    if tokenizer.get_vocab_size() > model.config.vocab_size:
        raise ValueError(
            f"{directory}: the tokenizer has {tokenizer.get_vocab_size()} entries, "
            f"the model {model.config.vocab_size}"
        )
    if tokenizer.token_to_id(corpus.SEPARATOR) is None:
        raise ValueError(f"{directory}: the tokenizer has no {corpus.SEPARATOR}")
    return model, tokenizer, directory


# %% Alignment: phase 9 on the trained model, rewarded by Python's own compiler
ALIGN_MINUTES = 3.4
HELD_OUT_PROMPTS = 256


@dataclass
class AlignOptions:
    """What an alignment was asked for; stored with its checkpoint, so that it can resume.

    `source`: directory of the checkpoint it started from, which stays its reference.
    """

    source: str
    data: list | None = None
    steps: int | None = None
    minutes: float | None = None
    seed: int = 0
    variant: str = "grpo"
    learning_rate: float = 1.4e-4
    kl_coef: float = 0.03
    prompts: int = 16
    group_size: int = 16
    max_new_tokens: int = 24
    minibatches: int = 2
    precision: str = "auto"
    once: bool = True

    def settle(self, device):
        """Replaces "auto" by what is faster on `device`; a resumed run keeps it."""
        if self.precision == "auto":
            self.precision = fastest_precision(device)

    def settings(self, device):
        """The trainer's `Settings`."""
        fast = device == "cpu" and self.precision == "bfloat16"
        return Settings(
            self.variant, self.prompts, self.group_size, self.max_new_tokens,
            minibatches=self.minibatches, learning_rate=self.learning_rate, kl_coef=self.kl_coef,
            precision=self.precision, path="products" if fast else "expanded", seed=self.seed,
            overlong_buffer=max(1, self.max_new_tokens // 4),
        )  # fmt: skip


class NoPrompts(ValueError):
    """The text is not Python, or too little of it."""


class AlignmentRun:
    """Everything between a trained checkpoint and an aligned one in `directory`/checkpoint.

    Prompts come from the training part; what is reported is measured on held-out prompts.
    """

    def __init__(self, directory, options, device, resume=False):
        self.directory, self.options = pathlib.Path(directory), options
        self.checkpoint = self.directory / "checkpoint"
        self.budget, self.state = Budget(options.steps, options.minutes), State()
        model, self.tokenizer, source = load_with_tokenizer(options.source, device)
        if model.quantization is not None:
            raise ValueError(f"{source} is quantised: it cannot be trained")
        options.source = str(source.resolve())
        options.settle(device)
        self.fingerprint = checkpoint.fingerprint(source)
        self.training = read_run(source) if (source / "run.json").is_file() else {}
        data = options.data or self.training.get("options", {}).get("data")
        self.corpus = corpus.load_corpus(data)
        if (
            self.training
            and not options.data
            and self.training["corpus"] != self.corpus.fingerprint
        ):
            print("note: the text has changed since training, held-out parts may have been seen",
                  file=sys.stderr)  # fmt: skip
        self.separator = self.tokenizer.token_to_id(corpus.SEPARATOR)
        longest = min(32, model.max_positions - options.max_new_tokens)
        if longest < 2:
            raise ValueError(
                f"max_new_tokens={options.max_new_tokens} leaves no room for a prompt in the "
                f"context of {model.max_positions}"
            )
        self.prompts, held_out = (
            compiler.line_end_prompts(self.tokenizer, part, min(12, longest), longest)
            for part in (self.corpus.train, self.corpus.test)
        )
        learnt = set(map(tuple, self.prompts))  # a licence, say, stands in many files
        held_out = [prompt for prompt in held_out if tuple(prompt) not in learnt]
        if not self.prompts or not held_out:
            raise NoPrompts(
                f"of the text, {len(self.prompts)} prompts to learn from and {len(held_out)} held "
                "out are Python that ends at a line's end: want at least one of each"
            )
        self.held_out = compiler.sample_of(held_out, HELD_OUT_PROMPTS)
        self.reward = compiler.CompilerReward(memory=options.once)
        self.trainer = GRPOTrainer(
            model, self.reward, self.draw, self.decode, self.separator, options.settings(device)
        )
        if resume:
            self.restore(device)

    def draw(self, count, generator):
        numbers = torch.randint(len(self.prompts), (count,), generator=generator,
                                device=generator.device)  # fmt: skip
        return [self.prompts[i] for i in numbers.tolist()]

    def decode(self, ids):
        """Whole lines; all of a text that ended by itself. The separator before a prompt goes."""
        ids = ids[1:] if ids[:1] == [self.separator] and len(ids) > 1 else ids
        return compiler.whole_lines(self.tokenizer.decode(ids, skip_special_tokens=False))

    def step(self, number, used):
        rate = learning_rate(used, self.options.learning_rate, floor=0.1)
        figures = self.trainer.step(rate)
        tokens = round(figures["completions"] * figures["length"])
        return {**figures, "tokens": tokens, "step": number + 1}

    def sample(self):
        """(prompts, completions) as texts: one completion of each held-out prompt."""
        policy = self.trainer.policy.eval()
        generator = torch.Generator(device=self.trainer.device).manual_seed(0)
        rollout = roll_out(policy, self.held_out, 1, self.options.max_new_tokens, self.separator,
                           generator=generator)  # fmt: skip
        return list(map(self.decode, self.held_out)), self.trainer.texts(rollout)

    def save(self):
        """As `TrainingRun.save`; the reference is the source, which is not stored again."""
        self.directory.mkdir(parents=True, exist_ok=True)
        with checkpoint.replaced_directory(self.checkpoint) as fresh:
            self.trainer.policy.save_pretrained(fresh)
            self.tokenizer.save(str(fresh / "tokenizer.json"))
            (fresh / "optimizer").mkdir()
            checkpoint.write_tensors(
                fresh / "optimizer" / checkpoint.WEIGHTS,
                checkpoint.optimizer_tensors(self.trainer.policy, [self.trainer.optimizer]),
            )
            if self.training:  # so that `evaluate` finds the text
                checkpoint.write_json(fresh / "run.json", self.training)
            checkpoint.write_json(
                fresh / "align.json",
                {"options": asdict(self.options), "state": asdict(self.state),
                 "paid": sorted(self.reward.paid), "corpus": self.corpus.fingerprint,
                 "source": self.fingerprint},
            )  # fmt: skip

    def restore(self, device):
        stored = read_alignment(self.checkpoint)
        if stored["corpus"] != self.corpus.fingerprint:
            raise ValueError(
                f"the text has changed since {self.directory} was started: its hash is "
                f"{self.corpus.fingerprint}, was {stored['corpus']}"
            )
        if stored["source"] != self.fingerprint:
            raise ValueError(
                f"{self.options.source}, the reference of {self.directory}, is not what it was "
                "when the alignment was started"
            )
        self.state = State(**stored["state"])
        self.reward.paid = set(stored["paid"])
        trainer = self.trainer
        aligned = DeepSeekModel.from_pretrained(self.checkpoint).to(device)
        trainer.policy.load_state_dict(aligned.state_dict())
        files = checkpoint.tensor_files(self.checkpoint / "optimizer")
        if files:  # none before the first update
            checkpoint.restore_optimizers(
                trainer.policy, [trainer.optimizer], checkpoint.read_tensors(files)
            )
        trainer.steps_done = self.state.step

    def align(self):
        self.directory.mkdir(parents=True, exist_ok=True)
        metrics = self.directory / "metrics.jsonl"
        if self.budget.used(self.state) >= 1:
            print(f"already aligned for the whole budget ({self.state.step} steps): ask for more")
        elif not run_steps(self.step, self.state, self.budget, metrics, self.save,
                           label="aligning"):  # fmt: skip
            print(
                f"stopped at step {self.state.step}; go on with: python deepseek_full_model.py "
                f"align --resume {self.directory}", file=sys.stderr,
            )  # fmt: skip
            raise SystemExit(130)

    def describe(self):
        o = self.options
        print(
            f"aligning {o.source}: {o.variant}, {o.prompts} prompts × {o.group_size} completions "
            f"a step, temperature 1, {o.max_new_tokens} tokens cut to whole lines, {o.precision}\n"
            f"reward 1 for prompt + completion that Python parses, with a statement added that "
            f"does something{', each text once' if o.once else ''}; "
            f"{len(self.prompts):,} prompts, {len(self.held_out)} held out"
        )


def read_alignment(directory):
    """The content of an aligned checkpoint's align.json."""
    path = directory / "align.json"
    stored = checkpoint.read_json(path)
    try:
        AlignOptions(**stored["options"]), State(**stored["state"])
        stored["paid"], stored["corpus"], stored["source"]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    return stored


def align_after_training(run, scores):
    """The last step of the main job, with as large a part of its budget as by default."""
    steps, minutes = run.options.steps, run.options.minutes
    options = AlignOptions(
        str(run.checkpoint), run.options.data, steps and math.ceil(steps / 10),
        minutes and minutes * ALIGN_MINUTES / DEFAULT_MINUTES, run.options.seed,
        precision=run.options.precision,
        max_new_tokens=min(AlignOptions.max_new_tokens, run.model.max_positions // 2),
    )  # fmt: skip
    try:
        alignment = AlignmentRun(run.directory / "aligned", options, run.device)
    except NoPrompts as error:
        print(f"not aligned: {error}")
        return
    report_alignment(alignment, scores)


def align_command(arguments):
    chosen = chosen_options(arguments, AlignOptions)
    if arguments.resume is not None:
        directory = directory_to_resume(arguments, chosen, "align.json", "alignment")
        options = AlignOptions(**read_alignment(directory / "checkpoint")["options"])
        replace_budget(options, chosen)
        run = AlignmentRun(directory, options, arguments.device, resume=True)
    else:
        if not hasattr(arguments, "checkpoint"):
            raise ValueError("want --checkpoint DIR or --resume RUN")
        options = AlignOptions(arguments.checkpoint, **chosen)
        if options.steps is None and options.minutes is None:
            options.minutes = ALIGN_MINUTES
        directory = new_directory(getattr(arguments, "out", None), "aligned")
        run = AlignmentRun(directory, options, arguments.device)
    report_alignment(run)


def report_alignment(run, before=None):
    """Aligns, and prints what it did to held-out prompts and to held-out text.

    before: `score`'s figures of the source on the test part, where they are known.
    """
    run.describe()
    documents, policy = run.corpus.test, run.trainer.policy
    reference = run.trainer.reference
    if before is None:
        before = score(reference, run.tokenizer, documents)
    run.trainer.policy = reference
    sampled = [run.sample()]
    run.trainer.policy = policy
    run.align()
    sampled.append(run.sample())
    after = score(policy, run.tokenizer, documents)
    shares = [compiler.shares(*pair) for pair in sampled]
    print(f"completions of {len(run.held_out)} held-out prompts, before → after "
          f"{run.state.step} steps in {run.state.seconds:.0f} s:")  # fmt: skip
    for name in shares[0]:
        print(f"  {name.replace('_', ', '):<16} {shares[0][name]:6.1%} → {shares[1][name]:6.1%}")
    rates = [figures["bits_per_byte"] for figures in (before, after)]
    print(f"bits per byte, test part: {rates[0]:.4f} → {rates[1]:.4f} "
          f"({rates[1] / rates[0] - 1:+.2%})")  # fmt: skip
    if before["mtp_acceptance"] is not None:
        drafts = [figures["mtp_acceptance"] for figures in (before, after)]
        print(f"MTP acceptance, its module left as it was: {drafts[0]:.1%} → {drafts[1]:.1%}")
    show_completions(*sampled)
    metrics = read_metrics(run.directory / "metrics.jsonl")
    draw_run(metrics, run.directory / "alignment.png")
    checkpoint.write_json(
        run.directory / "results.json",
        {"before": {**shares[0], "test": before}, "after": {**shares[1], "test": after},
         "steps": run.state.step, "seconds": run.state.seconds},
    )  # fmt: skip
    print(f"checkpoint: {run.checkpoint}   picture: {run.directory / 'alignment.png'}")


def show_completions(before, after, examples=4):
    """The same prompts before and after; then the shortest and commonest that earn a reward."""
    verdicts = [[compiler.verdict(p, c) for p, c in zip(*pair, strict=True)]
                for pair in (before, after)]  # fmt: skip
    changed = [i for i, pair in enumerate(zip(*verdicts, strict=True))
               if pair[0] != "valid" == pair[1]][:examples]  # fmt: skip
    for i in changed:
        print_marked("│", "\n".join(before[0][i].splitlines()[-3:]))
        for when, judged, text in (("before", verdicts[0][i], before[1][i]),
                                   ("after", verdicts[1][i], after[1][i])):  # fmt: skip
            print(f"  {when}: {judged}")
            print_marked("▌", text or "(no whole line)")
        print()
    paid = [c for c, v in zip(after[1], verdicts[1], strict=True) if v == "valid"]
    if not paid:
        print("nothing earned the reward")
        return
    cheapest = sorted(set(paid), key=lambda text: (len(text.strip()), text))[:examples]
    commonest = collections.Counter(text.strip() for text in paid).most_common(3)
    print(f"the cheapest ways to the reward: {', '.join(repr(t.strip()) for t in cheapest)}")
    print("the commonest: " + ", ".join(f"{text!r} ({count} of {len(paid)})"
                                        for text, count in commonest))  # fmt: skip


def evaluate_command(arguments):
    model, tokenizer, directory = load_with_tokenizer(arguments.checkpoint, arguments.device)
    if arguments.data:
        documents, part = corpus.read_files(arguments.data), "all of --data"
    else:
        run = read_run(directory) if (directory / "run.json").is_file() else {}
        text = corpus.load_corpus(run.get("options", {}).get("data"))
        if run and run["corpus"] != text.fingerprint:
            print(f"note: the text has changed since training, held-out parts may have been seen "
                  f"(hash {text.fingerprint}, was {run['corpus']})", file=sys.stderr)  # fmt: skip
        documents, part = text.part(arguments.part), f"{arguments.part} part"
    if arguments.cache_bits is not None:
        quantize_cache(model, arguments.cache_bits)
    if model.quantization is not None:
        print(describe_quantization(model))
    elif model.cache_bits:
        print(f"latent cache in {model.cache_bits} bits")
    scores = score(model, tokenizer, documents)
    print_scores(scores, documents, tokenizer, part)


def describe_quantization(model):
    stored, before = matrix_bytes(model)
    settings = ", ".join(f"{key} {value}" for key, value in model.quantization.items())
    cache = f"; latent cache in {model.cache_bits} bits" if model.cache_bits else ""
    return (
        f"quantised ({settings}): matrices {before:,} → {stored:,} bytes, "
        f"{stored / before:.4f} of FP32's{cache}"
    )


def quantize_command(arguments):
    model, tokenizer, directory = load_with_tokenizer(arguments.checkpoint, arguments.device)
    out = pathlib.Path(arguments.out)
    if out.exists():
        raise ValueError(f"--out {out} exists already: choose another")
    if arguments.calibration_sequences < 1:
        raise ValueError(
            f"--calibration-sequences={arguments.calibration_sequences} must be at least 1"
        )
    calibration = None
    if SCHEMES[arguments.scheme].method == "nearest":
        if arguments.data:
            raise ValueError(f"--data is for schemes that calibrate, {arguments.scheme} does not")
    else:
        run = read_run(directory) if (directory / "run.json").is_file() else {}
        data = arguments.data or run.get("options", {}).get("data")
        if not run and not arguments.data:
            print("note: no run.json tells what the model was trained on: calibrating on the "
                  "standard library", file=sys.stderr)  # fmt: skip
        calibration = calibration_ids(
            tokenizer, corpus.load_corpus(data).train, arguments.calibration_sequences,
            model.max_positions, arguments.seed,
        ).to(arguments.device)  # fmt: skip
    quantize_cache(model, arguments.cache_bits)  # the copy has it, too
    quantized = quantize_model(model, arguments.scheme, calibration)
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
    print(f"{after}: {size} (embedding, head, router and norms as before)")


def calibration_ids(tokenizer, documents, sequences, length, seed=0):
    """(≤ sequences, length) token ids: pieces of the documents, drawn with a seed."""
    ids, _ = corpus.token_stream(tokenizer, documents)
    if len(ids) < length:
        return ids[None]
    pieces = ids[: len(ids) // length * length].view(-1, length)
    generator = torch.Generator().manual_seed(seed)
    return pieces[torch.randperm(len(pieces), generator=generator)[:sequences]]


def generate_command(arguments):
    model, tokenizer, _ = load_with_tokenizer(arguments.checkpoint, arguments.device)
    separator = tokenizer.token_to_id(corpus.SEPARATOR)
    prompt = [separator, *corpus.encode(tokenizer, arguments.prompt)]
    text = corpus.TextStream(tokenizer, functools.partial(print, end="", flush=True))
    if arguments.cache_bits is not None:
        quantize_cache(model, arguments.cache_bits)
    if arguments.depth is not None and not arguments.speculative:
        raise ValueError("--depth is for --speculative")
    cut = arguments.top_k is not None or arguments.top_p is not None
    if cut and arguments.temperature == 0:
        raise ValueError("--top-k and --top-p are for a --temperature above 0")
    new_tokens = arguments.max_new_tokens
    if new_tokens is None:  # what fits
        new_tokens = max(1, min(128, model.max_positions - len(prompt)))
    figures, started = {}, False

    def show(new):  # nothing is printed before `generate` has checked what it was given
        nonlocal started
        if not started:
            print(arguments.prompt, end="")
        started = True
        text.add([token for token in new[0] if token != separator])

    start = time.perf_counter()
    model.generate(
        torch.tensor([prompt], device=arguments.device), new_tokens,
        arguments.temperature, arguments.speculative, eos_token_id=separator,
        pad_token_id=separator, top_k=arguments.top_k, top_p=arguments.top_p,
        depth=arguments.depth, prefill_chunk=arguments.prefill_chunk, figures=figures, stream=show,
        generator=torch.Generator(device=arguments.device).manual_seed(arguments.seed),
    )  # fmt: skip
    seconds = time.perf_counter() - start
    text.finish()
    print("" if started else arguments.prompt)
    print_generation(figures, seconds, arguments.speculative)


def print_generation(figures, seconds, speculative):
    """What a generation cost, to stderr: the text alone goes to stdout."""
    tokens, passes = figures["tokens"], max(1, figures["forwards"])
    line = f"{tokens} tokens, {tokens / seconds:.1f} tokens/s"
    if speculative:
        accepted, drafted = figures["accepted"], figures["drafted"]
        share = accepted / max(1, drafted)
        line += f"; {accepted} of {drafted} drafts accepted ({share:.0%}), "
        line += f"{tokens / passes:.2f} tokens a pass"
    print(f"{line}; cache {figures['cache_bytes']:,} bytes", file=sys.stderr)


# %% The command line
def build_parser():
    # Flags not given stay absent, so that a command's own flags cannot undo those before it.
    parser = OneLineParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    add_training_flags(parser)
    parser.set_defaults(command=whole_pipeline, resume=None)
    commands = parser.add_subparsers(title="commands", metavar="")
    train = commands.add_parser(
        "train",
        help="train only, or go on with a stopped run",
        argument_default=argparse.SUPPRESS,
    )
    add_training_flags(train)
    train.add_argument("--resume", metavar="RUN", help="directory of the run to go on with")
    train.set_defaults(command=train_command)

    evaluate = commands.add_parser("evaluate", help="bits per byte of a checkpoint")
    evaluate.add_argument("--checkpoint", required=True, metavar="DIR")
    evaluate.add_argument("--data", nargs="+", metavar="FILE", help="score all of these files")
    evaluate.add_argument("--part", default="test", choices=["train", "validation", "test"],
                          help="part of the training run's text, without --data")  # fmt: skip
    evaluate.add_argument("--cache-bits", type=int, metavar="N", help=CACHE_HELP)
    evaluate.add_argument("--device", help="cuda, mps or cpu")
    evaluate.set_defaults(command=evaluate_command)

    generate = commands.add_parser("generate", help="continue a prompt")
    generate.add_argument("--checkpoint", required=True, metavar="DIR")
    generate.add_argument("--prompt", default="", help="text to go on from; default: a new file")
    generate.add_argument("--max-new-tokens", type=int, help="default: 128, or what fits")
    generate.add_argument("--temperature", type=float, default=0.0, help="0: most likely token")
    generate.add_argument("--top-k", type=int, help="draw from the K most likely tokens only")
    generate.add_argument("--top-p", type=float, help="draw from the fewest that hold this share")
    generate.add_argument("--speculative", action="store_true", help="draft with the MTP module")
    generate.add_argument("--depth", type=int, help="drafts a pass (default: one more than held)")
    generate.add_argument("--prefill-chunk", type=int, help="read the prompt N tokens at a time")
    generate.add_argument("--seed", type=int, default=0)
    generate.add_argument("--cache-bits", type=int, metavar="N", help=CACHE_HELP)
    generate.add_argument("--device", help="cuda, mps or cpu")
    generate.set_defaults(command=generate_command)

    align = commands.add_parser("align", help="reward Python that parses (GRPO)",
                                argument_default=argparse.SUPPRESS)  # fmt: skip
    add_align_flags(align)
    align.set_defaults(command=align_command, resume=None)

    quantize = commands.add_parser("quantize", help="a smaller model of INT8, INT4 or FP8")
    add_quantize_flags(quantize)
    quantize.set_defaults(command=quantize_command)
    return parser


CACHE_HELP = "latent cache of 2 to 8 bits a number (default: as the model has it)"


def add_quantize_flags(parser):
    parser.add_argument("--checkpoint", required=True, metavar="DIR")
    parser.add_argument("--scheme", required=True, choices=list(SCHEMES))
    parser.add_argument("--out", required=True, metavar="DIR", help="directory of the new model")
    parser.add_argument("--cache-bits", type=int, metavar="N", help=CACHE_HELP)
    parser.add_argument(
        "--calibration-sequences", type=int, default=128, metavar="N",
        help="pieces of text, as long as the context, for methods that look at inputs (default: "
        "128)",
    )  # fmt: skip
    parser.add_argument("--data", nargs="+", metavar="FILE",
                        help="where they come from (default: the training text)")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of the calibration texts")
    parser.add_argument("--device", help="cuda, mps or cpu")


def add_align_flags(parser):
    defaults = AlignOptions("")
    parser.add_argument("--checkpoint", metavar="DIR", help="the trained model")
    parser.add_argument("--resume", metavar="RUN", help="directory of the alignment to go on with")
    parser.add_argument("--out", metavar="RUN", help="directory (default: runs/aligned, -2, …)")
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--steps", type=int, help="align for so many steps")
    budget.add_argument("--minutes", type=float,
                        help=f"align for so many minutes (default: {ALIGN_MINUTES})")  # fmt: skip
    parser.add_argument("--data", nargs="+", metavar="FILE",
                        help="Python for prompts (default: the training text)")  # fmt: skip
    parser.add_argument("--variant", choices=list(VARIANTS), help=f"default: {defaults.variant}")
    for name in ("seed", "learning_rate", "kl_coef", "prompts", "group_size", "max_new_tokens",
                 "minibatches"):  # fmt: skip
        value = getattr(defaults, name)
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value),
                            help=f"default: {value}")  # fmt: skip
    parser.add_argument("--precision", choices=PRECISIONS,
                        help="of the updates' products (default: auto, the faster)")  # fmt: skip
    parser.add_argument("--pay-again", dest="once", action="store_false",
                        help="pay a text as often as it comes: see what it leads to")  # fmt: skip
    parser.add_argument("--device", help="cuda, mps or cpu (default: best there is)")


def add_training_flags(parser):
    defaults = RunOptions()
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--steps", type=int, help="train for so many steps")
    budget.add_argument("--minutes", type=float,
                        help=f"train for so many minutes (default: {DEFAULT_MINUTES})")  # fmt: skip
    parser.add_argument("--data", nargs="+", metavar="FILE",
                        help="your own UTF-8 text (default: standard library)")  # fmt: skip
    parser.add_argument("--out", metavar="RUN",
                        help="directory of the run (default: runs/default, -2, …)")  # fmt: skip
    parser.add_argument("--config", help="config.json of the model (default: configs/small.json)")
    for name in ("seed", "batch_size", "sequence_length", "learning_rate", "mtp_weight", "gamma"):
        value = getattr(defaults, name)
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value),
                            help=f"default: {value}")  # fmt: skip
    parser.add_argument("--precision", choices=PRECISIONS,
                        help="of matrix products (default: auto, the faster)")  # fmt: skip
    parser.add_argument("--optimizer", choices=OPTIMIZERS,
                        help="default: auto, muon where BF16 is the faster precision")  # fmt: skip
    parser.add_argument("--device", help="cuda, mps or cpu (default: best there is)")


class OneLineParser(argparse.ArgumentParser):
    """Ends a wrong command line with one line, as all other mistakes end."""

    def error(self, message):
        self.exit(2, f"error: {message} (see --help)\n")


@one_line_errors
def main(argv=None):
    arguments = parse_arguments(build_parser(), argv)
    arguments.command(arguments)


if __name__ == "__main__":
    main()

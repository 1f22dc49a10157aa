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

import functools
from dataclasses import dataclass

import torch
from torch import nn

from lesson import check_settings, one_line_errors, require, setting
from mla_coded import cache_elements_per_token
from moe_coded import (
    MixtureOfExperts,
    SwiGLU,
    TopKRouter,
    TransformerBlock,
    balance_over_batch,
    balance_within_sequences,
)
from mtp_coded import CausalLM
from pipeline import aligning, decoding, generating, quantizing, released, report, scoring, training
from pipeline.commands import Command, run_command
from pipeline.fast import head_loss, speed_up
from pipeline.run import learning_rate
from pipeline.training import RunOptions
from rope_coded import RotaryEmbedding, RotaryLatentAttention

# %% The configuration: the fields of config.json
# What differs by `model_type`. The first value is meant where the file says nothing.
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
# What no released model has otherwise.
ALWAYS = {"hidden_act": ("silu",), "tie_word_embeddings": (False,), "attention_dropout": (0.0,)}


@dataclass
class DeepSeekConfig:
    """Fields as in the released config.json. `model_type` decides what V2 and V3 do differently.

    `from_file` and `from_dict` read both spellings of the rotary settings and fill in what
    transformers leaves out. Raises ValueError for a combination that no released model has.
    """

    vocab_size: int = setting(at_least=1)
    hidden_size: int = setting(at_least=1)
    intermediate_size: int = setting(at_least=1)
    moe_intermediate_size: int = setting(at_least=1)
    num_hidden_layers: int = setting(at_least=1)
    num_attention_heads: int = setting(at_least=1)
    kv_lora_rank: int = setting(at_least=1)
    qk_nope_head_dim: int = setting(at_least=1)
    qk_rope_head_dim: int = setting(at_least=1)
    v_head_dim: int = setting(at_least=1)
    n_routed_experts: int = setting(at_least=1)
    num_experts_per_tok: int = setting(at_least=1)
    model_type: str = "deepseek_v3"
    num_key_value_heads: int | None = setting(None, at_least=1)  # without effect: MLA has none
    q_lora_rank: int | None = setting(None, at_least=1)
    n_shared_experts: int = setting(1, at_least=0)
    first_k_dense_replace: int = setting(0, at_least=0)
    moe_layer_freq: int = setting(1, at_least=1)
    n_group: int = setting(1, at_least=1)
    topk_group: int = setting(1, at_least=1)
    topk_method: str | None = None
    scoring_func: str | None = None
    norm_topk_prob: bool | None = None
    routed_scaling_factor: float = setting(1.0, above=0)
    aux_loss_alpha: float = setting(0.001, at_least=0)
    seq_aux: bool = True
    num_nextn_predict_layers: int = setting(0, at_least=0)
    max_position_embeddings: int = setting(4096, at_least=1)
    rope_theta: float = setting(10000.0, above=0)
    rope_scaling: dict | None = None
    rms_norm_eps: float = setting(1e-6, above=0)
    initializer_range: float = setting(0.02, at_least=0)
    hidden_act: str = "silu"
    attention_bias: bool = False
    attention_dropout: float = setting(0.0, at_least=0)
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None
    quantization_config: dict | None = None

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
        self.yarn  # noqa: B018 - wrong rope_scaling is reported here

    @property
    def yarn(self):
        """The `YarnScaling` that rope_scaling describes, or None."""
        return released.yarn_scaling(self.rope_scaling)

    def is_moe_layer(self, index):
        return index >= self.first_k_dense_replace and index % self.moe_layer_freq == 0

    @classmethod
    def from_dict(cls, raw):
        """From the content of a config.json; fields that do not shape the model are ignored."""
        return cls(**released.config_fields(raw, cls))

    @classmethod
    def from_file(cls, path):
        """Reads a config.json. ValueError naming the file if it is none."""
        return released.read_config(path, cls)

    def to_dict(self):
        """The content of a config.json in the released spelling."""
        return released.config_content(self)


# %% The model
class DeepSeekModel(CausalLM):
    """DeepSeek-V2 or V3 by its configuration: `CausalLM` with rotary MLA, experts and MTP modules.

    `model(input_ids)` (B, T) → logits (B, T, W). `generate`, `hidden_states` and `mtp_logits` are
    `CausalLM`'s. Build it under `torch.device("meta")` to count without memory.
    """

    quantization = cache_bits = None  # phase 8 notes here what it changed

    def __init__(self, config):
        rotary = RotaryEmbedding(config.qk_rope_head_dim, config.rope_theta, config.yarn)
        layers = range(config.num_hidden_layers)
        depths = range(config.num_nextn_predict_layers)
        super().__init__(
            config.vocab_size,
            config.hidden_size,
            blocks=[build_block(config, rotary, config.is_moe_layer(i)) for i in layers],
            mtp_blocks=[build_block(config, rotary, moe=True) for _ in depths],
            norm_eps=config.rms_norm_eps,
            max_positions=config.max_position_embeddings,
        )
        self.config = config
        self.init_weights(config.initializer_range)
        self.prepared()

    def prepared(self):
        """The model itself, with quicker layers that give the same numbers: pipeline/fast."""
        return speed_up(self)

    def complete(self, input_ids, max_new_tokens, sampling, **options):
        """`CausalLM.complete` in its production form, with drafts and streams: pipeline/decoding.

        So `generate` also takes `speculative`, `depth`, `prefill_chunk` and `stream`.
        """
        return decoding.complete(self, input_ids, max_new_tokens, sampling, **options)

    @classmethod
    def from_pretrained(cls, directory):
        """Reads config.json and safetensors in the released layout, in FP32, or a quantised model.

        A checkpoint without any MTP tensors loads without MTP and warns. Raises: ValueError for
        missing, extra or mis-shaped tensors, unsupported configurations, or no checkpoint.
        """
        return released.load(cls, DeepSeekConfig, directory)

    def save_pretrained(self, directory):
        """Writes config.json and model.safetensors in the released layout.

        A quantised model goes to a layout of its own: every integer layer's codes and scales.
        """
        released.save(self, directory)


def build_block(config, rotary, moe):
    """One layer: rotary latent attention, then experts (`moe`) or a dense feed-forward."""
    attention = RotaryLatentAttention(
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        kv_lora_rank=config.kv_lora_rank,
        qk_nope_head_dim=config.qk_nope_head_dim,
        qk_rope_head_dim=config.qk_rope_head_dim,
        v_head_dim=config.v_head_dim,
        q_lora_rank=config.q_lora_rank,
        attention_bias=config.attention_bias,
        rotary=rotary,
    )
    if moe:
        feed_forward = build_experts(config)
    else:
        feed_forward = SwiGLU(config.hidden_size, config.intermediate_size)
    return TransformerBlock(attention, feed_forward, config.rms_norm_eps)


def build_experts(config):
    """Shared and routed experts, with a balance loss over each sequence or over the batch."""
    router = TopKRouter(
        config.hidden_size,
        config.n_routed_experts,
        config.num_experts_per_tok,
        scoring_func=config.scoring_func,
        topk_method=config.topk_method,
        n_group=config.n_group,
        topk_group=config.topk_group,
        norm_topk_prob=config.norm_topk_prob,
        routed_scaling_factor=config.routed_scaling_factor,
    )
    balance = balance_within_sequences if config.seq_aux else balance_over_batch
    return MixtureOfExperts(
        config.hidden_size,
        config.moe_intermediate_size,
        router,
        n_shared_experts=config.n_shared_experts,
        balance_loss=functools.partial(balance, config.aux_loss_alpha),
    )


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
    )
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


# %% Optimizers and the training step
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
    }
    rest = {name: p for name, p in named.items() if name not in matrices}
    decayed = [p for name, p in rest.items() if p.dim() >= 2 and ".gate." not in name]
    others = [p for name, p in rest.items() if p.dim() < 2 or ".gate." in name]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizers = [torch.optim.AdamW(groups, lr=peak_rate, betas=(0.9, 0.95), fused=True)]
    if matrices:
        muon = torch.optim.Muon(
            matrices.values(), lr=peak_rate, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"
        )
        optimizers.append(muon)
    return optimizers


def training_step(
    model, optimizers, ids, document_ids, rate, mtp_weight, gamma, precision=torch.float32
):
    """One step on a batch of tokens (B, T); returns its figures. Losses in nats per token.

    L = L_next + λ/depths · Σ_k L_k + Σ_layers L_balance, then b_i ± γ (V3, equations 24–25 and
    section 2.1.2). λ: `mtp_weight`. γ: `gamma`. rate: learning rate of all optimizers. precision:
    that of the matrix products. document_ids (B, T): no MTP target lies in another document.
    """
    model.train()
    for optimizer in optimizers:
        optimizer.zero_grad()
    routed = []  # gets what each layer's router decides
    # Autocast: matrix products in `precision`; weights, norms, router and losses in FP32.
    # `head_loss` is phase 6's `shifted_loss` of the head's logits, which it never stores whole.
    with torch.autocast(ids.device.type, precision, enabled=precision != torch.float32):
        hidden_BTD = model.hidden_states(ids, routed=routed)
        next_loss = head_loss(model.lm_head, hidden_BTD, ids, shift=1)
        depths = model.mtp_hidden_states(hidden_BTD, ids, routed=routed)
        further_losses = [
            head_loss(model.lm_head, states_BTD, ids, shift=k + 1, document_ids=document_ids)
            for k, states_BTD in enumerate(depths, start=1)
        ]
    further_loss = torch.stack(further_losses).mean() if further_losses else torch.zeros(())
    balance_loss = sum((layer_pass.balance_loss() for layer_pass in routed), torch.zeros(()))

    loss = next_loss + mtp_weight * further_loss + balance_loss
    gradient_norm = descend(model, optimizers, loss, rate)
    return {
        "loss": next_loss.item(),
        "mtp_loss": further_loss.item() if len(model.mtp) else None,
        "balance_loss": balance_loss.item(),
        "gradient_norm": gradient_norm.item(),
        "learning_rate": rate,
        "max_load": move_routing_biases(model, routed, gamma),
        "tokens": ids.numel(),
    }


def descend(model, optimizers, loss, rate):
    """One step of all optimizers along the gradient, clipped to length 1; returns its length."""
    loss.backward()
    gradient_norm = nn.utils.clip_grad_norm_(model.parameters(), max_norm=1.0)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
    return gradient_norm


def move_routing_biases(model, routed, gamma):
    """b_i ± γ in each layer, against its load; returns {layer: busiest expert's load / mean}."""
    max_load = {}
    for name, layer_pass in zip(model.moe_layers(), routed, strict=True):
        load_E = layer_pass.load().float()
        layer_pass.layer.gate.update_bias(load_E, gamma)
        max_load[name] = round((load_E.max() / load_E.mean()).item(), 4)
    return max_load


# %% The run: this step over batches of the text, with V3's schedules
class TrainingRun(training.TrainingRun):
    """λ falls to a third after two thirds of the training, and γ ends at 0."""

    config_class, model_class = DeepSeekConfig, DeepSeekModel

    def build_optimizers(self):
        muon = self.options.optimizer == "muon"
        return build_optimizers(self.model, self.options.learning_rate, muon)

    def costs(self):
        return parameter_counts(self.model), cache_elements(self.model.config)

    def step(self, number, used):
        """Step `number`, when the share `used` of the budget is spent."""
        options, (ids, document_ids) = self.options, self.batch(number)
        return training_step(
            self.model, self.optimizers, ids, document_ids,
            rate=learning_rate(used, options.learning_rate),
            mtp_weight=options.mtp_weight / (1 if used < 2 / 3 else 3),
            gamma=options.gamma if used < 0.95 else 0.0,
            precision=getattr(torch, options.precision),
        )


class AlignmentRun(aligning.AlignmentRun):
    """Phase 9's steps on the trained model."""

    model_class = DeepSeekModel


# %% The commands
def whole_pipeline(run):
    """The main job: train, read the checkpoint back, score the test part, draw, generate, align."""
    run.go()
    model = DeepSeekModel.from_pretrained(run.checkpoint).to(run.device)
    test = run.corpus.test
    scores = scoring.score(model, run.tokenizer, test)
    rates = scoring.print_scores(scores, test, run.tokenizer, "test part")
    pictures = report.save_results(run, scores, rates)
    generating.show_continuation(model, run.tokenizer, test)
    print(f"checkpoint: {run.checkpoint}   pictures: {', '.join(map(str, pictures))}")
    aligning.align_after_training(run, scores, AlignmentRun)


WHOLE = Command("the main job", RunOptions, whole_pipeline, TrainingRun)
COMMANDS = {  # name: what it does, its flags, the work, and for a run its kind
    "train": Command(
        "train only, or go on with a stopped run", RunOptions, training.train, TrainingRun
    ),
    "evaluate": Command(
        "bits per byte of a checkpoint", scoring.EvaluateOptions, scoring.evaluate
    ),
    "generate": Command("continue a prompt", generating.GenerateOptions, generating.generate),
    "align": Command(
        "reward Python that parses (GRPO)", aligning.AlignOptions, aligning.align, AlignmentRun
    ),
    "quantize": Command(
        "a smaller model of INT8, INT4 or FP8", quantizing.QuantizeOptions, quantizing.quantize
    ),
}


@one_line_errors
def main(argv=None):
    run_command(argv, __doc__, DeepSeekModel, WHOLE, COMMANDS)


if __name__ == "__main__":
    main()

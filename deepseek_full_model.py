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
import math
import pathlib
import sys
from dataclasses import MISSING, asdict, dataclass, fields

import torch
from torch import nn

from lesson import (
    check_settings,
    chosen_settings,
    one_line_errors,
    parse_arguments,
    require,
    setting,
)
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
from pipeline import (
    aligning,
    checkpoint,
    commands,
    corpus,
    decoding,
    generating,
    quantizing,
    released,
    report,
    scoring,
)
from pipeline.fast import head_loss, speed_up
from pipeline.run import (
    PRECISIONS,
    Run,
    fastest_precision,
    learning_rate,
    open_run,
    read_metrics,
)
from rope_coded import RotaryEmbedding, RotaryLatentAttention

HERE = pathlib.Path(__file__).parent

# %% The configuration: the fields of config.json
# What released models of each type have; the first one is meant where the file says nothing.
SUPPORTED = {
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
for methods in SUPPORTED.values():
    methods |= {
        "hidden_act": ("silu",), "tie_word_embeddings": (False,), "attention_dropout": (0.0,),
    }


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
        require(kind in SUPPORTED, f"model_type={kind!r} is not supported, want deepseek_v2 or "
                "deepseek_v3")
        for name, choices in SUPPORTED[kind].items():
            if getattr(self, name) is None:
                setattr(self, name, choices[0])
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        check_settings(self, types=True)
        for name, choices in SUPPORTED[kind].items():
            value, wanted = getattr(self, name), " or ".join(map(repr, choices))
            require(value in choices,
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
        raw = released.spelled_as_released(raw)
        kept = {field.name: raw[field.name] for field in fields(cls) if field.name in raw}
        required = [field.name for field in fields(cls) if field.default is MISSING]
        missing = [name for name in required if kept.get(name) is None]
        missing += ["model_type"] if "model_type" not in raw else []
        require(not missing, f"the configuration lacks {', '.join(missing)}")
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
    feed_forward = build_experts(config) if moe else SwiGLU(
        config.hidden_size, config.intermediate_size
    )
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

    λ = `mtp_weight` weighs the MTP loss; γ = `gamma` is how far the routing bias moves; `rate` is
    the learning rate of all optimizers, `precision` that of the matrix products.
    """
    model.train()
    for optimizer in optimizers:
        optimizer.zero_grad()
        for group in optimizer.param_groups:
            group["lr"] = rate
    routed = []  # what each layer's router decides in this step
    # Autocast: matrix products in `precision`, weights, norms, router and losses in FP32.
    with torch.autocast(ids.device.type, precision, enabled=precision != torch.float32):
        hidden_BTD = model.hidden_states(ids, routed=routed)
        next_loss = head_loss(model.lm_head, hidden_BTD, ids, shift=1)
        depths = model.mtp_hidden_states(hidden_BTD, ids, routed=routed)
        further_losses = [
            head_loss(model.lm_head, states, ids, shift=k + 1, document_ids=document_ids)
            for k, states in enumerate(depths, start=1)
        ]
    further_loss = torch.stack(further_losses).mean() if further_losses else 0.0
    balance_loss = sum(layer_pass.balance_loss() for layer_pass in routed)

    (next_loss + mtp_weight * further_loss + balance_loss).backward()
    gradient_norm = nn.utils.clip_grad_norm_(model.parameters(), max_norm=1.0)
    for optimizer in optimizers:
        optimizer.step()

    max_load = {}
    for name, layer_pass in zip(model.moe_layers(), routed, strict=True):
        load_E = layer_pass.load().float()
        max_load[name] = round((load_E.max() / load_E.mean()).item(), 4)
        layer_pass.layer.gate.update_bias(load_E, gamma)
    return {
        "loss": next_loss.item(),
        "mtp_loss": further_loss.item() if len(model.mtp) else None,
        "balance_loss": torch.as_tensor(balance_loss).item(),
        "gradient_norm": gradient_norm.item(),
        "learning_rate": rate,
        "max_load": max_load,
        "tokens": ids.numel(),
    }


# %% The run: options, and what a step reads
OPTIMIZERS = ("auto", "muon", "adamw")
DEFAULT_MINUTES = 4.6


@dataclass
class RunOptions:
    """What a training run was asked for; stored with its checkpoint, so that it can resume."""

    config: str = setting(
        str(HERE / "configs" / "small.json"),
        "config.json of the model (default: configs/small.json)",
    )
    data: list | None = setting(
        None, "your own UTF-8 text (default: standard library)", metavar="FILE"
    )
    steps: int | None = setting(None, "train for so many steps")
    minutes: float | None = setting(
        None, f"train for so many minutes (default: {DEFAULT_MINUTES})"
    )
    seed: int = setting(0, at_least=0)
    batch_size: int = setting(4, at_least=1)
    sequence_length: int = setting(256, at_least=3)
    learning_rate: float = setting(3e-3, above=0)
    precision: str = setting(
        "auto", "of matrix products (default: auto, the faster)", choices=PRECISIONS
    )
    optimizer: str = setting(
        "auto", "default: auto, muon where BF16 is the faster precision", choices=OPTIMIZERS
    )
    mtp_weight: float = setting(0.3, at_least=0)
    gamma: float = setting(0.005, at_least=0)

    def __post_init__(self):
        check_settings(self, as_flags=True)

    def settle(self, device):
        """Replaces each "auto" by what is faster on `device`; a resumed run keeps it."""
        if "auto" in (self.precision, self.optimizer):
            faster = fastest_precision(device)
            self.precision = faster if self.precision == "auto" else self.precision
            if self.optimizer == "auto":
                # Muon orthogonalises in BF16: without units for it, a step takes seconds.
                self.optimizer = "muon" if faster == "bfloat16" else "adamw"


class TrainingRun(Run):
    """Everything between the options and a trained checkpoint in `directory`/checkpoint."""

    options_class, default_minutes = RunOptions, DEFAULT_MINUTES

    def __init__(self, directory, options, device, resume=False):
        super().__init__(directory, options, device)
        options.settle(device)
        self.corpus = corpus.load_corpus(options.data)
        torch.manual_seed(options.seed)
        self.tokenizer, self.model = self.stored() if resume else self.fresh()
        self.model.to(device)
        context, length = self.model.config.max_position_embeddings, options.sequence_length
        require(length <= context,
                f"--sequence-length={length} exceeds max_position_embeddings={context}")
        self.optimizers = build_optimizers(
            self.model, options.learning_rate, muon=options.optimizer == "muon"
        )
        if resume:
            self.restore_optimizers()
        stream = corpus.token_stream(self.tokenizer, self.corpus.train)
        self.batches = corpus.Batches(stream, options.batch_size, length, options.seed)

    def fresh(self):
        """Tokenizer and model of a new run; the tokenizer may be smaller than its maximum."""
        config = DeepSeekConfig.from_file(self.options.config)
        require(config.quantization_config is None,
                f"{self.options.config}: a quantised model cannot be trained")
        tokenizer = corpus.train_tokenizer(self.corpus.train, config.vocab_size)
        config.vocab_size = tokenizer.get_vocab_size()
        return tokenizer, DeepSeekModel(config)

    def stored(self):
        """Tokenizer and model of the run's checkpoint."""
        require(not (self.checkpoint / AlignmentRun.record).exists(),
                f"{self.directory} is an alignment: go on with align --resume")
        self.read_record()
        tokenizer = corpus.load_tokenizer(self.checkpoint / "tokenizer.json")
        model = DeepSeekModel.from_pretrained(self.checkpoint)
        require(model.quantization is None,
                f"{self.checkpoint} is quantised: it cannot be trained")
        return tokenizer, model

    def step(self, number, used):
        """Step `number`, when the share `used` of the budget is spent.

        V3's schedules: λ falls to a third after two thirds of the training, γ ends at 0.
        """
        ids, document_ids = (part.to(self.device) for part in self.batches[number])
        return training_step(
            self.model, self.optimizers, ids, document_ids,
            rate=learning_rate(used, self.options.learning_rate),
            mtp_weight=self.options.mtp_weight / (1 if used < 2 / 3 else 3),
            gamma=self.options.gamma if used < 0.95 else 0.0,
            precision=getattr(torch, self.options.precision),
        )

    def go(self):
        report.print_header(self, parameter_counts(self.model), cache_elements(self.model.config))
        super().go()
        step, tokens, seconds = self.state.step, self.state.tokens, self.state.seconds
        print(f"trained {step} steps, {tokens:,} tokens in {seconds:.0f} s: "
              f"{tokens / seconds:,.0f} tokens/s")


class AlignmentRun(aligning.AlignmentRun):
    model_class = DeepSeekModel


# %% The commands
def whole_pipeline(arguments):
    """The main job: train, read the checkpoint back, score the test part, draw, generate, align."""
    run = open_run(arguments, TrainingRun)
    run.go()
    model = DeepSeekModel.from_pretrained(run.checkpoint).to(run.device)
    test = run.corpus.test
    scores = scoring.score(model, run.tokenizer, test)
    rates = scoring.print_scores(scores, test, run.tokenizer, "test part")
    metrics = read_metrics(run.metrics)
    pictures = [run.directory / "loss.png", run.directory / "expert_load.png"]
    report.draw_losses(metrics, pictures[0])
    report.draw_expert_load(metrics, pictures[1])
    checkpoint.write_json(
        run.directory / "results.json",
        {"bits_per_byte": rates, "test": scores, "training": asdict(run.state),
         "python": sys.version.split()[0], "corpus": run.corpus.fingerprint},
    )
    generating.show_continuation(model, run.tokenizer, test)
    print(f"checkpoint: {run.checkpoint}   pictures: {', '.join(map(str, pictures))}")
    align_after_training(run, scores)


def align_after_training(run, scores):
    """The last step of the main job, with as large a part of its budget as by default."""
    steps, minutes = run.options.steps, run.options.minutes
    options = aligning.AlignOptions(
        str(run.checkpoint), run.options.data,
        steps=steps and math.ceil(steps / 10),
        minutes=minutes and minutes * aligning.DEFAULT_MINUTES / DEFAULT_MINUTES,
        seed=run.options.seed, precision=run.options.precision,
        max_new_tokens=min(aligning.AlignOptions.max_new_tokens, run.model.max_positions // 2),
    )
    try:
        alignment = AlignmentRun(run.directory / "aligned", options, run.device)
    except aligning.NoPrompts as error:
        print(f"not aligned: {error}")
        return
    aligning.align(alignment, scores)


def train(arguments):
    run = open_run(arguments, TrainingRun)
    run.go()
    validation = run.corpus.validation
    scores = scoring.score(run.model, run.tokenizer, validation)
    scoring.print_scores(scores, validation, run.tokenizer, "validation part")
    print(f"checkpoint: {run.checkpoint}")


def align(arguments):
    require(arguments.resume is not None or hasattr(arguments, "source"),
            "want --checkpoint DIR or --resume RUN")
    aligning.align(open_run(arguments, AlignmentRun))


def load_with_tokenizer(directory, device):
    """(model, tokenizer, directory) of a checkpoint or of a run."""
    return released.load_with_tokenizer(DeepSeekModel, directory, device)


def on_checkpoint(work, options_class):
    """A command: the loaded --checkpoint and the options go to a room of pipeline/."""

    def command(arguments):
        options = options_class(**chosen_settings(arguments, options_class))
        work(load_with_tokenizer(options.checkpoint, arguments.device), options)

    return command


COMMANDS = {  # name: what it does, the dataclass of its flags, the function
    "train": ("train only, or go on with a stopped run", RunOptions, train),
    "evaluate": (
        "bits per byte of a checkpoint", scoring.EvaluateOptions,
        on_checkpoint(scoring.evaluate, scoring.EvaluateOptions),
    ),
    "generate": (
        "continue a prompt", generating.GenerateOptions,
        on_checkpoint(generating.generate, generating.GenerateOptions),
    ),
    "align": ("reward Python that parses (GRPO)", aligning.AlignOptions, align),
    "quantize": (
        "a smaller model of INT8, INT4 or FP8", quantizing.QuantizeOptions,
        on_checkpoint(quantizing.quantize, quantizing.QuantizeOptions),
    ),
}


@one_line_errors
def main(argv=None):
    parser = commands.build_parser(__doc__, whole=(RunOptions, whole_pipeline), commands=COMMANDS)
    arguments = parse_arguments(parser, argv)
    arguments.command(arguments)


if __name__ == "__main__":
    main()

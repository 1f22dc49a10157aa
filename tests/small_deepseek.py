"""Small models of every kind that phase 10 and the rooms around it are tested on."""

import pytest
import torch

from deepseek_full_model import DeepSeekConfig, DeepSeekModel

YARN = {
    "type": "yarn", "factor": 8.0, "original_max_position_embeddings": 16, "beta_fast": 32,
    "beta_slow": 1, "mscale": 0.707, "mscale_all_dim": 0.707,
}
COMMON = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 12,
    "num_hidden_layers": 3, "num_attention_heads": 4, "kv_lora_rank": 12, "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8, "v_head_dim": 6, "n_routed_experts": 8, "num_experts_per_tok": 2,
    "first_k_dense_replace": 1, "max_position_embeddings": 128,
}
V2 = {"model_type": "deepseek_v2"}
KINDS = {
    "v2_lite": {**COMMON, **V2, "n_shared_experts": 2, "topk_method": "greedy"},
    "v2_lite_wide": {**COMMON, **V2, "topk_method": "greedy", "num_experts_per_tok": 6,
                     "v_head_dim": 16, "moe_intermediate_size": 20, "hidden_size": 40},
    "v2": {**COMMON, **V2, "q_lora_rank": 16, "topk_method": "group_limited_greedy", "n_group": 4,
           "topk_group": 2, "routed_scaling_factor": 16.0, "num_experts_per_tok": 3,
           "rms_norm_eps": 1e-2},  # the norms inside attention keep 1e-6
    "v2_two_groups": {**COMMON, **V2, "q_lora_rank": 8, "topk_method": "group_limited_greedy",
                      "n_group": 2, "topk_group": 1, "first_k_dense_replace": 0},
    "v3": {**COMMON, "q_lora_rank": 16, "n_group": 4, "topk_group": 2,
           "routed_scaling_factor": 2.5, "num_experts_per_tok": 3},
    "v3_plain_queries": {**COMMON, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 4,
                         "attention_bias": True, "q_lora_rank": None, "first_k_dense_replace": 2},
}
EVERY_KIND = pytest.mark.parametrize("kind", KINDS)
WITH_AND_WITHOUT_YARN = pytest.mark.parametrize("yarn", [None, YARN], ids=["plain", "yarn"])
WIDE = {
    "hidden_size": 64, "kv_lora_rank": 32, "q_lora_rank": 32, "v_head_dim": 16,
    "moe_intermediate_size": 64, "intermediate_size": 64, "num_nextn_predict_layers": 2,
}


def build(kind="v3", yarn=None, std=0.3, **changes):
    config = DeepSeekConfig(**{**KINDS[kind], "rope_scaling": yarn, **changes})
    model = DeepSeekModel(config)
    model.init_weights(std)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                parameter.normal_(std=0.2)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.uniform_(-0.3, 0.3)
    return model.eval()


def ids_of(*shape, vocab=61):
    return torch.randint(vocab, shape)

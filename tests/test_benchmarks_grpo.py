"""The study of GRPO's variants and of the routing: what it counts, and that it runs."""

import json
import pathlib
import sys

import pytest
import torch

from grpo_coded import (
    END,
    Settings,
    Task,
    decode,
    encode,
    roll_out,
    small_policy,
)
from moe_coded import SwiGLU, TransformerBlock
from mtp_coded import CausalLM
from pipeline.trainer import GRPOTrainer
from rope_coded import RotaryEmbedding, RotaryLatentAttention

sys.path.append(str(pathlib.Path(__file__).parent.parent / "benchmarks"))  # as its scripts find it
from benchmarks.grpo import (  # noqa: E402
    CHANGES,
    another,
    chosen_experts,
    decoding_routing,
    routing_flips,
    routing_report,
    run,
    training_routing,
)

IN_FP32 = "cached rollout → training forward, FP32"


def likes_ones(prompt, completions):
    """A reward that every policy can find."""
    return [text.count("1") / 5 for text in completions]


def trainer_for(policy, **settings):
    settings = Settings(**{**dict(prompts=4, group_size=4, minibatches=1), **settings})
    task = Task(likes_ones, [encode("1+2="), encode("12+34=")], decode, END)
    return GRPOTrainer(policy, task, settings)


def test_routing_flips_by_hand():
    one = torch.tensor([[[[0, 1], [0, 2], [1, 2]], [[0, 1], [0, 1], [0, 1]]]])  # (1, 2, 3, 2)
    other = one.clone()
    other[0, 0, 1] = torch.tensor([1, 3])
    other[0, 1, 2] = torch.tensor([2, 3])  # followed by padding: does not count
    mask = torch.tensor([[True, True, True, True], [True, True, False, False]])
    assert routing_flips(one, other, mask) == (1, 4)
    assert routing_flips(one[:, :, :2], other[:, :, :2], mask) == (1, 3)


def test_experts_of_decoding_are_those_of_each_sequence_alone():
    policy, prompts = small_policy(32, 2), [encode("1+2="), encode("12+34=")]
    rollout = roll_out(policy, prompts, 2, 4, END, generator=torch.Generator().manual_seed(0))
    decoded = decoding_routing(policy, rollout)
    _, trained = training_routing(policy, rollout)
    assert decoded.shape == trained.shape == (2, 4, 3, 2)
    for i in range(4):
        length = int(rollout.mask[i].sum())
        prompt, routed = prompts[i // 2], []
        ids = torch.cat([torch.tensor(prompt), rollout.completions[i, :length]])[None]
        policy.hidden_states(ids, routed=routed)
        alone = chosen_experts(routed, 1)[:, 0, len(prompt) : -1]
        for found in (decoded, trained):
            assert torch.equal(found[:, i, : length - 1], alone)


def test_routing_is_the_same_decoded_and_trained():
    trainer = trainer_for(small_policy(32, 2), gamma=0.5)
    before = [p.clone() for p in trainer.policy.state_dict().values()]
    report = routing_report(trainer, gamma=0.3)
    assert report[IN_FP32][0] == 0 and report[IN_FP32][3] < 1e-4
    assert report["routing bias moved by ±0.3"][0] > 0
    assert report["routing bias moved by ±0.3"][2] > 1e-4  # and then ρ is not 1 any more
    assert report["after the updates of one rollout"][2] > 1e-4
    assert all(figures[1] > 0 for figures in report.values())
    for one, other in zip(before, trainer.policy.state_dict().values(), strict=True):
        assert torch.equal(one, other)


def test_routing_report_at_another_temperature_and_without_experts():
    report = routing_report(trainer_for(small_policy(32, 2), temperature=0.5))
    assert report[IN_FP32][3] < 1e-4
    with pytest.raises(ValueError, match="no routing to compare"):
        routing_report(trainer_for(small_policy(32, 2), max_new_tokens=1))
    attention = RotaryLatentAttention(16, 2, 8, 4, 4, 4, rotary=RotaryEmbedding(4))
    dense = CausalLM(END + 1, 16, [TransformerBlock(attention, SwiGLU(16, 16))], max_positions=16)
    with pytest.raises(ValueError, match="no routing to compare"):
        routing_report(trainer_for(dense))


def test_runs_start_from_one_policy_and_draw_as_many_completions():
    trainer = trainer_for(small_policy(32, 2))
    before = trainer.policy.lm_head.weight.clone()
    for changes in CHANGES.values():
        learner = another(trainer, Settings(prompts=4, group_size=4, **changes))
        assert torch.equal(learner.policy.lm_head.weight, before)
        history, accuracy = run(learner, ["1+2="], 40, "test")
        drawn = [line["completions"] for line in history]
        assert sum(drawn[:-1]) < 40 <= sum(drawn) and 0 <= accuracy <= 1
    assert torch.equal(trainer.policy.lm_head.weight, before)


@pytest.mark.integration
@pytest.mark.parametrize("part", ["compare", "routing"])
def test_quick_run_prints_and_saves(part, run_script, tmp_path):
    result = run_script("benchmarks/grpo.py", "--quick", f"--{part}", timeout=180)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("grpo.py · processor") and "warmed up by 40" in result.stdout
    saved = json.loads((tmp_path / "benchmark_results/grpo.json").read_text())
    assert saved["quick"] and set(saved["results"]) == {part}
    if part == "compare":
        assert set(saved["results"]["compare"]) == set(CHANGES)
        assert "after 256 completions each" in result.stdout
    else:
        assert saved["results"]["routing"][IN_FP32][0] == 0


@pytest.mark.integration
def test_a_wrong_flag_is_one_line(run_script):
    result = run_script("benchmarks/grpo.py", "--steps", "0")
    assert result.returncode == 2
    assert result.stderr == "error: --steps=0 must be at least 1\n"

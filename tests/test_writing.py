"""Writing texts with any model: here one that knows no lesson and counts 0 1 2 … 9 0 1 …"""

import dataclasses

import pytest
import torch
from torch import nn

from lesson.writing import Generation, LanguageModel, SamplingOptions


class Remembered:
    """A cache of what was read."""

    def __init__(self):
        self.length = 0

    def used_bytes(self):
        return self.length

    def repeat(self, times):
        self.times = times


class Attention(nn.Module):
    new_cache = staticmethod(Remembered)


class Block(nn.Module):
    def __init__(self, mlp):
        super().__init__()
        self.self_attn, self.mlp = Attention(), mlp


class Greedy(SamplingOptions):
    greedy = True


class Drawn(SamplingOptions):
    """Always draws the least likely token."""

    greedy = False

    def probabilities(self, logits):
        return self.limited(logits.softmax(dim=-1))

    def draw(self, probabilities):
        return probabilities.argmin(dim=-1)


class Counting(LanguageModel):
    """Its state of a token is the one-hot row of the next one."""

    sampling = Greedy

    def __init__(self, max_positions=None, modules=()):
        super().__init__()
        mixture = nn.Identity()
        mixture.experts = nn.ModuleList()
        self.embed_tokens, self.lm_head = nn.Embedding(10, 10), nn.Identity()
        self.layers, self.mtp = nn.ModuleList([Block(nn.Identity()), Block(mixture)]), modules
        self.max_positions, self.read = max_positions, []

    def hidden_states(self, input_ids, attention_mask=None, caches=None, path="expanded"):
        self.places(input_ids, attention_mask, caches)
        self.masks = getattr(self, "masks", []) + [attention_mask]
        self.read.append((tuple(input_ids.shape), path))
        for cache in caches:
            cache.length += input_ids.shape[1]
        return nn.functional.one_hot((input_ids + 1) % 10, 10).float()


def test_prompts_are_continued_and_each_token_is_read_once():
    model = Counting()
    assert model.generate(torch.tensor([[3, 4], [8, 9]]), 3).tolist() == [
        [3, 4, 5, 6, 7], [8, 9, 0, 1, 2]
    ]
    assert model.read == [((2, 2), "expanded"), ((2, 1), "absorbed"), ((2, 1), "absorbed")]


def test_rows_of_unequal_length_end_where_they_say():
    ids, mask = torch.tensor([[0, 4], [1, 2]]), torch.tensor([[0, 1], [1, 1]])
    result = Counting().complete(ids, 9, Greedy(), mask, eos_token_id=6, pad_token_id=8)
    assert result.ids[:, 2:].tolist() == [
        [5, 6, 8, 8, 8, 8, 8, 8, 8], [3, 4, 5, 6, 8, 8, 8, 8, 8]
    ]
    assert (result.forwards, result.tokens, result.cache_bytes) == (4, 4, 2 * 5)


def test_copies_of_a_prompt_are_read_once_and_lie_one_below_the_other():
    model = Counting()
    ids, mask = torch.tensor([[0, 4], [1, 2]]), torch.tensor([[0, 1], [1, 1]])
    result = model.complete(ids, 2, Greedy(), mask, copies=3)
    assert result.ids.tolist() == 3 * [[0, 4, 5, 6]] + 3 * [[1, 2, 3, 4]]
    assert model.read == [((2, 2), "expanded"), ((6, 1), "absorbed")]
    assert model.masks[1].tolist() == 3 * [[0, 1, 1]] + 3 * [[1, 1, 1]]  # new tokens are real
    assert result.logprobs.shape == (6, 2) and not result.logprobs.any()
    assert result.cache_bytes == 2 * 3
    with pytest.raises(ValueError, match="copies=0 must be at least 1"):
        model.complete(ids, 2, Greedy(), copies=0)


def test_nothing_is_read_for_no_new_tokens_and_padding_is_0_unless_told():
    model, ids = Counting(), torch.tensor([[3, 4]], dtype=torch.int32)
    assert torch.equal(model.generate(ids, 0), ids.long()) and model.read == []
    assert model.generate(ids, 4, eos_token_id=6).tolist() == [[3, 4, 5, 6, 0, 0]]
    assert len(model.read) == 2
    (result,) = [model.complete(ids, 4, Greedy(), eos_token_id=6)]
    assert result.logprobs.shape == (1, 4) and not result.logprobs[:, 2:].any()


def test_drawn_tokens_come_with_their_log_probabilities():
    logits = torch.tensor([[0.0, 1.0, 2.0], [2.0, 0.0, 1.0]])
    tokens, logprobs = Drawn().choose(logits)
    assert tokens.tolist() == [0, 1]
    torch.testing.assert_close(logprobs, logits.log_softmax(dim=-1).amin(dim=-1))
    tokens, logprobs = Greedy().choose(logits.double())
    assert tokens.tolist() == [2, 0] and logprobs.tolist() == [0, 0]
    assert logprobs.dtype == torch.float32


def test_generating_passes_its_options_of_sampling_on():
    class Noted(Greedy):
        def choose(self, logits):
            seen.append((self.temperature, self.top_k, self.top_p, self.generator))
            return super().choose(logits)

    seen, model, generator = [], Counting(), torch.Generator()
    model.sampling = Noted
    model.generate(torch.tensor([[3]]), 1)
    model.generate(torch.tensor([[3]]), 1, 0.5, generator=generator, top_k=4, top_p=0.75)
    assert seen == [(0.0, None, None, None), (0.5, 4, 0.75, generator)]


def test_places_follow_the_cached_tokens():
    model, cache = Counting(max_positions=5), Remembered()
    ids, mask = torch.tensor([[0, 4], [1, 2]]), torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    cache.length = 2
    options = model.places(ids, mask, [cache])
    assert options["positions"].tolist() == [[1, 2], [2, 3]]
    assert model.places(ids, None, [cache]) == {}
    with pytest.raises(ValueError, match=r"attention_mask must be \(2, 4\), got \(2, 2\)"):
        model.places(ids, mask[:, 2:], [cache])
    with pytest.raises(ValueError, match="6 tokens exceed the context of 5"):
        cache.length = 4
        model.places(ids, None, [cache])


def test_what_does_not_fit_is_named():
    model = Counting(max_positions=5)
    assert model.limits == dict(vocabulary=10, longest=5)
    with pytest.raises(ValueError, match="prompt of 3 and 3 new tokens exceed the context of 5"):
        model.generate(torch.ones(1, 3, dtype=torch.long), 3)
    with pytest.raises(ValueError, match=r"attention_mask must be \(1, 3\), got \(1, 2\)"):
        model.places(torch.ones(1, 3, dtype=torch.long), torch.ones(1, 2))
    with pytest.raises(ValueError, match="top_p=2 must be at most 1"):
        SamplingOptions(top_p=2)
    for name in ("temperature", "top_k", "top_p"):  # checked once, so they stay as they are
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(SamplingOptions(), name, 1)


def test_a_text_without_figures_has_cost_nothing():
    assert dataclasses.astuple(Generation(torch.ones(1, 2)))[1:] == (None, 0, 0, 0, 0, 0)


def test_parts_have_names():
    model = Counting()
    assert model.moe_layers() == {"layer 1": model.layers[1].mlp}
    assert model.blocks() == list(model.layers) and model.prepared() is model
    copied = model.copy()
    assert copied.embed_tokens.weight is not model.embed_tokens.weight


def test_modules_that_predict_further_tokens_have_names_too():
    with_experts, without = Block(nn.Identity()), Block(nn.Identity())
    with_experts.mlp.experts = nn.ModuleList()
    further = nn.ModuleList([nn.Module(), nn.Module()])
    further[0].block, further[1].block = with_experts, without
    model = Counting(modules=further)
    assert model.blocks() == [*model.layers, with_experts, without]
    assert list(model.moe_layers().items()) == [
        ("layer 1", model.layers[1].mlp), ("MTP 1", with_experts.mlp)
    ]
    assert len(model.new_caches()) == 2  # those of the main model


def test_limits_leave_out_the_unlikely():
    probabilities = torch.tensor([0.5, 0.1, 0.3, 0.1])
    for none in (dict(top_k=4), dict(top_k=9), dict(top_p=1.0)):
        torch.testing.assert_close(SamplingOptions(**none).limited(probabilities), probabilities)
    for one in (dict(top_k=1), dict(top_p=0.1), dict(top_p=0.5), dict(top_k=2, top_p=0.6)):
        assert SamplingOptions(**one).limited(probabilities).tolist() == [1, 0, 0, 0]
    unlikely = torch.tensor([1.0, 1e-9])  # the sum is 1 already without it
    assert SamplingOptions(top_p=1.0).limited(unlikely).tolist() == unlikely.tolist()
    rows = torch.stack([probabilities, probabilities.flip(0)])
    assert SamplingOptions(top_k=1).limited(rows).tolist() == [[1, 0, 0, 0], [0, 0, 0, 1]]
    assert SamplingOptions(top_p=0.5).limited(rows).tolist() == [[1, 0, 0, 0], [0, 0, 0, 1]]
    torch.testing.assert_close(SamplingOptions().limited(probabilities), probabilities)
    two = torch.tensor([0.625, 0, 0.375, 0])
    torch.testing.assert_close(SamplingOptions(top_k=2).limited(probabilities), two)
    torch.testing.assert_close(SamplingOptions(top_p=0.7).limited(probabilities), two)

"""Writing texts with any model: here one that knows no lesson and counts 0 1 2 … 9 0 1 …"""

import pytest
import torch
from torch import nn

from lesson.writing import LanguageModel, SamplingOptions


class Remembered:
    """A cache of what was read."""

    def __init__(self):
        self.length = 0

    def used_bytes(self):
        return self.length


class Attention(nn.Module):
    new_cache = staticmethod(Remembered)


class Block(nn.Module):
    def __init__(self, mlp):
        super().__init__()
        self.self_attn, self.mlp = Attention(), mlp


class Greedy(SamplingOptions):
    greedy = True


class Counting(LanguageModel):
    """Its state of a token is the one-hot row of the next one."""

    sampling = Greedy

    def __init__(self, max_positions=None):
        super().__init__()
        mixture = nn.Identity()
        mixture.experts = nn.ModuleList()
        self.embed_tokens, self.lm_head = nn.Embedding(10, 10), nn.Identity()
        self.layers, self.mtp = nn.ModuleList([Block(nn.Identity()), Block(mixture)]), []
        self.max_positions, self.read = max_positions, []

    def hidden_states(self, input_ids, attention_mask=None, caches=None, path="expanded"):
        self.places(input_ids, attention_mask, caches)
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


def test_what_does_not_fit_is_named():
    model = Counting(max_positions=5)
    assert model.limits == dict(vocabulary=10, longest=5)
    with pytest.raises(ValueError, match="prompt of 3 and 3 new tokens exceed the context of 5"):
        model.generate(torch.ones(1, 3, dtype=torch.long), 3)
    with pytest.raises(ValueError, match=r"attention_mask must be \(1, 3\), got \(1, 2\)"):
        model.places(torch.ones(1, 3, dtype=torch.long), torch.ones(1, 2))
    with pytest.raises(ValueError, match="top_p=2 must be at most 1"):
        SamplingOptions(top_p=2)


def test_parts_have_names():
    model = Counting()
    assert model.moe_layers() == {"layer 1": model.layers[1].mlp}
    assert model.blocks() == list(model.layers) and model.prepared() is model
    copied = model.copy()
    assert copied.embed_tokens.weight is not model.embed_tokens.weight


def test_limits_leave_out_the_unlikely():
    probabilities = torch.tensor([0.5, 0.1, 0.3, 0.1])
    torch.testing.assert_close(SamplingOptions().limited(probabilities), probabilities)
    two = torch.tensor([0.625, 0, 0.375, 0])
    torch.testing.assert_close(SamplingOptions(top_k=2).limited(probabilities), two)
    torch.testing.assert_close(SamplingOptions(top_p=0.7).limited(probabilities), two)

"""Phase 2: masks and the causal head."""

import re

import pytest
import torch
import torch.nn.functional as F

from causal_attention_coded import (
    CausalSelfAttention,
    causal_attention_loops,
    causal_mask,
    gradient_reach,
    largest_leak_by_perturbation,
    main,
)
from self_attention_coded import scaled_dot_product_attention


def test_mask_by_hand():
    assert causal_mask(3).int().tolist() == [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    assert causal_mask(2, 4).int().tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    shown = re.findall(r"^ +([01](?: [01])+)$", causal_mask.__doc__, re.MULTILINE)
    assert causal_mask(2, 4).int().tolist() == [list(map(int, row.split())) for row in shown]
    assert causal_mask(1, 5).all()


@pytest.mark.comparison
def test_square_mask_matches_pytorch_is_causal():
    q, k, v = torch.randn(3, 2, 6, 4).unbind(0)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    output, _ = scaled_dot_product_attention(q, k, v, causal_mask(6))
    torch.testing.assert_close(output, expected)


def test_mask_matches_growing_key_lists_with_an_offset():
    q, k, v = torch.randn(3, 2), torch.randn(8, 2), torch.randn(8, 5)
    output, _ = scaled_dot_product_attention(q, k, v, causal_mask(3, 8))
    torch.testing.assert_close(output, causal_attention_loops(q, k, v))


def test_no_output_depends_on_a_later_token():
    attention, x = CausalSelfAttention(6, 4), torch.randn(7, 6)
    assert largest_leak_by_perturbation(attention, x) == 0
    reach = gradient_reach(attention, x)
    assert (reach.triu(1) == 0).all() and (reach.tril().diagonal() > 0).all()


def test_the_leak_detectors_see_a_leak():
    from self_attention_coded import SelfAttention

    attention, x = SelfAttention(6, 4), torch.randn(7, 6)
    assert largest_leak_by_perturbation(attention, x) > 0
    assert (gradient_reach(attention, x).triu(1) > 0).any()


def test_padding_mask_only_takes_keys_away():
    attention, x = CausalSelfAttention(6, 4), torch.randn(1, 5, 6)
    real = torch.tensor([False, True, True, True, True])
    torch.testing.assert_close(attention(x, mask=real)[:, 1:], attention(x[:, 1:]))
    everything = torch.ones(5, 5, dtype=torch.bool)
    torch.testing.assert_close(attention(x, mask=everything), attention(x))


def test_fully_masked_rows_give_zeros():
    attention, x = CausalSelfAttention(6, 4), torch.randn(1, 5, 6)
    output = attention(x, mask=torch.zeros(5, 5, dtype=torch.bool))
    assert (output == 0).all()


def test_dropout_acts_in_training_only():
    attention, x = CausalSelfAttention(6, 4, dropout=0.5), torch.randn(2, 9, 6)
    assert not torch.equal(attention(x), attention(x))
    attention.eval()
    assert torch.equal(attention(x), attention(x))


@pytest.mark.parametrize("bias", [True, False])
def test_bias_reaches_all_projections(bias):
    attention = CausalSelfAttention(6, 4, bias=bias)
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    assert all((projection.bias is not None) == bias for projection in projections)


def test_masks_are_made_where_the_input_is():
    assert causal_mask(2, 4, device="meta").is_meta
    assert CausalSelfAttention(6, 4).to("meta")(torch.randn(5, 6, device="meta")).is_meta


def test_every_parameter_gets_a_gradient():
    attention = CausalSelfAttention(6, 4)
    attention(torch.randn(2, 5, 6)).square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in attention.parameters())


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="key_length=2 must be at least query_length=3"):
        causal_mask(3, 2)
    with pytest.raises(ValueError, match="dropout=1.0 must be at least 0 and below 1"):
        CausalSelfAttention(4, 4, dropout=1.0)
    with pytest.raises(ValueError, match="dropout=-0.1 must be at least 0"):
        CausalSelfAttention(4, 4, dropout=-0.1)


def test_the_leak_detectors_by_hand():
    def attention(x):  # output 0 leaks −2 · token 1; output 1 is 3 · token 0 + token 1
        return torch.stack([x[0] - 2 * x[1] * columns, 3 * x[0] + x[1]])

    x = torch.randn(2, 4, dtype=torch.float64)
    columns = torch.tensor([0, 1, 0, 0])
    assert largest_leak_by_perturbation(attention, x) == pytest.approx(2)
    columns = torch.ones(4)
    expected = torch.tensor([[2.0, 4.0], [6.0, 2.0]], dtype=torch.float64)
    torch.testing.assert_close(gradient_reach(attention, x), expected)


def test_the_leak_detectors_leave_their_input_alone():
    attention, x = CausalSelfAttention(6, 4), torch.randn(5, 6)
    before = x.clone()
    largest_leak_by_perturbation(attention, x)
    gradient_reach(attention, x)
    assert torch.equal(x, before) and not x.requires_grad
    gradient_reach(attention, torch.nn.Linear(6, 6)(x))  # a tensor with a graph behind it works too


@pytest.mark.integration
def test_script(check_script):
    check_script("causal_attention_coded.py", ["--length", 2], "--length=2")


def test_dropping_all_weights_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["--dropout", "1"])
    assert "--dropout=1.0 must be from 0 to 0.99" in capsys.readouterr().err

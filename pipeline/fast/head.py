"""The output head: packed for decoding, in chunks for training."""

import torch
import torch.nn.functional as F

from mtp_coded import shifted_targets
from pipeline.fast.few_rows import QuickLinear

# Packing costs as much as seven passes save, and small heads gain nothing.
PACK_FROM_TOKENS, PACK_FROM_NUMBERS = 16, 2**20


def decoding_head(head, tokens):
    """`head` for the few rows of a decoding pass. `tokens`: how many tokens will be generated.

    oneDNN's packed product reads a large matrix once for up to four rows and uses all threads. It
    takes 60 µs for 1 to 4 rows times 8,192 × 256; `F.linear` takes 117 for one and 222 for two.
    Packing costs 0.4 ms. It is done again for each text, so the packed weights are never old. A
    head that `speed_up` has not changed, or that is quantised, is returned as it is.
    """
    if type(head) is not QuickLinear:
        return head
    weight = head.weight
    fits = weight.device.type == "cpu" and weight.dtype == torch.float32 and head.bias is None
    pays = tokens >= PACK_FROM_TOKENS and weight.numel() >= PACK_FROM_NUMBERS
    if not (fits and pays and torch.backends.mkldnn.is_available()):
        return head
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), 4)  # for about 4 rows
    no_bias, nothing_after = None, ("none", [], "")
    return lambda rows: torch.ops.mkldnn._linear_pointwise(rows, packed, no_bias, *nothing_after)


def head_loss(head, hidden, input_ids, shift, document_ids=None, token_mask=None):
    """Mean cross-entropy in nats of the head's guess at token i + shift, from hidden states.

    It equals `shifted_loss(head(hidden), input_ids, shift, ...)`, but never stores all logits.
    hidden (B, ≤ T, D); input_ids, document_ids and token_mask (B, T).
    """
    targets = shifted_targets(input_ids, hidden.shape[1], shift, document_ids, token_mask)
    device, precision = hidden.device.type, hidden.dtype
    if torch.is_autocast_enabled(device):
        precision = torch.get_autocast_dtype(device)
    rows, weight = hidden.flatten(0, 1).to(precision), head.weight.to(precision)
    total = ChunkedHeadLoss.apply(rows, weight, targets.flatten())
    return total / (targets != -100).sum().clamp(min=1)


class ChunkedHeadLoss(torch.autograd.Function):
    """The sum of cross-entropies of `F.linear(hidden, weight)`, computed in chunks of rows.

    hidden (M, D), weight (W, D), targets (M,) with −100 = none → a scalar, at least in FP32. With a
    large vocabulary, logits are the largest tensors of a training step. Here, the FP32 logits of
    one chunk stay in the processor's cache while its gradient, softmax − one-hot, is computed. Only
    the gradient is stored as a whole, in the precision of `hidden`. With two heads of 1,024 rows by
    8,192 tokens in BF16, a whole training step takes 228 ms instead of 350.
    """

    ROWS = 256

    @staticmethod
    def forward(ctx, hidden, weight, targets):
        total, wanted = 0.0, any(ctx.needs_input_grad)
        gradients = hidden.new_empty(len(hidden), len(weight)) if wanted else None
        for start in range(0, len(hidden), ChunkedHeadLoss.ROWS):
            rows = slice(start, start + ChunkedHeadLoss.ROWS)
            logits = F.linear(hidden[rows], weight)
            exact = torch.promote_types(logits.dtype, torch.float32)
            log_p = logits.log_softmax(dim=-1, dtype=exact)
            counted, target = (targets[rows] != -100)[:, None], targets[rows].clamp(min=0)[:, None]
            total = total - (log_p.gather(1, target) * counted).sum()
            if wanted:
                minus_one = -torch.ones_like(target, dtype=log_p.dtype)
                gradients[rows] = log_p.exp_().scatter_add_(1, target, minus_one)
        if wanted:
            gradients[targets == -100] = 0.0
            ctx.save_for_backward(gradients @ weight, gradients.T @ hidden)
        return torch.as_tensor(total, device=hidden.device)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, scale):
        hidden_gradient, weight_gradient = ctx.saved_tensors
        return hidden_gradient * scale, weight_gradient * scale, None

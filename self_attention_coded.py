"""Phase 1: self-attention, one head, no mask.

Every token asks a question (its query), offers a label (its key) and carries content (its
value). A token's output is a weighted average of all values; the weight of a value is high when
its key matches the token's query. The weights come from a softmax, so they are positive and sum
to one. Nothing here knows the order of the tokens: that comes with masks (phase 2) and rotary
positions (phase 7).

    Q = X W_Q,  K = X W_K,  V = X W_V
    Attention(Q, K, V) = softmax(Q Kᵀ / √d_k) V

Paper: Vaswani et al., "Attention Is All You Need" (2017), section 3.2.1, equation 1.
Simplified: one head, no output projection (both arrive in phase 3).

Dimensions: B batch · T query positions · S key positions · D model width · K query/key width ·
V value width.

Run:  python self_attention_coded.py [--d-k 256] [--seed 0] [--device cpu]
"""

import argparse
import functools
import math
import sys

import torch
from torch import nn


# %% The naive reference: one sequence, explicit loops
def self_attention_loops(x, w_q, w_k, w_v):
    """Attention of one sequence, a query at a time and a key at a time.

    Args: `x` (T, D); `w_q`, `w_k` (K, D) and `w_v` (V, D), laid out as `nn.Linear.weight`.
    Returns: output (T, V) and weights (T, T).
    """
    queries = [w_q @ token for token in x]
    keys = [w_k @ token for token in x]
    values = [w_v @ token for token in x]
    d_k = w_q.shape[0]
    outputs, all_weights = [], []
    for query in queries:
        scores = torch.stack([query.dot(key) / math.sqrt(d_k) for key in keys])
        exponentials = torch.exp(scores - scores.max())
        weights = exponentials / exponentials.sum()
        outputs.append(sum(weight * value for weight, value in zip(weights, values, strict=True)))
        all_weights.append(weights)
    return torch.stack(outputs), torch.stack(all_weights)


# %% The same with matrices, for any number of leading dimensions
def scaled_dot_product_attention(query, key, value, mask=None, scale=None, dropout_p=0.0):
    """softmax(Q Kᵀ · scale) V (Vaswani et al., equation 1), returning the weights as well.

    Args:
        query: (..., T, K). key: (..., S, K). value: (..., S, V). Leading dimensions broadcast.
        mask: boolean, broadcastable to (..., T, S); True = this query may attend to this key.
        scale: factor on the scores; default 1/√K.
        dropout_p: share of the weights set to zero (the rest grow to keep the mean), always
            applied when above 0: pass 0.0 outside training.

    Returns: output (..., T, V) and the weights (..., T, S) that made it. A query that may attend
        to nothing gets zero weights and a zero output, where a plain softmax would give NaN.

    Raises: ValueError on widths or lengths that do not fit, or a mask that is not boolean.
    """
    if min(query.dim(), key.dim(), value.dim()) < 2:
        raise ValueError("query, key and value must each be (..., length, width)")
    if query.shape[-1] != key.shape[-1]:
        raise ValueError(f"query width {query.shape[-1]} must equal key width {key.shape[-1]}")
    if key.shape[-2] != value.shape[-2]:
        raise ValueError(f"got {key.shape[-2]} keys for {value.shape[-2]} values, want as many")
    if scale is None:
        scale = 1.0 / math.sqrt(query.shape[-1])
    scores = query @ key.transpose(-2, -1) * scale
    if mask is not None:
        mask = expanded_mask(mask, scores.shape)
        scores = scores.masked_fill(~mask, float("-inf"))
        # A row of -inf only has no softmax. Zeros keep the forward and the backward pass finite.
        nothing_to_see = ~mask.any(dim=-1, keepdim=True)
        scores = scores.masked_fill(nothing_to_see, 0.0)
        weights = torch.softmax(scores, dim=-1).masked_fill(nothing_to_see, 0.0)
    else:
        weights = torch.softmax(scores, dim=-1)
    weights = nn.functional.dropout(weights, p=dropout_p)
    return weights @ value, weights


def expanded_mask(mask, shape):
    """A boolean mask as a view of shape (..., T, S); ValueError if it is no such mask."""
    if mask.dtype != torch.bool:
        raise ValueError(f"mask must be boolean (True = may attend), got {mask.dtype}")
    try:
        return mask.expand(shape)
    except RuntimeError:
        raise ValueError(
            f"mask must be broadcastable to {tuple(shape)}, got {tuple(mask.shape)}"
        ) from None


# %% The module
class SelfAttention(nn.Module):
    """One head of self-attention: three projections and `scaled_dot_product_attention`.

    `d_in` is the model width D, `d_out` the width of queries, keys and values (K = V).
    """

    def __init__(self, d_in, d_out, bias=False):
        super().__init__()
        if d_in < 1 or d_out < 1:
            raise ValueError(f"d_in and d_out must be at least 1, got {d_in} and {d_out}")
        self.q_proj = nn.Linear(d_in, d_out, bias=bias)
        self.k_proj = nn.Linear(d_in, d_out, bias=bias)
        self.v_proj = nn.Linear(d_in, d_out, bias=bias)

    def project(self, x):
        """(B, T, d_in) or (T, d_in) → queries, keys and values (..., T, d_out)."""
        d_in = self.q_proj.in_features
        if x.dim() < 2 or x.shape[-1] != d_in:
            raise ValueError(f"input must be (..., T, {d_in}), got {tuple(x.shape)}")
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)

    def forward(self, x, mask=None):
        """(B, T, d_in) or (T, d_in) → (..., T, d_out)."""
        output, _ = scaled_dot_product_attention(*self.project(x), mask=mask)
        return output


# %% Why the scale is √d_k
def softmax_health(d_k, scale, queries=256, keys=32, seed=0):
    """How saturated the softmax is for queries and keys of independent unit-variance entries.

    Q·K is then a sum of d_k products of variance 1: its standard deviation is √d_k. Unscaled, one
    key soon takes all the weight, and the softmax passes ever less of a gradient back to its own
    input as d_k grows; scaled, as much at any d_k.

    Returns: (mean of each row's largest weight, mean norm of the gradient that a unit-variance
        gradient on the weights sends back to the softmax's input).
    """
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(queries, d_k, generator=generator)
    key = torch.randn(keys, d_k, generator=generator)
    scores = (query @ key.T * scale).requires_grad_()
    weights = torch.softmax(scores, dim=-1)
    upstream = torch.randn(weights.shape, generator=generator)
    (gradient,) = torch.autograd.grad(weights, scores, upstream)
    return weights.max(dim=-1).values.mean().item(), gradient.norm(dim=-1).mean().item()


# %% What the demonstration of every phase uses: arguments, header, check lines
class Demonstration:
    """Prints a header, then one line a check; `finish` exits with status 1 if a check failed."""

    def __init__(self, script, device, seed, dtype=torch.float32):
        print(f"{script} · torch {torch.__version__} · {device} · {dtype} · seed {seed}")
        torch.manual_seed(seed)
        self.failures = []

    def check(self, what, shape, figure, ok):
        """One line: what is shown, the shape with its letters, the figure, ok or FAILED."""
        print(f"  {what:<46} {shape:<26} {figure:<40} {'ok' if ok else 'FAILED'}", flush=True)
        if not ok:
            self.failures.append(what)

    def same(self, what, shape, got, want, tolerance=1e-5):
        """A check that two tensors are equal up to rounding."""
        difference = (got - want).abs().max().item()
        self.check(what, shape, f"largest difference {difference:.1e}", difference <= tolerance)

    def note(self, text):
        print(f"  {text}", flush=True)

    def finish(self, *experiments):
        print("Try changing:")
        for experiment in experiments:
            print(f"  {experiment}")
        if self.failures:
            print(f"FAILED: {'; '.join(self.failures)}", file=sys.stderr)
            raise SystemExit(1)


def demonstration_parser(docstring):
    """An argument parser with the flags that every phase has; the docstring is its help."""
    parser = argparse.ArgumentParser(
        description=docstring, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the random inputs")
    parser.add_argument("--device", default=None, help="cuda, mps or cpu; default: best there is")
    return parser


def parse_arguments(parser, argv):
    """`parser.parse_args(argv)`, with no arguments inside IPython, and the device picked."""
    inside_ipython = "IPython" in sys.modules and hasattr(sys.modules["builtins"], "get_ipython")
    arguments = parser.parse_args([] if argv is None and inside_ipython else argv)
    arguments.device = pick_device(getattr(arguments, "device", None))
    return arguments


def pick_device(name=None):
    """The named device, or the best of cuda, mps and cpu. ValueError if it is not there."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    available["cpu"] = True
    if name is None:
        return next(device for device, there in available.items() if there)
    if not available.get(name, False):
        there = ", ".join(device for device, is_there in available.items() if is_there)
        raise ValueError(f"device {name!r} is not available, got here: {there}")
    return name


def one_line_errors(main):
    """Makes a `main` end a user's mistake with one line on stderr and exit status 2."""

    @functools.wraps(main)
    def wrapped(argv=None):
        for stream in (sys.stdout, sys.stderr):  # a console without √ or λ must not end a run
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="replace")
        try:
            return main(argv)
        except (ValueError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(2) from None
        except KeyboardInterrupt:
            print("stopped", file=sys.stderr)
            raise SystemExit(130) from None

    return wrapped


# %% The demonstration
@one_line_errors
def main(argv=None):
    parser = demonstration_parser(__doc__)
    parser.add_argument("--d-k", type=int, default=256, help="largest key width in the scale table")
    arguments = parse_arguments(parser, argv)
    if arguments.d_k < 4:
        raise ValueError(f"--d-k={arguments.d_k} must be at least 4")
    demo = Demonstration("self_attention_coded.py", arguments.device, arguments.seed)

    attention = SelfAttention(d_in=16, d_out=8).to(arguments.device)
    x_BTD = torch.randn(2, 5, 16, device=arguments.device)
    output_BTV = attention(x_BTD)
    demo.check(
        "a vector per token in, a vector per token out",
        "(B, T, D) → (B, T, V)",
        f"{tuple(x_BTD.shape)} → {tuple(output_BTV.shape)}",
        output_BTV.shape == (2, 5, 8),
    )
    projections = (attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight)
    loop_TV, loop_weights_TS = self_attention_loops(x_BTD[1], *projections)
    demo.same("explicit loops = batched matrices", "(T, V)", output_BTV[1], loop_TV)

    _, weights_BTS = scaled_dot_product_attention(*attention.project(x_BTD))
    demo.same("weights of the loops = weights", "(T, S)", weights_BTS[1], loop_weights_TS)
    row_sums_BT = weights_BTS.sum(dim=-1)
    demo.same("each row of weights sums to 1", "(B, T)", row_sums_BT, torch.ones_like(row_sums_BT))
    order = torch.tensor([3, 0, 4, 1, 2])
    demo.same(
        "shuffled tokens give shuffled outputs", "(B, T, V)", attention(x_BTD[:, order]),
        output_BTV[:, order],
    )  # fmt: skip

    demo.note("why √d_k: largest weight of a row, and gradient through the softmax (32 keys)")
    widths = [width for width in (4, 16, 64, 256, 1024) if width < arguments.d_k] + [arguments.d_k]
    for d_k in widths:
        plain_weight, plain_gradient = softmax_health(d_k, scale=1.0, seed=arguments.seed)
        scaled_weight, scaled_gradient = softmax_health(d_k, scale=d_k**-0.5, seed=arguments.seed)
        demo.note(
            f"  d_k {d_k:>4}:  unscaled {plain_weight:.3f}, gradient {plain_gradient:.4f}   "
            f"scaled {scaled_weight:.3f}, gradient {scaled_gradient:.4f}"
        )
    demo.check(
        "the scale keeps the softmax soft", f"d_k {d_k}",
        f"largest weight {plain_weight:.2f} → {scaled_weight:.2f}", scaled_weight < plain_weight,
    )  # fmt: skip
    demo.check(
        "and keeps its gradient alive", f"d_k {d_k}",
        f"{plain_gradient:.3f} → {scaled_gradient:.3f}",
        scaled_gradient > plain_gradient or d_k < 64,
    )  # fmt: skip
    demo.finish("--d-k 4096: how saturated does the unscaled softmax get?", "--seed 1")


if __name__ == "__main__":
    main()

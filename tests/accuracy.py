"""The accuracy rule (flash-attention's own): how far from float64 a result may be, and how misses look.

The yardstick is the plain masked softmax in the input dtype, every step of it: a kernel may have at most
twice its largest error, plus 1e-5. The log-sum-exp must be within 2e-5 (1 + |lse|).

The rule compares two maxima over random numbers, and the yardstick's comes out of the local torch. Where few
elements are large, their ratio scatters, and a sound kernel misses it on a few draws in a hundred: a small
call that misses is held to the yardstick's largest error over several calls like it. The 1e-5 is meant for
sums over head dimensions up to 128 and grows with longer ones (a group of one token has gradients of exactly
0, and the yardstick may find them).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import sinklora
from sinklora.pattern import SFPattern
from sinklora.reference import sf_attention as reference_attention

NAMES = ("output", "grad_query", "grad_key", "grad_value")

# Calls of no more query elements than this are small: their yardstick may be drawn again, so many times.
SMALL = 2**16
DRAWS_AGAIN = 16


class Result(NamedTuple):
    output: Tensor
    grad_query: Tensor
    grad_key: Tensor
    grad_value: Tensor
    lse: Tensor | None = None


def as_numpy(array: Any) -> np.ndarray:
    if isinstance(array, Tensor):
        array = array.detach().cpu().double().numpy()
    return np.asarray(array, dtype=np.float64)


def assert_close(actual: Any, expected: Any, atol: float, rtol: float = 0.0, name: str = "result") -> None:
    """|actual - expected| <= atol + rtol |expected|; equal infinities and NaNs agree."""
    a, e = as_numpy(actual), as_numpy(expected)
    assert a.shape == e.shape, f"{name}: shape {a.shape}, expected {e.shape}"
    if a.size == 0:
        return
    with np.errstate(invalid="ignore"):
        excess = np.abs(a - e) - (atol + rtol * np.abs(e))
    excess = np.where(
        (a == e) | (np.isnan(a) & np.isnan(e)), -np.inf, np.where(np.isnan(excess), np.inf, excess)
    )
    worst = np.unravel_index(int(np.argmax(excess)), excess.shape)
    if excess[worst] > 0:
        where = tuple(int(i) for i in worst)
        raise AssertionError(
            f"{name}: at {where} got {a[worst]!r}, expected {e[worst]!r}, "
            f"error {abs(a[worst] - e[worst]):.3g}, allowed {atol + rtol * abs(e[worst]):.3g}; "
            f"{int((excess > 0).sum())} of {excess.size} elements miss"
        )


def assert_same_bits(actual: Tensor, expected: Tensor, name: str = "result") -> None:
    """Equal bit for bit, NaN included."""
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    assert actual.dtype == expected.dtype and actual.shape == expected.shape, f"{name}: dtype or shape differ"
    kind = kinds[actual.element_size()]
    a, e = actual.detach().contiguous().view(kind), expected.detach().contiguous().view(kind)
    if not torch.equal(a, e):
        where = tuple(torch.nonzero(a != e)[0].tolist())
        raise AssertionError(
            f"{name}: first differing bits at {where}: {actual[where]!r}, expected {expected[where]!r}; "
            f"{int((a != e).sum())} of {a.numel()} elements differ"
        )


def allowed_mask(
    pattern: SFPattern,
    num_heads: int,
    batch: int,
    num_tokens: int,
    cu_seqlens: Tensor | None = None,
    padding_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
) -> Tensor:
    """Bool (B, H, N, N), from the C definition, one sequence at a time; a padded row sees nothing."""
    mask = torch.zeros(batch, num_heads, num_tokens, num_tokens, dtype=torch.bool)
    for row, where in sinklora.reference._sequences(
        batch, num_tokens, cu_seqlens, padding_mask, position_ids
    ):
        index = torch.from_numpy(where)
        mask[row][:, index[:, None], index[None, :]] = torch.from_numpy(pattern.mask(num_heads, len(where)))
    return mask


def plain(
    query: Tensor, key: Tensor, value: Tensor, pattern: SFPattern, grad: Tensor, **options: Any
) -> Result:
    """softmax((q @ k^T) * scale + mask) @ v with every step in the input dtype, gradients by autograd."""
    scale = options.pop("scale", None) or query.shape[-1] ** -0.5
    q, k, v = (x.detach().clone().requires_grad_() for x in (query, key, value))
    mask = allowed_mask(pattern, q.shape[1], q.shape[0], q.shape[2], **options)
    repeat = q.shape[1] // k.shape[1]
    scores = (q @ k.repeat_interleave(repeat, 1).transpose(-1, -2)) * scale
    empty = ~mask.any(-1, keepdim=True)  # padded rows: finite here, zeroed below
    bias = torch.zeros_like(scores).masked_fill_(~(mask | empty), float("-inf"))
    probabilities = torch.softmax(scores + bias, -1).masked_fill(empty, 0.0)
    output = probabilities @ v.repeat_interleave(repeat, 1)
    grads = torch.autograd.grad(output, (q, k, v), grad.to(output.dtype))
    return Result(output.detach(), *grads)


def exact(
    query: Tensor, key: Tensor, value: Tensor, pattern: SFPattern, grad: Tensor, **options: Any
) -> Result:
    """The float64 reference on the same inputs, gradients by autograd."""
    q, k, v = (x.detach().double().requires_grad_() for x in (query, key, value))
    output, lse = reference_attention(q, k, v, pattern, return_lse=True, **options)
    if not output.requires_grad:  # no kept token at all
        return Result(output, *(torch.zeros_like(x) for x in (q, k, v)), lse)
    grads = torch.autograd.grad(output, (q, k, v), grad.double())
    return Result(output.detach(), *grads, lse.detach())


def kernel(
    query: Tensor, key: Tensor, value: Tensor, pattern: SFPattern, grad: Tensor, **options: Any
) -> Result:
    """What sinklora computes, through its registered operator."""
    from sinklora import torch_ops

    q, k, v = (x.detach().requires_grad_() for x in (query, key, value))
    output, lse = torch_ops.sf_attention(q, k, v, pattern, **options)
    grads = torch.autograd.grad(output, (q, k, v), grad)
    return Result(output.detach(), *grads, lse.detach())


class Yardstick:
    """The largest errors of the plain computation on some inputs, and on others like them where asked."""

    def __init__(self, *inputs: Any, **options: Any) -> None:
        self.inputs, self.options = inputs, options
        self.errors = self._errors(inputs)
        self.drawn_again = False

    def draw_again(self) -> bool:
        """Takes the maximum with the errors on shuffled inputs, once; False where that is not allowed."""
        if self.drawn_again or self.inputs[0].numel() > SMALL:
            return False
        self.drawn_again = True
        generator = torch.Generator().manual_seed(0)
        for _ in range(DRAWS_AGAIN):
            shuffled = [
                x.flatten()[torch.randperm(x.numel(), generator=generator)].view(x.shape)
                if isinstance(x, Tensor)
                else x
                for x in self.inputs
            ]
            errors = self._errors(shuffled)
            self.errors = {name: max(error, errors[name]) for name, error in self.errors.items()}
        return True

    def _errors(self, inputs: Any) -> dict[str, float]:
        want, got = exact(*inputs, **self.options), plain(*inputs, **self.options)
        errors = {name: (getattr(got, name).double() - getattr(want, name)).abs() for name in NAMES}
        return {name: float(error.max()) if error.numel() else 0.0 for name, error in errors.items()}


def assert_within_rule(actual: Result, want: Result, yardstick: Yardstick, where: str = "") -> None:
    """Applies the rule to output, lse and gradients; want is float64."""

    def check() -> None:
        for name in NAMES:
            allowed = 2 * yardstick.errors[name] + 1e-5 * max(1.0, actual.output.shape[-1] / 128)
            assert_close(getattr(actual, name), getattr(want, name), allowed, name=f"{where}{name}")

    try:
        check()
    except AssertionError:
        if not yardstick.draw_again():
            raise
        check()
    assert_close(actual.lse, want.lse, 2e-5, 2e-5, name=f"{where}lse")


def assert_accurate(
    query: Tensor, key: Tensor, value: Tensor, pattern: SFPattern, grad: Tensor, **options: Any
) -> Result:
    """Computes all three and applies the rule; returns what the kernel gave."""
    actual = kernel(query, key, value, pattern, grad, **options)
    want = exact(query, key, value, pattern, grad, **options)
    assert_within_rule(actual, want, Yardstick(query, key, value, pattern, grad, **options))
    return actual

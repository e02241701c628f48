"""Is a merged model, as it lies on disk, the adapter's model? Their logits say so."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch

CHECK_TOKENS = 256
# Of the logits: the root mean square difference as a share of theirs; and by how much, as a share of their
# spread, the likeliest token of the one may trail in the other. The merged weights are rounded once more
# than the adapter's, by half a unit in the last place.
TOLERANCES = {torch.float32: (1e-4, 1e-3), torch.float16: (1e-2, 5e-2), torch.bfloat16: (5e-2, 3e-1)}


class Check(NamedTuple):
    """The merged model, opened from disk with transformers alone, beside the adapter's model in its dtype.

    difference: root mean square of the logits' difference over that of the logits; agreement: share of the
    tokens with the same likeliest next one; lead: the most by which another token was ahead, over the
    logits' spread.
    """

    tokens: int
    difference: float
    agreement: float
    lead: float


@torch.no_grad()
def check_logits(model: Any, vocabulary: int) -> torch.Tensor:
    """float32 (CHECK_TOKENS, vocabulary) on the CPU, of tokens that are always the same."""
    tokens = torch.randint(vocabulary, (1, CHECK_TOKENS), generator=torch.Generator().manual_seed(0))
    tokens = tokens.to(next(model.parameters()).device)
    found = model(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False).logits
    return cast(torch.Tensor, found[0].float().cpu())


def compare(expected: torch.Tensor, found: torch.Tensor, dtype: torch.dtype) -> Check:
    """Raises RuntimeError where found is not expected to the dtype's rounding."""
    if expected.shape != found.shape:
        raise RuntimeError(
            f"output: the merged model has {found.shape[1]} logits, the adapter's {expected.shape[1]}"
        )
    tolerance, lead_tolerance = TOLERANCES[dtype]
    difference = float((found - expected).square().mean().sqrt() / expected.square().mean().sqrt())
    likeliest = found.argmax(dim=1)
    behind = expected.amax(dim=1) - expected.gather(1, likeliest[:, None])[:, 0]
    check = Check(
        tokens=len(expected),
        difference=difference,
        agreement=float((likeliest == expected.argmax(dim=1)).float().mean()),
        lead=float(behind.max() / expected.std()),
    )
    # Written so that NaN fails.
    if not (check.difference <= tolerance and check.lead <= lead_tolerance):
        raise RuntimeError(
            f"output: the merged model's logits differ from the adapter's by {check.difference:.2g} of their "
            f"size (up to {tolerance:g} is rounding), and {check.agreement:.1%} of {check.tokens} tokens "
            "agree; nothing was written"
        )
    return check

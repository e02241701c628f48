"""Every CUDA kernel once, over few small calls: what compute-sanitizer watches, and a first sign of life.

usage: python tests/gpu_matrix.py [DEVICE]      (as .ci/gpu runs it; DEVICE is cuda by default)

Prints a line for each call; exit status 1 where a result is not what the CPU's kernels give.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch
from torch import Tensor

import sinklora
from sinklora import SFPattern, torch_h2o, torch_ops

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 4e-2, torch.float16: 1e-2}
# heads, key/value heads, tokens, head_dim, pattern: ragged tiles, sinks, shared keys, both ways, every width.
SHAPES = (
    (2, 1, 70, 8, SFPattern(16)),
    (4, 2, 130, 64, SFPattern(32, shifted_fraction=0.5)),
    (2, 2, 129, 72, SFPattern(64, num_sink_tokens=70)),
    (2, 1, 65, 96, SFPattern(20, causal=False)),
    (4, 1, 200, 128, SFPattern(100, num_sink_tokens=1)),
    (2, 2, 33, 192, SFPattern(1000)),
    (1, 1, 67, 256, SFPattern(16, num_sink_tokens=0)),
)
Pairs = Iterator[tuple[str, Tensor, Tensor]]


def rows(heads: int, tokens: int, dim: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(1, heads, tokens, dim).to(dtype)


def attention(dtype: torch.dtype, device: str) -> Pairs:
    for heads, kv_heads, tokens, dim, pattern in SHAPES:
        here = [rows(n, tokens, dim, dtype) for n in (heads, kv_heads, kv_heads, heads)]
        starts = torch.tensor([0, tokens // 3, tokens], dtype=torch.int32)
        mask = torch.rand(1, tokens) > 0.3
        for name, options in (
            ("", {}),
            ("packed ", {"cu_seqlens": starts}),
            ("padded ", {"padding_mask": mask}),
        ):
            found = []
            for place in ("cpu", device):
                q, k, v = (x.to(place, copy=True).requires_grad_() for x in here[:3])
                given = {key: x.to(place) for key, x in options.items()}
                output, lse = torch_ops.sf_attention(q, k, v, pattern, **given)
                grads = torch.autograd.grad(output, (q, k, v), here[3].to(place))
                found.append((output, *grads, lse.exp()))
            for part, want, got in zip(("output", "dq", "dk", "dv", "lse"), *found, strict=True):
                yield f"{name}attention {tokens}x{dim} {part}", got, want


def cache(dtype: torch.dtype, device: str) -> Pairs:
    for heads, kv_heads, tokens, dim, _ in SHAPES:
        here = [rows(n, tokens, dim, dtype) for n in (heads, kv_heads, kv_heads)]
        mask = torch.rand(1, tokens) > 0.3
        step = [rows(n, 1, dim, dtype) for n in (heads, kv_heads, kv_heads)]
        found = []
        for place in ("cpu", device):
            query, key, value = (x.to(place, copy=True) for x in here)
            output, lse = torch_h2o.causal_attention(query, key, value, padding_mask=mask.to(place))
            scores = torch_h2o.attention_scores(query, key, lse, padding_mask=mask.to(place))
            positions = torch.arange(tokens, dtype=torch.int32, device=place).repeat(1, kv_heads, 1)
            counts = torch.tensor([[tokens, tokens, tokens // 2 + 1, 3]], dtype=torch.int32, device=place)
            order = torch.arange(tokens, 0.0, -1.0, device=place).repeat(1, kv_heads, 1)  # no ties to break
            kept = torch_h2o.h2o_select(
                key, value, order, positions, counts, num_sinks=2, capacity=tokens // 2 + 2
            )
            free = counts[:, 1:2].repeat(1, kv_heads)
            token = [x.to(place) for x in step]
            decoded = torch_h2o.h2o_decode(*token, *kept, free, counts, num_sinks=2)
            used = tokens // 2
            found.append((output, scores, kept[0][:, :, :used], kept[3], decoded, free, counts))
        names = ("output", "scores", "kept keys", "positions", "step", "free slot", "counts")
        for part, want, got in zip(names, *found, strict=True):
            yield f"cache {tokens}x{dim} {part}", got, want


def main() -> int:
    device = sys.argv[1] if len(sys.argv) > 1 else "cuda"
    torch.manual_seed(0)
    wrong = 0
    for dtype, tolerance in TOLERANCE.items():
        for calls in (attention, cache):
            for name, got, want in calls(dtype, device):
                error = (got.cpu().double() - want.double()).abs().max().item() if want.numel() else 0.0
                bad = not error <= tolerance * max(1.0, want.double().abs().max().item())
                wrong += bad
                if bad or name.endswith(("output", "step")):
                    print(
                        f"{'WRONG' if bad else 'ok':5} {str(dtype)[6:]:8} {name}: largest error {error:.2g}"
                    )
    print(f"{wrong} wrong, on {device}; {sinklora.info()}")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())

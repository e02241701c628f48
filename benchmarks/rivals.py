"""What sinklora is compared with, each in the fastest form found, and which function each of them computes.

s2_one_batch, s2_parts
    LongLoRA's S2-Attn over torch's SDPA: the shifted heads rolled by half a group, groups folded into the
    batch, causal attention in each, unfolded and rolled back. NOT SF-Attn's function: no sinks, N must be a
    multiple of G, and the roll wraps: the last group of a shifted head holds the end of the text before its
    beginning, so the first G/2 tokens see the last G/2 (future tokens). The same share of heads is shifted as
    for SF-Attn (LongLoRA: half), which is less to copy: the harder rival.
dense
    Full causal attention, torch's SDPA: what both approximate, with N/G times the work.
flex
    FlexAttention, compiled, with SF-Attn's pattern as block mask: the same function, sinks included. On CPUs
    torch has no backward for it.

On a CUDA device the S2 forms and dense run over both of SDPA's backends FLASH and CUDNN: device_attention.py.

Forms tried for S2 on an AMD EPYC of family 26, 2 threads, torch 2.13, N=4096 G=2048 H=8 D=128, a quarter
of the heads shifted; medians of 5 interleaved rounds in ms (bench_rivals.py makes such a table on yours):

    form                                    float32   bfloat16   float32   bfloat16
                                            forward   forward    fwd+bwd   fwd+bwd
    one batch (B, H, N, D order), cat       130.1     129.2 *    531.7     319.9 *
    one batch (B, H, N, D order), roll      133.3     130.0      486.6     328.6
    one batch in the model's order, cat     132.4     139.4      502.7     345.4
    one batch in the model's order, roll    134.5     140.5      508.6     344.7
    shifted and unshifted parts, cat        129.4 *   134.2      470.5     331.6
    shifted and unshifted parts, roll       130.1     136.9      462.4 *   337.8

The starred ones differ by layout, not by much: both layouts are kept and timed everywhere, and bars compare
with the faster one of each row. cat against roll is within the spread of the samples (cat ahead by 1-3 % in
the forwards). Grouped-query heads (Hkv=2): in parts, where each call has whole key/value heads or a piece of
one, SDPA's enable_gqa wins by 6-8 % over repeating (bfloat16 fwd+bwd 331 against 353 and 359). In one batch
shifted and unshifted query heads may share a key/value head, which must then be repeated; repeat_interleave
and expand + reshape are level.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import scaled_dot_product_attention

if TYPE_CHECKING:
    from sinklora import SFPattern

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def num_shifted_heads(num_heads: int, fraction: float) -> int:
    return int(num_heads * fraction)


def _rolled(x: torch.Tensor, shift: int) -> torch.Tensor:
    """torch.roll(x, -shift, 2) as one cat of two views."""
    shift %= x.shape[2]
    return torch.cat((x[:, :, shift:], x[:, :, :shift]), 2) if shift else x


def _require_whole_groups(num_tokens: int, group_size: int) -> None:
    if num_tokens % group_size:
        raise ValueError(f"query: num_tokens must be a multiple of group_size {group_size}, got {num_tokens}")


def s2_one_batch(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, group_size: int, fraction: float = 0.25
) -> torch.Tensor:
    """S2-Attn with all heads in one SDPA call. query (B, H, N, D); key, value (B, Hkv, N, D); any strides."""
    batch, heads, tokens, dim = query.shape
    _require_whole_groups(tokens, group_size)
    groups, shift = tokens // group_size, group_size // 2
    first = heads - num_shifted_heads(heads, fraction)
    repeats = heads // key.shape[1]

    def fold(x: torch.Tensor) -> torch.Tensor:
        # Whether a key is shifted depends on the query head, so shared key/value heads are repeated first.
        x = x if x.shape[1] == heads else x.repeat_interleave(repeats, 1)
        x = torch.cat((x[:, :first], _rolled(x[:, first:], shift)), 1)
        x = x.reshape(batch, heads, groups, group_size, dim).transpose(1, 2)
        return x.reshape(batch * groups, heads, group_size, dim)

    out = scaled_dot_product_attention(fold(query), fold(key), fold(value), is_causal=True)
    out = out.reshape(batch, groups, heads, group_size, dim).transpose(1, 2).reshape(query.shape)
    return torch.cat((out[:, :first], _rolled(out[:, first:], -shift)), 1)


def head_parts(num_heads: int, num_kv_heads: int, first_shifted: int) -> list[tuple[int, int, bool]]:
    """(begin, end, shifted) of runs of query heads that SDPA can take with its grouped-query option: each run
    is a whole number of key/value heads, or a piece of one."""
    repeats = num_heads // num_kv_heads
    below = first_shifted // repeats * repeats
    above = min(num_heads, below + repeats) if below < first_shifted else first_shifted
    cuts = [0, below, first_shifted, above, num_heads]
    runs = [(begin, end, begin >= first_shifted) for begin, end in itertools.pairwise(cuts)]
    return [run for run in runs if run[0] < run[1]]


def s2_parts(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, group_size: int, fraction: float = 0.25
) -> torch.Tensor:
    """S2-Attn with one SDPA call for each run of heads: unshifted heads in a model's (B, N, H, D) memory fold
    without a copy, shared key/value heads are not repeated. Same arguments and result as ``s2_one_batch``."""
    batch, heads, tokens, dim = query.shape
    _require_whole_groups(tokens, group_size)
    shift = group_size // 2
    repeats = heads // key.shape[1]

    def fold(x: torch.Tensor, shifted: bool) -> torch.Tensor:
        x = (_rolled(x, shift) if shifted else x).transpose(1, 2)
        return x.reshape(-1, group_size, x.shape[2], dim).transpose(1, 2)

    def unfold(x: torch.Tensor, shifted: bool) -> torch.Tensor:
        x = x.transpose(1, 2).reshape(batch, tokens, -1, dim).transpose(1, 2)
        return _rolled(x, -shift) if shifted else x

    outputs = []
    for begin, end, shifted in head_parts(heads, key.shape[1], heads - num_shifted_heads(heads, fraction)):
        kv = slice(begin // repeats, -(-end // repeats))
        q, k, v = (fold(x, shifted) for x in (query[:, begin:end], key[:, kv], value[:, kv]))
        out = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=repeats > 1)
        outputs.append(unfold(out, shifted))
    return torch.cat(outputs, 1)


def s2_pairs(num_heads: int, num_tokens: int, group_size: int) -> int:
    """Allowed pairs of S2-Attn: every group of every head is a full causal triangle, wrapped ones too."""
    return num_heads * (num_tokens // group_size) * group_size * (group_size + 1) // 2


def dense(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Full causal attention. query (B, H, N, D); key, value (B, Hkv, N, D)."""
    gqa = query.shape[1] != key.shape[1]
    return scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=gqa)


def dense_pairs(num_heads: int, num_tokens: int) -> int:
    return num_heads * num_tokens * (num_tokens + 1) // 2


def flex_mask(pattern: SFPattern, num_heads: int) -> Callable[..., torch.Tensor]:
    """SF-Attn's causal pattern as FlexAttention's mask function; tested against ``SFPattern.mask``."""
    group_size, sinks = pattern.group_size, pattern.num_sink_tokens
    shift = group_size // 2 if pattern.shift is None else pattern.shift
    if not pattern.causal:
        raise NotImplementedError("pattern: the FlexAttention rival knows causal patterns only")
    first = num_heads - num_shifted_heads(num_heads, pattern.shifted_fraction)

    def allowed(batch: torch.Tensor, head: torch.Tensor, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        # One group is added first, so that no token before the shift is divided as a negative number.
        offset = torch.where(head >= first, group_size - shift, group_size)
        return (j <= i) & (((i + offset) // group_size == (j + offset) // group_size) | (j < sinks))

    return allowed


def flex(
    pattern: SFPattern, num_heads: int, num_kv_heads: int, num_tokens: int, device: str = "cpu"
) -> Attention:
    """Compiled FlexAttention with SF-Attn's pattern; the compilation itself happens at the first call.

    Finding the blocks takes dense (N, N) tensors: once for each kind of head, not for all heads at once.
    """
    from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

    # Every shape compiles anew, and after eight times torch falls back to the dense form without a word.
    torch.compiler.reset()
    compiled = torch.compile(flex_attention, dynamic=False)
    allowed = flex_mask(pattern, num_heads)
    kinds = {}
    for head in {0, num_heads - 1}:

        def of_head(batch: torch.Tensor, _: torch.Tensor, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
            here = torch.tensor(head, device=i.device)  # noqa: B023 - called within this turn of the loop
            return allowed(batch, here, i, j)

        kinds[head] = create_block_mask(of_head, None, None, num_tokens, num_tokens, device=device)
    first = num_heads - num_shifted_heads(num_heads, pattern.shifted_fraction)
    parts = [kinds[0 if head < first else num_heads - 1] for head in range(num_heads)]

    def stacked(name: str) -> torch.Tensor:
        return torch.cat([getattr(part, name) for part in parts], 1)

    mask = BlockMask.from_kv_blocks(
        stacked("kv_num_blocks"),
        stacked("kv_indices"),
        stacked("full_kv_num_blocks"),
        stacked("full_kv_indices"),
        mask_mod=allowed,
        seq_lengths=(num_tokens, num_tokens),
    )

    def run(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = compiled(query, key, value, block_mask=mask, enable_gqa=num_heads != num_kv_heads)
        return out

    return run

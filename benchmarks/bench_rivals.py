"""Which form of S2-Attn over torch's SDPA is the fastest here? The table in rivals.py comes from this script.

usage: python benchmarks/bench_rivals.py [--dtypes ...] [--shapes H/Hkv/N/D/G ...] [--rounds 5]

Forms: layout (one_batch, one_batch in the model's memory order, parts), how the shifted heads are moved (cat,
roll), how shared key/value heads are served (repeat_interleave, expand + reshape, enable_gqa).
"""

from __future__ import annotations

import argparse
import functools
import itertools
from collections.abc import Callable

import report
import rivals
import timing
import torch
from shapes import BOTH, FLOPS_PER_PAIR, FORWARD, Case, Inputs, make_call
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

Move = Callable[[Tensor, int], Tensor]
SHAPES = ("8/8/8192/128/2048", "8/2/8192/128/2048", "8/8/8192/64/2048")
FRACTION = 0.25


def roll(x: Tensor, shift: int) -> Tensor:
    return x.roll(-shift, 2)


def cat(x: Tensor, shift: int) -> Tensor:
    shift %= x.shape[2]
    return torch.cat((x[:, :, shift:], x[:, :, :shift]), 2)


def repeated(x: Tensor, repeats: int, how: str) -> Tensor:
    if repeats == 1 or how == "enable_gqa":
        return x
    if how == "repeat":
        return x.repeat_interleave(repeats, 1)
    batch, heads, tokens, dim = x.shape
    return x[:, :, None].expand(batch, heads, repeats, tokens, dim).reshape(batch, -1, tokens, dim)


def one_batch(query: Tensor, key: Tensor, value: Tensor, group: int, *, move: Move, how: str) -> Tensor:
    """(B, H, N, D) copies, folded into (B N/G, H, G, D)."""
    batch, heads, _, dim = query.shape
    first = heads - rivals.num_shifted_heads(heads, FRACTION)
    repeats = heads // key.shape[1]

    def fold(x: Tensor) -> Tensor:
        x = torch.cat((x[:, :first], move(x[:, first:], group // 2)), 1)
        return x.reshape(batch, heads, -1, group, dim).transpose(1, 2).reshape(-1, heads, group, dim)

    q, k, v = (fold(x) for x in (query, repeated(key, repeats, how), repeated(value, repeats, how)))
    out = scaled_dot_product_attention(q, k, v, is_causal=True)
    out = out.reshape(batch, -1, heads, group, dim).transpose(1, 2).reshape(query.shape)
    return torch.cat((out[:, :first], move(out[:, first:], -(group // 2))), 1)


def model_order(query: Tensor, key: Tensor, value: Tensor, group: int, *, move: Move, how: str) -> Tensor:
    """Copies in (B, N, H, D) order, which fold as views; SDPA then reads rows that are H D apart."""
    batch, heads, tokens, dim = query.shape
    first = heads - rivals.num_shifted_heads(heads, FRACTION)
    repeats = heads // key.shape[1]

    def fold(x: Tensor) -> Tensor:
        parts = (x[:, :first].transpose(1, 2), move(x[:, first:], group // 2).transpose(1, 2))
        return torch.cat(parts, 2).view(-1, group, heads, dim).transpose(1, 2)

    q, k, v = (fold(x) for x in (query, repeated(key, repeats, how), repeated(value, repeats, how)))
    out = scaled_dot_product_attention(q, k, v, is_causal=True)
    out = out.transpose(1, 2).reshape(batch, tokens, heads, dim).transpose(1, 2)
    return torch.cat((out[:, :first], move(out[:, first:], -(group // 2))), 1)


def parts(query: Tensor, key: Tensor, value: Tensor, group: int, *, move: Move, how: str) -> Tensor:
    """A call for each run of heads; unshifted heads fold as views."""
    batch, heads, tokens, dim = query.shape
    first, repeats = heads - rivals.num_shifted_heads(heads, FRACTION), heads // key.shape[1]
    runs = [run for run in ((0, first, False), (first, heads, True)) if run[0] < run[1]]
    if how == "enable_gqa":
        runs = rivals.head_parts(heads, key.shape[1], first)
    outputs = []
    for begin, end, shifted in runs:
        kv = slice(begin // repeats, -(-end // repeats))
        tensors = [query[:, begin:end]]
        for x in (key[:, kv], value[:, kv]):
            whole = repeated(x, repeats, how)
            offset = begin - kv.start * repeats
            tensors.append(whole if how == "enable_gqa" else whole[:, offset : offset + end - begin])
        shift = group // 2
        tensors = [(move(x, shift) if shifted else x).transpose(1, 2) for x in tensors]
        q, k, v = (x.reshape(-1, group, x.shape[2], dim).transpose(1, 2) for x in tensors)
        out = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=how == "enable_gqa")
        out = out.transpose(1, 2).reshape(batch, tokens, -1, dim).transpose(1, 2)
        outputs.append(move(out, -shift) if shifted else out)
    return torch.cat(outputs, 1)


def forms(case: Case) -> dict[str, rivals.Attention]:
    """Name -> attention, those that suit the case's heads."""
    hows = ("repeat", "expand", "enable_gqa") if case.num_heads != case.num_kv_heads else ("repeat",)
    made: dict[str, rivals.Attention] = {}
    for layout, move, how in itertools.product((one_batch, model_order, parts), (cat, roll), hows):
        if how == "enable_gqa" and layout is not parts:
            continue  # A key/value head that shifted and unshifted query heads share must be repeated there.
        name = f"{layout.__name__} {move.__name__}" + (f" {how}" if len(hows) > 1 else "")
        made[name] = functools.partial(layout, group=case.group_size, move=move, how=how)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), help="H/Hkv/N/D/G")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for dtype, shape, direction in itertools.product(options.dtypes, options.shapes, (FORWARD, BOTH)):
        case = Case.parse(dtype, shape)
        inputs = Inputs.of(case)
        calls = {name: make_call(form, inputs, direction) for name, form in forms(case).items()}
        timings = timing.interleave(calls, rounds=options.rounds)
        fastest = min(taken.median for taken in timings.values())
        table = report.Table((f"{direction} {dtype} {shape}", "ms", "GFLOP/s", "of the fastest", ""))
        pairs = rivals.s2_pairs(case.num_heads, case.num_tokens, case.group_size)
        for name, taken in sorted(timings.items(), key=lambda item: item[1].median):
            gflops = FLOPS_PER_PAIR[direction] * case.head_dim * pairs / taken.median / 1e9
            note = "" if taken.quiet else timing.BUSY
            cells = (f"{taken.median * 1e3:.1f}", f"{gflops:.0f}", f"{taken.median / fastest:.3f}", note)
            table.lines.append((name, *cells))
        print(table, "\n", sep="", flush=True)


if __name__ == "__main__":
    main()

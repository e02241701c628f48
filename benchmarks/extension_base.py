"""Trains the short-context LLaMA that bench_extension.py extends, from scratch, on text files."""

from __future__ import annotations

import math
import time
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

import sinklora
from sinklora.tokenizer import byte_tokenizer

CONTEXT = 512
BATCH = 16
LEARNING_RATE = 2e-3
WARM_UP = 40


def config(vocabulary: int) -> LlamaConfig:
    """Hidden 256, 13 layers, 4 heads of 64: 10 million parameters."""
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=13,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        initializer_range=0.04,
        pad_token_id=256,
        bos_token_id=257,
        eos_token_id=258,
    )


def train(texts: Path, folder: Path, seed: int, steps: int, log_every: int = 25) -> None:
    """Trains on random pieces of the .txt files under texts and saves model and tokenizer into folder.

    Matrix products are in bfloat16, weights in float32, to spend less time on what is not measured.
    """
    if (folder / "config.json").is_file():
        return
    set_seed(seed)
    tokenizer = byte_tokenizer(CONTEXT)
    model = LlamaForCausalLM(config(len(tokenizer)))
    # One group as long as the row is full causal attention, by the kernels.
    sinklora.patch(model, sinklora.SFPattern(group_size=CONTEXT, num_sink_tokens=0, shifted_fraction=0.0))
    text = np.frombuffer(b"\n".join(path.read_bytes() for path in sorted(texts.glob("*.txt"))), np.uint8)
    draw = np.random.default_rng(seed)
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        lr=LEARNING_RATE,
        betas=(0.9, 0.95),
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(1.0, (step + 1) / WARM_UP) * (0.1 + 0.45 * (1 + math.cos(math.pi * step / steps))),
    )
    begun, losses = time.perf_counter(), []
    for step in range(steps):
        starts = draw.integers(len(text) - CONTEXT, size=BATCH)
        tokens = torch.from_numpy(np.stack([text[s : s + CONTEXT] for s in starts]).astype(np.int64))
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if (step + 1) % log_every == 0:
            rate = (step + 1) * BATCH * CONTEXT / (time.perf_counter() - begun)
            print(
                f"base {seed}: step {step + 1} of {steps}, loss {np.mean(losses[-log_every:]):.3f}, "
                f"{rate:.0f} tokens/s",
                flush=True,
            )
    sinklora.unpatch(model).save_pretrained(folder)
    tokenizer.save_pretrained(folder)

"""sinklora finetune"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sinklora.cli import ConfigOption
from sinklora.commands.training import either, run_settings, show_training
from sinklora.training.settings import (
    ATTENTIONS,
    DTYPES,
    EPOCHS,
    GROUP_RATIO,
    NUM_SINK_TOKENS,
    PACKINGS,
    QUANTIZATIONS,
    ROPES,
    SCHEDULES,
    SHARDINGS,
    SHIFTED_FRACTION,
    FinetuneSettings,
)

_DEFAULT = FinetuneSettings(model="-", data=("-",), context=2, output="-")


def finetune(
    context_of_command: typer.Context,
    model: Annotated[
        str | None,
        typer.Option(help="Folder of the model to train, or its name on the Hub; required."),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="Text to train on: a file, a folder, or a data set of the Hub; required, may be given "
            "several times."
        ),
    ] = None,
    context: Annotated[
        int | None, typer.Option(help="Tokens of a training row: the new context; required.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder of the run and of its results; required.")
    ] = None,
    attention: Annotated[
        str,
        typer.Option(
            help=f"Of training: {', '.join(ATTENTIONS)}. s2-torch is LongLoRA's own form of s2, to compare; "
            "it needs --packing joined. The evaluation is always with full attention."
        ),
    ] = _DEFAULT.attention,
    group_size: Annotated[
        int | None,
        typer.Option(help="Tokens in a group.", show_default=f"{GROUP_RATIO:g} of the context"),
    ] = None,
    group_ratio: Annotated[
        float | None, typer.Option(help="Instead: a group as a share of the context.", show_default=False)
    ] = None,
    sinks: Annotated[
        int | None, typer.Option(help="Sink tokens of sf.", show_default=str(NUM_SINK_TOKENS))
    ] = None,
    shifted_fraction: Annotated[
        float | None,
        typer.Option(help="Share of the heads that sf shifts.", show_default=f"{SHIFTED_FRACTION:g}"),
    ] = None,
    rope: Annotated[
        str, typer.Option(help=f"How positions are stretched to the context: {', '.join(ROPES)}.")
    ] = _DEFAULT.rope,
    lora_rank: Annotated[int, typer.Option(help="Rank of LoRA.")] = _DEFAULT.lora_rank,
    lora_alpha: Annotated[
        int, typer.Option(help="Of LoRA: the update is scaled by alpha / rank.")
    ] = _DEFAULT.lora_alpha,
    lora_dropout: Annotated[float, typer.Option(help="Of LoRA.")] = _DEFAULT.lora_dropout,
    lora_targets: Annotated[
        list[str] | None,
        typer.Option(
            help="Linear layers with LoRA, by the last part of their names; may be given several times.",
            show_default="query, key, value and output of attention",
        ),
    ] = None,
    train_embeddings_and_norms: Annotated[
        bool, typer.Option(help="Train these too, whole; without them LoRA hardly extends a context.")
    ] = _DEFAULT.train_embeddings_and_norms,
    full_finetuning: Annotated[
        bool, typer.Option("--full-finetuning", help="Train all weights instead of LoRA.")
    ] = False,
    quantize: Annotated[
        str | None,
        typer.Option(
            help=f"Hold frozen weights in {', '.join(QUANTIZATIONS)} (QLoRA; needs bitsandbytes).",
            show_default="no",
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help=f"Of the computation: {', '.join(DTYPES)}. What is trained is kept in float32, what is "
            "frozen in this.",
            show_default="bfloat16 on a GPU, else float32",
        ),
    ] = None,
    gradient_checkpointing: Annotated[
        bool | None,
        typer.Option(
            "--gradient-checkpointing/--no-gradient-checkpointing",
            help="Compute layers again in the backward instead of keeping what they made.",
            show_default="on a GPU",
        ),
    ] = None,
    chunk_tokens: Annotated[
        int, typer.Option(help="Tokens whose logits exist at a time.")
    ] = _DEFAULT.chunk_tokens,
    batch_size: Annotated[int, typer.Option(help="Rows at a time, on each device.")] = _DEFAULT.batch_size,
    accumulate: Annotated[
        int, typer.Option(help="Batches of a step, whose gradients are added up.")
    ] = _DEFAULT.accumulate,
    learning_rate: Annotated[float, typer.Option(help="Of AdamW.")] = _DEFAULT.learning_rate,
    schedule: Annotated[
        str, typer.Option(help=f"Of the learning rate: {', '.join(SCHEDULES)}.")
    ] = _DEFAULT.schedule,
    warmup_steps: Annotated[
        int, typer.Option(help="Steps in which the learning rate rises.")
    ] = _DEFAULT.warmup_steps,
    weight_decay: Annotated[float, typer.Option(help="Of AdamW.")] = _DEFAULT.weight_decay,
    max_grad_norm: Annotated[
        float, typer.Option(help="Longer gradients are cut to this; 0: never.")
    ] = _DEFAULT.max_grad_norm,
    steps: Annotated[
        int | None, typer.Option(help="Steps of the optimiser.", show_default=f"{EPOCHS:g} epoch")
    ] = None,
    epochs: Annotated[
        float | None, typer.Option(help="Instead: passes over the data.", show_default=False)
    ] = None,
    eval_data: Annotated[
        list[str] | None,
        typer.Option(help="Text to evaluate on, as --data; may be given several times.", show_default=False),
    ] = None,
    eval_share: Annotated[
        float | None,
        typer.Option(help="Instead: share of --data's documents to hold out.", show_default=False),
    ] = None,
    eval_every: Annotated[
        int | None,
        typer.Option(help="Steps between evaluations.", show_default="at the beginning and the end"),
    ] = None,
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = _DEFAULT.save_every,
    keep_checkpoints: Annotated[
        int, typer.Option(help="Newest checkpoints that are kept.")
    ] = _DEFAULT.keep_checkpoints,
    log_every: Annotated[int, typer.Option(help="Steps between lines of the log.")] = _DEFAULT.log_every,
    report_to: Annotated[
        list[str] | None,
        typer.Option(
            help="Also log to tensorboard, wandb, trackio, mlflow, ... where installed; may be given several "
            "times.",
            show_default="none",
        ),
    ] = None,
    text_field: Annotated[
        str, typer.Option(help="Field of JSON, Parquet and data sets that has the text.")
    ] = _DEFAULT.text_field,
    packing: Annotated[
        str,
        typer.Option(
            help=f"How documents fill rows: {', '.join(PACKINGS)}. whole keeps those that fit a row in one, "
            "cut leaves no padding, and neither lets one document see another; joined does, as LongLoRA "
            "trains."
        ),
    ] = _DEFAULT.packing,
    cache_dir: Annotated[
        Path | None,
        typer.Option(
            help="Folder for tokens, made once.", show_default="sinklora/tokens in the user's cache"
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option(help="Of LoRA's start, dropout, the order of rows and what is held out.")
    ] = _DEFAULT.seed,
    threads: Annotated[
        int | None, typer.Option(help="Threads on the CPU.", show_default="all processors")
    ] = None,
    sharding: Annotated[
        str,
        typer.Option(
            help=f"Under torchrun, what is held in parts: {', '.join(SHARDINGS)}. none is DDP; "
            "zero2 and zero3 need DeepSpeed."
        ),
    ] = _DEFAULT.sharding,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in --output from its last checkpoint.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show tokens, steps, memory and time, and train nothing.")
    ] = False,
    config: ConfigOption = None,
) -> None:
    """Extend a model's context by training it on text with SF-Attn.

    Saves a LoRA adapter (or with --full-finetuning a model), the log, and a model card. Ctrl-C saves and
    ends; --resume goes on as if nothing had happened. Runs on several devices under torchrun or accelerate
    launch.
    """
    given = dict(locals())
    del given["context_of_command"], given["config"]
    values = either(context_of_command, given, ("steps", "epochs"), ("group_size", "group_ratio"))
    settings = run_settings(FinetuneSettings, values)
    show_training(settings)

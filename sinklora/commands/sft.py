"""sinklora sft"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from sinklora.commands.finetune import finetune
from sinklora.commands.training import either, run_settings, show_training
from sinklora.training.instruct_settings import ATTENTIONS, OVERLONG, SftSettings

# Options of `sinklora finetune` that are about plain text.
_WITHOUT = ("text_field", "packing", "chunk_tokens")
_CHANGED = {
    "data": Annotated[
        list[str] | None,
        typer.Option(
            help="Instruction data: a file (JSON Lines, JSON, Parquet), a folder, or a data set of the Hub; "
            "required, may be given several times. Rows have instruction and output (Alpaca, LongAlpaca), "
            "messages or conversations, or prompt and completion.",
        ),
    ],
    "context": Annotated[
        int | None,
        typer.Option(help="Tokens of a row, and of a conversation at most; required."),
    ],
    "attention": Annotated[
        str,
        typer.Option(
            help=f"Of training: {', '.join(ATTENTIONS)}. The evaluation is always with full attention."
        ),
    ],
    "eval_data": Annotated[
        list[str] | None,
        typer.Option(help="Instruction data to evaluate on; may be given several times.", show_default=False),
    ],
    "eval_share": Annotated[
        float | None,
        typer.Option(help="Instead: share of --data's conversations to hold out.", show_default=False),
    ],
}
_OWN = {
    "overlong": (
        Annotated[
            str,
            typer.Option(
                help=f"What becomes of longer conversations: {', '.join(OVERLONG)}. shorten cuts the middle "
                "out of their longest question; answers stay whole. truncation.json says what was cut."
            ),
        ],
        "shorten",
    ),
    "no_packing": (
        Annotated[
            bool,
            typer.Option(
                "--no-packing",
                help="One conversation a row, padded, instead of as many as fit; none sees another.",
            ),
        ],
        False,
    ),
    "chat_template": (
        Annotated[
            Path | None,
            typer.Option(
                help="File of a chat template (Jinja), in place of the tokenizer's; {% generation %} tags "
                "mark answers.",
                show_default="the tokenizer's, else Alpaca's wording",
            ),
        ],
        None,
    ),
    "system": (
        Annotated[
            str | None,
            typer.Option(help="System message of conversations that have none.", show_default="none"),
        ],
        None,
    ),
}


def sft(context_of_command: typer.Context, **values: Any) -> None:
    """Tune a model on instruction data with SF-Attn; the loss is on answers only.

    Saves a LoRA adapter (or with --full-finetuning a model), the log, a report of what was truncated, and a
    model card. Ctrl-C saves and ends; --resume goes on as if nothing had happened. Runs on several devices
    under torchrun or accelerate launch.
    """
    del values["config"]
    given = either(context_of_command, values, ("steps", "epochs"), ("group_size", "group_ratio"))
    settings = run_settings(SftSettings, given)
    show_training(settings, "instruct:SftRun", ("trl", "datasets"))


def _signature() -> inspect.Signature:
    """finetune's options, so that the two never come apart, with this command's own behind --rope and what
    belongs to it."""
    hints = get_type_hints(finetune, include_extras=True)
    parameters: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(finetune).parameters.items():
        if name in _WITHOUT:
            continue
        parameters.append(parameter.replace(annotation=_CHANGED.get(name, hints[name])))
        if name == "output":
            parameters += [
                inspect.Parameter(
                    own, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=default, annotation=kind
                )
                for own, (kind, default) in _OWN.items()
            ]
    return inspect.Signature(parameters, return_annotation=None)


# What typer reads in place of the function's own.
sft.__signature__ = _signature()  # type: ignore[attr-defined]

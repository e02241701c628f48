"""sinklora evaluate"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sinklora.cli import ConfigOption
from sinklora.commands.shared import DeviceOption, DtypeOption, amount, bad, note, prepare_libraries
from sinklora.extras import require

if TYPE_CHECKING:
    from rich.console import Console

    from sinklora.evaluation.run import Results
    from sinklora.evaluation.task import Task


# Settings whose errors are about an option of another name.
_OPTIONS = {
    "model": "MODEL",
    "lengths": "--length",
    "depths": "--depth",
    "tokens_per_batch": "--batch-tokens",
}

# Tasks that an option acts on, where that is not all; harness: any of lm-evaluation-harness.
_SCORING, _HIDING, _ASKING = ("perplexity", "short"), ("passkey", "needle"), ("passkey", "needle", "topics")
_ACTS_ON = {
    **dict.fromkeys(("data", "text_field", "split", "max_documents"), (*_SCORING, "needle")),
    **dict.fromkeys(("max_tokens", "min_tokens"), _SCORING),
    **dict.fromkeys(("stride", "chunk"), ("perplexity",)),
    **dict.fromkeys(("base", "short_length"), ("short",)),
    **dict.fromkeys(("length", "h2o", "streaming", "sinks"), ("perplexity", *_ASKING, "harness")),
    **dict.fromkeys(("repeats", "chat", "prefill_chunk"), _ASKING),
    **dict.fromkeys(("topic", "dialogues"), ("topics",)),
    "depth": _HIDING,
    "distractors": ("needle",),
    "limit": ("harness",),
    "seed": (*_ASKING, "harness"),
}


def _refuse_idle(context: typer.Context, settings: Any) -> None:
    """Raises for an option on the command line that would do nothing. Those of --config may: run.yaml has
    them all."""
    from sinklora.evaluation.tasks import TASKS

    chosen = {name if name in TASKS else "harness" for name in settings.task}
    caches = bool(settings.h2o or settings.streaming)
    for name in settings.as_dict():
        if getattr(context.get_parameter_source(name), "name", "") != "COMMANDLINE":
            continue
        tasks = _ACTS_ON.get(name)
        if tasks is not None and not chosen.intersection(tasks):
            names = ", ".join(tasks).replace("harness", "tasks of lm-evaluation-harness")
            raise bad(_option(name), f"acts only on {names}, got {', '.join(settings.task)}")
        if name in ("sinks", "chunk") and not caches:
            raise bad(_option(name), "acts only on caches, got neither --h2o nor --streaming")


def _option(name: str) -> str:
    return _OPTIONS.get(name, f"--{name.replace('_', '-')}")


@contextlib.contextmanager
def _option_errors() -> Iterator[None]:
    """Turns an error "name: what is wrong" about a setting into one about the option."""
    try:
        yield
    except (TypeError, ValueError) as error:
        name, _, rest = str(error).partition(": ")
        if not (rest and name.isidentifier()):
            raise
        raise bad(_option(name), rest) from error


def evaluate(
    context: typer.Context,
    model: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL...",
            help="Folders of models or PEFT adapters, or names on the Hub; NAME=PATH names it in tables.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            help="Folder for the results. Where it has some already, only what is missing is measured."
        ),
    ] = Path("sinklora-evaluation"),
    task: Annotated[
        list[str],
        typer.Option(
            "--task",
            "--tasks",
            metavar="NAME[,NAME...]",
            help="What to measure: perplexity; passkey, needle (a number in a long text); topics (of a long "
            "conversation); short (are short texts read as well as by the first model); or a task of "
            "lm-evaluation-harness, where that is installed. May be repeated.",
        ),
    ] = ["perplexity"],  # noqa: B006
    data: Annotated[
        list[str],
        typer.Option(
            metavar="SOURCE",
            help="Text to score: files (text, JSONL, Parquet), folders of them, a dataset. May be repeated.",
            show_default=False,
        ),
    ] = [],  # noqa: B006
    text_field: Annotated[str, typer.Option(help="Field of the text in JSONL, Parquet, datasets.")] = "text",
    split: Annotated[str, typer.Option(help="Split of a dataset.")] = "train",
    length: Annotated[
        list[int], typer.Option(help="Tokens that the model sees at once. May be repeated.")
    ] = [512, 1024, 2048, 4096],  # noqa: B006
    stride: Annotated[
        int | None,
        typer.Option(
            help="Tokens that the window of perplexity is moved on by.",
            show_default="256, and at most half the shortest length",
        ),
    ] = None,
    attention: Annotated[
        list[str],
        typer.Option(
            help="full: everything; sf: the pattern that the model was trained with. May be repeated."
        ),
    ] = ["full"],  # noqa: B006
    h2o: Annotated[
        list[Any],
        typer.Option(
            parser=amount,
            metavar="N|SHARE",
            help="Also through an H2O cache of so many entries, or share of the length, half heavy, half "
            "recent. May be repeated.",
        ),
    ] = [],  # noqa: B006
    streaming: Annotated[
        list[Any],
        typer.Option(
            parser=amount,
            metavar="N|SHARE",
            help="Also through StreamingLLM's cache of so many newest entries. May be repeated.",
        ),
    ] = [],  # noqa: B006
    sinks: Annotated[int, typer.Option(help="First tokens that caches keep on top of their budget.")] = 4,
    chunk: Annotated[
        int, typer.Option(help="Tokens that perplexity reads at a time through a cache; 1 is decoding.")
    ] = 32,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    batch_tokens: Annotated[int, typer.Option(help="Tokens computed together.")] = 8192,
    max_documents: Annotated[
        int | None, typer.Option(help="The first so many documents.", show_default="all")
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(help="Of each document its first so many tokens.", show_default="all")
    ] = None,
    min_tokens: Annotated[int, typer.Option(help="Leave out documents of fewer tokens.")] = 2,
    base: Annotated[
        str | None,
        typer.Option(help="Name of the model that short compares with.", show_default="the first one"),
    ] = None,
    short_length: Annotated[
        int | None,
        typer.Option(help="Tokens of short's pieces of text.", show_default="the context base began with"),
    ] = None,
    repeats: Annotated[int, typer.Option(help="Questions of retrieval at each length and depth.")] = 10,
    depth: Annotated[
        list[float],
        typer.Option(help="Where passkey and needle hide a number, 0 to 1. May be repeated."),
    ] = [0.0, 0.25, 0.5, 0.75, 1.0],  # noqa: B006
    distractors: Annotated[int, typer.Option(help="Other numbers that needle hides.")] = 4,
    topic: Annotated[int, typer.Option(help="The topic that topics asks for; 1 is the first.")] = 1,
    dialogues: Annotated[
        list[str],
        typer.Option(
            metavar="FILE",
            help="JSON Lines of dialogues for topics, in LongChat's form. May be repeated.",
            show_default="made up",
        ),
    ] = [],  # noqa: B006
    chat: Annotated[
        bool, typer.Option("--chat", help="Ask in the tokenizer's chat template, for models that have one.")
    ] = False,
    prefill_chunk: Annotated[
        int | None,
        typer.Option(
            help="Tokens of a question read at a time; a bounded cache evicts after each.",
            show_default="all at once",
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(help="Questions of each task of lm-evaluation-harness.", show_default="all"),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of what is drawn.")] = 0,
    config: ConfigOption = None,
) -> None:
    """Measure models side by side: perplexity by context length, retrieval, short texts.

    Every measured cell is stored at once: the same command goes on after an interruption. --output gets a
    table (.csv) and a picture (.png) of each task, results.json with everything, and run.yaml for --config.
    """
    require("train", "torch", "transformers", "matplotlib")
    given: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in locals().items()
        if name not in ("context", "output", "config")
    }
    given["task"] = tuple(name for names in task for name in names.split(",") if name)
    prepare_libraries()
    with _option_errors():
        from sinklora.evaluation.settings import EvaluateSettings
        from sinklora.evaluation.tasks import make_tasks

        settings = EvaluateSettings(**given)
        tasks = make_tasks(settings, settings.models())
        _refuse_idle(context, settings)
        results, console = _measure(settings, tasks, output)
    _show(results, tasks, console)
    note(f"{results.measured} cells measured, {results.stored} taken from earlier calls; all in {output}")
    if not any(results.rows.values()):
        raise RuntimeError(f"nothing could be measured: {results.failures[0].message}")
    failed = sorted({failure.model for failure in results.failures if not failure.skipped})
    if failed:
        raise RuntimeError(f"not everything could be measured of {', '.join(failed)}")


def _measure(settings: Any, tasks: Sequence[Task], output: Path) -> tuple[Results, Console]:
    import yaml

    from sinklora.commands.demo import _console
    from sinklora.commands.shared import own_warnings_only
    from sinklora.evaluation.report import write_results
    from sinklora.evaluation.run import Evaluation, Interrupted
    from sinklora.evaluation.store import Store
    from sinklora.folders import write_whole
    from sinklora.progress import progress_bars

    console = _console()
    evaluation = Evaluation(
        settings.models(),
        settings.ways(),
        tasks,
        Store(output),
        dtype=settings.dtype,
        device=str(settings.place()),
    )
    write_whole(output / "run.yaml", yaml.safe_dump(settings.as_dict(), sort_keys=False).encode())
    try:
        with progress_bars(console) as begin, own_warnings_only():
            results = evaluation.run(begin)
    except Interrupted as stopped:
        note(str(stopped))
        raise
    write_results(results, tasks, settings.as_dict(), output)
    return results, console


def _show(results: Results, tasks: Sequence[Task], console: Console) -> None:
    """A table for each task, what it means below it, and what could not be measured."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from sinklora.evaluation.report import table

    for task in tasks:
        rows = results.rows[task.name]
        if not rows:
            continue
        headers, lines = table(task, rows)
        shown = Table(box=box.SIMPLE)
        for index, header in enumerate(headers):
            shown.add_column(header, justify="left" if index < 2 else "right")
        for line in lines:
            shown.add_row(*map(Text, line))
        console.print(shown)
        for text in task.notes(rows):
            console.print(Text(text, style="dim"))
    together: dict[tuple[bool, str], list[str]] = {}
    for failure in results.failures:
        where = " ".join(part for part in (failure.task, failure.model, failure.way) if part)
        together.setdefault((failure.skipped, failure.message), []).append(where)
    for (skipped, message), places in together.items():
        note(f"{'SKIPPED' if skipped else 'FAILED'}: {message} ({', '.join(places)})")

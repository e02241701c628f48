"""The frame of the command line: commands by name, options from a YAML file, one-line errors, exit status.

A command is a function in sinklora/commands, registered in COMMANDS below. Its module is imported when it
is asked for, and imports what it needs when it runs, so that every `--help` is quick and a missing package
matters only to the commands that need it.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer
from typer.core import TyperGroup

from . import __version__


class Command(NamedTuple):
    """Where a command is (module in sinklora.commands, function), and its line in the list of commands: the
    first sentence of the function's docstring, here so that the list imports no command."""

    module: str
    function: str
    help: str


class Group(NamedTuple):
    """Commands under a common name, as in `sinklora data mix`."""

    help: str
    commands: Mapping[str, Command]


# By their names on the command line, in the order of the list.
COMMANDS: dict[str, Command | Group] = {
    "demo": Command(
        "demo",
        "demo",
        "Extend the context of a small LLaMA with full attention, S2-Attn and SF-Attn, and compare them.",
    ),
    "finetune": Command(
        "finetune", "finetune", "Extend a model's context by training it on text with SF-Attn."
    ),
    "sft": Command(
        "sft", "sft", "Tune a model on instruction data with SF-Attn; the loss is on answers only."
    ),
    "data": Group(
        "Make data to train on.",
        {
            "mix": Command(
                "data",
                "mix",
                "Mix instruction rows from several sources by shares into one file for `sinklora sft`.",
            )
        },
    ),
    "evaluate": Command(
        "evaluate",
        "evaluate",
        "Measure models side by side: perplexity by context length, retrieval, short texts.",
    ),
    "merge": Command(
        "merge",
        "merge",
        "Write an adapter into its base model: a plain checkpoint that loads anywhere, checked.",
    ),
    "generate": Command("generate", "generate", "Continue a text with a bounded (H2O) cache."),
    "chat": Command(
        "chat", "chat", "Talk with a model over a bounded (H2O) cache that lives through the whole dialogue."
    ),
    "visualize": Command(
        "visualize",
        "visualize",
        "Draw who may see whom, for each kind of head: a picture, or block characters on the terminal.",
    ),
    "benchmark": Command(
        "benchmark",
        "benchmark",
        "Time SF-Attn, LongLoRA's S2 form over SDPA and full attention by SDPA, forward and with backward.",
    ),
    "info": Command(
        "info", "info", "Show versions, the CPU's level, threads, CUDA or not, and which path would run."
    ),
}

DEBUG_VARIABLE = "SINKLORA_DEBUG"
USAGE_STATUS = 2
ERROR_STATUS = 1
INTERRUPTED_STATUS = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit status: 0, 1 for an error, 2 for wrong usage, 130 when
    interrupted.

    Errors are one line on stderr; with --debug (or SINKLORA_DEBUG=1) their traceback comes first.
    """
    given = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    command = typer.main.get_command(build_app())
    try:
        status = command.main(args=given, prog_name="sinklora", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        return _fail("interrupted", INTERRUPTED_STATUS)
    except Exception as error:
        if _debugging(given):
            import traceback

            traceback.print_exc()
        if _said_by_first(error):
            return getattr(error, "exit_code", ERROR_STATUS)
        # Usage errors of typer (and of click, which older ones stand on) know how to say what was wrong.
        if hasattr(error, "format_message"):
            return _fail(
                f"{_prefix(error)}{error.format_message()}", getattr(error, "exit_code", USAGE_STATUS)
            )
        return _fail(str(error) or type(error).__name__, ERROR_STATUS)
    if status == INTERRUPTED_STATUS:  # how newer typers return an interrupt
        return _fail("interrupted", INTERRUPTED_STATUS)
    return status if isinstance(status, int) else 0


def build_app() -> typer.Typer:
    """The typer application; each command is imported when it is asked for."""
    app = _new_typer(
        cls=_group_of(COMMANDS),
        name="sinklora",
        help="Longer context for language models: SF-Attn training, and generation with an H2O cache.",
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_root)
    return app


def _new_typer(**settings: Any) -> typer.Typer:
    return typer.Typer(add_completion=False, rich_markup_mode=None, **settings)


class _Commands(TyperGroup):
    """A group that imports the one command that is asked for, and lists the others by their names."""

    entries: Mapping[str, Command | Group] = {}

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Only names, for typer looks here for one that is like a mistyped one.
        self.commands: Any = dict.fromkeys(self.entries)

    def list_commands(self, ctx: Any) -> list[str]:
        return list(self.entries)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        entry = self.entries.get(cmd_name)
        return None if entry is None else _made(cmd_name, entry)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, entry.help) for name, entry in self.entries.items()])


def _group_of(entries: Mapping[str, Command | Group]) -> type[_Commands]:
    return type("_Commands", (_Commands,), {"entries": entries})


def _made(name: str, entry: Command | Group) -> Any:
    """typer's command of an entry."""
    if isinstance(entry, Group):
        app = _new_typer(cls=_group_of(entry.commands), name=name, help=entry.help)
        app.callback()(lambda: None)  # without one typer takes an empty group for a mistake
    else:
        app = _new_typer()
        module = importlib.import_module(f".commands.{entry.module}", __package__)
        app.command(name)(getattr(module, entry.function))
    return typer.main.get_command(app)


def _version(on: bool) -> None:
    if on:
        typer.echo(f"sinklora {__version__}")
        raise typer.Exit


def _root(
    version: Annotated[
        bool,
        typer.Option("--version", help="Show the version and exit.", callback=_version, is_eager=True),
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help=f"Show tracebacks and log messages (also {DEBUG_VARIABLE}=1).")
    ] = False,
) -> None:
    level = logging.WARNING if _is_first() else logging.ERROR
    logging.basicConfig(
        level=logging.INFO if debug else level, format="%(name)s: %(message)s", stream=sys.stderr
    )


def load_config(context: typer.Context, path: Path | None) -> Path | None:
    """Callback of --config: the file's values become the defaults of the command's other options.

    Keys are option names, with dashes or underscores. The command line wins.

    Raises:
        typer.BadParameter: no such file, no YAML mapping, or a key that is no option of the command.
    """
    if path is None:
        return None
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise typer.BadParameter(f"{path}: {getattr(error, 'strerror', None) or error}") from error
    except yaml.YAMLError as error:
        raise typer.BadParameter(f"{path}: expected YAML, got {' '.join(str(error).split())}") from error
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise typer.BadParameter(f"{path}: expected a mapping of options, got {type(values).__name__}")
    names = [parameter.name for parameter in context.command.params if parameter.name]
    known = {_key(name): name for name in names if name != "config"}
    repeated = {parameter.name: getattr(parameter, "multiple", False) for parameter in context.command.params}
    defaults: dict[str, Any] = {}
    for key, value in values.items():
        name = known.get(_key(str(key)))
        if name is None:
            raise typer.BadParameter(f"{path}: {key}: no such option; there are {', '.join(sorted(known))}")
        # One value stands for a list of it. Commands that take a mapping read it themselves.
        single = not isinstance(value, list | dict) and value is not None
        defaults[name] = [value] if repeated.get(name) and single else value
    context.default_map = {**(context.default_map or {}), **defaults}
    return path


def _key(name: str) -> str:
    return name.replace("-", "_")


# The --config option of the commands that take one.
ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config",
        help="YAML file of options (key: value); options on the command line win.",
        callback=load_config,
        is_eager=True,
        show_default=False,
    ),
]


def _prefix(error: Any) -> str:
    """The command that was used wrongly, as "demo: " or "data mix: "."""
    context = getattr(error, "ctx", None)
    path = context.command_path.partition(" ")[2] if context is not None else ""
    return f"{path}: " if path else ""


def _debugging(arguments: Sequence[str]) -> bool:
    return "--debug" in arguments or os.environ.get(DEBUG_VARIABLE, "0") not in ("", "0")


def _said_by_first(error: Exception) -> bool:
    """Whether under torchrun the first process says the same: options and data are wrong in all of them, and
    they stop together."""
    alike = hasattr(error, "format_message") or isinstance(error, ValueError | FloatingPointError)
    return alike and not _is_first()


def _is_first() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _fail(message: str, status: int) -> int:
    print(f"sinklora: error: {' '.join(message.split())}", file=sys.stderr)
    return status

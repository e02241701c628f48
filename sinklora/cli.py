"""The frame of the command line: commands by name, options from a YAML file, one-line errors, exit status.

A command is a function in sinklora/commands, registered in COMMANDS below; it imports what it needs when it
runs, so that `--help` is quick and a missing package matters only to the commands that need it.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from . import __version__

# name on the command line -> (module in sinklora.commands, function)
COMMANDS = {
    "demo": ("demo", "demo"),
    "generate": ("generate", "generate"),
    "chat": ("chat", "chat"),
    "visualize": ("visualize", "visualize"),
    "benchmark": ("benchmark", "benchmark"),
    "info": ("info", "info"),
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
    """The typer application with every command."""
    app = typer.Typer(
        name="sinklora",
        help="Longer context for language models: SF-Attn training, and generation with an H2O cache.",
        add_completion=False,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_root)
    for name, (module, function) in COMMANDS.items():
        body = getattr(importlib.import_module(f".commands.{module}", __package__), function)
        app.command(name)(body)
    return app


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
    logging.basicConfig(
        level=logging.INFO if debug else logging.WARNING, format="%(name)s: %(message)s", stream=sys.stderr
    )


def load_config(context: typer.Context, path: Path | None) -> Path | None:
    """Callback of --config: the file's values become the defaults of the command's other options.

    Keys are option names, with dashes or underscores. The command line wins.

    Raises:
        typer.BadParameter: no such file, no YAML mapping, or a key that is no option of the command.
    """
    if path is None:
        return None
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
    defaults: dict[str, Any] = {}
    for key, value in values.items():
        name = known.get(_key(str(key)))
        if name is None:
            raise typer.BadParameter(f"{path}: {key}: no such option; there are {', '.join(sorted(known))}")
        defaults[name] = value
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
    """The command that was used wrongly, as "demo: "."""
    context = getattr(error, "ctx", None)
    name = getattr(context, "info_name", None) if context is not None and context.parent is not None else None
    return f"{name}: " if name else ""


def _debugging(arguments: Sequence[str]) -> bool:
    return "--debug" in arguments or os.environ.get(DEBUG_VARIABLE, "0") not in ("", "0")


def _fail(message: str, status: int) -> int:
    print(f"sinklora: error: {' '.join(message.split())}", file=sys.stderr)
    return status

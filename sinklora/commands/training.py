"""What the commands that train share: options to settings, errors by option, and what is shown."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import typer

from sinklora.extras import require

Settings = TypeVar("Settings")
# What the library's functions call an option's value.
_OTHER_NAMES = {"target_modules": "lora_targets", "validation": "eval_share"}


def either(context: Any, values: dict[str, Any], *pairs: tuple[str, str]) -> dict[str, Any]:
    """The values, where of a pair that excludes each other one came from --config and the other from the
    command line without the first."""
    done = dict(values)
    for pair in pairs:
        sources = [getattr(context.get_parameter_source(name), "name", "") for name in pair]
        if sorted(sources) == ["COMMANDLINE", "DEFAULT_MAP"]:
            done[pair[sources.index("DEFAULT_MAP")]] = None
    return done


def run_settings(kind: type[Settings], values: Mapping[str, Any]) -> Settings:
    """The settings dataclass of the options; what is missing or wrong is an error about the option."""
    fields = {field.name: field for field in dataclasses.fields(kind) if field.init}  # type: ignore[arg-type]
    plain: dict[str, Any] = {}
    for name, field in fields.items():
        value = values[name]
        required = field.default is dataclasses.MISSING
        if required and (value is None or value == []):
            raise bad(name, "missing")
        if isinstance(value, Path):
            value = str(value)
        elif isinstance(value, list) or (value is None and field.default == ()):
            value = tuple(value or ())
        plain[name] = value
    with option_errors(set(fields)):
        return kind(**plain)


def bad(name: str, what: str) -> typer.BadParameter:
    return typer.BadParameter(what, param_hint=f"'--{name.replace('_', '-')}'")


@contextlib.contextmanager
def option_errors(names: set[str]) -> Iterator[None]:
    """Turns an error "name: what is wrong" about a setting into one about the option."""
    try:
        yield
    except (TypeError, ValueError) as error:
        name, _, rest = str(error).partition(": ")
        name = _OTHER_NAMES.get(name, name)
        if name not in names or not rest:
            raise
        raise bad(name, rest) from error


def quiet_libraries() -> None:
    """Keeps progress bars, hints and notices of the libraries off the terminal; their warnings go through
    logging."""
    warnings.simplefilter("ignore", FutureWarning)
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_default_handler()
    transformers.utils.logging.enable_propagation()


def show_training(settings: Any, run: str = "continued:FinetuneRun", needs: Sequence[str] = ()) -> None:
    """Runs what the settings say.

    Args:
        run: module in sinklora.training and class, imported once it is known that all packages are there.
        needs: packages beside those that every training needs.
    """
    require("train", "torch", "transformers", "peft", "accelerate", "safetensors", "matplotlib", *needs)
    from rich.console import Console

    from sinklora.progress import progress_bars

    console = Console(highlight=False, soft_wrap=True)
    quiet_libraries()
    module, _, name = run.partition(":")
    kind = getattr(importlib.import_module(f"sinklora.training.{module}"), name)
    names = {field.name for field in dataclasses.fields(settings)}
    with option_errors(names), progress_bars(console) as begin:
        job = kind(settings, begin)
        job.show = functools.partial(_show, console, settings)
        job.run()


def _show(console: Any, settings: Any, what: str, lines: Sequence[tuple[str, str]]) -> None:
    """A block of lines of name and text, and after it what to do next; in the main process only."""
    from rich.text import Text

    from sinklora.training.card import next_commands
    from sinklora.training.devices import is_main

    if not is_main():
        return
    width = max((len(name) for name, _ in lines), default=0)
    if what != "plan":
        console.print()
    for name, text in lines:
        console.print(Text.assemble((f"{name:<{width}}  ", "dim"), text))
    if what == "estimate":
        console.print("\nA dry run: nothing was written but the tokens in the cache.")
    elif what == "result":
        folder = settings.output
        console.print(f"\nEverything is in {folder}. Go on with:")
        for command in next_commands(folder, adapter=not settings.full_finetuning):
            console.print(f"  {command}", markup=False)

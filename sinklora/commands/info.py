"""sinklora info"""

from __future__ import annotations

import json
from typing import Annotated

import typer


def info(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Show versions, the CPU's level, threads, CUDA or not, and which path would run."""
    import sinklora

    facts = sinklora.info()
    typer.echo(json.dumps(facts, indent=2) if as_json else str(facts))

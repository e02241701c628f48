"""The model card (README.md) of a run's result."""

from __future__ import annotations

import math
import platform
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .log import losses
from .plan import Lines
from .settings import FinetuneSettings

_HYPERPARAMETERS = (
    "learning_rate",
    "schedule",
    "warmup_steps",
    "weight_decay",
    "max_grad_norm",
    "batch_size",
    "accumulate",
    "lora_rank",
    "lora_alpha",
    "lora_dropout",
    "seed",
)

_LOAD_ADAPTER = """\
This folder holds an adapter. Its base model, positions and attention settings are found by

```python
from sinklora.loading import open_model

model, tokenizer, _ = open_model({folder!r})
```

or on the command line `{generate}`. To load it anywhere, without sinklora, write it
into its base model once: `{merge}`.
"""

_LOAD_MODEL = """\
This folder holds a whole model: `AutoModelForCausalLM.from_pretrained({folder!r})` loads it, with the
positions that it was trained with. Nothing has to be merged.
"""

_LIMITS = """\
- Trained with {attention}; in use and in the evaluation above it attends fully.
- Loss and perplexity are of the held-out text alone, if there is any. They say little of other text, of
  retrieval from a long context, or of short ones: `sinklora evaluate` measures those.
- What the base model and its text bring along (bias, errors, licences) is here too. The licence of this model
  is for those who publish it to say, with the base model's and the text's in view.
"""


def write_card(
    path: Path, settings: FinetuneSettings, plan: Lines, history: Sequence[Mapping[str, Any]], adapter: bool
) -> None:
    """Writes README.md: what was trained on what and how, the losses, how to load it, and its limits."""
    name = Path(settings.output).name
    facts = dict(plan)
    rows = [(title, text) for title, text in plan if title not in ("model", "text", "held out")]
    rows += [(key.replace("_", " "), str(getattr(settings, key))) for key in _hyperparameters(settings)]
    generate, merge = next_commands(name, adapter=True)
    load = (_LOAD_ADAPTER if adapter else _LOAD_MODEL).format(folder=name, generate=generate, merge=merge)
    sections = [
        _front_matter(settings, adapter),
        f"# {name}\n",
        f"`{settings.model}`, trained on rows of {settings.context:,} tokens with sinklora.\n",
        "## Data\n",
        _data(settings, facts),
        "## Training\n",
        _table(("setting", "value"), rows),
        "`run.yaml` has every option; with `--config run.yaml --output OTHER` the command repeats the run.\n",
        "## Losses\n",
        _losses(history),
        "![losses](loss.png)\n",
        "## Use\n",
        load,
        "## Limits\n",
        _LIMITS.format(attention=facts["attention"]),
        "## Versions\n",
        _table(("package", "version"), list(versions().items())),
    ]
    path.write_text("\n".join(sections), encoding="utf-8")


def next_commands(folder: str, *, adapter: bool) -> list[str]:
    """What may be typed next with a result's folder; `sinklora merge` for an adapter only."""
    place = shlex.quote(folder)
    merge = [f"sinklora merge {place} --output MERGED"] if adapter else []
    return [f"sinklora generate --model {place} TEXT", *merge]


def versions() -> dict[str, str]:
    """Of Python and of the packages that the result depends on."""
    from importlib import metadata

    from .. import __version__

    found = {"sinklora": __version__, "python": platform.python_version()}
    for name in ("torch", "transformers", "peft", "accelerate", "trl"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def summary(history: Sequence[Mapping[str, Any]]) -> Lines:
    """(name, text) of what a run came to: losses at its beginning and end, and its speed."""
    training, held_out = losses(history, "loss"), losses(history, "eval_loss")
    lines = []
    if training:
        values = list(training.values())
        end = values[-min(len(values), 10) :]
        lines.append(
            (
                "training loss",
                f"{values[0]:.4f} in the first step, {math.fsum(end) / len(end):.4f} in the last",
            )
        )
    if held_out:
        values = list(held_out.values())
        text = f"{values[-1]:.4f} (perplexity {_perplexity(values[-1])}) with full attention"
        if len(values) > 1 and min(held_out) == 0:
            text += f"; before the training {values[0]:.4f} ({_perplexity(values[0])})"
        lines.append(("held-out loss", text))
    speeds = sorted(float(entry["tokens_per_second"]) for entry in history if "tokens_per_second" in entry)
    if speeds:
        lines.append(("speed", f"{speeds[len(speeds) // 2]:,.0f} tokens/s"))
    return lines


def _perplexity(loss: float) -> str:
    return f"{math.exp(min(loss, 700.0)):.4g}"


def _hyperparameters(settings: FinetuneSettings) -> list[str]:
    unused = ("lora_rank", "lora_alpha", "lora_dropout") if settings.full_finetuning else ()
    return [name for name in _HYPERPARAMETERS if name not in unused]


def _front_matter(settings: FinetuneSettings, adapter: bool) -> str:
    import yaml

    values: dict[str, Any] = {}
    # A folder of this machine is no name that others could look up.
    if not Path(settings.model).exists():
        values["base_model"] = settings.model
    values |= {
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["sinklora", "long-context", *(["lora"] if adapter else [])],
    }
    return f"---\n{yaml.safe_dump(values, sort_keys=False)}---\n"


def _data(settings: FinetuneSettings, facts: Mapping[str, str]) -> str:
    lines = [f"- Trained on {facts['text']}, of: {', '.join(f'`{name}`' for name in settings.data)}"]
    if "held out" in facts:
        source = ", ".join(f"`{name}`" for name in settings.eval_data) or "the same sources"
        lines.append(f"- Held out for the evaluation: {facts['held out']}, of: {source}")
    return "\n".join(lines) + "\n"


def _losses(history: Sequence[Mapping[str, Any]]) -> str:
    return "\n".join(f"- {name}: {text}" for name, text in summary(history)) + "\n"


def _table(headers: tuple[str, str], rows: Sequence[tuple[str, str]]) -> str:
    lines = [f"| {headers[0]} | {headers[1]} |", "| --- | --- |"]
    lines += [f"| {name} | {text.replace('|', chr(92) + '|')} |" for name, text in rows]
    return "\n".join(lines) + "\n"

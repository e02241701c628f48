"""README.md of a merged model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .merge import Merged

_FRONT_MATTER = re.compile(r"\A---\n.*?\n---\n", re.DOTALL)


def write_card(result: Merged, folder: Path) -> None:
    """Writes what was merged and how it was checked, followed by the adapter's own card."""
    check = result.check
    reach = f", {result.context} tokens" if result.context is not None else ""
    text = f"""---
library_name: transformers
tags: [sinklora]
---

# {result.adapter.resolve().name}, merged

The adapter `{result.adapter.resolve().name}` written into its base model `{_public(result.base)}` by
`sinklora merge`. It needs neither sinklora nor PEFT:

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("this folder")
```

| | |
|---|---|
| weights | {result.parameters:,} in {result.dtype}, summed in float32 |
| vocabulary | {result.vocabulary} tokens{", embeddings and output layer tied" if result.tied else ""} |
| positions | {result.rope}{reach} |
| check | logits of {check.tokens} tokens differ by {check.difference:.1e} of their size from the adapter's; \
{check.agreement:.1%} of the likeliest tokens agree |
"""
    own = result.adapter / "README.md"
    if own.is_file():
        card = _FRONT_MATTER.sub("", own.read_text(encoding="utf-8", errors="replace")).strip()
        text += f"\n# The adapter's card\n\n{card}\n"
    (folder / "README.md").write_text(text, encoding="utf-8")


def _public(base: str) -> str:
    """A name on the Hub as it is, of a folder its last part: where it lay is nobody's business."""
    return Path(base).name if Path(base).exists() else base

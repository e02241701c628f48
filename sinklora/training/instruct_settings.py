"""What `sinklora sft` is told: the settings of `sinklora finetune`, but for those of plain text, and its
own."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from .settings import FinetuneSettings

OVERLONG = ("shorten", "drop", "error")
# s2-torch cannot keep conversations apart.
ATTENTIONS = ("sf", "s2", "full")


@dataclasses.dataclass(frozen=True)
class SftSettings(FinetuneSettings):
    """The options of `sinklora sft` under their names; see FinetuneSettings.

    chat_template: a file. system: the system message of conversations that have none.
    """

    text_field: str = dataclasses.field(default="text", init=False)
    packing: str = dataclasses.field(default="whole", init=False)
    chunk_tokens: int = dataclasses.field(default=1024, init=False)
    overlong: str = "shorten"
    no_packing: bool = False
    chat_template: str | None = None
    system: str | None = None

    def __post_init__(self) -> None:
        if self.attention not in ATTENTIONS:
            raise ValueError(f"attention: expected one of {', '.join(ATTENTIONS)}, got {self.attention}")
        if self.overlong not in OVERLONG:
            raise ValueError(f"overlong: expected one of {', '.join(OVERLONG)}, got {self.overlong}")
        super().__post_init__()

    def template(self) -> str | None:
        """The text of chat_template. ValueError: it cannot be read."""
        if self.chat_template is None:
            return None
        try:
            return Path(self.chat_template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            what = getattr(error, "strerror", None) or error
            raise ValueError(f"chat_template: cannot read {self.chat_template}: {what}") from error

"""Opens a model to generate with or to train: a folder, an adapter's folder, or a name on the Hub."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from . import cuda
from .hf.patching import patch
from .hf.settings import CONFIG_KEY, FILE_NAME, base_model, text_config
from .pattern import SFPattern
from .weights import first_line, open_library, open_weights

# Where `sinklora demo` writes when it is not told otherwise.
DEMO_FOLDER = "sinklora-demo"
DTYPES = ("auto", "float32", "bfloat16", "float16")
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")
_ADAPTER_FILE = "adapter_config.json"


class OpenedModel(NamedTuple):
    """A patched model in eval mode, its tokenizer, and the name that it was opened by."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str


def open_model(name: str | os.PathLike[str] | None = None, dtype: str = "auto") -> OpenedModel:
    """Opens a causal language model and patches it with the settings that it carries, else the defaults.

    Args:
        name: the folder of a saved model, or of a PEFT adapter (on the base model that its
            adapter_config.json names, with the positions that it was trained with), or a model's name on the
            Hub. None: what `sinklora demo` left in its default folder.
        dtype: of the weights: one of DTYPES; "auto" is the one that they were saved in.

    In eval mode a patched model attends fully; settings that keep SF-Attn in eval mode are overruled, since
    SF-Attn does not go on from cached tokens.

    Raises:
        ValueError: nothing there that can be opened (the message names `model` or `dtype`).
        NotImplementedError: an adapter that is not made of weights (prompt tuning), a model that `patch`
        refuses.
    """
    options = _weight_options(dtype)
    source = _locate(name)
    carried: Path | SFPattern | None = None
    folder = Path(source)
    model: PreTrainedModel
    if (folder / _ADAPTER_FILE).is_file():
        from .extras import require

        require("train", "peft")
        from .adapters import adapter_files, open_adapter

        files = adapter_files(folder)
        # The adapter's layers are inside the base model, which generates as it does without PEFT around it.
        model, tokenizer_source = base_model(open_adapter(files, options)), files.tokenizer
        carried = folder if (folder / FILE_NAME).is_file() else None
    else:
        model, tokenizer_source = open_weights(source, options), source
    tokenizer: PreTrainedTokenizerBase = open_library(AutoTokenizer, tokenizer_source, {})
    if carried is None and getattr(text_config(model.config), CONFIG_KEY, None) is None:
        # Given, not left out: patch warns of settings nobody chose, and none of them acts in eval mode.
        carried = SFPattern()
    patch(model, carried, eval_attention="full")
    return OpenedModel(model.eval(), tokenizer, str(source))


def open_for_training(
    name: str | os.PathLike[str], *, dtype: str = "float32", quantize: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Opens a causal language model to train, with transformers' own attention, and its tokenizer.

    Args:
        name: the folder of a saved model, or a model's name on the Hub.
        dtype: of the weights: one of DTYPES; "auto" is the one that they were saved in.
        quantize: "4bit" holds the weights of linear layers in 4 bits (bitsandbytes' nf4, quantised twice) and
            computes in `dtype`; those weights are then not trained themselves (QLoRA).

    Raises:
        ValueError: nothing there that can be opened (the message names `model`, `dtype` or `quantize`).
        MissingExtraError: bitsandbytes is needed and not installed.
    """
    options = _weight_options(dtype)
    if quantize not in (None, "4bit"):
        raise ValueError(f"quantize: expected 4bit or None, got {quantize}")
    source = _locate(name)
    if (Path(source) / _ADAPTER_FILE).is_file():
        raise ValueError(
            f"model: expected a model to train, got the adapter {source}; write it into its base first: "
            f"sinklora merge {source} --output DIR"
        )
    if quantize is not None:
        options.update(_four_bits(options["dtype"]))
    return open_weights(source, options), open_library(AutoTokenizer, source, {})


def _weight_options(dtype: str) -> dict[str, Any]:
    if dtype not in DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype}")
    return {"dtype": dtype if dtype == "auto" else getattr(torch, dtype)}


def _four_bits(dtype: Any) -> dict[str, Any]:
    from .extras import require

    require("quantize", "bitsandbytes")
    from transformers import BitsAndBytesConfig

    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if dtype == "auto" else dtype,
    )
    # Quantised weights cannot be moved later: each process puts its copy on its own device at once.
    device = int(os.environ.get("LOCAL_RANK", "0")) if torch.cuda.is_available() else "cpu"
    return {"quantization_config": settings, "device_map": {"": device}}


def choose_device(name: str = "auto", *, kernels: bool = False) -> torch.device:
    """Where to run a model that open_model opened.

    Args:
        name: a device as torch calls it, or "auto": the GPU where there is one that serves, else the CPU.
        kernels: whether only sinklora's own kernels serve (for an H2OCache, or SF-Attn); without them a GPU
            attends by SDPA.

    Raises:
        ValueError: a device that is not here (names `device`).
    """
    if name == "auto":
        serves = torch.cuda.is_available() and (not kernels or cuda.takes(torch.device("cuda")))
        return torch.device("cuda" if serves else "cpu")
    try:
        found = torch.device(name)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"device: expected auto or one that is here (cpu, cuda, cuda:1), got {name}: {first_line(error)}"
        ) from error
    return found


def on_the_hub(name: str) -> bool:
    """Whether open_model will ask the Hub for it: "owner/name", and nothing of that name here."""
    return bool(_HUB_NAME.fullmatch(name)) and not Path(name).exists()


def _locate(name: str | os.PathLike[str] | None) -> str:
    """The folder or Hub name to open; refuses what is neither before anything is loaded."""
    if name is None:
        if not (Path(DEMO_FOLDER) / "config.json").is_file():
            raise ValueError(
                f"model: none given, and no model of the demo in {DEMO_FOLDER}; run `sinklora demo` here, or "
                "name a folder or a model of the Hub with --model"
            )
        return DEMO_FOLDER
    text = os.path.expanduser(os.fspath(name))
    path = Path(text)
    if on_the_hub(text):
        return text
    if not text:
        raise ValueError("model: no such folder: ''")
    if path.is_dir():
        if any((path / file).is_file() for file in ("config.json", _ADAPTER_FILE)):
            return text
        raise ValueError(f"model: expected config.json or {_ADAPTER_FILE} in {text}, found neither")
    if path.exists():
        raise ValueError(f"model: expected a folder, got the file {text}")
    # The Hub's old names without an owner are not asked for: they are mostly folders spelt wrong.
    raise ValueError(f"model: no such folder, nor a name on the Hub (owner/name): {text!r}")

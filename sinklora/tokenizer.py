"""A byte-level tokenizer: 256 bytes and a few special tokens, no vocabulary to train."""

from __future__ import annotations

from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast

SPECIAL_TOKENS = {"pad_token": "<|pad|>", "bos_token": "<|begin|>", "eos_token": "<|end|>"}


def byte_tokenizer(context: int) -> PreTrainedTokenizerFast:
    """Token b is byte b of the text's UTF-8; 256, 257 and 258 are padding, begin and end.

    An ordinary tokenizer of the tokenizers library: save_pretrained writes a tokenizer.json that
    AutoTokenizer opens. Nothing is added to a text, so any text comes back from its tokens exactly.

    Args:
        context: tokens that the model beside it takes (model_max_length).
    """
    vocabulary = {character: byte for byte, character in enumerate(_byte_characters())}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = ByteLevelDecoder()
    # Added here for their order; left to transformers they are numbered by the names of its settings.
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS.values()))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=context,
        clean_up_tokenization_spaces=False,
        **SPECIAL_TOKENS,
    )


def _byte_characters() -> list[str]:
    """The character that ByteLevel writes for each byte: itself where it is printable Latin-1, else one from
    U+0100 on.

    The table is GPT-2's; the tokenizers library has it inside and shows only its alphabet, so the order is
    made here.
    """
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)}
    spare = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(spare)) for byte in range(256)]

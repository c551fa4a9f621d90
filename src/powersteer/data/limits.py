"""What a base takes of a pair: so many tokens of a caption, pictures of such a size. Its weights are not loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from powersteer.backbones.load import source_of
from powersteer.backbones.parts import INDEX, load_tokenizer, read_index
from powersteer.core.errors import PowersteerError
from powersteer.core.files import is_folder
from powersteer.core.hub import CONFIG, fetch
from powersteer.core.text import read_object


@dataclass(frozen=True)
class Limits:
    """What limits the pairs that a base takes: its tokenizers, and the size of its pictures."""

    tokenizers: list[Any]
    side: int
    """Pixels of the pictures that it was trained on, which is the resolution of a training that names none."""


def limits_of(base: str) -> Limits:
    """The limits of a base.

    Args:
        base: See `powersteer.backbones.load.load_base`.

    Raises:
        PowersteerError: There is no such base, or what is read of it is missing or damaged.
    """
    folder = Path(source_of(base))
    try:
        if not is_folder(folder):
            folder = fetch(base, INDEX, f"unet/{CONFIG}", f"vae/{CONFIG}", "tokenizer*/*.json", "tokenizer*/*.txt")
        parts = read_index(folder / INDEX)
        tokenizers = [load_tokenizer(folder / name, parts[name]) for name in parts if name.startswith("tokenizer")]
        unet, vae = (read_object(folder / part / CONFIG) for part in ("unet", "vae"))
        latent, levels = unet.get("sample_size"), vae.get("block_out_channels")
        if not isinstance(latent, int) or not isinstance(levels, list) or not levels:
            raise PowersteerError("its configurations do not say how large its pictures are")
    except PowersteerError as error:
        raise PowersteerError(f"cannot read the captions' limits of the base '{base}': {error}") from None
    return Limits(tokenizers, latent * 2 ** (len(levels) - 1))

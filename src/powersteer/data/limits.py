"""What a base takes of a pair: so many tokens of a caption, pictures of such a size. Its weights are not loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from powersteer.backbones.load import find_base
from powersteer.backbones.parts import CONFIG, load_tokenizer
from powersteer.core.errors import PowersteerError
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
    try:
        found = find_base(base, weights=False)
        named = {name: kind for name, kind in found.kinds.items() if name.startswith("tokenizer")}
        tokenizers = [load_tokenizer(found.folder / name, kind) for name, kind in named.items()]
        unet, vae = (read_object(found.folder / part / CONFIG) for part in ("unet", "vae"))
        latent, levels = unet.get("sample_size"), vae.get("block_out_channels")
        if not isinstance(latent, int) or not isinstance(levels, list) or not levels:
            raise PowersteerError("its configurations do not say how large its pictures are")
    except PowersteerError as error:
        raise PowersteerError(f"cannot read the captions' limits of the base '{base}': {error}") from None
    return Limits(tokenizers, latent * 2 ** (len(levels) - 1))

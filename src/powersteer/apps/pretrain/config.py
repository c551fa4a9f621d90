"""The whole recipe of a base, one section a stage."""

from __future__ import annotations

from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from powersteer.apps.pretrain.clip import CLIPConfig
from powersteer.apps.pretrain.icons import DataConfig
from powersteer.apps.pretrain.text import TokenizerConfig
from powersteer.apps.pretrain.unet import UNetConfig
from powersteer.apps.pretrain.vae import VAEConfig
from powersteer.core.config import StrictConfig


class PretrainConfig(StrictConfig):
    """`powersteer pretrain CONFIG.yaml`."""

    output_dir: Path
    """Folder for the base and its stages."""
    minutes: float | None = Field(default=None, ge=0, le=1e6)
    """Time for the whole command, in minutes: the U-Net trains until then, or until its ``steps`` are done. 0 trains no
    more, and makes a base of what was trained before."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Seed of all stages."""
    init_from: str | None = None
    """Continue from a finished base: keep its tokenizer, CLIP and VAE, and train its U-Net further."""
    data: DataConfig
    """Icon sets to train on."""
    tokenizer: TokenizerConfig = TokenizerConfig()
    """Tokenizer."""
    clip: CLIPConfig | None = None
    """CLIP. Needed without ``init_from``."""
    vae: VAEConfig | None = None
    """VAE. Needed without ``init_from``."""
    unet: UNetConfig
    """U-Net."""

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if self.init_from is None and (self.clip is None or self.vae is None):
            raise ValueError("give clip and vae, or init_from")
        return self

    @model_validator(mode="after")
    def _latents_are_whole(self) -> Self:
        factor = 1 if self.vae is None else 2 ** (len(self.vae.block_out_channels) - 1)
        if self.data.resolution % factor:
            raise ValueError(
                f"the VAE makes one latent of {factor} pixels a side, of which {self.data.resolution} is no multiple"
            )
        return self

    @model_validator(mode="after")
    def _styles_are_known(self) -> Self:
        known = {source.style for source in self.data.sources}
        if unknown := set(self.unet.style_weights) - known:
            raise ValueError(f"style_weights names {sorted(unknown)}; the sources' styles are {sorted(known)}")
        return self

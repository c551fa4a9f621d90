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
    minutes: float | None = Field(default=None, ge=0, le=1e6)
    """How long the whole command takes: the U-Net learns until then, if its ``steps`` do not come before. With 0
    nothing more is learned, and what was learned before becomes a base."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    init_from: str | None = None
    """Go on from a finished base: its tokenizer, CLIP and VAE are taken as they are, its U-Net trained further."""
    data: DataConfig
    tokenizer: TokenizerConfig = TokenizerConfig()
    clip: CLIPConfig | None = None
    vae: VAEConfig | None = None
    """Like ``clip``, needed unless there is ``init_from``."""
    unet: UNetConfig

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

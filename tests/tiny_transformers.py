"""Tiny diffusion transformers of every family of the table, with random weights, in their stock pipelines."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch

TEXT = 7
"""Tokens of a prompt."""


@dataclass(frozen=True)
class Tiny:
    """One family at a tiny shape."""

    transformer: Callable[[], Any]
    pipeline: str
    scheduler: Callable[[], Any]
    texts: Callable[[torch.Generator, int], dict[str, Any]]
    """The pipeline's text arguments for so many prompts."""
    channels: int
    """Of the latents as the transformer is given them, a token's where they are packed."""
    pixels: int = 16
    """Pixels per token, along each side."""
    guidance: str = "guidance_scale"
    vae: Callable[[], Any] = lambda: None
    more: tuple[tuple[str, Any], ...] = ()

    def pipe(self, seed: int = 0) -> Any:
        """The stock pipeline, without text encoders and VAE."""
        torch.manual_seed(seed)
        transformer = self.transformer().eval().requires_grad_(False)
        with torch.no_grad():
            for parameter in transformer.parameters():  # zero-initialised ones would hide what is added
                parameter += 0.05 * torch.randn_like(parameter)
        kind = getattr(diffusers, self.pipeline)
        parts: dict[str, Any] = dict.fromkeys(kind._optional_components)
        needed = ("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3")
        asked = inspect.signature(kind.__init__).parameters
        parts |= {name: None for name in needed if name in asked}
        pipe = kind(**parts | {"vae": self.vae()}, transformer=transformer, scheduler=self.scheduler())
        pipe.set_progress_bar_config(disable=True)
        return pipe


def _flow() -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler()


def _random(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=generator)


def _plain(generator: torch.Generator, count: int) -> dict[str, Any]:
    shape = count, TEXT, 16
    return {"prompt_embeds": _random(generator, *shape), "negative_prompt_embeds": _random(generator, *shape)}


def _pooled(generator: torch.Generator, count: int) -> dict[str, Any]:
    names = ("pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    return _plain(generator, count) | {name: _random(generator, count, 24) for name in names}


def _masked(generator: torch.Generator, count: int) -> dict[str, Any]:
    names = ("prompt_attention_mask", "negative_prompt_attention_mask")
    return _plain(generator, count) | {name: torch.ones(count, TEXT) for name in names}


def _qwen(generator: torch.Generator, count: int) -> dict[str, Any]:
    names = ("prompt_embeds_mask", "negative_prompt_embeds_mask")
    return _plain(generator, count) | {name: torch.ones(count, TEXT, dtype=torch.long) for name in names}


def _lists(generator: torch.Generator, count: int) -> dict[str, Any]:
    return {name: list(rows) for name, rows in _plain(generator, count).items()}


TINY = {
    "Stable Diffusion 3": Tiny(
        lambda: diffusers.SD3Transformer2DModel(
            sample_size=8,
            in_channels=4,
            num_layers=3,
            attention_head_dim=8,
            num_attention_heads=4,
            joint_attention_dim=16,
            caption_projection_dim=32,
            pooled_projection_dim=24,
            out_channels=4,
            pos_embed_max_size=16,
        ),
        "StableDiffusion3Pipeline",
        _flow,
        _pooled,
        4,
    ),
    "FLUX.1": Tiny(
        lambda: diffusers.FluxTransformer2DModel(
            in_channels=16,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=16,
            pooled_projection_dim=24,
            axes_dims_rope=(4, 4, 8),
        ),
        "FluxPipeline",
        _flow,
        _pooled,
        16,
        guidance="true_cfg_scale",
    ),
    "FLUX.2": Tiny(
        lambda: diffusers.Flux2Transformer2DModel(
            in_channels=16,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=16,
            axes_dims_rope=(4, 4, 4, 4),
            guidance_embeds=False,
        ),
        "Flux2KleinPipeline",
        _flow,
        _plain,
        16,
        vae=lambda: diffusers.AutoencoderKLFlux2(
            block_out_channels=(8, 8, 8, 8),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=4,
            sample_size=32,
        ),
    ),
    "Qwen-Image": Tiny(
        lambda: diffusers.QwenImageTransformer2DModel(
            in_channels=16,
            out_channels=4,
            num_layers=3,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=16,
            axes_dims_rope=(4, 4, 8),
        ),
        "QwenImagePipeline",
        _flow,
        _qwen,
        16,
        guidance="true_cfg_scale",
    ),
    "Z-Image": Tiny(
        lambda: diffusers.ZImageTransformer2DModel(
            in_channels=4,
            dim=32,
            n_layers=3,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=16,
            axes_dims=[4, 4, 8],
            axes_lens=[256, 32, 32],
        ),
        "ZImagePipeline",
        _flow,
        _lists,
        4,
    ),
    "Sana": Tiny(
        lambda: diffusers.SanaTransformer2DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=4,
            attention_head_dim=8,
            num_layers=3,
            num_cross_attention_heads=4,
            cross_attention_head_dim=8,
            cross_attention_dim=32,
            caption_channels=16,
            sample_size=4,
        ),
        "SanaPipeline",
        _flow,
        _masked,
        4,
        pixels=32,
        more=(("use_resolution_binning", False), ("prompt", None), ("negative_prompt", None)),
    ),
    "PixArt": Tiny(
        lambda: diffusers.PixArtTransformer2DModel(
            sample_size=8,
            in_channels=4,
            out_channels=8,
            num_layers=3,
            attention_head_dim=8,
            num_attention_heads=4,
            caption_channels=16,
            cross_attention_dim=32,
            use_additional_conditions=False,
        ),
        "PixArtSigmaPipeline",
        lambda: diffusers.DDIMScheduler(clip_sample=False),
        _masked,
        4,
        more=(("use_resolution_binning", False), ("negative_prompt", None)),
    ),
}

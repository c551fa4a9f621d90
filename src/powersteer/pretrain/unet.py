"""Stage 5, U-Net: text-to-image denoiser on cached latents and text states."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from pydantic import Field
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer

from powersteer.pictures import save_grid
from powersteer.pretrain.clip import caption_ranks
from powersteer.pretrain.fit import FitConfig, fit
from powersteer.pretrain.icons import Icon, IconSet, captions
from powersteer.pretrain.text import tokenize
from powersteer.records import Layers, Size, Sizes

LATENT_SIZE = 16
_PEOPLE = ("man", "woman", "person", "men", "women", "people", "family", "couple", "kiss", "boy", "girl")


class UNetConfig(FitConfig):
    """The denoiser's size, its training and what it is judged by."""

    block_out_channels: Sizes = (64, 128, 160)
    layers_per_block: Layers = 2
    attention_levels: tuple[bool, ...] = (False, True, True)
    attention_head_dim: Sizes = (2, 4, 5)
    """Heads at each level (diffusers' U-Net calls their number so)."""
    norm_num_groups: Size = 16
    empty_prompt_share: float = Field(default=0.1, ge=0, lt=1)
    people_weight: float = Field(default=0.4, gt=0, le=1)
    """How often a picture of people is drawn against any other: they are many and alike."""
    style_weights: dict[str, Annotated[float, Field(ge=0)]] = Field(default_factory=dict)
    """How often a style's pictures are drawn, where not 1. Styles draw one name so differently that plain prompts get
    shapes only when one style is seen far more often than the others."""
    flip_share: float = Field(default=0.5, ge=0, le=1)
    """How often a picture that may be mirrored is."""
    guidance_scale: float = Field(default=4.0, ge=1)
    num_inference_steps: int = Field(default=25, gt=0)
    sample_prompts: tuple[str, ...] = ()
    """Plain prompts of the sample grid."""


def build_unet(config: UNetConfig, cross_attention_dim: int, latent_channels: int) -> UNet2DConditionModel:
    """An untrained denoiser."""
    down = tuple("CrossAttnDownBlock2D" if attend else "DownBlock2D" for attend in config.attention_levels)
    up = tuple("CrossAttnUpBlock2D" if attend else "UpBlock2D" for attend in reversed(config.attention_levels))
    shape: dict[str, Any] = {
        "block_out_channels": config.block_out_channels,
        "down_block_types": down,
        "up_block_types": up,
        "attention_head_dim": config.attention_head_dim,
        # The text reaches every ResNet through the time embedding too, in the one way that needs no other pipeline.
        "addition_embed_type": "text",
        "addition_embed_type_num_heads": cross_attention_dim // 16,
    }
    return UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        in_channels=latent_channels,
        out_channels=latent_channels,
        layers_per_block=config.layers_per_block,
        norm_num_groups=config.norm_num_groups,
        cross_attention_dim=cross_attention_dim,
        **shape,
    )


def build_scheduler() -> DDIMScheduler:
    """The noise schedule: cosine down to pure noise, v-prediction.

    Predicting ε left the noisiest timesteps worse than the mean picture: colours came, shapes did not. Stable
    Diffusion's schedule drowns 16×16 latents for many of its timesteps, where there is nothing to learn or to draw.
    """
    return DDIMScheduler(
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
    )


def draw_weights(config: UNetConfig, icons: Sequence[Icon]) -> torch.Tensor:
    """How often each picture is drawn against the others, (N,)."""
    people = [config.people_weight if icon.name.startswith(_PEOPLE) else 1.0 for icon in icons]
    styles = [config.style_weights.get(icon.style, 1.0) for icon in icons]
    return torch.tensor(people) * torch.tensor(styles)


@torch.no_grad()
def encode_latents(vae: AutoencoderKL, images: torch.Tensor, batch_size: int = 64) -> torch.Tensor:
    """Unscaled latent means (N, 4, 16, 16) of pictures (N, 3, 64, 64) in [-1, 1]."""
    return torch.cat(
        [vae.encode(part.to(vae.device), return_dict=False)[0].mode().cpu() for part in images.split(batch_size)]
    )


def set_scaling_factor(vae: AutoencoderKL, icons: IconSet) -> None:
    """Record the factor that gives the training latents unit variance."""
    sample = icons.select(use="all", held_out=False)[::8]
    vae.register_to_config(scaling_factor=1 / encode_latents(vae, icons.images(sample)).std().item())


def train_unet(
    config: UNetConfig,
    icons: IconSet,
    tokenizer: CLIPTokenizer,
    clip: CLIPModel,
    vae: AutoencoderKL,
    stage_dir: Path,
    *,
    unet: UNet2DConditionModel | None = None,
    seed: int,
    device: torch.device,
) -> StableDiffusionPipeline:
    """Train the denoiser, a new one or ``unet`` further; returns the whole base as a stock pipeline."""
    text_encoder = clip.text_model
    torch.manual_seed(seed)
    unet = unet or build_unet(config, text_encoder.config.hidden_size, vae.config["latent_channels"])
    unet.set_attn_processor(AttnProcessor())  # on small maps faster in training than the fused kernel
    scheduler: Any = build_scheduler()
    pipe = assemble(vae, text_encoder, tokenizer, unet, scheduler)

    train = icons.select(use="all", held_out=False)
    rows = [icons.icons[int(i)] for i in train]
    images = icons.images(train)
    scale = vae.config["scaling_factor"]
    latents = torch.stack([encode_latents(vae, images), encode_latents(vae, images.flip(3))], 1) * scale
    mirrored = torch.tensor([row.mirrored for row in rows])
    frequency = draw_weights(config, rows)
    texts = sorted({caption for row in rows for caption in captions(row.name, row.style)})
    row_of = {text: i for i, text in enumerate(texts)}
    states = torch.cat([encode_text(text_encoder, tokenizer, texts[i : i + 512]) for i in range(0, len(texts), 512)])
    empty = encode_text(text_encoder, tokenizer, [""])[0]
    held_out = icons.select(use="all", held_out=True)
    held_out_latents = encode_latents(vae, icons.images(held_out)) * scale
    held_out_names = [icons.icons[int(i)].name for i in held_out]
    held_out_states = encode_text(text_encoder, tokenizer, [f"icon of {name}" for name in held_out_names])

    alphas_cumprod = scheduler.alphas_cumprod.to(device)
    denoise = torch.compile(unet)

    def loss(_: int, generator: torch.Generator) -> tuple[torch.Tensor, dict[str, float]]:
        size = config.batch_size
        picks = torch.multinomial(frequency, size, replacement=True, generator=generator)
        flips = (torch.rand(size, generator=generator) < config.flip_share) & mirrored[picks]
        rng = random.Random(int(torch.randint(2**31, (1,), generator=generator)))
        chosen = [row_of[rng.choice(captions(rows[int(i)].name, rows[int(i)].style))] for i in picks]
        text = states[torch.tensor(chosen)].clone()
        text[torch.rand(size, generator=generator) < config.empty_prompt_share] = empty
        clean = latents[picks, flips.long()]
        noise = torch.randn(clean.shape, generator=generator)
        timesteps = (torch.rand(size, generator=generator).sqrt() * len(alphas_cumprod)).long()  # rather the noisy ones
        noisy = scheduler.add_noise(clean, noise, timesteps).to(device, memory_format=torch.channels_last)
        guess = denoise(noisy, timesteps.to(device), text.to(device, torch.float32), return_dict=False)[0]
        velocity = scheduler.get_velocity(clean, noise, timesteps)
        return F.mse_loss(guess.float(), velocity.to(device)), {}

    def report(step: int) -> dict[str, float]:
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(held_out_latents.shape, generator=generator)
        timesteps = torch.linspace(20, 980, len(held_out_latents)).long()
        noisy = scheduler.add_noise(held_out_latents, noise, timesteps)
        velocity = scheduler.get_velocity(held_out_latents, noise, timesteps)
        guess = torch.cat(
            [
                unet(a.to(device), t.to(device), s.to(device, torch.float32)).sample.cpu()
                for a, t, s in zip(noisy.split(64), timesteps.split(64), held_out_states.split(64), strict=True)
            ]
        )
        if config.sample_prompts:
            save_grid(
                sample(pipe, config, list(config.sample_prompts)), stage_dir / f"sample-{step:06d}.png", columns=8
            )
        names = sorted(set(held_out_names))
        made = sample(pipe, config, [f"icon of {name}" for name in names])
        ranks = caption_ranks(clip, tokenizer, made, names, torch.arange(len(names)))
        return {
            "held_out_loss": F.mse_loss(guess, velocity).item(),
            "generated_top5": (ranks < 5).float().mean().item(),
        }

    fit(stage_dir, config, unet, loss, report, seed=seed, device=device)
    return pipe


@torch.no_grad()
def encode_text(text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer, texts: list[str]) -> torch.Tensor:
    """Text states (B, 24, D), half precision."""
    device = text_encoder.device
    return text_encoder(tokenize(tokenizer, texts).to(device)).last_hidden_state.half().cpu()


def assemble(
    vae: AutoencoderKL,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    unet: UNet2DConditionModel,
    scheduler: DDIMScheduler,
) -> StableDiffusionPipeline:
    """The stock pipeline, without a safety checker: it draws icons."""
    parts: dict[str, Any] = {"scheduler": scheduler, "safety_checker": None, "feature_extractor": None}
    pipe = StableDiffusionPipeline(
        vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, requires_safety_checker=False, **parts
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def sample(
    pipe: StableDiffusionPipeline, config: UNetConfig, prompts: list[str], seed: int = 0, batch_size: int = 34
) -> torch.Tensor:
    """Pictures (N, 3, 64, 64) in [-1, 1] for plain prompts, one seed each."""
    pictures: list[torch.Tensor] = []
    for i in range(0, len(prompts), batch_size):
        part = prompts[i : i + batch_size]
        generators = [torch.Generator().manual_seed(seed + i + k) for k in range(len(part))]
        made: Any = pipe(
            part,
            height=4 * LATENT_SIZE,
            width=4 * LATENT_SIZE,
            num_inference_steps=config.num_inference_steps,
            guidance_scale=config.guidance_scale,
            generator=generators,
            output_type="pt",
        )
        pictures.append(made.images.cpu() * 2 - 1)
    return torch.cat(pictures)

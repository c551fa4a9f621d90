"""Stage 5, U-Net: text-to-image denoiser on cached latents and text states."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from pydantic import Field
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer

from powersteer.apps.pretrain.clip import caption_ranks
from powersteer.apps.pretrain.fit import FitConfig, Session, fit
from powersteer.apps.pretrain.icons import Icon, IconSet, captions
from powersteer.apps.pretrain.text import tokenize
from powersteer.core.pictures import save_grid
from powersteer.core.records import Layers, Size, Sizes

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


_ENCODE_BATCH = 2048
"""Pictures that are floats at a time."""


def build_unet(
    config: UNetConfig, cross_attention_dim: int, latent_channels: int, latent_size: int
) -> UNet2DConditionModel:
    """An untrained denoiser of latents (B, ``latent_channels``, ``latent_size``, ``latent_size``)."""
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
        sample_size=latent_size,
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
    """Unscaled latent means (N, C, h, w) of pictures (N, 3, H, W) in [-1, 1]."""
    return torch.cat([vae.encode(part, return_dict=False)[0].mode() for part in images.split(batch_size)])


def set_scaling_factor(vae: AutoencoderKL, icons: IconSet) -> None:
    """Record the factor that gives the training latents unit variance."""
    sample = icons.select(use="all", held_out=False)[::8]
    latents = torch.cat([encode_latents(vae, icons.images(part)) for part in sample.split(_ENCODE_BATCH)])
    vae.register_to_config(scaling_factor=1 / latents.std().item())


def train_unet(
    config: UNetConfig,
    icons: IconSet,
    tokenizer: CLIPTokenizer,
    clip: CLIPModel,
    vae: AutoencoderKL,
    stage_dir: Path,
    session: Session,
    unet: UNet2DConditionModel | None = None,
) -> StableDiffusionPipeline:
    """Train the denoiser, a new one or ``unet`` further; returns the whole base as a stock pipeline."""
    text_encoder, device = clip.text_model, session.device
    factor = 2 ** (len(vae.config["block_out_channels"]) - 1)
    torch.manual_seed(session.seed)
    if unet is None:
        width, channels = text_encoder.config.hidden_size, vae.config["latent_channels"]
        unet = build_unet(config, width, channels, icons.size // factor)
    if device.type == "cpu":
        unet.set_attn_processor(AttnProcessor())  # on small maps faster in training than the fused kernel
    scheduler: Any = build_scheduler()
    pipe = assemble(vae, text_encoder, tokenizer, unet, scheduler)
    examples, held_out = _examples(config, icons, pipe), _held_out(icons, pipe)
    denoise = torch.compile(unet)

    def loss(_: int, generator: torch.Generator) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        clean, text = examples.draw(config, generator)
        noise = torch.randn(clean.shape, generator=generator, device=device)
        share = torch.rand(len(clean), generator=generator, device=device).sqrt()  # rather the noisy ones
        timesteps = (share * len(scheduler.alphas_cumprod)).long()
        noisy = scheduler.add_noise(clean, noise, timesteps).contiguous(memory_format=torch.channels_last)
        guess = denoise(noisy, timesteps, text.float(), return_dict=False)[0]
        return F.mse_loss(guess.float(), scheduler.get_velocity(clean, noise, timesteps)), {}

    def report(step: int) -> dict[str, float]:
        held_out_loss = held_out.loss(unet, scheduler)
        if config.sample_prompts:
            grid = sample(pipe, config, list(config.sample_prompts))
            save_grid(grid, stage_dir / f"sample-{step:06d}.png", columns=8)
        names = sorted(set(held_out.names))
        made = sample(pipe, config, [f"icon of {name}" for name in names])
        ranks = caption_ranks(clip, tokenizer, made, names, torch.arange(len(names)))
        return {"held_out_loss": held_out_loss, "generated_top5": (ranks < 5).float().mean().item()}

    fit(stage_dir, config, unet, loss, report, session)
    return pipe


@dataclass(frozen=True)
class _Examples:
    """What the denoiser learns from, encoded once: N pictures, T captions of which each picture has K."""

    latents: torch.Tensor
    """(N, 2, C, h, w): as they are, and mirrored."""
    mirrored: torch.Tensor
    """(N,): whether a picture may be mirrored."""
    frequency: torch.Tensor
    """(N,): see `draw_weights`."""
    states: torch.Tensor
    """(T, 24, D)."""
    captions: torch.Tensor
    """(N, K): rows of ``states``."""
    empty: torch.Tensor
    """(1, 24, D): the states of no words."""

    def draw(self, config: UNetConfig, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """A batch: clean latents (B, C, h, w) and text states (B, 24, D)."""
        size, given = config.batch_size, dict[str, Any](generator=generator, device=self.latents.device)
        picks = torch.multinomial(self.frequency, size, replacement=True, generator=generator)
        flips = (torch.rand(size, **given) < config.flip_share) & self.mirrored[picks]
        text = self.states[self.captions[picks, torch.randint(self.captions.shape[1], (size,), **given)]]
        wordless = torch.rand(size, **given) < config.empty_prompt_share
        return self.latents[picks, flips.long()], torch.where(wordless[:, None, None], self.empty, text)


def _examples(config: UNetConfig, icons: IconSet, pipe: Any) -> _Examples:
    """Encode the training pictures and their captions."""
    train = icons.select(use="all", held_out=False)
    rows = [icons.icons[i] for i in train.tolist()]
    latents = [_scaled_latents(pipe.vae, icons, train, flipped=flipped) for flipped in (False, True)]
    captions_of = [captions(row.name, row.style) for row in rows]
    texts = sorted({caption for own in captions_of for caption in own})
    row_of = {text: i for i, text in enumerate(texts)}
    choices = [[row_of[caption] for caption in own] for own in captions_of]
    encoder, tokenizer, device = pipe.text_encoder, pipe.tokenizer, latents[0].device
    states = [encode_text(encoder, tokenizer, texts[i : i + 512]) for i in range(0, len(texts), 512)]
    return _Examples(
        torch.stack(latents, 1),
        torch.tensor([row.mirrored for row in rows], device=device),
        draw_weights(config, rows).to(device),
        torch.cat(states),
        torch.tensor(choices, device=device),
        encode_text(encoder, tokenizer, [""]),
    )


@dataclass(frozen=True)
class _HeldOut:
    """The held-out pictures, encoded once."""

    names: list[str]
    latents: torch.Tensor
    """(N, C, h, w)."""
    states: torch.Tensor
    """(N, 24, D)."""

    def loss(self, unet: UNet2DConditionModel, scheduler: Any) -> float:
        """The denoising loss, of fixed noise and evenly spread timesteps."""
        device = self.latents.device
        generator = torch.Generator(device).manual_seed(0)
        noise = torch.randn(self.latents.shape, generator=generator, device=device)
        timesteps = torch.linspace(20, 980, len(self.latents), device=device).long()
        noisy = scheduler.add_noise(self.latents, noise, timesteps)
        velocity = scheduler.get_velocity(self.latents, noise, timesteps)
        parts = zip(noisy.split(64), timesteps.split(64), self.states.split(64), strict=True)
        guess = torch.cat([unet(a, t, s.float()).sample for a, t, s in parts])
        return F.mse_loss(guess, velocity).item()


def _held_out(icons: IconSet, pipe: Any) -> _HeldOut:
    held_out = icons.select(use="all", held_out=True)
    names = [icons.icons[i].name for i in held_out.tolist()]
    states = encode_text(pipe.text_encoder, pipe.tokenizer, [f"icon of {name}" for name in names])
    return _HeldOut(names, _scaled_latents(pipe.vae, icons, held_out, flipped=False), states)


def _scaled_latents(vae: AutoencoderKL, icons: IconSet, indices: torch.Tensor, *, flipped: bool) -> torch.Tensor:
    """Latents (N, C, h, w) of unit variance, of pictures as they are or mirrored."""
    parts = (icons.images(part) for part in indices.split(_ENCODE_BATCH))
    latents = torch.cat([encode_latents(vae, part.flip(3) if flipped else part) for part in parts])
    return latents * vae.config["scaling_factor"]


@torch.no_grad()
def encode_text(text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer, texts: list[str]) -> torch.Tensor:
    """Text states (B, 24, D), half precision."""
    return text_encoder(tokenize(tokenizer, texts).to(text_encoder.device)).last_hidden_state.half()


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
    """Pictures (N, 3, H, W) in [-1, 1] for plain prompts, one seed each."""
    pictures: list[torch.Tensor] = []
    for i in range(0, len(prompts), batch_size):
        part = prompts[i : i + batch_size]
        generators = [torch.Generator().manual_seed(seed + i + k) for k in range(len(part))]
        made: Any = pipe(
            part,
            num_inference_steps=config.num_inference_steps,
            guidance_scale=config.guidance_scale,
            generator=generators,
            output_type="pt",
        )
        pictures.append(made.images.cpu() * 2 - 1)
    return torch.cat(pictures)

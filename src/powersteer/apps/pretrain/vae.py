"""Stage 4, VAE: pictures ↔ latents, edges kept sharp."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from pydantic import Field

from powersteer.apps.pretrain.fit import FitConfig, Session, fit
from powersteer.apps.pretrain.icons import IconSet
from powersteer.core.pictures import save_grid
from powersteer.core.records import Layers, Size, Sizes


class VAEConfig(FitConfig):
    """The autoencoder's size and loss."""

    block_out_channels: Sizes = (32, 64, 128)
    layers_per_block: Layers = 1
    latent_channels: Size = 4
    norm_num_groups: Size = 8
    gradient_weight: float = Field(default=0.5, ge=0)
    """Weight of the L1 distance between image gradients: keeps edges sharp."""
    kl_weight: float = Field(default=6e-3, ge=0)
    """Weight of the KL divergence to N(0, I), in nats per latent dimension."""
    crop_share: float = Field(default=0.75, ge=0, le=1)
    """The first share of the steps sees four quarter-size crops in the place of each picture: more variety at
    the same cost. The rest sees whole pictures, on which the group norms settle."""


def build_vae(config: VAEConfig, size: int) -> AutoencoderKL:
    """An untrained autoencoder of pictures of ``size`` pixels a side."""
    levels = len(config.block_out_channels)
    shape: dict[str, Any] = {
        "block_out_channels": config.block_out_channels,
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
    }
    return AutoencoderKL(
        sample_size=size,
        layers_per_block=config.layers_per_block,
        latent_channels=config.latent_channels,
        norm_num_groups=config.norm_num_groups,
        mid_block_add_attention=False,
        **shape,
    )


def train_vae(config: VAEConfig, icons: IconSet, stage_dir: Path, session: Session) -> AutoencoderKL:
    """Train on every set; held-out figures and grids on the held-out names of the sets the U-Net will see."""
    torch.manual_seed(session.seed)
    vae, device = build_vae(config, icons.size), session.device
    train = icons.select(held_out=False)
    held_out = icons.images(icons.select(use="all", held_out=True))

    def loss(step: int, generator: torch.Generator) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        cropped = step < config.crop_share * config.steps
        count = config.batch_size * 4 if cropped else config.batch_size
        picks = train[torch.randint(len(train), (count,), generator=generator, device=device)]
        images = augment(icons.images(picks), generator)
        if cropped:
            images = crop(images, icons.size // 2, generator)
        l1, gradient, kl = _compare(vae, images.contiguous(memory_format=torch.channels_last), generator)
        figures = {"l1": l1, "gradient": gradient, "kl": kl}
        return l1 + config.gradient_weight * gradient + config.kl_weight * kl, figures

    def report(step: int) -> dict[str, float]:
        rebuilt = reconstruct(vae, held_out)
        shown = torch.stack([held_out[:48:3], rebuilt[:48:3]], 1).flatten(0, 1).cpu()
        save_grid(shown, stage_dir / f"sample-{step:06d}.png", columns=8)
        return {"held_out_psnr": psnr(held_out, rebuilt)}

    fit(stage_dir, config, vae, loss, report, session)
    return vae


def _compare(
    vae: Any, images: torch.Tensor, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Encode, sample and decode: (L1, L1 of the image gradients, KL in nats per latent dimension)."""
    moments = vae.encode(images, return_dict=False)[0].parameters
    mean, logvar = moments.float().chunk(2, 1)  # 2 × (B, C, h, w)
    logvar = logvar.clamp(-30, 20)
    noise = torch.randn(mean.shape, generator=generator, device=mean.device)
    rebuilt = vae.decode(mean + noise * (0.5 * logvar).exp(), return_dict=False)[0].float()  # (B, 3, H, W)
    across = F.l1_loss(rebuilt.diff(dim=3), images.diff(dim=3))
    down = F.l1_loss(rebuilt.diff(dim=2), images.diff(dim=2))
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    return F.l1_loss(rebuilt, images), across + down, kl


def crop(images: torch.Tensor, size: int, generator: torch.Generator) -> torch.Tensor:
    """A random square of each picture, (B, 3, H, W) → (B, 3, size, size)."""
    most = images.shape[-1] - size + 1
    corners = torch.randint(most, (2, len(images), 1), generator=generator, device=images.device)
    rows, columns = corners + torch.arange(size, device=images.device)  # each (B, size)
    picture = torch.arange(len(images), device=images.device)[:, None, None]
    return images[picture, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def augment(
    images: torch.Tensor,
    generator: torch.Generator,
    *,
    outline: float = 0.2,
    recolour: float = 0.3,
    move: float = 0.4,
) -> torch.Tensor:
    """Mirror, outline, recolour, move and scale pictures (B, 3, H, W) in [-1, 1], each with its probability.

    The codec must carry what it has not seen: other placements, other colours, black outlines.
    """
    count, device = len(images), images.device

    def chance(*shape: int) -> torch.Tensor:
        return torch.rand(count, *shape, generator=generator, device=device)

    def chosen(probability: float) -> torch.Tensor:
        return (chance() < probability)[:, None, None, None]

    images = torch.where(chosen(0.5), images.flip(3), images)
    # Black outline, one to two 64ths of a side wide, around whatever is not white.
    inside = (images.amin(1, keepdim=True) < 0.9).float()
    width = max(1, images.shape[-1] // 64)
    grown = F.max_pool2d(inside, 2 * width + 1, 1, width)
    wider = F.max_pool2d(grown, 2 * width + 1, 1, width)
    ring = torch.where(chosen(0.5), grown, wider) - inside
    images = torch.where(chosen(outline) & (ring > 0), -1.0, images)
    # Another colour for every shape: channels permuted, white kept.
    order = chance(3).argsort(1)
    images = torch.where(chosen(recolour), images.gather(1, order[:, :, None, None].expand_as(images)), images)
    # Another place and size, on white.
    scale = 1.15 ** (chance() * 4 - 1)  # 0.87 … 1.52: shows the picture smaller or larger
    shift = chance(2) * 0.3 - 0.15
    affine = torch.zeros(count, 2, 3, device=device)
    affine[:, 0, 0] = affine[:, 1, 1] = scale
    affine[:, :, 2] = shift
    grid = F.affine_grid(affine, list(images.shape), align_corners=False)
    moved = F.grid_sample(images - 1, grid, align_corners=False) + 1
    return torch.where(chosen(move), moved, images)


@torch.no_grad()
def reconstruct(vae: Any, images: torch.Tensor, batch_size: int = 64) -> torch.Tensor:
    """Pictures (N, 3, H, W) in [-1, 1] through the latents' means and back."""
    parts: list[torch.Tensor] = []
    for part in images.split(batch_size):
        latents = vae.encode(part, return_dict=False)[0].mode()
        parts.append(vae.decode(latents, return_dict=False)[0])
    return torch.cat(parts).clamp(-1, 1)


def psnr(images: torch.Tensor, rebuilt: torch.Tensor) -> float:
    """Mean over pictures in [-1, 1] of each one's peak signal-to-noise ratio, in dB."""
    error = (images - rebuilt).square().mean((1, 2, 3)).clamp_min(1e-10)
    return (10 * torch.log10(4 / error)).mean().item()

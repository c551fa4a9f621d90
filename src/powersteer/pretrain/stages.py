"""All stages in order: an interrupted run goes on where it stopped, and ends with a base in diffusers' layout."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from transformers import CLIPModel

from powersteer.base import load_base, load_clip, save_clip, source_of
from powersteer.config import save_config
from powersteer.core.console import PlainConsole
from powersteer.pretrain.clip import train_clip
from powersteer.pretrain.config import PretrainConfig
from powersteer.pretrain.evaluate import evaluate_base
from powersteer.pretrain.icons import build_icons, load_icons
from powersteer.pretrain.text import train_tokenizer
from powersteer.pretrain.unet import set_scaling_factor, train_unet
from powersteer.pretrain.vae import train_vae

console = PlainConsole(stderr=True)


def pretrain(config: PretrainConfig) -> Path:
    """Build the base, or go on building it, in ``config.output_dir``.

    Returns:
        The folder of the finished base.

    Raises:
        PowersteerError: The output folder cannot be written, or a source is missing.
    """
    root = config.output_dir
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    save_config(config, root / "config.yaml")
    if not (root / "data" / "icons.jsonl").exists():
        build_icons(config.data, root / "data")
    icons = load_icons(root / "data")
    console.print(f"{len(icons.icons)} pictures")

    unet = None
    if config.init_from is not None:
        start = load_base(config.init_from)
        clip, tokenizer = load_clip(Path(source_of(config.init_from)))
        vae, unet = start.vae, start.unet.requires_grad_(True)
    else:
        assert config.clip is not None and config.vae is not None  # see PretrainConfig
        tokenizer = train_tokenizer(config.tokenizer, icons, root / "tokenizer")
        clip = train_clip(config.clip, icons, tokenizer, root / "clip", seed=config.seed, device=device)
        vae = train_vae(config.vae, icons, root / "vae", seed=config.seed, device=device)
        set_scaling_factor(vae, icons)
    for part in (clip, vae):
        part.requires_grad_(False).eval()
    pipe = train_unet(
        config.unet, icons, tokenizer, clip, vae, root / "unet", unet=unet, seed=config.seed, device=device
    )
    base = root / "base"
    export(pipe, clip, base)
    shutil.copy(root / "data" / "notices.json", base)
    # What is measured is what was written: the half-precision weights.
    written, (clip, tokenizer) = load_base(str(base)), load_clip(base)
    metrics = evaluate_base(written, clip, tokenizer, icons, config.unet, base, root / "openmoji")
    console.print_json(json.dumps(metrics))
    return base


def export(pipe: StableDiffusionPipeline, clip: CLIPModel, out_dir: Path) -> None:
    """Write the base in half precision, diffusers' layout, with its CLIP beside it."""
    pipe.to(dtype=torch.float16)
    pipe.save_pretrained(out_dir)
    save_clip(clip, out_dir)
    pipe.to(dtype=torch.float32)
    size = sum(file.stat().st_size for file in out_dir.rglob("*") if file.is_file())
    console.print(f"{out_dir}: {size / 1e6:.1f} MB")

"""All stages in order: an interrupted run goes on where it stopped, and ends with a base in diffusers' layout."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from transformers import CLIPModel

from powersteer.apps.pretrain.clip import train_clip
from powersteer.apps.pretrain.config import PretrainConfig
from powersteer.apps.pretrain.evaluate import evaluate_base
from powersteer.apps.pretrain.fit import Session
from powersteer.apps.pretrain.icons import build_icons, load_icons
from powersteer.apps.pretrain.snapshot import pack, unpack
from powersteer.apps.pretrain.teacher import load_teacher
from powersteer.apps.pretrain.text import train_tokenizer
from powersteer.apps.pretrain.unet import set_scaling_factor, train_unet
from powersteer.apps.pretrain.vae import train_vae
from powersteer.backbones.load import load_base, load_clip, save_clip, source_of
from powersteer.core.config import save_config
from powersteer.core.console import PlainConsole
from powersteer.core.hardware import best_device

console = PlainConsole(stderr=True)
FINISHING_SECONDS = 30
"""What exporting and measuring the base takes of the time that is given."""


def pretrain(config: PretrainConfig, snapshot: Path | None = None) -> Path:
    """Build the base, or go on building it, in ``config.output_dir``.

    Args:
        config: The recipe.
        snapshot: A folder of pieces (see `powersteer.apps.pretrain.snapshot`): what it holds is taken where
            ``config.output_dir`` has nothing, and it is renewed whenever a stage has written its weights.

    Returns:
        The folder of the finished base.

    Raises:
        PowersteerError: The output folder cannot be written, a source is missing, or what is there is damaged.
    """
    begun, root, device = time.monotonic(), config.output_dir, best_device()
    save_config(config, root / "config.yaml")
    if snapshot is not None:
        unpack(snapshot, root)
    build_icons(config.data, root / "data")
    icons = load_icons(root / "data").to(device)
    console.print(f"{len(icons.icons)} pictures, {time.monotonic() - begun:.0f} s")
    session = Session(
        config.seed,
        device,
        deadline=None if config.minutes is None else begun + max(0.0, 60 * config.minutes - FINISHING_SECONDS),
        saved=(lambda: pack(root, snapshot)) if snapshot is not None else (lambda: None),
    )

    unet = None
    if config.init_from is not None:
        start = load_base(config.init_from)
        clip, tokenizer = load_clip(Path(source_of(config.init_from)))
        vae, unet = start.vae, start.unet.requires_grad_(True)
    else:
        assert config.clip is not None and config.vae is not None  # see PretrainConfig
        teacher = load_teacher(root)
        tokenizer = train_tokenizer(config.tokenizer, icons.icons, teacher, root / "tokenizer")
        clip = train_clip(config.clip, icons, tokenizer, teacher, root / "clip", session)
        vae = train_vae(config.vae, icons, root / "vae", session)
    for part in (clip, vae):
        torch.nn.Module.to(part.requires_grad_(False).eval(), device)
    if config.init_from is None:
        set_scaling_factor(vae, icons)
    pipe = train_unet(config.unet, icons, tokenizer, clip, vae, root / "unet", session, unet)
    base = root / "base"
    export(pipe, clip, base)
    shutil.copy(root / "data" / "notices.json", base)
    # What is measured is what was written: the half-precision weights.
    written, (clip, tokenizer) = load_base(str(base)).to(device), load_clip(base)
    torch.nn.Module.to(clip, device)
    metrics = evaluate_base(written, clip, tokenizer, icons, config.unet, base, root / "openmoji")
    console.print_json(json.dumps(metrics))
    return base


def export(pipe: StableDiffusionPipeline, clip: CLIPModel, out_dir: Path) -> None:
    """Write the base in half precision, diffusers' layout, with its CLIP beside it."""
    pipe.to("cpu", torch.float16)
    pipe.save_pretrained(out_dir)
    save_clip(clip.cpu(), out_dir)
    pipe.to(dtype=torch.float32)
    size = sum(file.stat().st_size for file in out_dir.rglob("*") if file.is_file())
    console.print(f"{out_dir}: {size / 1e6:.1f} MB")

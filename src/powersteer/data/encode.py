"""Latents and text states of a folder of pairs, encoded once and cached."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from rich.progress import track
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from powersteer.data.pairs import Pairs


@dataclass(frozen=True)
class EncodedPairs:
    """A data set as the training loop sees it."""

    latents: torch.Tensor
    """Scaled latents (N, C, h, w)."""
    conditions: torch.Tensor
    """Condition images (N, C, H, W), uint8: 255 stands for 1."""
    text_states: torch.Tensor
    """Text states (M, T, D), one for each distinct caption; row 0 is the empty prompt."""
    text_rows: torch.Tensor
    """Row (N,) in ``text_states`` of each pair's caption."""

    def __len__(self) -> int:
        return len(self.latents)

    def condition(self, rows: torch.Tensor) -> torch.Tensor:
        """Conditions (n, C, H, W) in [0, 1]."""
        return self.conditions[rows].float() / 255


@torch.no_grad()
def encode_pairs(pipe: StableDiffusionPipeline, pairs: Pairs, cache_dir: Path | None = None) -> EncodedPairs:
    """Encode every pair, or read them from the cache.

    Args:
        pipe: The base: its VAE and text encoder are used, and its weights are part of the cache's key.
        pairs: The pairs.
        cache_dir: Where to keep the result; nothing is kept without one.
    """
    path = cache_dir / f"{_fingerprint(pipe, pairs)}.safetensors" if cache_dir else None
    if path is not None and path.exists():
        try:
            return EncodedPairs(**load_file(path))
        except (SafetensorError, TypeError):
            path.unlink()  # cut short while it was written: encode again
    latents: list[torch.Tensor] = []
    conditions: list[torch.Tensor] = []
    device, dtype = pipe.vae.device, pipe.vae.dtype
    for start in track(range(0, len(pairs), 32), "encoding pairs", transient=True):
        part = [pairs[i] for i in range(start, min(start + 32, len(pairs)))]
        images = torch.stack([image for image, _ in part])
        conditions += [condition for _, condition in part]
        latents.append(pipe.vae.encode(images.to(device, dtype)).latent_dist.mode().float().cpu())
    distinct = ["", *sorted(set(pairs.texts) - {""})]
    row_of = {text: row for row, text in enumerate(distinct)}
    states = [encode_prompts(pipe, distinct[i : i + 256]) for i in range(0, len(distinct), 256)]
    encoded = EncodedPairs(
        latents=(torch.cat(latents) * pipe.vae.config.scaling_factor).contiguous(),
        conditions=torch.stack(conditions),
        text_states=torch.cat(states).contiguous(),
        text_rows=torch.tensor([row_of[text] for text in pairs.texts]),
    )
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        save_file(vars(encoded), partial)
        partial.replace(path)
    return encoded


@torch.no_grad()
def encode_prompts(pipe: StableDiffusionPipeline, prompts: list[str]) -> torch.Tensor:
    """Text states (N, T, D), as the pipeline itself makes them."""
    states, _ = pipe.encode_prompt(prompts, pipe.text_encoder.device, 1, False)
    return states.float().cpu()


def _fingerprint(pipe: StableDiffusionPipeline, pairs: Pairs) -> str:
    """A key of what the result depends on: the pairs, their bytes, and both encoders' weights."""
    digest = hashlib.sha256(repr((pairs.size, pairs.channels, pairs.resampling)).encode())
    for module in (pipe.vae, pipe.text_encoder):
        for name, tensor in sorted(module.state_dict().items()):
            digest.update(name.encode() + tensor.detach().float().cpu().numpy().tobytes())
    for row, text in zip(pairs.rows, pairs.texts, strict=True):
        digest.update(text.encode() + row.image.content() + row.conditioning_image.content())
    return digest.hexdigest()[:24]

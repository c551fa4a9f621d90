"""The prior that every adapter steers: a U-Net that learned the field, frozen."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel

from powersteer.apps.bench.posterior.learning import BATCH, Learner
from powersteer.apps.bench.posterior.world import BANDS, Pairs, World, make_unet, predict
from powersteer.core.errors import PowersteerError

LEARNING_RATE = 2e-3


def frozen_prior(folder: Path, updates: int) -> tuple[Any, str]:
    """The U-Net kept in ``folder``; trained first where there is none.

    Args:
        folder: Holds the weights, and ``learning.json``.
        updates: Of training.

    Returns:
        The frozen U-Net, and a digest of its weights.

    Raises:
        PowersteerError: The folder cannot be written, or holds something else.
    """
    weights = folder / "diffusion_pytorch_model.safetensors"
    try:
        if not weights.exists():
            unet, learned = train_prior(updates)
            unet.save_pretrained(folder)
            (folder / "learning.json").write_text(json.dumps(learned, indent=2) + "\n", encoding="utf-8")
        digest = hashlib.sha256(weights.read_bytes()).hexdigest()[:16]
        unet = UNet2DConditionModel.from_pretrained(str(folder))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise PowersteerError(f"cannot keep the prior in {folder}: {reason}") from None
    prior: Any = unet
    return prior.requires_grad_(False).eval().to(memory_format=torch.channels_last), digest


def train_prior(updates: int, seed: int = 0) -> tuple[UNet2DConditionModel, dict[str, float]]:
    """A U-Net that denoises the field, from fresh samples in every batch.

    Its target is E[ε | z] in place of ε: the same minimum, without the noise of what nobody can predict.

    Returns:
        The U-Net with its averaged weights, and how long it learned.
    """
    world = World("blur")  # the field is the same under every observation
    torch.manual_seed(seed)
    unet: Any = make_unet()
    unet.to(memory_format=torch.channels_last)
    generator = torch.Generator().manual_seed(seed)
    learner = Learner(unet, LEARNING_RATE, updates)

    def loss() -> torch.Tensor:
        pictures = world.field.sample(BATCH, generator)
        times = world.stratified(1, BATCH, generator)[:, 0]
        noisy = world.disturb(Pairs(pictures, pictures), times, generator)
        target = world.field.denoise(noisy.pictures, noisy.alphas)
        return F.mse_loss(predict(unet, noisy), target.float())

    for _ in learner.updates(loss):
        pass
    with learner.average.applied(learner.parameters):
        kept = make_unet()
        kept.load_state_dict(unet.state_dict())
    return kept.eval(), {"updates": updates, "seconds": learner.seconds}


@torch.no_grad()
def prior_excess(unet: Any, world: World, count: int, seed: int) -> list[float]:
    """How far the U-Net's loss lies above the least possible, E‖ε̂ − E[ε | z]‖² per pixel, in each band."""
    generator = torch.Generator().manual_seed(seed)
    pairs = world.draw(count, generator)
    excess: list[float] = []
    for times in world.stratified(count, BANDS, generator):
        noisy = world.disturb(pairs, times, generator)
        exact = world.field.denoise(noisy.pictures, noisy.alphas)
        excess.append((predict(unet, noisy) - exact).square().mean().item())
    return excess

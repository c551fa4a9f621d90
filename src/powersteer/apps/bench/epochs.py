"""What the cache of encoded pairs saves: epochs of the embedded base with and without it."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from powersteer.adapters.attach import attach
from powersteer.adapters.bps.model import BPSModel
from powersteer.apps.bench.turns import timed
from powersteer.backbones.load import load_base
from powersteer.backbones.protocol import PipelineBackbone, base_of
from powersteer.core.hardware import fast_attention, native_precision
from powersteer.data.encode import EncodedPairs, conditions_of, encode_pairs
from powersteer.data.pairs import Pairs
from powersteer.data.rows import Picture, Row
from powersteer.denoising.objective import objective_of
from powersteer.denoising.step import Batch, denoiser, predict, squared_errors

LEARNING_RATE = 1e-5
EPOCH_PAIRS, EPOCH_BATCH = 128, 16
STORED = (64, 512)
"""Sides of picture files, pixels: the size trained at, and one that people have."""


@dataclass(frozen=True)
class Epochs:
    """An epoch on the embedded base, seconds."""

    pairs: int
    stored: int
    """Side of the picture files, pixels."""
    batch_size: int
    cached: float
    uncached: float

    @property
    def ratio(self) -> float:
        """How much faster the cached one is."""
        return self.uncached / self.cached


def bench_epochs(stored: int, device: str = "cpu", rounds: int = 3) -> Epochs:
    """Time epochs of the embedded base with and without the cache, the method ``lite`` in training.

    Args:
        stored: Side of the picture files, pixels; they are trained on at 64.
        device: Where to measure.
        rounds: Epochs of each kind that count, taken in turns.
    """
    pipe: Any = load_base()
    pipe.to(device)
    base = base_of(pipe)
    model: Any = BPSModel.from_unet(base.module, pixel_unshuffle=base.factor, preset="lite")
    model.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)
    with tempfile.TemporaryDirectory() as folder:
        pairs = Pairs(list(_rows(Path(folder), stored)), (base.size, base.size))
        kinds = {True: encode_pairs(pipe, pairs, Path(folder) / "cache"), False: encode_pairs(pipe, pairs)}
        times: dict[bool, list[float]] = {True: [], False: []}
        for round_ in range(rounds + 1):
            for cached, encoded in kinds.items():
                seconds = timed(partial(_epoch, base, model, optimizer, encoded), device)
                if round_ > 0:
                    times[cached].append(seconds)
    return Epochs(EPOCH_PAIRS, stored, EPOCH_BATCH, statistics.median(times[True]), statistics.median(times[False]))


def _rows(folder: Path, side: int) -> Iterator[Row]:
    """Pairs in files: a coloured ellipse on white, and its outline."""
    rng = np.random.default_rng(0)
    for i in range(EPOCH_PAIRS):
        corners = (rng.random(4) * side / 2 + [0, 0, side / 2, side / 2]).tolist()
        image, drawing = Image.new("RGB", (side, side), "white"), Image.new("L", (side, side))
        ImageDraw.Draw(image).ellipse(corners, fill=tuple(rng.integers(0, 256, 3).tolist()))
        ImageDraw.Draw(drawing).ellipse(corners, outline=255, width=max(1, side // 64))
        pictures: list[Picture] = []
        for kind, picture in (("image", image), ("condition", drawing)):
            file = folder / f"{kind}-{i}.png"
            picture.save(file)
            pictures.append(Picture(str(file), kind, file.read_bytes, file))
        yield Row(f"pairs[{i}]", *pictures, texts=(f"thing number {i}",))


def _epoch(base: PipelineBackbone, model: BPSModel, optimizer: torch.optim.Optimizer, encoded: EncodedPairs) -> None:
    module, objective = base.module, objective_of(base.pipe.scheduler)
    device, precision = module.device, native_precision(module.device)
    for start in range(0, len(encoded), EPOCH_BATCH):
        samples = [encoded[i, 0] for i in range(start, start + EPOCH_BATCH)]
        latents, condition = encoded.latents(samples).to(device), conditions_of(samples)
        noise, times = torch.randn_like(latents), objective.sampler()(len(latents), torch.default_generator)
        texts = encoded.texts([sample.texts[0] for sample in samples])
        batch = Batch.of(base, latents, noise, times, texts)
        with attach(module, model, condition, plan=None), fast_attention(device.type, precision):
            with torch.autocast(device.type, precision, enabled=precision != torch.float32):
                prediction = predict(denoiser(module), objective, batch, device, module.dtype)
            squared_errors(objective, prediction, batch).mean().backward()
        optimizer.step()
        optimizer.zero_grad()

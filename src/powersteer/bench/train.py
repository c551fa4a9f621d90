"""What a training step costs, against ControlNet's and T2I-Adapter's; and what the cache saves."""

from __future__ import annotations

import gc
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import nn

from powersteer.base import load_base
from powersteer.baselines import make_controlnet
from powersteer.bench.shapes import Shape, make_t2i_adapter, make_unet, wait
from powersteer.data.encode import EncodedPairs, conditions_of, encode_pairs, unet_inputs
from powersteer.data.pairs import Pairs
from powersteer.data.rows import Picture, Row
from powersteer.hardware import fast_attention, machine, native_precision
from powersteer.memory import TensorBytes
from powersteer.model import BPSModel
from powersteer.steering import steer
from powersteer.training.memory import estimate_memory

LEARNING_RATE = 1e-5
EPOCH_PAIRS, EPOCH_BATCH = 128, 16
STORED = (64, 512)


@dataclass(frozen=True)
class StepRow:
    """One method's training step."""

    name: str
    seconds: float
    """Median."""
    ratio: float
    """To ControlNet's step of the same round, median."""
    parameters: int
    """Trained."""
    peak_memory: int
    """Bytes of weights, gradients, optimizer and activations at their peak, the U-Net's among them."""
    estimated_memory: int | None = None
    """What `powersteer train --dry-run` would say of it."""


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


@dataclass(frozen=True)
class TrainBench:
    """The rows, and what they were measured on."""

    shape: Shape
    pixels: int
    batch_size: int
    gradient_checkpointing: bool
    device: str
    precision: str
    rounds: int
    machine: str
    rows: list[StepRow]
    epochs: list[Epochs]
    """With and without the cache: files of the size trained at, and of the size people have."""

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


@dataclass
class _Trainee:
    """A network in training: one step of the loop of diffusers' example scripts."""

    trained: nn.Module
    predict: Callable[[], torch.Tensor]
    context: Callable[[], Any] = nullcontext

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.AdamW(self.trained.parameters(), lr=LEARNING_RATE, fused=True)

    def step(self, target: torch.Tensor, precision: torch.dtype) -> None:
        device_type = target.device.type
        with self.context(), fast_attention(device_type, precision):
            with torch.autocast(device_type, precision, enabled=precision != torch.float32):
                loss = F.mse_loss(self.predict().float(), target)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


def bench_train(
    shape: Shape = "sd15",
    *,
    device: str = "cpu",
    precision: torch.dtype = torch.float32,
    batch_size: int = 1,
    gradient_checkpointing: bool = False,
    rounds: int = 3,
) -> TrainBench:
    """Time a training step of each method on random weights, batch and U-Net the same.

    In each round every method is built anew, takes one step that is not counted and some that are; ratios are taken
    within a round.

    Args:
        shape: ``tiny`` (the embedded base's, 64 px), ``sd15`` (512 px) or ``sdxl`` (1024 px).
        device: Where to measure.
        precision: Of autocast and of the frozen weights; the trained ones stay in float32.
        batch_size: Samples a step.
        gradient_checkpointing: In the U-Net and in the trained network.
        rounds: Turns.
    """
    torch.manual_seed(0)
    unet, factor = make_unet(shape)
    nn.Module.to(unet.requires_grad_(False).eval(), device=torch.device(device), dtype=precision)
    if gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    side, steps = unet.config["sample_size"], 4 if shape == "tiny" else 1
    target = torch.randn(batch_size, 4, side, side, device=device)

    names = ["ControlNet", "BPS paper", "BPS lite", "T2I-Adapter"]
    times: dict[str, list[float]] = {name: [] for name in names}
    peaks: dict[str, int] = {}
    sizes: dict[str, int] = {}
    for round_ in range(rounds):
        for name in names:
            trainee = _trainee(name, shape, unet, factor, batch_size, device, precision)
            if gradient_checkpointing and hasattr(trainee.trained, "enable_gradient_checkpointing"):
                network: Any = trainee.trained
                if network._supports_gradient_checkpointing:
                    network.enable_gradient_checkpointing()
            trainee.step(target, precision)
            since = time.perf_counter()
            for _ in range(steps):
                trainee.step(target, precision)
            wait(device)
            times[name].append((time.perf_counter() - since) / steps)
            if round_ == 0:
                sizes[name] = sum(p.numel() for p in trainee.trained.parameters() if p.requires_grad)
                peaks[name] = _peak(trainee, unet, target, precision)
            del trainee
            gc.collect()
    rows = [
        StepRow(
            name,
            seconds=statistics.median(times[name]),
            ratio=statistics.median(a / b for a, b in zip(times[name], times["ControlNet"], strict=True)),
            parameters=sizes[name],
            peak_memory=peaks[name],
            estimated_memory=_estimated(name, unet, factor, batch_size, device, precision, gradient_checkpointing),
        )
        for name in names
    ]
    return TrainBench(
        shape,
        side * factor,
        batch_size,
        gradient_checkpointing,
        device,
        str(precision).removeprefix("torch."),
        rounds,
        machine(device),
        rows,
        [bench_epochs(stored, device, rounds) for stored in STORED] if shape == "tiny" else [],
    )


def bench_epochs(stored: int, device: str = "cpu", rounds: int = 3) -> Epochs:
    """Time epochs of the embedded base with and without the cache, the method ``lite`` in training.

    Args:
        stored: Side of the picture files, pixels; they are trained on at 64.
        device: Where to measure.
        rounds: Epochs of each kind that count, taken in turns.
    """
    pipe: Any = load_base()
    pipe.to(device)
    model: Any = BPSModel.from_unet(pipe.unet, pixel_unshuffle=pipe.vae_scale_factor, preset="lite")
    model.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)
    side = pipe.unet.config.sample_size * pipe.vae_scale_factor
    with tempfile.TemporaryDirectory() as folder:
        pairs = Pairs(list(_rows(Path(folder), stored)), (side, side))
        kinds = {True: encode_pairs(pipe, pairs, Path(folder) / "cache"), False: encode_pairs(pipe, pairs)}
        times: dict[bool, list[float]] = {True: [], False: []}
        for round_ in range(rounds + 1):
            for cached, encoded in kinds.items():
                since = time.perf_counter()
                _epoch(pipe, model, optimizer, encoded)
                wait(device)
                if round_ > 0:
                    times[cached].append(time.perf_counter() - since)
    return Epochs(EPOCH_PAIRS, stored, EPOCH_BATCH, statistics.median(times[True]), statistics.median(times[False]))


def _trainee(
    name: str, shape: Shape, unet: Any, factor: int, batch_size: int, device: str, precision: torch.dtype
) -> _Trainee:
    side = unet.config["sample_size"]
    frozen: dict[str, Any] = {"device": device, "dtype": precision}
    sample = torch.randn(batch_size, 4, side, side, **frozen)
    timesteps = torch.randint(1000, (batch_size,), device=device)
    inputs: dict[str, Any] = {
        "encoder_hidden_states": torch.randn(batch_size, 77, unet.config["cross_attention_dim"], **frozen)
    }
    if shape == "sdxl":
        inputs = unet_inputs(
            {**inputs, "text_embeds": torch.randn(batch_size, 1280, **frozen)}, (side * factor, side * factor)
        )
    pixels = side * factor
    sketch = torch.rand(batch_size, 1, pixels, pixels, device=device)

    def denoise(**extra: Any) -> torch.Tensor:
        return unet(sample, timesteps, **inputs, **extra).sample

    if name.startswith("BPS"):
        preset: Any = name.removeprefix("BPS ")
        model: Any = BPSModel.from_unet(unet, pixel_unshuffle=factor, preset=preset)
        model.to(device).train()
        return _Trainee(model, denoise, lambda: steer(unet, model, sketch, plan=None))
    if name == "ControlNet":
        controlnet: Any = make_controlnet(unet, factor)
        controlnet.to(device, torch.float32).train()
        picture = sketch.expand(-1, 3, -1, -1)

        def controlled() -> torch.Tensor:
            down, mid = controlnet(sample, timesteps, controlnet_cond=picture, **inputs, return_dict=False)
            return denoise(
                down_block_additional_residuals=[residual.to(precision) for residual in down],
                mid_block_additional_residual=mid.to(precision),
            )

        return _Trainee(controlnet, controlled)
    adapter: Any = make_t2i_adapter(unet, factor, shape)
    adapter.to(device).train()
    return _Trainee(
        adapter,
        lambda: denoise(down_intrablock_additional_residuals=[f.to(precision) for f in adapter(sketch)]),
    )


def _peak(trainee: _Trainee, unet: nn.Module, target: torch.Tensor, precision: torch.dtype) -> int:
    """Bytes of all tensors at their peak within a step."""
    if target.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        trainee.step(target, precision)
        return torch.cuda.max_memory_allocated()
    state = [t for s in trainee.optimizer.state.values() for t in s.values() if isinstance(t, torch.Tensor)]
    kept = [*unet.parameters(), *trainee.trained.parameters(), *state]
    with TensorBytes(kept) as counted:
        trainee.step(target, precision)
    return counted.peak + sum(tensor.nbytes for tensor in kept)


def _estimated(
    name: str, unet: Any, factor: int, batch_size: int, device: str, precision: torch.dtype, checkpointing: bool
) -> int | None:
    if not name.startswith("BPS"):
        return None
    side = unet.config["sample_size"]
    return estimate_memory(
        {key: value for key, value in unet.config.items() if not key.startswith("_")},
        {"pixel_unshuffle": factor, "preset": name.removeprefix("BPS ")},
        batch_size=batch_size,
        size=(side, side),
        base_dtype=precision,
        precision=precision,
        gradient_checkpointing=checkpointing,
        ema=False,
        device_type=torch.device(device).type,
    ).total


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


def _epoch(pipe: Any, model: BPSModel, optimizer: torch.optim.Optimizer, encoded: EncodedPairs) -> None:
    device, precision = pipe.unet.device, native_precision(pipe.unet.device)
    for start in range(0, len(encoded), EPOCH_BATCH):
        samples = [encoded[i, 0] for i in range(start, start + EPOCH_BATCH)]
        latents, condition = encoded.latents(samples).to(device), conditions_of(samples)
        noise, timesteps = torch.randn_like(latents), torch.randint(1000, (len(latents),))
        states = encoded.texts([sample.texts[0] for sample in samples])
        with steer(pipe.unet, model, condition, plan=None), fast_attention(device.type, precision):
            noisy = pipe.scheduler.add_noise(latents, noise, timesteps)
            text = states["encoder_hidden_states"].to(device)
            with torch.autocast(device.type, precision, enabled=precision != torch.float32):
                guess = pipe.unet(noisy, timesteps.to(device), text).sample
            F.mse_loss(guess.float(), noise).backward()
        optimizer.step()
        optimizer.zero_grad()

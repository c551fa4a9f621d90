"""What a training step costs, against ControlNet's and T2I-Adapter's; and what the cache saves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from diffusers import DDPMScheduler
from torch import nn

from powersteer.adapters.attach import attach
from powersteer.adapters.bps.model import BPSModel
from powersteer.apps.bench.epochs import LEARNING_RATE, STORED, Epochs, bench_epochs
from powersteer.apps.bench.shapes import Shape, make_controlnet, make_t2i_adapter, make_unet
from powersteer.apps.bench.turns import OUT_OF_MEMORY, chosen, is_cuda, must_fit, release, take_turns
from powersteer.backbones.unet import UNetBackbone
from powersteer.core.hardware import fast_attention, machine
from powersteer.core.memory import TensorBytes
from powersteer.denoising.objective import objective_of
from powersteer.denoising.step import Batch, Denoise, denoiser, predict, squared_errors
from powersteer.training.memory import Step, estimate_memory

OBJECTIVE = objective_of(DDPMScheduler())
METHODS = ("ControlNet", "BPS paper", "BPS lite", "T2I-Adapter")
"""The methods, the baseline first."""


@dataclass(frozen=True)
class StepRow:
    """One method's training step."""

    name: str
    seconds: float | None = None
    """Median."""
    ratio: float | None = None
    """To ControlNet's step of the same round, median."""
    parameters: int | None = None
    """Trained."""
    peak_memory: int | None = None
    """Bytes of weights, gradients, optimizer and activations at their peak, the U-Net's among them."""
    estimated_memory: int | None = None
    """What `powersteer train --dry-run` would say of it."""
    pictures_per_second: float | None = None
    """That are trained on."""
    error: str | None = None
    """Why there are no figures."""


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


def bench_train(
    shape: Shape = "sd15",
    *,
    device: str = "cpu",
    precision: torch.dtype = torch.float32,
    batch_size: int = 1,
    gradient_checkpointing: bool = False,
    rounds: int = 3,
    only: Sequence[str] = (),
    on_row: Callable[[TrainBench], None] = lambda _: None,
) -> TrainBench:
    """Time a training step of each method on random weights, batch and U-Net the same.

    One row is finished at a time: the method's memory is measured alone, then it takes turns with ControlNet, and both
    are gone when the next is built. At the ``tiny`` shape epochs with and without the cache come last.

    Args:
        shape: ``tiny`` (the embedded base's, 64 px), ``sd15`` (512 px) or ``sdxl`` (1024 px).
        device: Where to measure.
        precision: Of autocast and of the frozen weights; the trained ones stay in float32.
        batch_size: Samples a step.
        gradient_checkpointing: In the U-Net and in the trained network.
        rounds: Turns counted, after one that is not.
        only: Names of `METHODS` to measure beside ControlNet, and no epochs; all if empty. See
            `powersteer.apps.bench.turns.chosen`.
        on_row: Called with the rows so far whenever one is done.

    Raises:
        PowersteerError: No method has such a name.
    """
    names = chosen(METHODS, only)
    torch.manual_seed(0)
    with must_fit(shape, device), torch.device(device):
        unet, factor = make_unet(shape)
        nn.Module.to(unet.requires_grad_(False).eval(), precision)
    if gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    scene = _Scene(shape, unet, factor, batch_size, device, precision, gradient_checkpointing)
    result = TrainBench(
        shape,
        scene.side * factor,
        batch_size,
        gradient_checkpointing,
        device,
        str(precision).removeprefix("torch."),
        rounds,
        machine(device),
        [],
        [],
    )
    for name in names:
        result.rows.append(_measure(name, scene, rounds))
        release(device)
        on_row(result)
    if shape == "tiny" and not only:
        result.epochs.extend(bench_epochs(stored, device, rounds) for stored in STORED)
    return result


@dataclass
class _Trainee:
    """A network in training: one step of the loop of diffusers' example scripts."""

    trained: nn.Module
    denoise: Denoise
    batch: Batch
    precision: torch.dtype
    context: Callable[[], Any] = nullcontext

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.AdamW(self.trained.parameters(), lr=LEARNING_RATE, fused=True)

    def step(self) -> None:
        device = self.batch.latents.device
        with self.context(), fast_attention(device.type, self.precision):
            with torch.autocast(device.type, self.precision, enabled=self.precision != torch.float32):
                prediction = predict(self.denoise, OBJECTIVE, self.batch, device, self.precision)
            squared_errors(OBJECTIVE, prediction, self.batch).mean().backward()
        torch.nn.utils.clip_grad_norm_(self.trained.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


@dataclass(frozen=True)
class _Scene:
    """The U-Net of all methods, and how each is trained."""

    shape: Shape
    unet: Any
    factor: int
    batch_size: int
    device: str
    precision: torch.dtype
    gradient_checkpointing: bool

    @property
    def side(self) -> int:
        """Latents along each side."""
        return self.unet.config["sample_size"]

    @property
    def steps(self) -> int:
        """Taken in one turn."""
        return 4 if self.shape == "tiny" else 1

    def trainee(self, name: str) -> _Trainee:
        """A method, built anew."""
        with torch.device(self.device):
            trainee = self._trainee(name)
        network: Any = trainee.trained
        if self.gradient_checkpointing and getattr(network, "_supports_gradient_checkpointing", False):
            network.enable_gradient_checkpointing()
        return trainee

    def _trainee(self, name: str) -> _Trainee:
        unet, batch_size, side, pixels = self.unet, self.batch_size, self.side, self.side * self.factor
        latents, noise = torch.randn(2, batch_size, 4, side, side)
        times = OBJECTIVE.at(torch.rand(batch_size))
        text = torch.randn(batch_size, 77, unet.config["cross_attention_dim"], dtype=self.precision)
        inputs: dict[str, Any] = {"encoder_hidden_states": text}
        if self.shape == "sdxl":
            pooled = torch.randn(batch_size, 1280, dtype=self.precision)
            inputs = UNetBackbone.inputs({**inputs, "text_embeds": pooled}, (pixels, pixels))
        batch, denoise = Batch(latents, noise, times, inputs), denoiser(unet)
        sketch = torch.rand(batch_size, 1, pixels, pixels)

        if name.startswith("BPS"):
            model: Any = BPSModel.from_unet(unet, pixel_unshuffle=self.factor, preset=_preset(name))
            context = partial(attach, unet, model, sketch, plan=None)
            return _Trainee(model.train(), denoise, batch, self.precision, context)
        if name == "ControlNet":
            controlnet: Any = make_controlnet(unet, self.factor)
            nn.Module.to(controlnet.train(), torch.float32)
            picture = sketch.expand(-1, 3, -1, -1)

            def controlled(noisy: torch.Tensor, times: torch.Tensor, **inputs: Any) -> torch.Tensor:
                down, mid = controlnet(noisy, times, controlnet_cond=picture, **inputs, return_dict=False)
                return denoise(
                    noisy,
                    times,
                    **inputs,
                    down_block_additional_residuals=[residual.to(self.precision) for residual in down],
                    mid_block_additional_residual=mid.to(self.precision),
                )

            return _Trainee(controlnet, controlled, batch, self.precision)
        adapter: Any = make_t2i_adapter(unet, self.factor, self.shape)

        def adapted(noisy: torch.Tensor, times: torch.Tensor, **inputs: Any) -> torch.Tensor:
            features = [feature.to(self.precision) for feature in adapter(sketch)]
            return denoise(noisy, times, **inputs, down_intrablock_additional_residuals=features)

        return _Trainee(adapter.train(), adapted, batch, self.precision)

    def estimated(self, name: str) -> int | None:
        """What a dry run says of the method's memory, bytes; it knows only this project's own."""
        if not name.startswith("BPS"):
            return None
        step = Step(
            batch_size=self.batch_size,
            size=(self.side, self.side),
            base_dtype=self.precision,
            precision=self.precision,
            gradient_checkpointing=self.gradient_checkpointing,
            ema=False,
            device_type=torch.device(self.device).type,
        )
        return estimate_memory(
            UNetBackbone(self.unet), {"pixel_unshuffle": self.factor, "preset": _preset(name)}, step
        ).total


def _measure(name: str, scene: _Scene, rounds: int) -> StepRow:
    error = OUT_OF_MEMORY
    try:
        trainee = scene.trainee(name)
        trainee.step()
        peak, baseline = _peak(trainee, scene), None
        if name != METHODS[0]:
            error = f"{OUT_OF_MEMORY} beside {METHODS[0]}"
            other = scene.trainee(METHODS[0])
            other.step()
            baseline = _steps(other, scene.steps)
        turns = take_turns(_steps(trainee, scene.steps), baseline, rounds, scene.device)
    except torch.OutOfMemoryError:
        return StepRow(name, error=error)
    return StepRow(
        name,
        turns.seconds / scene.steps,
        turns.ratio,
        parameters=sum(p.numel() for p in trainee.trained.parameters() if p.requires_grad),
        peak_memory=peak,
        estimated_memory=scene.estimated(name),
        pictures_per_second=scene.batch_size * scene.steps / turns.seconds,
    )


def _steps(trainee: _Trainee, count: int) -> Callable[[], None]:
    def steps() -> None:
        for _ in range(count):
            trainee.step()

    return steps


def _peak(trainee: _Trainee, scene: _Scene) -> int:
    """Bytes of all tensors at their peak within a step."""
    if is_cuda(scene.device):
        torch.cuda.reset_peak_memory_stats()
        trainee.step()
        return torch.cuda.max_memory_allocated()
    state = [t for s in trainee.optimizer.state.values() for t in s.values() if isinstance(t, torch.Tensor)]
    kept = [*scene.unet.parameters(), *trainee.trained.parameters(), *state]
    with TensorBytes(kept) as counted:
        trainee.step()
    return counted.peak + sum(tensor.nbytes for tensor in kept)


def _preset(name: str) -> Any:
    return name.removeprefix("BPS ")

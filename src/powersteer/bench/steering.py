"""What a denoising step costs under steering, against a bare U-Net and the other control networks of diffusers."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from diffusers import (
    UNet2DConditionModel,
    UNetControlNetXSModel,
)
from torch import nn

from powersteer.baselines import make_controlnet, make_controlnet_xs
from powersteer.bench.shapes import (
    Shape,
    make_t2i_adapter,
    make_unet,
    wait,
)
from powersteer.hardware import machine
from powersteer.memory import TensorBytes
from powersteer.model import BPSModel
from powersteer.plan import SteeringPlan
from powersteer.steering import steer

Step = Callable[[], Any]
TIMESTEP = 501


@dataclass(frozen=True)
class Row:
    """One way to take a denoising step."""

    name: str
    seconds: float
    """Median."""
    ratio: float
    """To the bare U-Net's step of the same round, median."""
    parameters: int
    """Beyond the U-Net's."""
    extra_peak_memory: int
    """Bytes beyond the bare step: the method's weights, what it keeps, and its activations at their peak."""
    plan_bytes: int | None = None
    """What a plan keeps for this timestep."""


@dataclass(frozen=True)
class SteeringBench:
    """The rows, and what they were measured on."""

    shape: Shape
    pixels: int
    device: str
    dtype: str
    rounds: int
    machine: str
    rows: list[Row]

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


@torch.no_grad()
def bench_steering(
    shape: Shape = "sd15", *, device: str = "cpu", dtype: torch.dtype = torch.float32, rounds: int = 5
) -> SteeringBench:
    """Time every way to take one step of classifier-free guidance (a U-Net batch of two), on random weights.

    The ways take turns, so that a machine's moods hit all alike; ratios are taken within a round.

    Args:
        shape: ``tiny`` (the embedded base's, 64 px), ``sd15`` (512 px) or ``sdxl`` (1024 px).
        device: Where to measure.
        dtype: Of weights and activations.
        rounds: Turns counted, after one that is not.
    """
    torch.manual_seed(0)
    unet, factor = make_unet(shape)
    nn.Module.to(unet.eval(), device=torch.device(device), dtype=dtype)
    side = unet.config["sample_size"]
    sample = torch.randn(2, 4, side, side, device=device, dtype=dtype)
    text = torch.randn(2, 77, unet.config["cross_attention_dim"], device=device, dtype=dtype)
    inputs: dict[str, Any] = {"encoder_hidden_states": text}
    if shape == "sdxl":
        ids = torch.tensor([[1024.0, 1024, 0, 0, 1024, 1024]] * 2, device=device, dtype=dtype)
        inputs["added_cond_kwargs"] = {"text_embeds": torch.randn(2, 1280, device=device, dtype=dtype), "time_ids": ids}
    ways = list(_ways(shape, unet, factor, sample, inputs))
    times: list[list[float]] = [[] for _ in ways]
    for round_ in range(rounds + 1):
        for way, seconds in zip(ways, times, strict=True):
            since = time.perf_counter()
            way.step()
            wait(device)
            if round_ > 0:
                seconds.append(time.perf_counter() - since)
    peaks = [_peak(way, unet, device) for way in ways]
    rows = [
        Row(
            way.name,
            seconds=statistics.median(seconds),
            ratio=statistics.median(mine / bare for mine, bare in zip(seconds, times[0], strict=True)),
            parameters=way.parameters,
            extra_peak_memory=peak - peaks[0] + way.weight_bytes + (way.plan.nbytes if way.plan else 0),
            plan_bytes=way.plan.nbytes if way.plan else None,
        )
        for way, seconds, peak in zip(ways, times, peaks, strict=True)
    ]
    return SteeringBench(shape, side * factor, device, str(dtype).removeprefix("torch."), rounds, machine(device), rows)


@dataclass(frozen=True)
class _Way:
    name: str
    step: Step
    modules: tuple[nn.Module, ...] = ()
    parameters: int = 0
    weight_bytes: int = 0
    plan: SteeringPlan | None = None


def _ways(
    shape: Shape, unet: UNet2DConditionModel, factor: int, sample: torch.Tensor, inputs: dict[str, Any]
) -> Iterator[_Way]:
    device, dtype = sample.device, sample.dtype

    def count(*modules: nn.Module) -> dict[str, Any]:
        parameters = [p for module in modules for p in module.parameters()]
        size = sum(p.numel() for p in parameters)
        return {"modules": modules, "parameters": size, "weight_bytes": size * dtype.itemsize}

    def ready(module: Any) -> Any:
        return module.to(device, dtype).eval()

    def denoise(**extra: Any) -> Any:
        return unet(sample, TIMESTEP, **inputs, **extra)

    pixels = factor * sample.shape[-1]
    sketch = torch.rand(1, 1, pixels, pixels, device=device)
    picture = torch.rand(2, 3, pixels, pixels, device=device, dtype=dtype)
    yield _Way("bare U-Net", denoise)

    for preset in ("paper", "lite"):
        model = ready(_randomised(BPSModel.from_unet(unet, pixel_unshuffle=factor, preset=preset)))

        def steered(condition: torch.Tensor, plan: SteeringPlan | None, model: BPSModel = model) -> Any:
            with steer(unet, model, condition, plan=plan):
                return denoise()

        if preset == "paper":
            twice = sketch.expand(2, -1, -1, -1)
            yield _Way("BPS paper, not shared", lambda c=twice, s=steered: s(c, None), **count(model))
        yield _Way(f"BPS {preset}, shared", lambda s=steered: s(sketch, None), **count(model))
        plan = SteeringPlan()
        yield _Way(f"BPS {preset}, warm plan", lambda s=steered, p=plan: s(sketch, p), plan=plan, **count(model))

    controlnet = ready(make_controlnet(unet, factor))

    def with_controlnet() -> Any:
        down, mid = controlnet(sample, TIMESTEP, controlnet_cond=picture, **inputs, return_dict=False)
        return denoise(down_block_additional_residuals=down, mid_block_additional_residual=mid)

    yield _Way("ControlNet", with_controlnet, **count(controlnet))

    adapter = make_controlnet_xs(unet, factor)
    fused = ready(UNetControlNetXSModel.from_unet(unet, adapter))
    counted: dict[str, Any] = {**count(adapter), "modules": (fused,)}
    yield _Way("ControlNet-XS", lambda: fused(sample, TIMESTEP, controlnet_cond=picture, **inputs), **counted)

    t2i = ready(make_t2i_adapter(unet, factor, shape))
    features = [feature.repeat(2, 1, 1, 1) for feature in t2i(sketch.to(dtype))]
    yield _Way(
        "T2I-Adapter, once a picture",
        lambda: denoise(down_intrablock_additional_residuals=[feature.clone() for feature in features]),
        **count(t2i),
    )


def _randomised(model: BPSModel) -> BPSModel:
    """Zero-initialised convolutions made random: nothing may be skipped because it is zero."""
    for parameter in model.parameters():
        if parameter.ndim == 4:
            nn.init.normal_(parameter, std=0.02)
    return model


def _peak(way: _Way, unet: nn.Module, device: str) -> int:
    """Bytes of the tensors that a step makes, at their peak."""
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        way.step()
        return torch.cuda.max_memory_allocated() - before
    with TensorBytes([p for module in (unet, *way.modules) for p in module.parameters()]) as tracked:
        way.step()
    return tracked.peak

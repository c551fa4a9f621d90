"""What a denoising step costs under steering, against a bare U-Net and the other control networks of diffusers."""

from __future__ import annotations

import platform
import statistics
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import diffusers
import torch
from diffusers import (
    ControlNetModel,
    ControlNetXSAdapter,
    T2IAdapter,
    UNet2DConditionModel,
    UNetControlNetXSModel,
)
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from powersteer.base import load_base
from powersteer.model import BPSModel
from powersteer.plan import SteeringPlan
from powersteer.steering import steer

Shape = Literal["tiny", "sd15", "sdxl"]
Step = Callable[[], Any]
TIMESTEP = 501

_SD15: dict[str, Any] = {"sample_size": 64, "cross_attention_dim": 768}
_SDXL: dict[str, Any] = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


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
    unet, factor = _unet(shape)
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
            _wait(device)
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
    return SteeringBench(
        shape, side * factor, device, str(dtype).removeprefix("torch."), rounds, _machine(device), rows
    )


@dataclass(frozen=True)
class _Way:
    name: str
    step: Step
    modules: tuple[nn.Module, ...] = ()
    parameters: int = 0
    weight_bytes: int = 0
    plan: SteeringPlan | None = None


def _unet(shape: Shape) -> tuple[UNet2DConditionModel, int]:
    """The U-Net and the VAE's scale factor."""
    if shape != "tiny":
        return UNet2DConditionModel(**(_SDXL if shape == "sdxl" else _SD15)), 8
    pipe = load_base()
    # Without the text in its time embedding, which ControlNet-XS knows for SDXL only.
    config: dict[str, Any] = {**pipe.unet.config, "addition_embed_type": None}
    return UNet2DConditionModel(**{k: v for k, v in config.items() if not k.startswith("_")}), pipe.vae_scale_factor


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

    conditioning: Any = (16, 32, 96, 256) if factor == 8 else (16, 32, 96)
    controlnet = ready(ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=conditioning))

    def with_controlnet() -> Any:
        down, mid = controlnet(sample, TIMESTEP, controlnet_cond=picture, **inputs, return_dict=False)
        return denoise(down_block_additional_residuals=down, mid_block_additional_residual=mid)

    yield _Way("ControlNet", with_controlnet, **count(controlnet))

    adapter = ControlNetXSAdapter.from_unet(
        unet, size_ratio=0.1 if shape != "tiny" else 0.25, conditioning_embedding_out_channels=conditioning
    )
    fused = ready(UNetControlNetXSModel.from_unet(unet, adapter))
    counted: dict[str, Any] = {**count(adapter), "modules": (fused,)}
    yield _Way("ControlNet-XS", lambda: fused(sample, TIMESTEP, controlnet_cond=picture, **inputs), **counted)

    # Of a first block without attention the U-Net takes the feature after its downsampler: the XL kind.
    plain_head = unet.config["down_block_types"][0] == "DownBlock2D"
    channels = list(unet.config["block_out_channels"]) + [1280] * (shape == "sdxl")
    kind = "full_adapter_xl" if plain_head else "full_adapter"
    t2i = ready(T2IAdapter(1, channels, downscale_factor=(1 + plain_head) * factor, adapter_type=kind))
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
    with _TensorBytes([p for module in (unet, *way.modules) for p in module.parameters()]) as tracked:
        way.step()
    return tracked.peak


class _TensorBytes(TorchDispatchMode):
    """Counts the bytes of live tensor storages: a CPU allocator keeps no such statistics."""

    def __init__(self, known: list[torch.Tensor]) -> None:
        super().__init__()
        self.live: dict[int, int] = {tensor.untyped_storage().data_ptr(): 0 for tensor in known}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._watch(tensor.untyped_storage())
        return result

    def _watch(self, storage: torch.UntypedStorage) -> None:
        address = storage.data_ptr()
        if address in self.live:
            return
        self.live[address] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, address)

    def _forget(self, address: int) -> None:
        self.now -= self.live.pop(address, 0)


def _wait(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def _machine(device: str) -> str:
    if torch.device(device).type == "cuda":
        chip = torch.cuda.get_device_name()
    else:
        chip = f"{_cpu_name()}, {torch.get_num_threads()} threads"
    return f"{chip}; Python {platform.python_version()}, torch {torch.__version__}, diffusers {diffusers.__version__}"


def _cpu_name() -> str:
    try:
        info = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in info if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()

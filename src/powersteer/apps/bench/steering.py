"""What a denoising step costs under steering, against a bare U-Net and the other control networks of diffusers."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal

import torch
from diffusers import UNet2DConditionModel, UNetControlNetXSModel
from torch import nn

from powersteer.adapters.attach import attach
from powersteer.adapters.plan import SteeringPlan
from powersteer.apps.bench.shapes import (
    Shape,
    compile_in_place,
    make_bps,
    make_controlnet,
    make_controlnet_xs,
    make_t2i_adapter,
    make_unet,
    twin,
)
from powersteer.apps.bench.turns import (
    OUT_OF_MEMORY,
    Step,
    chosen,
    device_waits,
    is_cuda,
    must_fit,
    release,
    take_turns,
    timed,
)
from powersteer.core.hardware import machine
from powersteer.core.memory import TensorBytes

TIMESTEP = 501
BARE = "bare U-Net"


@dataclass(frozen=True)
class Row:
    """One way to take a denoising step."""

    name: str
    seconds: float | None = None
    """Median."""
    ratio: float | None = None
    """To the bare U-Net's step of the same round, median."""
    parameters: int | None = None
    """Beyond the U-Net's."""
    extra_peak_memory: int | None = None
    """Bytes beyond the bare step: the method's weights, what it keeps, and its activations at their peak; None where
    nobody counts them (compiled code on the CPU)."""
    plan_bytes: int | None = None
    """What a plan keeps for this timestep."""
    warm_up_seconds: float | None = None
    """Seconds of the first step, which compiles and fills the plan."""
    device_waits: int | None = None
    """How many times a step makes the CPU wait for the GPU; None on the CPU."""
    error: str | None = None
    """Why there are no figures."""


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
    batch_size: int = 1
    """Pictures: half the U-Net's batch."""
    compiled: bool = False

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


@torch.no_grad()
def bench_steering(
    shape: Shape = "sd15",
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    rounds: int = 5,
    batch_size: int = 1,
    compiled: bool = False,
    only: Sequence[str] = (),
    on_row: Callable[[SteeringBench], None] = lambda _: None,
) -> SteeringBench:
    """Time every way to take one step of classifier-free guidance, on random weights.

    One row is finished at a time: its way takes turns with the bare U-Net, and its networks are in memory no longer
    than that. A step is one within the block of `steer`, which is entered before.

    Args:
        shape: ``tiny`` (the embedded base's, 64 px), ``sd15`` (512 px) or ``sdxl`` (1024 px).
        device: Where to measure.
        dtype: Of weights and activations.
        rounds: Turns counted, after one that is not.
        batch_size: Pictures; the U-Net has both halves of the guidance, twice as many.
        compiled: Have ``torch.compile`` the U-Net before it is steered, and the networks beside it.
        only: Names of `WAYS` to measure beside the bare U-Net; all if empty. See `powersteer.apps.bench.turns.chosen`.
        on_row: Called with the rows so far whenever one is done.

    Raises:
        PowersteerError: No way has such a name.
    """
    names = chosen(list(WAYS), only)
    torch.manual_seed(0)
    scene = _Scene.of(shape, batch_size, compiled, device, dtype)
    precision = str(dtype).removeprefix("torch.")
    result = SteeringBench(shape, scene.pixels, device, precision, rounds, machine(device), [], batch_size, compiled)
    for name in names:
        result.rows.append(_measure(name, scene, rounds))
        release(device, compiled=compiled)
        on_row(result)
    return result


@dataclass(frozen=True)
class _Way:
    """A way to take a step, with what it has beyond the U-Net."""

    step: Step
    modules: tuple[nn.Module, ...] = ()
    parameters: int = 0
    weight_bytes: int = 0
    plan: SteeringPlan | None = None


@dataclass
class _Scene:
    """The U-Net of all ways, what it is given, and how its own step does."""

    shape: Shape
    unet: UNet2DConditionModel
    factor: int
    sample: torch.Tensor
    inputs: dict[str, Any]
    compiled: bool
    device: str
    bare_step: Step = lambda: None
    bare_peak: int = 0

    @classmethod
    def of(cls, shape: Shape, batch_size: int, compiled: bool, device: str, dtype: torch.dtype) -> _Scene:
        with must_fit(shape, device), torch.device(device):
            unet, factor = make_unet(shape)
            nn.Module.to(unet.eval(), dtype)
            side, rows = unet.config["sample_size"], 2 * batch_size
            sample = torch.randn(rows, 4, side, side, dtype=dtype)
            text = torch.randn(rows, 77, unet.config["cross_attention_dim"], dtype=dtype)
            inputs: dict[str, Any] = {"encoder_hidden_states": text}
            if shape == "sdxl":
                ids = torch.tensor([[1024.0, 1024, 0, 0, 1024, 1024]] * rows, dtype=dtype)
                inputs["added_cond_kwargs"] = {"text_embeds": torch.randn(rows, 1280, dtype=dtype), "time_ids": ids}
        scene = cls(shape, unet, factor, sample, inputs, compiled, device)
        scene.bare_step = scene.step_of(scene.ready(twin(unet)))
        return scene

    @property
    def pixels(self) -> int:
        """Side of a picture."""
        return self.factor * self.sample.shape[-1]

    def ready(self, network: Any) -> Any:
        """The network as it is measured."""
        nn.Module.to(network.eval(), self.sample.dtype)
        if self.compiled:
            compile_in_place(network)
        return network

    def step_of(self, network: Any, **extra: Any) -> Step:
        """A step of the U-Net, or of what takes its place."""
        return lambda: network(self.sample, TIMESTEP, **self.inputs, **extra)

    def random(self, count: int, channels: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Pictures (count, channels, H, W) in [0, 1]."""
        return torch.rand(count, channels, self.pixels, self.pixels, device=self.device, dtype=dtype)

    def counted(self, module: nn.Module) -> dict[str, Any]:
        """What a way says of a network."""
        size = sum(parameter.numel() for parameter in module.parameters())
        return {"modules": (module,), "parameters": size, "weight_bytes": size * self.sample.dtype.itemsize}


def _measure(name: str, scene: _Scene, rounds: int) -> Row:
    is_bare = name == BARE
    try:
        with WAYS[name](scene) as way:
            warm_up = timed(way.step, scene.device)
            if not is_bare:
                timed(scene.bare_step, scene.device)
            turns = take_turns(way.step, None if is_bare else scene.bare_step, rounds, scene.device)
            peak = _peak(way, scene)
            if is_bare:
                scene.bare_peak = peak or 0
            kept = way.plan.nbytes if way.plan else None
            return Row(
                name,
                turns.seconds,
                turns.ratio,
                way.parameters,
                extra_peak_memory=None if peak is None else peak - scene.bare_peak + way.weight_bytes + (kept or 0),
                plan_bytes=kept,
                warm_up_seconds=warm_up,
                device_waits=device_waits(way.step, scene.device),
            )
    except torch.OutOfMemoryError:
        return Row(name, error=OUT_OF_MEMORY)


def _peak(way: _Way, scene: _Scene) -> int | None:
    """Bytes of the tensors that a step makes, at their peak."""
    if is_cuda(scene.device):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        way.step()
        return torch.cuda.max_memory_allocated() - before
    if scene.compiled:
        return None
    with TensorBytes([p for module in (scene.unet, *way.modules) for p in module.parameters()]) as tracked:
        way.step()
    return tracked.peak


@contextmanager
def _bare(scene: _Scene) -> Generator[_Way]:
    yield _Way(scene.bare_step)


@contextmanager
def _bps(scene: _Scene, preset: str, kind: Literal["not shared", "shared", "warm plan"]) -> Generator[_Way]:
    with torch.device(scene.device):
        model = scene.ready(make_bps(scene.unet, scene.factor, preset))
    unet = scene.ready(twin(scene.unet))
    sketch = scene.random(1, 1)
    condition = sketch.expand(len(scene.sample), -1, -1, -1) if kind == "not shared" else sketch
    plan = SteeringPlan() if kind == "warm plan" else None
    with attach(unet, model, condition, plan=plan):
        yield _Way(scene.step_of(unet), plan=plan, **scene.counted(model))


@contextmanager
def _controlnet(scene: _Scene) -> Generator[_Way]:
    with torch.device(scene.device):
        network = scene.ready(make_controlnet(scene.unet, scene.factor))
    unet = scene.ready(twin(scene.unet))
    picture = scene.random(len(scene.sample), 3, scene.sample.dtype)
    control = scene.step_of(network, controlnet_cond=picture, return_dict=False)

    def step() -> Any:
        down, mid = control()
        extra = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
        return scene.step_of(unet, **extra)()

    yield _Way(step, **scene.counted(network))


@contextmanager
def _controlnet_xs(scene: _Scene) -> Generator[_Way]:
    with torch.device(scene.device):
        adapter = make_controlnet_xs(scene.unet, scene.factor)
        fused = scene.ready(UNetControlNetXSModel.from_unet(scene.unet, adapter))
    picture = scene.random(len(scene.sample), 3, scene.sample.dtype)
    counted: dict[str, Any] = scene.counted(adapter) | {"modules": (fused,)}
    yield _Way(scene.step_of(fused, controlnet_cond=picture), **counted)


@contextmanager
def _t2i_adapter(scene: _Scene) -> Generator[_Way]:
    with torch.device(scene.device):
        network = nn.Module.to(make_t2i_adapter(scene.unet, scene.factor, scene.shape).eval(), scene.sample.dtype)
    features = [
        feature.repeat(len(scene.sample), 1, 1, 1) for feature in network(scene.random(1, 1, scene.sample.dtype))
    ]
    unet = scene.ready(twin(scene.unet))

    def step() -> Any:
        return scene.step_of(unet, down_intrablock_additional_residuals=[feature.clone() for feature in features])()

    yield _Way(step, **scene.counted(network))


WAYS: dict[str, Callable[[_Scene], AbstractContextManager[_Way]]] = {
    BARE: _bare,
    "BPS paper, not shared": partial(_bps, preset="paper", kind="not shared"),
    "BPS paper, shared": partial(_bps, preset="paper", kind="shared"),
    "BPS paper, warm plan": partial(_bps, preset="paper", kind="warm plan"),
    "BPS lite, shared": partial(_bps, preset="lite", kind="shared"),
    "BPS lite, warm plan": partial(_bps, preset="lite", kind="warm plan"),
    "ControlNet": _controlnet,
    "ControlNet-XS": _controlnet_xs,
    "T2I-Adapter, once a picture": _t2i_adapter,
}
"""The ways by name, the baseline first; each builds its networks, and what it opens lets go of them."""

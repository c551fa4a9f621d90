"""How many pictures a second whole pipelines make, steered, bare and with the other control networks of diffusers."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    StableDiffusionAdapterPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLAdapterPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLPipeline,
)
from torch import nn

from powersteer.adapters.attach import attach
from powersteer.adapters.plan import SteeringPlan
from powersteer.apps.bench.shapes import (
    Shape,
    compile_in_place,
    make_bps,
    make_controlnet,
    make_t2i_adapter,
    make_unet,
    make_vae,
    twin,
)
from powersteer.apps.bench.turns import OUT_OF_MEMORY, Step, chosen, is_cuda, must_fit, release, take_turns, timed
from powersteer.backbones.load import EMBEDDED_BASE, base_configs
from powersteer.core.hardware import machine

BARE = "bare pipeline"
GUIDANCE_SCALE = 7.5


@dataclass(frozen=True)
class Row:
    """One way to make a batch of pictures."""

    name: str
    batch_size: int
    """Pictures made at once, of one condition."""
    seconds: float | None = None
    """A batch, median."""
    pictures_per_second: float | None = None
    ratio: float | None = None
    """Its seconds over the bare pipeline's in the same round, median."""
    warm_up_seconds: float | None = None
    """Seconds of the first batch, which compiles, and fills the plan."""
    peak_memory: int | None = None
    """Bytes of everything at their peak; None on the CPU."""
    error: str | None = None
    """Why there are no figures."""


@dataclass(frozen=True)
class GenerateBench:
    """The rows, and what they were measured on."""

    shape: Shape
    pixels: int
    num_inference_steps: int
    device: str
    dtype: str
    compiled: bool
    rounds: int
    machine: str
    rows: list[Row]

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


@torch.no_grad()
def bench_generate(  # each parameter is an option of the bench
    shape: Shape = "sd15",
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    rounds: int = 3,
    batch_sizes: Sequence[int] = (1, 8),
    num_inference_steps: int = 30,
    compiled: bool = False,
    only: Sequence[str] = (),
    on_row: Callable[[GenerateBench], None] = lambda _: None,
) -> GenerateBench:
    """Time whole generations of diffusers' pipelines on random weights: from text states to decoded pictures.

    One row is finished at a time: its way takes turns with the bare pipeline, and its networks are in memory no longer
    than that. The pictures of a batch share their condition. The first picture of a condition fills a plan; the
    further ones find it full.

    Args:
        shape: ``tiny`` (the embedded base's, 64 px), ``sd15`` (512 px) or ``sdxl`` (1024 px).
        device: Where to measure.
        dtype: Of weights and activations.
        rounds: Turns counted, after one that is not.
        batch_sizes: Pictures made at once; all ways are measured for each.
        num_inference_steps: Of denoising, with classifier-free guidance.
        compiled: Have ``torch.compile`` the U-Net before it is steered, and the networks beside it.
        only: Names of `WAYS` to measure beside the bare pipeline; all if empty;
            see `powersteer.apps.bench.turns.chosen`.
        on_row: Called with the rows so far whenever one is done.

    Raises:
        PowersteerError: No way has such a name.
    """
    names = chosen(list(WAYS), only)
    torch.manual_seed(0)
    parts = _Parts.of(shape, device, dtype, compiled)
    dtype_name = str(dtype).removeprefix("torch.")
    result = GenerateBench(
        shape, parts.pixels, num_inference_steps, device, dtype_name, compiled, rounds, machine(device), []
    )
    for batch_size in batch_sizes:
        scene = _Scene(parts, batch_size, num_inference_steps)
        for name in names:
            result.rows.append(_measure(name, scene, rounds))
            release(device, compiled=compiled)
            on_row(result)
    return result


@dataclass(frozen=True)
class _Parts:
    """What all pipelines are put together from."""

    shape: Shape
    unet: Any
    vae: Any
    factor: int
    """Pixels per latent pixel, along each side."""
    compiled: bool
    device: str

    @classmethod
    def of(cls, shape: Shape, device: str, dtype: torch.dtype, compiled: bool) -> _Parts:
        with must_fit(shape, device), torch.device(device):
            unet, factor = make_unet(shape)
            vae = make_vae(shape)
            for module in (unet, vae):
                nn.Module.to(module.eval(), dtype)
        return cls(shape, unet, vae, factor, compiled, device)

    @property
    def pixels(self) -> int:
        """Side of a picture."""
        return self.factor * self.unet.config["sample_size"]

    def pipeline(self, kinds: tuple[Any, Any], **parts: Any) -> Any:
        """A pipeline with a U-Net of its own: one of a class for Stable Diffusion and one for SDXL."""
        unet = self.ready(twin(self.unet))
        kind = kinds[self.shape == "sdxl"]
        scheduler = DDIMScheduler.from_config(base_configs(EMBEDDED_BASE)["scheduler"])
        parts |= {"unet": unet, "vae": self.vae, "scheduler": scheduler, "text_encoder": None, "tokenizer": None}
        if self.shape == "sdxl":
            pipe = kind(**parts, text_encoder_2=None, tokenizer_2=None)
            pipe.watermark = None  # which is put in on the CPU, where its package is installed
        else:
            pipe = kind(**parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def ready(self, network: Any) -> Any:
        """The network as it is measured."""
        nn.Module.to(network.eval(), self.unet.dtype)
        if self.compiled:
            compile_in_place(network)
        return network

    def random(self, count: int, channels: int) -> torch.Tensor:
        """Pictures (count, channels, H, W) in [0, 1]."""
        return torch.rand(count, channels, self.pixels, self.pixels, device=self.device)


class _Scene:
    """What the pipelines are given for one size of batch, and the bare pipeline.

    Args:
        parts: Of the pipelines.
        batch_size: Pictures made at once.
        num_inference_steps: Denoising steps.
    """

    def __init__(self, parts: _Parts, batch_size: int, num_inference_steps: int) -> None:
        self.parts, self.batch_size = parts, batch_size
        unet = parts.unet
        width, side, dtype = unet.config["cross_attention_dim"], unet.config["sample_size"], unet.dtype
        with torch.device(parts.device):
            self.inputs: dict[str, Any] = {
                "prompt_embeds": torch.randn(batch_size, 77, width, dtype=dtype),
                "negative_prompt_embeds": torch.randn(batch_size, 77, width, dtype=dtype),
                "latents": torch.randn(batch_size, 4, side, side, dtype=dtype),
                "height": parts.pixels,
                "width": parts.pixels,
                "guidance_scale": GUIDANCE_SCALE,
                "num_inference_steps": num_inference_steps,
                "output_type": "pt",
            }
            if parts.shape == "sdxl":
                for name in ("pooled_prompt_embeds", "negative_pooled_prompt_embeds"):
                    self.inputs[name] = torch.randn(batch_size, 1280, dtype=dtype)
        bare = parts.pipeline((StableDiffusionPipeline, StableDiffusionXLPipeline))
        self.bare: Step = lambda: bare(**self.inputs)


def _measure(name: str, scene: _Scene, rounds: int) -> Row:
    is_bare, cuda = name == BARE, is_cuda(scene.parts.device)
    try:
        with WAYS[name](scene) as generate:
            warm_up = timed(generate, scene.parts.device)
            if not is_bare:
                timed(scene.bare, scene.parts.device)

            def turn() -> None:
                if cuda:
                    torch.cuda.reset_peak_memory_stats()
                generate()

            turns = take_turns(turn, None if is_bare else scene.bare, rounds, scene.parts.device)
            return Row(
                name,
                scene.batch_size,
                turns.seconds,
                scene.batch_size / turns.seconds,
                turns.ratio,
                warm_up,
                torch.cuda.max_memory_allocated() if cuda else None,  # of the last turn, which was the way's
            )
    except torch.OutOfMemoryError:
        return Row(name, scene.batch_size, error=OUT_OF_MEMORY)


@contextmanager
def _bare(scene: _Scene) -> Generator[Step]:
    yield scene.bare


@contextmanager
def _bps(scene: _Scene, preset: str, *, first: bool) -> Generator[Step]:
    with torch.device(scene.parts.device):
        model = scene.parts.ready(make_bps(scene.parts.unet, scene.parts.factor, preset))
    pipe = scene.parts.pipeline((StableDiffusionPipeline, StableDiffusionXLPipeline))
    condition, plan = scene.parts.random(1, 1), SteeringPlan()

    def generate() -> None:
        if first:
            plan.clear()
        with attach(pipe, model, condition, plan=plan):
            pipe(**scene.inputs)

    yield generate


@contextmanager
def _controlnet(scene: _Scene) -> Generator[Step]:
    with torch.device(scene.parts.device):
        network = scene.parts.ready(make_controlnet(scene.parts.unet, scene.parts.factor))
    kinds = (StableDiffusionControlNetPipeline, StableDiffusionXLControlNetPipeline)
    pipe, picture = scene.parts.pipeline(kinds, controlnet=network), scene.parts.random(1, 3)
    yield lambda: pipe(**scene.inputs, image=picture)


@contextmanager
def _t2i_adapter(scene: _Scene) -> Generator[Step]:
    with torch.device(scene.parts.device):
        network = scene.parts.ready(make_t2i_adapter(scene.parts.unet, scene.parts.factor, scene.parts.shape))
    kinds = (StableDiffusionAdapterPipeline, StableDiffusionXLAdapterPipeline)
    pipe, picture = scene.parts.pipeline(kinds, adapter=network), scene.parts.random(1, 1)
    inputs = {**scene.inputs, "image": picture.expand(scene.batch_size, -1, -1, -1)}

    def generate() -> None:
        if scene.parts.shape == "sdxl":
            pipe(**inputs)
        else:  # whose pipeline would make NumPy arrays of the pictures, on the CPU
            latents = pipe(**inputs | {"output_type": "latent"}).images
            pipe.vae.decode(latents / pipe.vae.config.scaling_factor)

    yield generate


WAYS: dict[str, Callable[[_Scene], AbstractContextManager[Step]]] = {
    BARE: _bare,
    "BPS paper, first picture": partial(_bps, preset="paper", first=True),
    "BPS paper, further picture": partial(_bps, preset="paper", first=False),
    "BPS lite, first picture": partial(_bps, preset="lite", first=True),
    "BPS lite, further picture": partial(_bps, preset="lite", first=False),
    "ControlNet": _controlnet,
    "T2I-Adapter": _t2i_adapter,
}
"""The ways by name, the baseline first; each builds its networks, and what it opens lets go of them."""

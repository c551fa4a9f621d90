"""What steering a large transformer costs, counted at its true shape without its weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import diffusers
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from powersteer.adapters.bps.transformer import BPSTransformerModel
from powersteer.apps.bench.turns import chosen
from powersteer.backbones.transformer import TransformerBackbone

_DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Base:
    """A released transformer's shape."""

    transformer: Callable[[], nn.Module]
    tokens: int
    """Tokens of a prompt, at the pipeline's default length."""
    pixels: int = 16
    """Per token, along each side."""
    control_net: Callable[[], nn.Module] | None = None
    """Diffusers' class for the family, at a released shape."""


BASES: dict[str, Base] = {
    "Z-Image": Base(diffusers.ZImageTransformer2DModel, 128),
    "FLUX.1": Base(
        lambda: diffusers.FluxTransformer2DModel(guidance_embeds=True),
        512,
        control_net=lambda: diffusers.FluxControlNetModel(num_layers=5, num_single_layers=10, guidance_embeds=True),
    ),
    "FLUX.2 klein 4B": Base(
        lambda: diffusers.Flux2Transformer2DModel(
            num_layers=5, num_single_layers=20, num_attention_heads=24, joint_attention_dim=7680, guidance_embeds=False
        ),
        512,
    ),
    "Stable Diffusion 3.5 medium": Base(
        lambda: diffusers.SD3Transformer2DModel(
            num_layers=24,
            num_attention_heads=24,
            caption_projection_dim=1536,
            pos_embed_max_size=384,
            dual_attention_layers=tuple(range(13)),
            qk_norm="rms_norm",
        ),
        333,
        control_net=lambda: diffusers.SD3ControlNetModel(
            num_layers=12,
            num_attention_heads=24,
            caption_projection_dim=1536,
            pos_embed_max_size=384,
            pooled_projection_dim=2048,
            qk_norm="rms_norm",
        ),
    ),
    "Qwen-Image": Base(
        diffusers.QwenImageTransformer2DModel,
        128,
        control_net=lambda: diffusers.QwenImageControlNetModel(num_layers=5),
    ),
    "Sana 1.6B": Base(
        diffusers.SanaTransformer2DModel,
        300,
        pixels=32,
        control_net=lambda: diffusers.SanaControlNetModel(num_layers=7),
    ),
    "PixArt-Σ": Base(
        lambda: diffusers.PixArtTransformer2DModel(
            caption_channels=4096, use_additional_conditions=False, interpolation_scale=2
        ),
        300,
    ),
}
"""Shapes as their makers released them."""


@dataclass(frozen=True)
class CostRow:
    """One base."""

    name: str
    base_parameters: int
    parameters: int
    """The steering network's."""
    parameter_share: float
    base_operations: int
    """Multiplications and additions of a step for one picture, without guidance."""
    cold_share: float
    """Operations of the network and its heads, over the base's."""
    warm_share: float
    """The same of the heads alone, where a plan has the features."""
    plan_bytes: int
    """What a plan keeps a step, in half precision."""
    control_net_parameters: int | None


@dataclass(frozen=True)
class CostBench:
    """The rows, and what they are of."""

    pixels: int
    preset: str
    rows: list[CostRow]

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


@torch.no_grad()
def bench_cost(
    pixels: int = 1024,
    preset: str = "paper",
    only: Sequence[str] = (),
    on_row: Callable[[CostBench], None] = lambda _: None,
) -> CostBench:
    """Count parameters, operations of a step and bytes of a plan, with tensors that have shapes but no values.

    Args:
        pixels: Side of the picture.
        preset: The steering network's: ``paper`` or ``lite``.
        only: Names of `BASES`; all if empty. See `powersteer.apps.bench.turns.chosen`.
        on_row: Called with the rows so far whenever one is done.

    Raises:
        PowersteerError: No base has such a name.
    """
    names = chosen(list(BASES), only, baseline=False)
    result = CostBench(pixels, preset, [])
    for name in names:
        result.rows.append(_row(name, BASES[name], pixels, preset))
        on_row(result)
    return result


def _row(name: str, base: Base, pixels: int, preset: str) -> CostRow:
    with torch.device("meta"):
        transformer: Any = nn.Module.to(base.transformer().eval(), _DTYPE)
        model: Any = nn.Module.to(
            BPSTransformerModel.from_transformer(transformer, pixel_unshuffle=base.pixels, preset=preset).eval(),
            _DTYPE,
        )
        control_net = None if base.control_net is None else _count(base.control_net())
        backbone, side = TransformerBackbone(transformer), pixels // base.pixels
        call = backbone.example(1, (side, side), base.tokens, _DTYPE)
        bare = _operations(lambda: transformer(**call))
        condition = torch.zeros(1, 1, pixels, pixels, dtype=_DTYPE)
        time = torch.zeros(1, model.config["time_embed_dim"], dtype=_DTYPE)
        trunk = _operations(lambda: model(condition, time))
        features = model(condition, time)
        heads = _operations(
            lambda: [model.residual(place, features[model.stage_of(place)]) for place in range(len(model.heads))]
        )
    parameters, base_parameters = _count(model), _count(transformer)
    return CostRow(
        name,
        base_parameters,
        parameters,
        parameters / base_parameters,
        bare,
        (trunk + heads) / bare,
        heads / bare,
        sum(one.nbytes for one in features),
        control_net,
    )


def _operations(run: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())

"""One protocol for every control network: training, evaluation and comparison know no other.

with attach(unet, network, condition):
    unet(noisy, timesteps, **inputs)  # the posterior's denoiser, whichever network it is
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import ControlNetModel, ControlNetXSAdapter, UNet2DConditionModel

from powersteer.adapters.baselines import (
    Baseline,
    ZeroStartT2IAdapter,
    base_widths,
    condition_channels,
    condition_factor,
    hook_up,
    make_controlnet,
    make_controlnet_xs,
    make_t2i_adapter,
)
from powersteer.adapters.bps.ablations import (
    ABLATIONS,
    NO_LATENTS,
    AddedOnce,
    ConditionalHalf,
    WithoutLatents,
    last_layers,
)
from powersteer.adapters.bps.model import BPSModel
from powersteer.adapters.steering import check_fits, steer
from powersteer.backbones.fingerprint import describe, differences, fingerprint
from powersteer.backbones.load import load_saved
from powersteer.conditions import to_condition
from powersteer.conditions.kinds import BLIND
from powersteer.core.errors import PowersteerError
from powersteer.core.records import BASELINE_RECORD

Adapter = BPSModel | Baseline
"""What can be trained: `BPSModel`, or one of the baselines."""

BASELINES = ("controlnet", "controlnet-xs", "t2i-adapter")
"""Names of the baselines; ``paper`` and ``lite`` are BPS."""

_CLASSES: dict[str, type[Adapter]] = {
    "BPSModel": BPSModel,
    "ControlNetModel": ControlNetModel,
    "WithoutLatents": WithoutLatents,
    "ControlNetXSAdapter": ControlNetXSAdapter,
    "ZeroStartT2IAdapter": ZeroStartT2IAdapter,
    **{kind.__name__: kind for kind in ABLATIONS.values()},
}


def make_adapter(
    unet: UNet2DConditionModel,
    *,
    preset: str = "paper",
    conditioning_channels: int = 1,
    pixel_unshuffle: int = 8,
    prediction_type: str | None = None,
    conditioning: Mapping[str, Any] | None = None,
    ablation: str | None = None,
    **bps: Any,
) -> Adapter:
    """An untrained network for ``unet``; within `attach` it is exactly the prior.

    Args:
        unet: The U-Net it will be attached to.
        preset: ``paper``, ``lite``, ``controlnet``, ``controlnet-xs`` or ``t2i-adapter``.
        conditioning_channels: Channels of the condition.
        pixel_unshuffle: The VAE's scale factor.
        prediction_type: The scheduler's, recorded with the base.
        conditioning: What the condition is; recorded, too.
        ablation: BPS or ControlNet without something, or any network without its condition; see
            `powersteer.adapters.bps.ablations`.
        **bps: Further arguments of `BPSModel.from_unet`, which the baselines have no use for.

    Raises:
        ValueError: ``preset`` or ``weights`` is unknown.
        PowersteerError: The baseline knows no such U-Net.
    """
    if ablation == BLIND:
        conditioning = {**(conditioning or {}), BLIND: True}
    if preset in BASELINES:
        kind = WithoutLatents if ablation == NO_LATENTS else ControlNetModel
        network = _make_baseline(unet, preset, pixel_unshuffle, conditioning_channels, kind)
        known = {"base": fingerprint(unet, prediction_type), "conditioning": conditioning}
        network.register_to_config(**{BASELINE_RECORD: known})
        return network
    shape: Any = {"preset": preset, "pixel_unshuffle": pixel_unshuffle, "prediction_type": prediction_type, **bps}
    kind = BPSModel if ablation in (None, BLIND) else ABLATIONS[ablation]
    return kind.from_unet(unet, conditioning_channels=conditioning_channels, conditioning=conditioning, **shape)


def _make_baseline(unet: Any, name: str, factor: int, channels: int, controlnet: type[ControlNetModel]) -> Baseline:
    if name == "controlnet":
        return make_controlnet(unet, factor, controlnet)
    if name == "controlnet-xs":
        return make_controlnet_xs(unet, factor)
    return make_t2i_adapter(unet, factor, channels)


def load_network(name_or_path: str | Path) -> Adapter:
    """A trained network of any kind; see `powersteer.backbones.load.load_adapter` for the names.

    Raises:
        PowersteerError: There is no such network, or it is incomplete, damaged or not finite.
    """
    return load_saved(str(name_or_path), _CLASSES)


def record_of(network: Adapter) -> Mapping[str, Any]:
    """``base`` and ``conditioning``: what a network was trained on, as far as it is known."""
    return network.config if isinstance(network, BPSModel) else network.config.get(BASELINE_RECORD) or {}


def channels_of(network: Adapter) -> int:
    """Channels of the conditions that a network was trained on."""
    if isinstance(network, BPSModel):
        return network.config["conditioning_channels"]
    return (record_of(network).get("conditioning") or {}).get("channels") or condition_channels(network)


def factor_of(network: Adapter) -> int:
    """Pixels of the condition a side of one latent."""
    return network.config["pixel_unshuffle"] if isinstance(network, BPSModel) else condition_factor(network)


def check_adapter(network: Adapter, pipe: Any) -> None:
    """Refuse a network that was made for another base.

    Args:
        network: The network.
        pipe: The pipeline, or the bare U-Net.

    Raises:
        PowersteerError: Block widths differ, or text width or prediction type, where they are known; for BPS, see
            `powersteer.adapters.steering.check_fits`.
    """
    if isinstance(network, BPSModel):
        check_fits(network, pipe)
        return
    scheduler = getattr(pipe, "scheduler", None)
    given = fingerprint(getattr(pipe, "unet", pipe), None if scheduler is None else scheduler.config["prediction_type"])
    made_for = {"block_out_channels": base_widths(network), **(record_of(network).get("base") or {})}
    if differences(made_for, given):
        raise PowersteerError(
            f"the {type(network).__name__} was made for {describe(made_for)}; this is {describe(given)}: load the base "
            "it was trained on"
        )


def save_activation_memory(network: Any) -> None:
    """Gradient checkpointing, in the networks that know it."""
    if network._supports_gradient_checkpointing:
        network.enable_gradient_checkpointing()


@contextmanager
def attach(unet: UNet2DConditionModel, network: Adapter, condition: torch.Tensor) -> Generator[None]:
    """Within the block, ``unet`` denoises under the condition; afterwards it is as it was.

    Args:
        unet: The frozen U-Net.
        network: The network, made for it.
        condition: (N, C, H, W) in [0, 1]: N is 1, the U-Net's batch, or half of it (the two halves of classifier-free
            guidance). One channel serves as three where a network reads three.

    Raises:
        PowersteerError: The network does not fit the U-Net, the condition is malformed, or (within the block) the
            number of conditions or their size does not fit the batch.
    """
    if isinstance(network, BPSModel):
        layers = last_layers if isinstance(network, AddedOnce) else None
        both = not isinstance(network, ConditionalHalf)
        with steer(unet, network, condition, plan=None, layers=layers, steer_unconditional=both):
            yield
        return
    check_adapter(network, unet)
    channels = condition_channels(network)
    if channels == 3 and condition.ndim == 4 and condition.shape[1] == 1:
        condition = condition.expand(-1, 3, -1, -1)
    if (record_of(network).get("conditioning") or {}).get(BLIND):
        condition = torch.zeros_like(condition)
    parameter = next(network.parameters())
    checked = to_condition(condition, channels).to(device=parameter.device, dtype=parameter.dtype)

    def rows(batch: int) -> torch.Tensor:
        count = len(checked)
        if count not in (1, batch) and 2 * count != batch:
            raise PowersteerError(f"{count} conditions for a U-Net batch of {batch}: give 1, {batch}, or half as many")
        return checked.repeat(batch // count, 1, 1, 1)

    def check_size(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        sample = args[0] if args else kwargs["sample"]
        height, width = (condition_factor(network) * side for side in sample.shape[-2:])
        if tuple(checked.shape[-2:]) != (height, width):
            raise PowersteerError(
                f"the condition is {checked.shape[-2]}×{checked.shape[-1]} pixels, the picture {height}×{width}: "
                "resize the condition"
            )

    with ExitStack() as hooks:
        hooks.enter_context(unet.register_forward_pre_hook(check_size, with_kwargs=True))
        for handle in hook_up(unet, network, rows):
            hooks.enter_context(handle)
        yield

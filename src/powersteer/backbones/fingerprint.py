"""What an adapter must know about the base it was trained on, to refuse another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_FAMILIES = {
    ((320, 640, 1280, 1280), 768): "Stable Diffusion 1.x",
    ((320, 640, 1280, 1280), 1024): "Stable Diffusion 2.x",
    ((320, 640, 1280), 2048): "Stable Diffusion XL",
    ((384, 768, 1536, 1536), 1280): "Stable Diffusion XL refiner",
    ((64, 128, 160), 192): "powersteer-tiny",
}


FLOW = "flow_prediction"


def predicted_by(scheduler: Any) -> str | None:
    """What a base's denoiser predicts: ``epsilon``, ``v_prediction``, ``sample`` or ``flow_prediction``.

    Args:
        scheduler: The base's scheduler, of diffusers, or what its ``scheduler_config.json`` holds.
    """
    read = isinstance(scheduler, Mapping)
    config: Mapping[str, Any] = scheduler if read else scheduler.config
    name = str(config.get("_class_name")) if read else type(scheduler).__name__
    return FLOW if name.startswith("FlowMatch") else config.get("prediction_type")


def fingerprint(unet: Any, prediction_type: str | None = None) -> dict[str, Any]:
    """Family, block widths, cross-attention width and prediction type (where known) of a base.

    Args:
        unet: A `UNet2DConditionModel`.
        prediction_type: Its scheduler's: see `predicted_by`.
    """
    widths = tuple(unet.config["block_out_channels"])
    cross_attention = unet.config["cross_attention_dim"]
    width = cross_attention if isinstance(cross_attention, int) else max(cross_attention)
    return {
        "family": _FAMILIES.get((widths, width), "unknown"),
        "block_out_channels": list(widths),
        "cross_attention_dim": width,
        "prediction_type": prediction_type,
    }


def differences(made_for: Mapping[str, Any], given: Mapping[str, Any]) -> list[str]:
    """The keys in which two fingerprints disagree; what one of them does not know is no disagreement."""
    keys = ("family", "block_out_channels", "cross_attention_dim", "prediction_type")
    known = [key for key in keys if all(one.get(key) not in (None, "unknown") for one in (made_for, given))]
    return [key for key in known if _plain(made_for[key]) != _plain(given[key])]


def describe(base: Mapping[str, Any]) -> str:
    """A base in a few words."""
    widths = "-".join(str(width) for width in base["block_out_channels"])
    name = "a U-Net" if base.get("family") in (None, "unknown") else f"{base['family']}"
    text, prediction = base.get("cross_attention_dim"), base.get("prediction_type") or "ε or v"
    return f"{name} (widths {widths}, {'' if text is None else f'text width {text}, '}{prediction})"


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else value

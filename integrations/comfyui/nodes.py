"""The nodes: what they take and give. `steering` has the logic."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image

import powersteer.conditions.extractors.catalogue  # noqa: F401  (registers the extractors)
from powersteer import BPSModel, load_adapter
from powersteer.conditions.extractor import EXTRACTORS, Subject

from .steering import steered

CATEGORY = "powersteer"
ADAPTER = "POWERSTEER_ADAPTER"
SHARE = {"default": 0.0, "min": 0.0, "max": 1.0, "step": 0.01}
NEED_MORE = ("drawn", "labels", "boxes", "npy", "model")
"""Extractors that need more than a picture, or settings."""


class LoadAdapter:
    """An adapter by name: ``sketch``, a folder, or ``user/name`` on the Hub."""

    CATEGORY, FUNCTION, RETURN_TYPES, RETURN_NAMES = CATEGORY, "load", (ADAPTER,), ("adapter",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """As ComfyUI asks for them."""
        return {"required": {"name": ("STRING", {"default": "sketch"})}}

    def load(self, name: str) -> tuple[BPSModel]:
        """Load it."""
        return (load_adapter(name.strip()),)


class ApplySteering:
    """The model, denoising under a condition image."""

    CATEGORY, FUNCTION, RETURN_TYPES = CATEGORY, "apply", ("MODEL",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """As ComfyUI asks for them."""
        return {
            "required": {
                "model": ("MODEL",),
                "adapter": (ADAPTER,),
                "image": ("IMAGE",),
                "strength": ("FLOAT", {"default": 1.0, "min": 0.0, "max": 5.0, "step": 0.05}),
                "start_percent": ("FLOAT", SHARE),
                "end_percent": ("FLOAT", SHARE | {"default": 1.0}),
                "steer_negative": ("BOOLEAN", {"default": True}),
            }
        }

    def apply(
        self,
        model: Any,
        adapter: BPSModel,
        image: torch.Tensor,
        strength: float,
        start_percent: float,
        end_percent: float,
        steer_negative: bool,
    ) -> tuple[Any]:
        """Clone the model and steer the clone."""
        made = steered(model, adapter, image, strength, start_percent, end_percent, steer_unconditional=steer_negative)
        return (made,)


class ExtractCondition:
    """A condition of each picture, by powersteer's extractors."""

    CATEGORY, FUNCTION, RETURN_TYPES = CATEGORY, "extract", ("IMAGE",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """As ComfyUI asks for them."""
        names = [f"{one.task}: {one.name}" for one in EXTRACTORS.known.values() if one.name not in NEED_MORE]
        return {"required": {"image": ("IMAGE",), "extractor": (names,)}}

    def extract(self, image: torch.Tensor, extractor: str) -> tuple[torch.Tensor]:
        """Light lines on black, or colours: (N, height, width, 3 or 4) in [0, 1]."""
        task, _, name = extractor.partition(": ")
        build: Any = EXTRACTORS.find(task, name).build  # type: ignore[arg-type]
        extract = build()
        made: list[torch.Tensor] = []
        for picture in image[..., :3]:
            pixels = (picture.clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()
            condition = extract(Subject(Image.fromarray(pixels)))
            mode = "RGBA" if condition.mode == "RGBA" else "RGB"
            made.append(torch.from_numpy(np.asarray(condition.convert(mode), dtype=np.float32) / 255))
        return (torch.stack(made),)


NODE_CLASS_MAPPINGS = {
    "PowersteerLoadAdapter": LoadAdapter,
    "PowersteerApplySteering": ApplySteering,
    "PowersteerExtractCondition": ExtractCondition,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "PowersteerLoadAdapter": "Load Powersteer Adapter",
    "PowersteerApplySteering": "Apply Steering",
    "PowersteerExtractCondition": "Extract Condition",
}

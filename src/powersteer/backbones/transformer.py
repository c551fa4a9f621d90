"""Diffusion transformers of diffusers, told apart by one table.

A family of the table costs one row: where its blocks are, where image tokens lie in what they give, which modules make
features of the time alone, and how its latents are packed.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from powersteer.backbones.protocol import Backbone, Call, Place
from powersteer.core.errors import PowersteerError


@dataclass(frozen=True)
class Blocks:
    """A list of blocks, and where image tokens lie in what each gives."""

    name: str
    """Attribute of the transformer."""
    index: int | None = None
    """Position of the image's stream in a tuple; None where a block gives one tensor."""
    after_text: bool = False
    """Whether the text's tokens come before the image's in that tensor."""


@dataclass(frozen=True)
class Family:
    """A row of the table."""

    title: str
    blocks: tuple[Blocks, ...]
    time: tuple[str, ...]
    """Modules that make features of the timestep alone, in order."""
    time_scale: float = 1.0
    """What the first of them is given, as a multiple of the timestep argument."""
    to_schedule: float = 1.0
    """A scheduler's timestep, of 1000, as a multiple of the timestep argument."""
    sample: str = "hidden_states"
    timestep: str = "timestep"
    text: str = "encoder_hidden_states"
    packed: bool = False
    """Whether the pipeline makes tokens of the latents, 2×2 each; else the transformer does."""
    unconditional_last: bool = False
    """Whether the unconditional half of a guided batch comes second."""
    reversed_time: bool = False
    """Whether the timestep argument counts from noise (0) to picture (1)."""


_TEXT_WIDTHS = ("joint_attention_dim", "caption_channels", "cap_feat_dim")
"""What configurations call the width of text states."""
_BOTH = ("time_text_embed.time_proj", "time_text_embed.timestep_embedder")
FAMILIES = {
    "SD3Transformer2DModel": Family("Stable Diffusion 3", (Blocks("transformer_blocks", 1),), _BOTH),
    "FluxTransformer2DModel": Family(
        "FLUX.1",
        (Blocks("transformer_blocks", 1), Blocks("single_transformer_blocks", 1)),
        _BOTH,
        time_scale=1000.0,
        to_schedule=1000.0,
        packed=True,
    ),
    "Flux2Transformer2DModel": Family(
        "FLUX.2",
        (Blocks("transformer_blocks", 1), Blocks("single_transformer_blocks", after_text=True)),
        ("time_guidance_embed.time_proj", "time_guidance_embed.timestep_embedder"),
        time_scale=1000.0,
        to_schedule=1000.0,
        packed=True,
    ),
    "QwenImageTransformer2DModel": Family(
        "Qwen-Image", (Blocks("transformer_blocks", 1),), _BOTH, to_schedule=1000.0, packed=True
    ),
    "ZImageTransformer2DModel": Family(
        "Z-Image",
        (Blocks("noise_refiner"), Blocks("layers")),
        ("t_embedder",),
        time_scale=1000.0,
        to_schedule=1000.0,
        sample="x",
        timestep="t",
        text="cap_feats",
        unconditional_last=True,
        reversed_time=True,
    ),
    "SanaTransformer2DModel": Family(
        "Sana",
        (Blocks("transformer_blocks"),),
        ("time_embed.emb.time_proj", "time_embed.emb.timestep_embedder"),
    ),
    "PixArtTransformer2DModel": Family(
        "PixArt",
        (Blocks("transformer_blocks"),),
        ("adaln_single.emb.time_proj", "adaln_single.emb.timestep_embedder"),
    ),
}
"""By diffusers' class."""


class TransformerBackbone(Backbone):
    """A transformer of the table."""

    has_places = True

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.family = FAMILIES[type(module).__name__]
        self.arguments = tuple(inspect.signature(type(module).forward).parameters)[1:]
        self.sample, self.timestep = self.family.sample, self.family.timestep
        self._stacked: tuple[Call, torch.Tensor] | None = None
        self._read: tuple[torch.Tensor, int, tuple[int, int]] | None = None
        """Positions that were read off the device, their version, and the grid that they tell."""

    @classmethod
    def fits(cls, module: nn.Module) -> bool:
        """Whether the table has its class."""
        return type(module).__name__ in FAMILIES

    def sites(self) -> list[tuple[int, nn.Module]]:
        """Every block, by depth."""
        blocks = (block for of in self.family.blocks for block in getattr(self.module, of.name))
        return list(enumerate(blocks))

    def places(self, call: Call, count: int) -> Mapping[nn.Module, Place]:
        """Where a block's image tokens are.

        Raises:
            PowersteerError: A cache skips blocks, and what is added to them.
        """
        if getattr(self.module, "is_cache_enabled", False):
            raise PowersteerError(
                "the transformer has a cache that skips blocks, and what steers them: call its disable_cache() first"
            )
        found: dict[nn.Module, Place] = {}
        for of in self.family.blocks:
            place = Place(of.index, call.get(self.family.text).shape[1] if of.after_text else 0, count)
            found |= dict.fromkeys(getattr(self.module, of.name), place)
        return found

    def samples(self, call: Call) -> torch.Tensor:
        """(B, C, h, w), or (B, tokens, C) where the pipeline packs them."""
        given = call.get(self.sample)
        if not isinstance(given, list):
            return given
        if self._stacked is None or self._stacked[0] is not call:
            self._stacked = call, torch.stack(list(given)).squeeze(2)
        return self._stacked[1]

    def grid(self, call: Call) -> tuple[int, int]:
        """Height and width in tokens."""
        if not self.family.packed:
            patch = self._patch
            height, width = self.samples(call).shape[-2:]
            return height // patch, width // patch
        if "img_shapes" in self.arguments:
            return tuple(call.get("img_shapes")[0][0][-2:])
        ids: torch.Tensor = call.get("img_ids")
        version = 0 if ids.is_inference() else ids._version
        if self._read is None or self._read[0] is not ids or self._read[1] != version:
            rows = ids[0] if ids.ndim == 3 else ids
            here = rows[rows[:, 0] == 0]  # reference pictures come later
            height, width = (int(one) + 1 for one in here[:, 1:3].amax(0).tolist())
            self._read = ids, version, (height, width)
        return self._read[2]

    def schedule_time(self, call: Call, variables: Mapping[str, Any] | None) -> Any:
        """The pipeline's own timestep, which lies on its schedule; without one, what the argument stands for."""
        given = None if variables is None else variables.get("t")
        if given is not None:
            return given
        value = call.get(self.timestep) * self.family.to_schedule
        return 1000.0 - value if self.family.reversed_time else value

    def guidance(self, call: Call, variables: Mapping[str, Any]) -> tuple[bool, bool | None]:
        """The table's order; and of two calls, the one whose text is the pipeline's negative one."""
        text = call.get(self.family.text)
        known = (variables.get("negative_prompt_embeds"), variables.get("prompt_embeds"))
        alone = next(
            (unconditional for one, unconditional in zip(known, (True, False), strict=True) if one is text), None
        )
        return self.family.unconditional_last, None if text is None else alone

    def time_embedding(self, call: Call, timestep: Any, rows: int) -> torch.Tensor:
        """Features of the time alone, before text or guidance join them: (rows, D)."""
        weight, sample = next(self.time_layers.parameters()), self.samples(call)
        device = sample.device if weight.is_meta else weight.device  # offloaded weights come with their own hooks
        dtype = weight.dtype if weight.is_floating_point() else sample.dtype  # quantised ones
        h = torch.as_tensor(timestep, device=device).flatten().float() * self.family.time_scale
        h = h.expand(rows) if len(h) == 1 else h[:rows]
        for name in self.family.time:
            part = self.module.get_submodule(name)
            h = part(h.to(dtype) if h.ndim > 1 else h)
        return h

    def example(self, batch: int, size: tuple[int, int], tokens: int, dtype: torch.dtype) -> dict[str, Any]:
        """All arguments of a call, of zeros; see `powersteer.backbones.protocol.PipelineBackbone.example`.

        Args:
            batch: Samples.
            size: Height and width in tokens.
            tokens: Of each prompt.
            dtype: Of latents and text.
        """
        config, family, (height, width) = self.module.config, self.family, size
        text = torch.zeros(batch, tokens, next(config[name] for name in _TEXT_WIDTHS if name in config), dtype=dtype)
        side = self._patch
        latents = torch.zeros(batch, config["in_channels"], side * height, side * width, dtype=dtype)
        given: dict[str, Any] = {
            family.sample: torch.zeros(batch, height * width, config["in_channels"], dtype=dtype)
            if family.packed
            else latents,
            family.timestep: torch.zeros(batch, dtype=dtype),
            family.text: text,
        }
        if family.sample == "x":  # lists of samples, with a frame axis
            given |= {"x": list(latents.unsqueeze(2).unbind()), family.text: list(text.unbind())}
        mask = torch.ones(batch, tokens, dtype=torch.long)
        ids = config.get("axes_dims_rope", ())
        grid = torch.stack(torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij"), -1).flatten(0, 1)
        grid = F.pad(grid, (1, max(0, len(ids) - 3))).to(dtype)
        further: dict[str, Any] = {
            "pooled_projections": lambda: torch.zeros(batch, config["pooled_projection_dim"], dtype=dtype),
            "guidance": lambda: torch.zeros(batch, dtype=dtype) if config.get("guidance_embeds") else None,
            "img_ids": lambda: grid,
            "txt_ids": lambda: torch.zeros(tokens, max(3, len(ids)), dtype=dtype),
            "img_shapes": lambda: [[(1, height, width)]] * batch,
            "encoder_hidden_states_mask": lambda: mask,
            "encoder_attention_mask": lambda: mask,
            "added_cond_kwargs": lambda: {"resolution": None, "aspect_ratio": None},
        }
        return given | {name: make() for name, make in further.items() if name in self.arguments}

    @property
    def time_layers(self) -> nn.Module:
        """The timestep embedder."""
        return self.module.get_submodule(self.family.time[-1])

    @property
    def time_width(self) -> int:
        """Width of `time_embedding`."""
        return [layer for layer in self.time_layers.modules() if isinstance(layer, nn.Linear)][-1].out_features

    @property
    def width(self) -> int:
        """Width of the blocks."""
        config = self.module.config
        return config.get("dim") or config["num_attention_heads"] * config["attention_head_dim"]

    @property
    def shape(self) -> tuple[list[int], list[int]]:
        """Width, and number of blocks."""
        return [self.width], [len(self.sites())]

    def fingerprint(self, prediction_type: str | None = None) -> dict[str, Any]:
        """Family, width, and prediction type."""
        return {
            "family": self.family.title,
            "block_out_channels": [self.width],
            "prediction_type": prediction_type,
        }

    @property
    def _patch(self) -> int:
        config = self.module.config
        return config["patch_size"] if "patch_size" in config else config["all_patch_size"][0]


def transformer_backbone(module: nn.Module) -> TransformerBackbone:
    """The backbone of a transformer.

    Raises:
        PowersteerError: The table has no such class.
    """
    if not TransformerBackbone.fits(module):
        raise PowersteerError(
            f"{type(module).__name__} is no transformer of the table, which has {', '.join(FAMILIES)}"
        )
    return TransformerBackbone(module)

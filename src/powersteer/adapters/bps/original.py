"""The authors' checkpoints → ours: names, and the architecture read off names and shapes."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from pydantic import Field

from powersteer.core.config import StrictConfig, build_config
from powersteer.core.errors import PowersteerError
from powersteer.core.files import is_file
from powersteer.core.weights import MOST, check_finite, read_tensors, shown, unpickle

logger = logging.getLogger(__name__)

_TIME_BLOCK = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_LIGHT_BLOCK = {"out_layers.0": "norm", "out_layers.3": "conv", "skip_connection": "conv_shortcut"}
_ATTENTION = {"norm": "norm", "qkv": "to_qkv", "proj_out": "to_out"}
_BLOCKS = ("input_blocks", "zero_blocks", "middle_block", "output_blocks")
_ROOMS = (*_BLOCKS, "res_weights")
_NUMBERED = re.compile(rf"(?:{'|'.join(_BLOCKS)})\.\d{{1,3}}\..+|res_weights\.\d{{1,3}}")
"""Names in their rooms; no network has a thousand blocks."""


class _Told(StrictConfig):
    """What shapes do not tell."""

    conditioning_channels: int = Field(ge=1, le=MOST)
    unshuffle: int = Field(ge=1, le=64)
    attention_head_dim: int = Field(ge=1, le=MOST)
    norm_num_groups: int = Field(ge=1, le=MOST)


def load_original(
    source: str | PathLike[str] | Mapping[str, torch.Tensor],
    *,
    conditioning_channels: int,
    unshuffle: int = 8,
    attention_head_dim: int = 64,
    norm_num_groups: int = 32,
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Read the authors' network: the arguments of `BPSModel`, and its weights under our names.

    Args:
        source: A state dict, or a Lightning ``.ckpt``, ``.pt`` or ``.safetensors`` file; the whole model or the network
            alone, under any prefix. Pickles are read with ``weights_only=True``.
        conditioning_channels: Channels of the condition image, before it is unshuffled.
        unshuffle: Pixels of the condition a side of one latent; 1 for feature maps at latent resolution.
        attention_head_dim: Head width of the self-attention, where the network has any (SDXL).
        norm_num_groups: Groups of every GroupNorm; shapes do not tell.

    Raises:
        PowersteerError: The file cannot be read safely, holds no such network, or one that is not finite, or reads
            other channels; or a number is out of range.
    """
    told = {"conditioning_channels": conditioning_channels, "unshuffle": unshuffle}
    told |= {"attention_head_dim": attention_head_dim, "norm_num_groups": norm_num_groups}
    build_config(told, _Told, where="the checkpoint's shape")
    state = _network(_read(source), _name(source))
    blocks = _Blocks(state, _name(source))
    read = blocks.shape_of("input_blocks.0.weight", 4)[1]
    if read != conditioning_channels * unshuffle**2:
        raise PowersteerError(
            f"{_name(source)} reads {read} channels after unshuffling; {conditioning_channels} conditioning channels "
            f"unshuffled by {unshuffle} are {conditioning_channels * unshuffle**2}"
        )
    renamed, unused = blocks.rename()
    if unused:
        count = sum(state[name].numel() for name in unused)
        rooms = sorted({".".join(name.split(".")[:2]) for name in unused}, key=_natural)
        logger.warning(
            "dropped %d weights (%.1f M parameters) that the method never uses: %s",
            len(unused),
            count / 1e6,
            ", ".join(shown(room) for room in rooms),
        )
    per_level = [blocks.weight(positions[0]) for positions in blocks.levels]
    shape = {
        "conditioning_channels": conditioning_channels,
        "pixel_unshuffle": unshuffle,
        "block_out_channels": tuple(blocks.width(positions[-1]) for positions in blocks.levels),
        "layers_per_block": tuple(len(positions) for positions in blocks.levels),
        "time_embed_dim": blocks.shape_of(f"input_blocks.{blocks.levels[0][0]}.emb_layers.1.weight", 2)[1],
        "norm_num_groups": norm_num_groups,
        "attention_head_dim": attention_head_dim if blocks.has_attention else None,
        "down_weights": tuple(per_level),
        "mid_weight": blocks.weight(blocks.last_weight),
        "up_weight": 1.0,
    }
    return shape, renamed


class _Blocks:
    """The authors' numbering of blocks, read off the names below ``control_model.``."""

    def __init__(self, state: Mapping[str, torch.Tensor], source: str) -> None:
        self.state, self.source = state, source
        self.layout: dict[str, str] = {}
        for name in state:
            other = self.layout.setdefault(_flat(name), name)
            if other != name:
                raise PowersteerError(f"{source}: '{shown(other)}' and '{shown(name)}' are one weight: keep one")
        count = 1 + self.last(r"input_blocks\.(\d+)\.")
        strided = set(_indices(self.layout, r"input_blocks\.(\d+)\.op\."))
        self.has_attention = any(".qkv." in name for name in self.layout)
        self.strided = sorted(strided)
        self.levels: list[list[int]] = [[]]
        for position in range(1, count):
            if position in strided:
                self.levels.append([])
            else:
                self.levels[-1].append(position)
        self.last_weight = self.last(r"res_weights\.(\d+)")
        self.last_output = self.last(r"zero_blocks\.(\d+)\.")
        """The positions of TP's weight and output, which come last in their rooms."""
        if not all(self.levels) or 0 in strided:
            raise PowersteerError(f"{source}: a level without a ResBlock; this is no BPS network")

    def last(self, pattern: str) -> int:
        """The largest index of a room."""
        return max(_indices(self.layout, pattern))  # `_network` saw to it that there is one

    def shape_of(self, flat: str, sides: int) -> torch.Size:
        """The shape of a weight that must be there, with so many sides."""
        if flat not in self.layout:
            raise PowersteerError(f"{self.source} has no {flat}: it is incomplete, or no BPS network")
        shape = self.state[self.layout[flat]].shape
        if len(shape) != sides:
            raise PowersteerError(f"{self.source}: {flat} has the shape {tuple(shape)}: this is no BPS network")
        return shape

    def width(self, position: int) -> int:
        """The width of the ResBlock at ``position``, in channels."""
        return self.shape_of(f"input_blocks.{position}.in_layers.2.weight", 4)[0]

    def weight(self, position: int) -> float:
        """The integration weight at ``position``."""
        self.shape_of(f"res_weights.{position}", 0)
        return self.state[self.layout[f"res_weights.{position}"]].float().item()

    def rename(self) -> tuple[dict[str, torch.Tensor], list[str]]:
        """Weights under our names, and the names of those never used."""
        block_of = {position: i for i, position in enumerate(p for level in self.levels for p in level)}
        upsamplers = sorted(set(_indices(self.layout, r"output_blocks\.(\d+)\.2\.")))
        renamed: dict[str, torch.Tensor] = {}
        unused: list[str] = []
        for flat, name in self.layout.items():
            ours = self._ours(flat, block_of, upsamplers)
            if ours is not None:
                tensor = self.state[name]
                if ours in renamed:
                    raise PowersteerError(f"{self.source}: '{shown(name)}' is there twice: this is no BPS network")
                conv1d = flat.endswith(("qkv.weight", "proj_out.weight")) and tensor.ndim == 3
                renamed[ours] = tensor[..., None] if conv1d else tensor
            elif not flat.startswith("res_weights.") or int(flat.split(".")[1]) not in {*block_of, self.last_weight}:
                unused.append(name)
        foot = 1 + self.last(r"output_blocks\.(\d+)\.")
        weights = [*(self.weight(position) for position in block_of), self.weight(self.last_weight), *[1.0] * foot]
        return renamed | {"weights": torch.tensor(weights)}, unused

    def _ours(self, flat: str, block_of: Mapping[int, int], upsamplers: list[int]) -> str | None:
        """Our name of a weight; None for what is never used."""
        room, _, rest = flat.partition(".")
        if room not in _BLOCKS:
            return None
        index_text, _, inner = rest.partition(".")
        index, (layer, _, kind) = int(index_text), inner.rpartition(".")
        if room == "zero_blocks":
            if index == self.last_output:
                return f"mid_output.{kind}"
            return f"down_outputs.{block_of[index]}.{kind}" if index in block_of else None
        if room == "input_blocks" and index == 0:
            return f"conv_in.{kind}"
        if room == "input_blocks" and index in self.strided:
            return f"downsamplers.{self.strided.index(index)}.{kind}"
        if room == "input_blocks":
            if layer in _ATTENTION:
                return f"down_attentions.{block_of[index]}.{_ATTENTION[layer]}.{kind}"
            return self._known(f"down_blocks.{block_of[index]}", _TIME_BLOCK, layer, kind)
        if room == "middle_block":
            if layer in _ATTENTION:
                return f"mid_attention.{_ATTENTION[layer]}.{kind}"
            return self._known(f"mid_blocks.{min(index, 1)}", _TIME_BLOCK, layer, kind)
        part, _, layer = layer.partition(".")
        if part == "0":
            return self._known(f"up_blocks.{index}", _LIGHT_BLOCK, layer, kind)
        if part == "1":
            return f"up_outputs.{index}.{kind}"
        return f"upsamplers.{upsamplers.index(index)}.{kind}" if part == "2" else None

    @staticmethod
    def _known(block: str, names: Mapping[str, str], layer: str, kind: str) -> str | None:
        return f"{block}.{names[layer]}.{kind}" if layer in names else None


def _read(source: str | PathLike[str] | Mapping[str, Any]) -> Mapping[str, Any]:
    if isinstance(source, Mapping):
        return source
    path = Path(source)
    if not is_file(path):
        raise PowersteerError(f"{path} is no file: give a .ckpt, .pt or .safetensors of the authors' network")
    if path.suffix == ".safetensors":
        return read_tensors(path)
    state = unpickle(path)
    if not isinstance(state, Mapping):
        raise PowersteerError(f"{path} holds a {type(state).__name__}, not a state dict")
    return state


def _network(state: Mapping[str, Any], source: str) -> dict[str, torch.Tensor]:
    """The network's own weights, prefix removed."""
    inner = state.get("state_dict", state)
    if not isinstance(inner, Mapping):
        raise PowersteerError(f"{source}: its 'state_dict' is a {type(inner).__name__}, not tensors by name")
    tensors = {str(name): tensor for name, tensor in inner.items() if isinstance(tensor, torch.Tensor)}
    prefixes = {match[1] for name in tensors if (match := re.match(r"(.*?)zero_blocks\.\d+\.", name))}
    if not prefixes:
        hint = "; this is a ControlNet" if any("zero_convs." in name for name in tensors) else ""
        raise PowersteerError(f"{source} holds no BPS network (no 'zero_blocks' among its names){hint}")
    if len(prefixes) > 1:
        raise PowersteerError(f"{source} holds several BPS networks, under {', '.join(sorted(prefixes))}: keep one")
    prefix = prefixes.pop()
    network = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    missing = [room for room in _ROOMS if not any(name.startswith(f"{room}.") for name in network)]
    if missing:
        raise PowersteerError(f"{source} has no {missing[0]}.*: it is incomplete, or no BPS network")
    for name, tensor in network.items():
        if name.split(".")[0] in _ROOMS and not _NUMBERED.fullmatch(name):
            raise PowersteerError(f"{source}: '{shown(name)}' is no name of a BPS network")
        if not _is_plain(tensor):
            raise PowersteerError(f"{source}: '{shown(name)}' is no plain tensor of numbers: it is damaged, or forged")
    check_finite(network, source)
    return network


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether each of its numbers lies in the file, so that it takes no more room than the file."""
    if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized or not tensor.is_floating_point():
        return False
    return 0 < tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()


def _flat(name: str) -> str:
    """One spelling: a lone ResBlock, strided or output convolution loses the index of its container.

    Stable Diffusion's network has ``input_blocks.1.in_layers``, SDXL's ``input_blocks.1.0.in_layers`` and
    ``input_blocks.1.1.qkv``.
    """
    return re.sub(r"^((?:input_blocks|zero_blocks|res_weights)\.\d+)\.[01](?=\.|$)", r"\1", name)


def _indices(names: Iterable[str], pattern: str) -> list[int]:
    return [int(match[1]) for name in names if (match := re.match(pattern, name))]


def _natural(name: str) -> list[tuple[int, str]]:
    return [(len(part) if part.isdecimal() else 0, part) for part in name.split(".")]


def _name(source: str | PathLike[str] | Mapping[str, Any]) -> str:
    return "the state dict" if isinstance(source, Mapping) else str(source)

"""The names in the authors' checkpoints → ours."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch

_TIME_BLOCK = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_LIGHT_BLOCK = {"out_layers.0": "norm", "out_layers.3": "conv", "skip_connection": "conv_shortcut"}


def rename_original(state: Mapping[str, torch.Tensor], layers_per_block: Sequence[int]) -> dict[str, torch.Tensor]:
    """Rename the weights of the authors' network (LDM names, prefix removed) to `BPSModel`'s.

    Output convolutions that the method never uses (those of conv_in and of the stride-2 convolutions) are left out.

    Args:
        state: Names below ``control_model.``.
        layers_per_block: The network's ResBlocks at each level.
    """
    block_of: dict[int, int] = {}  # input block → ours
    downsampler_of: dict[int, int] = {}
    position = 1
    for level, depth in enumerate(layers_per_block):
        for _ in range(depth):
            block_of[position] = len(block_of)
            position += 1
        if level + 1 < len(layers_per_block):
            downsampler_of[position] = level
            position += 1
    upsamplers = sorted({int(name.split(".")[1]) for name in state if re.match(r"output_blocks\.\d+\.2\.", name)})

    renamed: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        room, _, rest = name.partition(".")
        index_text, _, inner = rest.partition(".")
        index = int(index_text)
        layer, _, kind = inner.rpartition(".")
        if room == "input_blocks" and index == 0:
            renamed[f"conv_in.{inner}"] = tensor
        elif room == "input_blocks" and index in downsampler_of:
            renamed[f"downsamplers.{downsampler_of[index]}.{kind}"] = tensor
        elif room == "input_blocks":
            renamed[f"down_blocks.{block_of[index]}.{_TIME_BLOCK[layer]}.{kind}"] = tensor
        elif room == "zero_blocks" and index in block_of:
            renamed[f"down_outputs.{block_of[index]}.{inner}"] = tensor
        elif room == "zero_blocks" and index == position:
            renamed[f"mid_output.{inner}"] = tensor
        elif room == "middle_block":
            renamed[f"mid_blocks.{index}.{_TIME_BLOCK[layer]}.{kind}"] = tensor
        elif room == "output_blocks":
            part, _, layer = layer.partition(".")
            if part == "0":
                renamed[f"up_blocks.{index}.{_LIGHT_BLOCK[layer]}.{kind}"] = tensor
            elif part == "1":
                renamed[f"up_outputs.{index}.{kind}"] = tensor
            else:
                renamed[f"upsamplers.{upsamplers.index(index)}.{kind}"] = tensor
    scalars = [state[f"res_weights.{i}"] for i in block_of]
    mid = state[f"res_weights.{sum(name.startswith('res_weights.') for name in state) - 1}"]
    foot = torch.ones(len({name.split(".")[1] for name in state if name.startswith("output_blocks.")}))
    renamed["weights"] = torch.cat([torch.stack(scalars), mid[None], foot.to(mid)])
    return renamed

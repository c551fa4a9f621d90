"""Small networks under the names of the authors' checkpoints."""

import torch

from conftest import randomise
from powersteer import BPSModel

TIME_BLOCK = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


LIGHT_BLOCK = {"norm": "out_layers.0", "conv": "out_layers.3", "conv_shortcut": "skip_connection"}


ATTENTION = {"norm": "norm", "to_qkv": "qkv", "to_out": "proj_out"}


VARIANTS = {
    "sketch": {"conditioning_channels": 1},
    "layout, uniform weights": {"conditioning_channels": 3, "down_weights": (1.0, 1.0), "mid_weight": 1.0},
    "style": {"conditioning_channels": 4},
    "style features": {"conditioning_channels": 24, "pixel_unshuffle": 1},
    "sdxl": {"conditioning_channels": 1, "attention_head_dim": 16},
    "three levels, uneven depths": {
        "conditioning_channels": 1,
        "block_out_channels": (32, 32, 96),
        "layers_per_block": (1, 3, 2),
        "down_weights": (5.0, 3.0, 2.0),
    },
}


def network(variant: str) -> BPSModel:
    shape = {
        "block_out_channels": (32, 64),
        "layers_per_block": (2, 2),
        "time_embed_dim": 48,
        "norm_num_groups": 16,
        "down_weights": (16.0, 8.0),
        "mid_weight": 12.0,
    }
    torch.manual_seed(0)
    return randomise(BPSModel(**(shape | VARIANTS[variant])))


def authors_names(model: BPSModel) -> dict[str, torch.Tensor]:
    """The inverse of the importer, written from the description of the authors' names."""
    own, state, sdxl = model.state_dict(), {}, bool(model.config["attention_head_dim"])

    def put(ours: str, theirs: str, names: dict[str, str] | None = None) -> None:
        for name, tensor in own.items():
            if name.startswith(ours + "."):
                layer, _, kind = name.removeprefix(ours + ".").rpartition(".")
                inner = f".{names[layer]}" if names else ""
                tensor = tensor[..., 0] if names is ATTENTION and tensor.ndim == 4 else tensor
                state[f"{theirs}{inner}.{kind}"] = tensor

    depths, block, position = model.config["layers_per_block"], 0, 0
    put("conv_in", "input_blocks.0.0" if sdxl else "input_blocks.0")
    weights = {0: torch.tensor(7.0)}
    unused = [0]
    for level, depth in enumerate(depths):
        for _ in range(depth):
            position += 1
            put(f"down_blocks.{block}", f"input_blocks.{position}" + ".0" * sdxl, TIME_BLOCK)
            put(f"down_attentions.{block}", f"input_blocks.{position}.1", ATTENTION)
            put(f"down_outputs.{block}", f"zero_blocks.{position}" + ".0" * sdxl)
            weights[position] = own["weights"][block]
            block += 1
        if level + 1 < len(depths):
            position += 1
            put(f"downsamplers.{level}", f"input_blocks.{position}" + ".0" * sdxl + ".op")
            weights[position] = torch.tensor(1.0)
            unused.append(position)
    put("mid_blocks.0", "middle_block.0", TIME_BLOCK)
    put("mid_blocks.1", f"middle_block.{2 if sdxl else 1}", TIME_BLOCK)
    put("mid_attention", "middle_block.1", ATTENTION)
    put("mid_output", f"zero_blocks.{position + 1}" + ".0" * sdxl)
    weights |= {position + 1: torch.tensor(1.0), position + 2: own["weights"][block]}
    for i in unused:
        state[f"zero_blocks.{i}" + ".0" * sdxl + ".weight"] = torch.randn(8, 8, 3, 3)
    state |= {f"res_weights.{i}": weight for i, weight in weights.items()}
    step = 0
    for level in reversed(range(len(depths))):
        for i in range(depths[level] + 1):
            put(f"up_blocks.{step}", f"output_blocks.{step}.0", LIGHT_BLOCK)
            put(f"up_outputs.{step}", f"output_blocks.{step}.1")
            if level > 0 and i == depths[level]:
                put(f"upsamplers.{len(depths) - 1 - level}", f"output_blocks.{step}.2.conv")
            step += 1
    return state

"""A pipeline's weights in one file, under LDM's names: as Stable Diffusion was first published, and is shared."""

import re

import torch
from safetensors.torch import save_file

UNET = "model.diffusion_model."
_UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_OPEN_CLIP = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "encoder.layers.": "transformer.resblocks.",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
    "final_layer_norm": "ln_final",
}


def ldm_state(pipe) -> dict[str, torch.Tensor]:
    """All of a pipeline's weights: OpenCLIP's names for the text encoders of 2.x (of gelu) and for XL's second one."""
    named = {UNET + name: tensor for name, tensor in ldm_unet(pipe.unet).items()}
    named |= {f"first_stage_model.{name}": tensor for name, tensor in ldm_vae(pipe.vae).items()}
    if getattr(pipe, "text_encoder_2", None) is not None:
        named |= clip(pipe.text_encoder, "conditioner.embedders.0.transformer.")
        named |= open_clip(pipe.text_encoder_2, "conditioner.embedders.1.model.")
    elif pipe.text_encoder.config.hidden_act == "gelu":
        named |= open_clip(pipe.text_encoder, "cond_stage_model.model.")
    else:
        named |= clip(pipe.text_encoder, "cond_stage_model.transformer.")
    return named


def save_ldm(pipe, file, **more: torch.Tensor):
    """Write the one file."""
    save_file({name: tensor.contiguous().clone() for name, tensor in (ldm_state(pipe) | more).items()}, file)
    return file


def ldm_unet(unet) -> dict[str, torch.Tensor]:
    """Blocks numbered in the order in which they run: each resnet with its attention, each change of size."""
    layers = unet.config.layers_per_block
    places: dict[str, str] = {}
    for level in range(len(unet.down_blocks)):
        first = 1 + level * (layers + 1)
        for i in range(layers):
            places[f"down_blocks.{level}.resnets.{i}"] = f"input_blocks.{first + i}.0"
            places[f"down_blocks.{level}.attentions.{i}"] = f"input_blocks.{first + i}.1"
        places[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{first + layers}.0.op"
    for level, block in enumerate(unet.up_blocks):
        first, attends = level * (layers + 1), hasattr(block, "attentions")
        for i in range(layers + 1):
            places[f"up_blocks.{level}.resnets.{i}"] = f"output_blocks.{first + i}.0"
            places[f"up_blocks.{level}.attentions.{i}"] = f"output_blocks.{first + i}.1"
        places[f"up_blocks.{level}.upsamplers.0.conv"] = f"output_blocks.{first + layers}.{1 + attends}.conv"
    for i, place in enumerate(("resnets.0", "attentions.0", "resnets.1")):
        places[f"mid_block.{place}"] = f"middle_block.{i}"
    return {_placed(name, places | _UNET_ENDS): tensor for name, tensor in unet.state_dict().items()}


def ldm_vae(vae) -> dict[str, torch.Tensor]:
    """The decoder's levels are numbered from the largest pictures, and attention is by 1×1 convolutions."""
    places: dict[str, str] = {}
    last = len(vae.config.block_out_channels) - 1
    for level in range(last + 1):
        for i in range(vae.config.layers_per_block + 1):
            places[f"encoder.down_blocks.{level}.resnets.{i}"] = f"encoder.down.{level}.block.{i}"
            places[f"decoder.up_blocks.{level}.resnets.{i}"] = f"decoder.up.{last - level}.block.{i}"
        places[f"encoder.down_blocks.{level}.downsamplers.0"] = f"encoder.down.{level}.downsample"
        places[f"decoder.up_blocks.{level}.upsamplers.0"] = f"decoder.up.{last - level}.upsample"
    for tower in ("encoder", "decoder"):
        places |= {f"{tower}.mid_block.resnets.{i}": f"{tower}.mid.block_{i + 1}" for i in range(2)}
        places |= {f"{tower}.mid_block.attentions.0": f"{tower}.mid.attn_1"}
        places |= {f"{tower}.conv_norm_out": f"{tower}.norm_out"}
    named = {}
    for name, tensor in vae.state_dict().items():
        new = _placed(name, places).replace("conv_shortcut", "nin_shortcut")
        if ".attn_1." in new:
            head, tail = new.split(".attn_1.")
            new = f"{head}.attn_1.{_placed(tail, _ATTENTION)}"
            tensor = tensor[:, :, None, None] if tensor.ndim == 2 else tensor
        named[new] = tensor
    return named


def clip(encoder, prefix: str) -> dict[str, torch.Tensor]:
    """The names of transformers before its fifth version."""
    return {
        f"{prefix}text_model.{name.removeprefix('text_model.')}": tensor
        for name, tensor in encoder.state_dict().items()
    }


def open_clip(encoder, prefix: str) -> dict[str, torch.Tensor]:
    """Query, key and value are one matrix; the projection is transposed."""
    named, parts = {}, {}
    for name, tensor in encoder.state_dict().items():
        if name == "text_projection.weight":
            named[f"{prefix}text_projection"] = tensor.T
            continue
        new = name.removeprefix("text_model.")
        for ours, theirs in _OPEN_CLIP.items():
            new = new.replace(ours, theirs)
        found = re.fullmatch(r"(.*)self_attn\.([qkv])_proj\.(weight|bias)", new)
        if found:
            parts.setdefault(f"{prefix}{found[1]}attn.in_proj_{found[3]}", {})[found[2]] = tensor
        else:
            named[prefix + new] = tensor
    return named | {name: torch.cat([three[part] for part in "qkv"]) for name, three in parts.items()}


def _placed(name: str, places: dict[str, str]) -> str:
    """A name with its beginning exchanged, and a resnet's layers renamed."""
    for ours, theirs in places.items():
        if name.startswith(f"{ours}."):
            rest = name.removeprefix(f"{ours}.")
            if "resnets" in ours and "_block" in theirs:
                for layer, old in _RESNET.items():
                    rest = re.sub(rf"^{layer}\.", f"{old}.", rest)
            return f"{theirs}.{rest}"
    return name

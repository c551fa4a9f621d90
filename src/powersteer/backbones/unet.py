"""Stable Diffusion's U-Nets (1.x, 2.x, XL, inpainting, InstructPix2Pix), in diffusers' class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import nn

from powersteer.backbones.fingerprint import fingerprint
from powersteer.backbones.protocol import Call, PipelineBackbone


class UNetBackbone(PipelineBackbone):
    """A `UNet2DConditionModel`."""

    part = "unet"

    arguments = (
        "sample",
        "timestep",
        "encoder_hidden_states",
        "class_labels",
        "timestep_cond",
        "attention_mask",
        "cross_attention_kwargs",
        "added_cond_kwargs",
        "down_block_additional_residuals",
        "mid_block_additional_residual",
        "down_intrablock_additional_residuals",
        "encoder_attention_mask",
        "return_dict",
    )

    @classmethod
    def fits(cls, module: nn.Module) -> bool:
        """Whether it is one."""
        return isinstance(module, UNet2DConditionModel)

    def sites(self) -> list[tuple[int, nn.Module]]:
        """Every ResNet and every spatial transformer; the middle block's share one residual."""
        unet, found, position = self.module, list[tuple[int, nn.Module]](), 0
        middle = unet.mid_block
        for block in (*unet.down_blocks, middle, *unet.up_blocks):
            lists: Any = block._modules  # asked for in every call: attributes of modules are slow
            each = 0 if block is middle else 1
            for name in ("resnets", "attentions"):
                layers = enumerate(lists[name]._modules.values() if name in lists else ())
                found += [(position + each * place, layer) for place, layer in layers if layer is not None]
            position += each * len(lists["resnets"]) or 1
        return found

    def time_embedding(self, call: Call, timestep: Any, rows: int) -> torch.Tensor:
        """After the two-layer MLP, before labels, sizes and text are added: (rows, 4·w_0)."""
        unet, sample = self.module, call.get("sample")
        device = next(unet.time_embedding.parameters()).device
        device = sample.device if device.type == "meta" else device  # offloaded weights come with their own hooks
        like = torch.empty(rows, 0, dtype=sample.dtype, device=device)
        features = unet.get_time_embed(like, timestep.to(device) if torch.is_tensor(timestep) else timestep)
        inputs = self.time_inputs(call)
        return unet.time_embedding(features, None if inputs is None else inputs[:rows].to(features))

    @property
    def time_layers(self) -> nn.Module:
        """The MLP."""
        return self.module.time_embedding

    def time_inputs(self, call: Call) -> torch.Tensor | None:
        """What distilled U-Nets read the guidance from."""
        return call.get("timestep_cond")

    @property
    def shape(self) -> tuple[list[int], list[int]]:
        """Block widths, and ResNets a level."""
        widths, depth = list(self.module.config["block_out_channels"]), self.module.config["layers_per_block"]
        return widths, [depth] * len(widths) if isinstance(depth, int) else list(depth)

    def fingerprint(self, prediction_type: str | None = None) -> dict[str, Any]:
        """Family, block widths, text width and prediction type."""
        return fingerprint(self.module, prediction_type)

    @property
    def step(self) -> int:
        """The U-Net halves each level but the last."""
        return self.factor * 2 ** (len(self.module.config["block_out_channels"]) - 1)

    @property
    def tokens(self) -> int:
        """What CLIP's text encoder was made for."""
        return self.pipe.text_encoder.config.max_position_embeddings

    @property
    def text_numbers(self) -> int:
        """Tokens times width."""
        return self.tokens * self._text_width

    @property
    def _text_width(self) -> int:
        width = self.module.config["encoder_hid_dim"] or self.module.config["cross_attention_dim"]
        return width if isinstance(width, int) else max(width)

    @torch.no_grad()
    def texts(self, prompts: Sequence[str]) -> dict[str, torch.Tensor]:
        """``encoder_hidden_states`` (N, T, D), and of XL ``text_embeds`` (N, D')."""
        given = list(prompts)
        if "text_encoder_2" in self.parts:
            states, _, pooled, _ = self.pipe.encode_prompt(given, do_classifier_free_guidance=False)
            return {"encoder_hidden_states": states.float().cpu(), "text_embeds": pooled.float().cpu()}
        states, _ = self.pipe.encode_prompt(given, self.pipe.text_encoder.device, 1, False)
        return {"encoder_hidden_states": states.float().cpu()}

    def example(self, batch: int, size: tuple[int, int], tokens: int, dtype: torch.dtype) -> dict[str, Any]:
        """Latents, timesteps and text, and XL's sizes and pooled text."""
        config = self.module.config
        inputs: dict[str, Any] = {
            "sample": torch.zeros(batch, config["in_channels"], *size, dtype=dtype),
            "timestep": torch.zeros(batch, dtype=torch.long),
            "encoder_hidden_states": torch.zeros(batch, tokens, self._text_width, dtype=dtype),
        }
        if config["addition_embed_type"] == "text_time":
            ids = 6
            pooled = config["projection_class_embeddings_input_dim"] - ids * config["addition_time_embed_dim"]
            inputs["added_cond_kwargs"] = {
                "text_embeds": torch.zeros(batch, pooled, dtype=dtype),
                "time_ids": torch.zeros(batch, ids, dtype=dtype),
            }
        return inputs

    @staticmethod
    def inputs(states: Mapping[str, torch.Tensor], size: tuple[int, int]) -> dict[str, Any]:
        """The text; XL is told the pictures' size too, uncropped."""
        if "text_embeds" not in states:
            return dict(states)
        ids = torch.tensor([[*size, 0, 0, *size]], dtype=torch.float32).repeat(len(states["text_embeds"]), 1)
        added = {"text_embeds": states["text_embeds"], "time_ids": ids.to(states["text_embeds"].device)}
        return {"encoder_hidden_states": states["encoder_hidden_states"], "added_cond_kwargs": added}

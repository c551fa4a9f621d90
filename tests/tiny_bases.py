"""Pipelines as large in pictures as the real ones, and tiny in everything else."""

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from conftest import build_pipe, build_unet


def tiny_unet(xl: bool = False, **change) -> UNet2DConditionModel:
    torch.manual_seed(0)
    text_and_size = {
        "cross_attention_dim": 48,
        "transformer_layers_per_block": (1, 2),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + 20,
    }
    shape = {
        "sample_size": 128 if xl else 64,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": 2,
        "cross_attention_dim": 24,
        "norm_num_groups": 4,
    }
    return UNet2DConditionModel(**shape | (text_and_size if xl else {}) | change).eval()


def tiny_pipe(name: str):
    """A pipeline of the real one's picture size, VAE factor and class."""
    small, lower = build_pipe(), name.lower()
    torch.manual_seed(0)
    vae = AutoencoderKL(
        sample_size=64,
        block_out_channels=(4,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=4,
        mid_block_add_attention=False,
    ).eval()
    if "xl" in lower:
        text = dict(small.text_encoder.config.to_dict())
        pipe = StableDiffusionXLPipeline(
            vae=vae,
            text_encoder=CLIPTextModel(CLIPTextConfig(**text)).eval(),
            text_encoder_2=CLIPTextModelWithProjection(CLIPTextConfig(**text | {"projection_dim": 20})).eval(),
            tokenizer=small.tokenizer,
            tokenizer_2=small.tokenizer,
            unet=tiny_unet(xl=True),
            scheduler=small.scheduler,
            add_watermarker=False,
        )
    else:
        unet = tiny_unet(in_channels=9) if "inpaint" in lower else tiny_unet()
        pipe = type(small)(**small.components | {"vae": vae, "unet": unet}, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def second_pipe():
    """What tells Stable Diffusion 2.x from 1.x: OpenCLIP's activation, linear projections, and prediction of v.

    Levels without attention lie where those of the real ones do: at the bottom.
    """
    pipe = build_pipe()
    torch.manual_seed(2)
    text = pipe.text_encoder.config.to_dict() | {"hidden_act": "gelu"}
    parts = pipe.components | {
        "text_encoder": CLIPTextModel(CLIPTextConfig(**text)).eval(),
        "unet": build_unet(
            block_out_channels=(16, 32, 32),
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            use_linear_projection=True,
        ),
        "scheduler": DDIMScheduler.from_config(pipe.scheduler.config, prediction_type="v_prediction"),
    }
    second = type(pipe)(**parts, requires_safety_checker=False)
    second.set_progress_bar_config(disable=True)
    return second

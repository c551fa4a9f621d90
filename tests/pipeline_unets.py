"""What a pipeline's signatures tell of the U-Net that it takes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipelines import Traits

WIDTH = 24
"""Width of one encoder's text features."""

SIMPLE = {
    "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "resnet_time_scale_shift": "scale_shift",
    "attention_head_dim": 4,
}


def unet_options(at: Traits) -> dict[str, Any]:
    init, call = at.init, at.call
    found: dict[str, Any] = {"layers_per_block": 2 if "ControlNetXSAdapter" in init.values() else 1}
    if ("pooled_prompt_embeds" in call and "target_size" in call) or "text_encoder_2" in init:
        width = WIDTH * (2 if "text_encoder_2" in init else 1)
        found |= {
            "cross_attention_dim": width,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 6 * 8 + WIDTH,
        }
    if "movq" in init or any(name.endswith("prior_prior") for name in init):
        kind = "text_image" if "text_encoder" in init else "image_hint" if "hint" in call else "image"
        found |= SIMPLE | {"out_channels": 8, "addition_embed_type": kind}
        found |= {
            "encoder_hid_dim": WIDTH,
            "encoder_hid_dim_type": "text_image_proj" if kind == "text_image" else "image_proj",
        }
        found["in_channels"] = 9 if "mask_image" in call else 8 if "hint" in call else 4
        if kind == "text_image":
            found["addition_embed_type_num_heads"] = 2
    if at.pixels:
        twice = "image_noising_scheduler" in init
        found |= SIMPLE | {"in_channels": 6 if twice else 3, "out_channels": 6, "sample_size": 8}
        found |= {"class_embed_type": "timestep"} if twice else {}
        found |= {"class_embed_type": "identity"} if "decoder" in init else {"encoder_hid_dim": WIDTH}
    for told, options in (
        ("low_res_scheduler" in init, {"in_channels": 7, "num_class_embeds": 1000}),
        ("image_guidance_scale" in call, {"in_channels": 8}),
        ("ensemble_size" in call, {"in_channels": 8}),
        ("depth_estimator" in init, {"in_channels": 5}),
        ("example_image" in call, {"in_channels": 9}),
        ("image_normalizer" in init,
         {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 2 * WIDTH}),
        (init.get("scheduler") == "LCMScheduler", {"time_cond_proj_dim": 16}),
        ("audio_length_in_s" in call and "transcription" not in call,
         {"class_embed_type": "simple_projection", "projection_class_embeddings_input_dim": WIDTH,
          "class_embeddings_concat": True, "cross_attention_dim": (16, 32)}),
        ("gligen_boxes" in call,
         {"attention_type": "gated-text-image" if "gligen_images" in call else "gated"}),
        ("mel" in init, {"sample_size": (8, 8)}),
        (at.kind.__name__ == "StableDiffusionLatentUpscalePipeline",
         {"in_channels": 8, "out_channels": 5, "time_cond_proj_dim": 128 + WIDTH}),
    ):  # fmt: skip
        found |= options if told else {}
    return found

"""Calls of the pipelines of `pipelines`: arguments by their names, for pictures of given rows."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from PIL import Image

from pipeline_unets import WIDTH
from pipelines import SIDE, Traits, traits

STEPS = 2
PROMPTS = ["a fox", "the moon"]


def picture(row: int, side: int = SIDE, seed: int = 0, mode: str = "RGB") -> Image.Image:
    generator = np.random.default_rng(100 * seed + row)
    small = Image.fromarray(generator.integers(0, 255, (4, 4, 3), dtype=np.uint8))
    return small.resize((side, side), Image.Resampling.NEAREST).convert(mode)


def mask(side: int) -> Image.Image:
    shape = np.zeros((side, side), dtype=np.uint8)
    shape[: side // 2] = 255
    return Image.fromarray(shape)


def features(row: int, *shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1000 * seed + row))


def stacked(make: Callable[[int], Any], rows: list[int]) -> torch.Tensor:
    return torch.stack([make(row) for row in rows])


def side_of(at: Traits) -> int:
    """Side of the picture that is read."""
    if at.pixels or "low_res_scheduler" in at.init:
        return 8
    return 16 if at.kind.__name__ == "StableDiffusionLatentUpscalePipeline" else SIDE


ARGUMENTS: dict[str, Callable[[Traits, list[int]], Any]] = {
    "prompt": lambda _, rows: [PROMPTS[row] for row in rows],
    "source_prompt": lambda _, rows: ["two fish" for _ in rows],
    "image": lambda at, rows: [picture(row, side_of(at)) for row in rows],
    "original_image": lambda at, rows: [picture(row, 16, 3) for row in rows],
    "control_image": lambda at, rows: (
        [stacked(lambda row: features(row, 3, SIDE, SIDE).sigmoid(), rows)]
        if "control_mode" in at.call
        else [picture(row, seed=1) for row in rows]
    ),
    "example_image": lambda _, rows: [picture(row, seed=2) for row in rows],
    "mask_image": lambda at, rows: [mask(8 if "image_latents" in at.call else side_of(at)) for _ in rows],
    "control_mode": lambda *_: [0],
    "strength": lambda *_: 1.0,
    "inpaint_strength": lambda *_: 1.0,
    "hint": lambda _, rows: stacked(lambda row: features(row, 3, 2 * SIDE, 2 * SIDE).sigmoid(), rows),
    "image_embeds": lambda _, rows: stacked(lambda row: features(row, WIDTH), rows),
    "negative_image_embeds": lambda _, rows: stacked(lambda _: features(7, WIDTH), rows),
    "image_latents": lambda _, rows: stacked(lambda row: features(row, 2, 4, 8, 8), rows),
    "encoding": lambda _, rows: stacked(lambda row: features(row, 5, WIDTH), rows),
    "gligen_phrases": lambda *_: ["a fox"],
    "gligen_boxes": lambda *_: [[0.1, 0.1, 0.6, 0.6]],
    "gligen_images": lambda *_: [picture(0)],
    "token_indices": lambda _, rows: [[2] for _ in rows],
    "attn_res": lambda *_: (4, 4),
    "source_embeds": lambda *_: features(1, 2, 12, WIDTH),
    "target_embeds": lambda *_: features(2, 2, 12, WIDTH),
    "editing_prompt": lambda *_: ["two fish"],
    "use_intersect_mask": lambda *_: False,
    "edit_warmup_steps": lambda *_: 0,
    "video_length": lambda *_: 2,
    "t0": lambda *_: 1,
    "t1": lambda *_: 2,
    "audio_length_in_s": lambda *_: 0.008,
    "batch_size": lambda _, rows: len(rows),
    "height": lambda at, _: 16 if at.pixels else SIDE,
    "width": lambda at, _: 16 if at.pixels else SIDE,
    "num_inference_steps": lambda *_: STEPS,
    "steps": lambda *_: STEPS,
    "decoder_num_inference_steps": lambda *_: 3,
    "prior_num_inference_steps": lambda *_: 2,
    "super_res_num_inference_steps": lambda *_: 2,
    "processing_resolution": lambda *_: SIDE,
    "clean_caption": lambda *_: False,
    "max_sequence_length": lambda *_: 12,
    "noise_level": lambda *_: 20,
    "reference_image": lambda _, rows: picture(0, seed=5),
    "condtioning_image": lambda _, rows: picture(0, seed=6),
    "source_subject_category": lambda _, rows: ["a fox" for _ in rows],
    "target_subject_category": lambda _, rows: [PROMPTS[row] for row in rows],
    "prompt_reps": lambda *_: 1,
    "generator": lambda _, rows: [torch.Generator().manual_seed(row) for row in rows],
}
"""By parameter's name, for the pictures of these rows."""

GUIDANCE = ("guidance_scale", "decoder_guidance_scale", "edit_guidance_scale")


def arguments(at: Traits, rows: list[int], guidance: float | None) -> dict[str, Any]:
    given = {name: make(at, rows) for name, make in ARGUMENTS.items() if name in at.call}
    if "image" in given and at.call.get("image_embeds", inspect.Parameter.empty) is None:
        del given["image_embeds"]
    if guidance is not None:
        given |= {name: guidance for name in GUIDANCE if name in at.call}
    if at.pixels and "image_noising_scheduler" not in at.init:
        given = {name: value for name, value in given.items() if name not in ("height", "width")}
    if "output_type" in at.call:
        given["output_type"] = "latent" if '"latent"' in at.source else "pt" if '"pt"' in at.source else "np"
    if "output_latent" in at.call:
        given["output_type"] = "pt"
    if any("ClapModel" in told for told in at.init.values()):
        del given["prompt"]
        given["prompt_embeds"] = stacked(lambda row: features(row, WIDTH), rows)
        given["negative_prompt_embeds"] = stacked(lambda _: features(9, WIDTH), rows)
    return given | {name: make(rows) for name, make in EXTRA.get(at.kind.__name__, {}).items()}


EXTRA: dict[str, dict[str, Callable[[list[int]], Any]]] = {
    "TextToVideoZeroPipeline": {"num_inference_steps": lambda _: 4},
    "TextToVideoZeroSDXLPipeline": {"num_inference_steps": lambda _: 4},
    "StableDiffusionLDM3DPipeline": {"output_type": lambda _: "np"},
    "StableDiffusionInpaintPipelineLegacy": {"image": lambda _: picture(0), "mask_image": lambda _: mask(SIDE)},
    "VersatileDiffusionPipeline": {"prompt": lambda rows: [PROMPTS[row] for row in rows]},
}
"""What a name does not tell."""


def guided(at: Traits) -> bool:
    return any(name in at.call for name in GUIDANCE)


def unet_of(pipe: DiffusionPipeline) -> UNet2DConditionModel | None:
    found = [part for part in pipe.components.values() if isinstance(part, UNet2DConditionModel)]
    return found[0] if found else None


def drawn(pipe: DiffusionPipeline, rows: list[int], guidance: float | None = None) -> torch.Tensor:
    """The pictures of these rows, (N, …)."""
    at = traits(type(pipe))
    torch.manual_seed(5)
    if hasattr(pipe, "invert") and "editing_prompt" in at.call:
        pipe.invert([picture(row) for row in rows], num_inversion_steps=STEPS, skip=0.0,
                    generator=torch.Generator().manual_seed(0))  # fmt: skip
    result = getattr(pipe, at.entry)(**arguments(at, rows, guidance))
    found = next(iter(result.values())) if isinstance(result, dict) else result[0]
    if isinstance(found, list):
        found = np.stack([np.asarray(one) for one in found])
    return torch.as_tensor(np.asarray(found), dtype=torch.float32)

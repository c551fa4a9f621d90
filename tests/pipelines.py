"""Every diffusers pipeline that takes a `UNet2DConditionModel`, made of tiny real parts.

Classes are found in the installed diffusers. Parts and the U-Net's options come from tables by the *names* in a class's
signatures, as arguments do in `pipeline_calls`, so that a pipeline of a later diffusers is built by the same tables.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import re
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import diffusers.pipelines
import numpy as np
import torch
import transformers
from diffusers import DiffusionPipeline

from conftest import build_pipe, build_unet
from pipeline_unets import WIDTH, unet_options

SIDE = 32
CHANGED = {
    "VersatileDiffusionPipeline": "text_to_image",
}
"""Pipelines that are called by a method of their own."""


_INIT = re.compile(r"^class (\w+)\((?:(?!^class ).|\n)*?^(    def __init__\((?:.|\n)*?\):)$", re.MULTILINE)


@cache
def places() -> dict[str, str]:
    """Class name → module, of all pipelines whose ``__init__`` names the U-Net; read from their text, not imported."""
    root = Path(diffusers.pipelines.__path__[0])
    found: dict[str, str] = {}
    for file in sorted(root.rglob("pipeline_*.py")):
        text = file.read_text()
        if "UNet2DConditionModel" not in text:
            continue
        module = ".".join((diffusers.pipelines.__name__, *file.relative_to(root).with_suffix("").parts))
        for name, body in _INIT.findall(text):
            if re.search(r"\w: .*UNet2DConditionModel", body):
                found[name] = module
    return found


def pipeline_class(name: str) -> type[DiffusionPipeline]:
    return getattr(importlib.import_module(places()[name]), name)


def takes_unet(kind: Any) -> bool:
    """Whether it is a pipeline whose ``__init__`` has a parameter with the U-Net's class."""
    if not (inspect.isclass(kind) and issubclass(kind, DiffusionPipeline)):
        return False
    parameters = inspect.signature(kind.__init__).parameters.values()
    return any("UNet2DConditionModel" in str(parameter.annotation) for parameter in parameters)


class Traits:
    """What a pipeline's signatures tell."""

    def __init__(self, kind: type[DiffusionPipeline]) -> None:
        self.kind = kind
        parameters = list(inspect.signature(kind.__init__).parameters.values())[1:]
        self.init = {one.name: _told(one.annotation) for one in parameters}
        self.optional = {one.name for one in parameters if one.default is not one.empty}
        self.entry = CHANGED.get(kind.__name__, "__call__")
        call = list(inspect.signature(getattr(kind, self.entry)).parameters.values())[1:]
        self.call = {one.name: one.default for one in call}
        """Arguments and their defaults."""
        self.source = inspect.getsource(getattr(kind, self.entry))
        self.pixels = not any(name in self.init for name in ("vae", "movq", "vqvae"))
        """Denoises pixels, not latents."""

    @property
    def module(self) -> Any:
        return importlib.import_module(self.kind.__module__)


@cache
def traits(kind: type[DiffusionPipeline]) -> Traits:
    return Traits(kind)


def _told(annotation: Any) -> str:
    return annotation.__name__ if inspect.isclass(annotation) else str(annotation)


# --- parts


@cache
def stock() -> Any:
    return build_pipe()


@cache
def tokenizer() -> Any:
    return stock().tokenizer


def text_config(**change: Any) -> Any:
    return transformers.CLIPTextConfig(**{**stock().text_encoder.config.to_dict(), "projection_dim": WIDTH} | change)


def vision_config(**change: Any) -> Any:
    sizes = {"hidden_size": WIDTH, "intermediate_size": 48, "num_attention_heads": 2, "num_hidden_layers": 2}
    return transformers.CLIPVisionConfig(**sizes, image_size=SIDE, patch_size=8, projection_dim=WIDTH, **change)


def roberta_sizes() -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer()),
        "hidden_size": WIDTH,
        "intermediate_size": 48,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "max_position_embeddings": 40,
        "pad_token_id": 1,
    }


def image_processor(**change: Any) -> Any:
    return transformers.CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=SIDE, **change)


def autoencoder(channels: int = 3) -> Any:
    shape = {name: value for name, value in stock().vae.config.items() if not name.startswith("_")}
    return diffusers.AutoencoderKL(**shape | {"in_channels": channels, "out_channels": channels})


def vq_model() -> Any:
    return diffusers.VQModel(
        block_out_channels=(32, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=4,
        num_vq_embeddings=12,
        vq_embed_dim=4,
        norm_num_groups=4,
        norm_type="spatial",
    )


def prior() -> Any:
    return diffusers.PriorTransformer(
        num_attention_heads=2,
        attention_head_dim=4,
        embedding_dim=WIDTH,
        num_layers=1,
        num_embeddings=tokenizer().model_max_length,
        additional_embeddings=4,
    )


def controlnet(unet: Any) -> Any:
    return lively(diffusers.ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 8, 16)))


def union_controlnet(unet: Any) -> Any:
    names = ("cross_attention_dim", "attention_head_dim", "use_linear_projection", "addition_embed_type",
             "addition_time_embed_dim", "projection_class_embeddings_input_dim", "norm_num_groups",
             "block_out_channels", "down_block_types", "layers_per_block", "transformer_layers_per_block")  # fmt: skip
    shape = {name: unet.config[name] for name in names}
    shape |= {"num_trans_channel": 16, "num_trans_head": 2, "num_proj_channel": 16}
    return lively(diffusers.ControlNetUnionModel(**shape, conditioning_embedding_out_channels=(8, 8, 16)))


def lively(module: torch.nn.Module) -> torch.nn.Module:
    """Layers that begin at zero made random."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            if not parameter.any():
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return module


def motion_adapter() -> Any:
    return diffusers.MotionAdapter(
        block_out_channels=(16, 32), motion_layers_per_block=1, motion_norm_num_groups=8, motion_num_attention_heads=2
    )


def sparse_controlnet(unet: Any) -> Any:
    return diffusers.SparseControlNetModel(
        block_out_channels=(16, 32),
        down_block_types=tuple(unet.config["down_block_types"]),
        layers_per_block=1,
        cross_attention_dim=unet.config["cross_attention_dim"],
        attention_head_dim=2,
        norm_num_groups=8,
        conditioning_embedding_out_channels=(8, 8, 16),
    )


def flat_unet() -> Any:
    from diffusers.pipelines.deprecated.versatile_diffusion.modeling_text_unet import UNetFlatConditionModel

    return UNetFlatConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlockFlat", "CrossAttnDownBlockFlat"),
        up_block_types=("CrossAttnUpBlockFlat", "UpBlockFlat"),
        cross_attention_dim=WIDTH,
        attention_head_dim=2,
        norm_num_groups=8,
    )


def depth_estimator() -> Any:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 4}
    config = transformers.DPTConfig(
        **sizes,
        image_size=SIDE,
        patch_size=8,
        backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[8, 8, 16, 16],
        fusion_hidden_size=16,
        is_hybrid=False,
    )
    return transformers.DPTForDepthEstimation(config)


def vocoder() -> Any:
    config = transformers.SpeechT5HifiGanConfig(
        model_in_dim=8,
        sampling_rate=16000,
        upsample_initial_channel=16,
        upsample_rates=[2, 2],
        upsample_kernel_sizes=[4, 4],
        resblock_kernel_sizes=[3],
        resblock_dilation_sizes=[[1]],
        normalize_before=False,
    )
    return transformers.SpeechT5HifiGan(config)


def scheduler_of(told: str) -> Any:
    """The first of these that a pipeline names; DDIM where it takes any."""
    plain = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    exact = {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
    if "KarrasDiffusionSchedulers" in told or "DDIMScheduler" in told or told == "SchedulerMixin":
        return diffusers.DDIMScheduler(**plain, **exact)
    for name, options in (
        ("DDIMInverseScheduler", {**plain, "clip_sample": False, "set_alpha_to_one": False}),
        ("LCMScheduler", {**plain, **exact}),
        ("UnCLIPScheduler", {}),
        ("EulerDiscreteScheduler", plain),
        ("PNDMScheduler", {**plain, "set_alpha_to_one": False, "skip_prk_steps": True}),
        ("DDPMScheduler", {**plain, "clip_sample": False}),
    ):
        if name in told:
            return getattr(diffusers, name)(**options)
    raise KeyError(f"no scheduler for {told}")


class PlacedTokenizer(transformers.CLIPTokenizer):
    """Tells the places of tokens, too, as ChatGLM's does."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        found = super().__call__(*args, **kwargs)
        found["position_ids"] = torch.arange(found["input_ids"].shape[1]).expand_as(found["input_ids"])
        return found


def placed_tokenizer() -> Any:
    made = copy.copy(tokenizer())
    made.__class__ = PlacedTokenizer
    return made


def chat_model(at: Traits) -> Any:
    module = importlib.import_module(at.module.ChatGLMModel.__module__)
    config = module.ChatGLMConfig(
        num_layers=1,
        padded_vocab_size=len(tokenizer()),
        hidden_size=WIDTH,
        ffn_hidden_size=32,
        kv_channels=WIDTH // 2,
        num_attention_heads=2,
        multi_query_attention=True,
        multi_query_group_num=1,
        seq_length=256,
        original_rope=True,
    )
    return settled(module.ChatGLMModel(config))


def settled(module: torch.nn.Module) -> torch.nn.Module:
    """Weights that a class leaves as the memory was made small random numbers."""
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    return module


def question_former(at: Traits) -> Any:
    """BLIP-Diffusion's own, whose tokenizer is read from a folder."""
    module = importlib.import_module(at.module.Blip2QFormerModel.__module__)
    sizes = {"hidden_size": WIDTH, "intermediate_size": 48, "num_attention_heads": 2, "num_hidden_layers": 2}
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "fox", "moon", "the"]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "vocab.txt").write_text("\n".join(words))
        transformers.BertTokenizer(vocab={word: place for place, word in enumerate(words)}).save_pretrained(folder)
        config = transformers.Blip2Config(
            vision_config={**sizes, "image_size": SIDE, "patch_size": 8},
            qformer_config={**sizes, "vocab_size": len(words) + 1, "encoder_hidden_size": WIDTH},
            num_query_tokens=4,
            tokenizer=folder,
        )
        return module.Blip2QFormerModel(config)


def super_resolution() -> Any:
    return diffusers.UNet2DModel(
        sample_size=16,
        in_channels=6,
        out_channels=3,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("ResnetDownsampleBlock2D",) * 2,
        up_block_types=("ResnetUpsampleBlock2D",) * 2,
        norm_num_groups=4,
    )


def text_projection() -> Any:
    from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel

    return UnCLIPTextProjModel(
        clip_extra_context_tokens=3, clip_embeddings_dim=WIDTH, time_embed_dim=64, cross_attention_dim=WIDTH
    )


class Mel(diffusers.SchedulerMixin, diffusers.ConfigMixin):
    """Stands for diffusers' `Mel`, which needs librosa: spectrograms are not listened to here."""

    config_name = "mel_config.json"

    def image_to_audio(self, image: Any) -> np.ndarray:
        return np.asarray(image, dtype=np.float32).ravel()

    def get_sample_rate(self) -> int:
        return 16000


PARTS: dict[str, Callable[[Traits, Any], Any]] = {
    "PaintByExampleImageEncoder": lambda at, _: at.module.PaintByExampleImageEncoder(vision_config(), proj_size=WIDTH),
    "RobertaSeriesModelWithTransformation": lambda at, _: at.module.RobertaSeriesModelWithTransformation(
        importlib.import_module(f"{at.module.__package__}.modeling_roberta_series").RobertaSeriesConfig(
            **roberta_sizes(), project_dim=WIDTH
        )
    ),
    "MultilingualCLIP": lambda at, _: importlib.import_module(f"{at.module.__package__}.text_encoder").MultilingualCLIP(
        importlib.import_module(f"{at.module.__package__}.text_encoder").MCLIPConfig(
            transformerDimSize=WIDTH, imageDimSize=WIDTH, **roberta_sizes()
        )
    ),
    "ClapTextModelWithProjection": lambda *_: transformers.ClapTextModelWithProjection(
        transformers.ClapTextConfig(**roberta_sizes(), projection_dim=WIDTH)
    ),
    "T5EncoderModel": lambda *_: transformers.T5EncoderModel(
        transformers.T5Config(vocab_size=len(tokenizer()), d_model=WIDTH, d_kv=4, d_ff=32, num_layers=1, num_heads=2)
    ),
    "CLIPImageProjection": lambda at, _: at.module.CLIPImageProjection(hidden_size=WIDTH),
    "StableUnCLIPImageNormalizer": lambda at, _: at.module.StableUnCLIPImageNormalizer(embedding_dim=WIDTH),
    "UnCLIPTextProjModel": lambda *_: text_projection(),
    "CLIPTextModelWithProjection": lambda *_: transformers.CLIPTextModelWithProjection(text_config()),
    "CLIPTextModel": lambda at, _: (
        transformers.CLIPTextModelWithProjection if "text_unet" in at.init else transformers.CLIPTextModel
    )(text_config()),
    "CLIPVisionModelWithProjection": lambda *_: transformers.CLIPVisionModelWithProjection(vision_config()),
    "CLIPVisionModel": lambda *_: transformers.CLIPVisionModel(vision_config()),
    "CLIPProcessor": lambda *_: transformers.CLIPProcessor(image_processor(), tokenizer()),
    "CLIPImageProcessor": lambda *_: image_processor(),
    "ChatGLMTokenizer": lambda *_: placed_tokenizer(),
    "ChatGLMModel": lambda at, _: chat_model(at),
    "Tokenizer": lambda *_: tokenizer(),
    "PythonBackend": lambda *_: tokenizer(),
    "UNetFlatConditionModel": lambda *_: flat_unet(),
    "VQModel": lambda *_: vq_model(),
    "AutoencoderKL": lambda at, _: autoencoder(CHANNELS_OF_VAE.get(at.kind.__name__, 3)),
    "PriorTransformer": lambda *_: prior(),
    "ControlNetModel": lambda _, unet: controlnet(unet),
    "ControlNetUnionModel": lambda _, unet: union_controlnet(unet),
    "ControlNetXSAdapter": lambda _, unet: diffusers.ControlNetXSAdapter.from_unet(
        unet, size_ratio=0.5, conditioning_embedding_out_channels=(8, 8)
    ),
    "SparseControlNetModel": lambda _, unet: sparse_controlnet(unet),
    "T2IAdapter": lambda *_: diffusers.T2IAdapter(
        in_channels=3,
        channels=[16, 32],
        num_res_blocks=1,
        downscale_factor=8,
        adapter_type="full_adapter_xl",
    ),
    "AudioLDM2UNet2DConditionModel": lambda at, _: at.module.AudioLDM2UNet2DConditionModel(
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=((None, WIDTH),) * 2,
        attention_head_dim=2,
        norm_num_groups=8,
    ),
    "Blip2QFormerModel": lambda at, _: question_former(at),
    "ContextCLIPTextModel": lambda at, _: at.module.ContextCLIPTextModel(text_config()),
    "BlipImageProcessor": lambda at, _: at.module.BlipImageProcessor(size={"height": SIDE, "width": SIDE}),
    "MotionAdapter": lambda *_: motion_adapter(),
    "DPTForDepthEstimation": lambda *_: depth_estimator(),
    "DPTImageProcessor": lambda *_: transformers.DPTImageProcessor(size={"height": SIDE, "width": SIDE}),
    "SpeechT5HifiGan": lambda *_: vocoder(),
    "UNet2DModel": lambda *_: super_resolution(),
    "Mel": lambda *_: Mel(),
    "PreTrainedModel": lambda at, _: at.module.LDMBertModel(
        at.module.LDMBertConfig(
            vocab_size=len(tokenizer()),
            max_position_embeddings=77,
            encoder_layers=1,
            encoder_ffn_dim=32,
            encoder_attention_heads=2,
            head_dim=4,
            d_model=WIDTH,
        )
    ),
}
"""By the class in the annotation; the first key that is found in it, in this order."""

ABSENT = {"safety_checker", "watermarker", "caption_generator", "caption_processor", "feature_extractor_1"}
"""Parts that a pipeline does without."""
OPTIONS = {"requires_safety_checker": False, "add_watermarker": False}
CHANNELS_OF_VAE = {"StableDiffusionLDM3DPipeline": 6, "AudioLDMPipeline": 1, "MusicLDMPipeline": 1}
WITHOUT = ("ClapModel", "ClapFeatureExtractor", "AudioLDM2ProjectionModel", "GPT2LMHeadModel")
"""Classes that are not made: text is given as features instead."""
SCHEDULERS: dict[str, Callable[[], Any]] = {
    "decoder_scheduler": lambda: diffusers.UnCLIPScheduler(num_train_timesteps=500, variance_type="learned_range"),
    "StableDiffusionParadigmsPipeline": lambda: diffusers.DDIMParallelScheduler(clip_sample=False),
    "LEditsPPPipelineStableDiffusion": lambda: diffusers.DPMSolverMultistepScheduler(
        algorithm_type="sde-dpmsolver++", solver_order=2
    ),
}
SCHEDULERS["LEditsPPPipelineStableDiffusionXL"] = SCHEDULERS["LEditsPPPipelineStableDiffusion"]


def part(at: Traits, name: str, told: str, unet: Any) -> Any:
    if name in ABSENT:
        return None
    if "scheduler" in name:
        named = SCHEDULERS.get(at.kind.__name__ if name == "scheduler" else name)
        return scheduler_of(told) if named is None else named()
    for kind, make in PARTS.items():
        if kind in told:
            torch.manual_seed(len(name))
            made = make(at, unet)
            return made.eval().requires_grad_(False) if isinstance(made, torch.nn.Module) else made
    if any(kind in told for kind in WITHOUT):
        return None
    raise KeyError(f"no part for {name}: {told}")


def build(kind: type[DiffusionPipeline]) -> DiffusionPipeline:
    """The pipeline of tiny random parts."""
    at = traits(kind)
    unet = None
    parts: dict[str, Any] = {}
    for name, told in at.init.items():
        if re.search(r"\bUNet2DConditionModel", told) and unet is None:
            parts[name] = unet = lively(build_unet(**unet_options(at))).requires_grad_(False).eval()
    for name, told in at.init.items():
        if name in parts:
            continue
        if name in OPTIONS:
            parts[name] = OPTIONS[name]
        elif name == "text_unet":
            parts[name] = flat_unet().eval()
        elif name not in at.optional or name == "motion_adapter":
            parts[name] = part(at, name, told, unet)
    pipe = kind(**parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe

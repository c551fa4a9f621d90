"""Tiny real components: a U-Net, VAE and text encoder of a few channels, in diffusers' own classes."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image, ImageDraw
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from powersteer import BPSModel
from powersteer.apps import cli
from powersteer.evaluation.information import LogSnr
from powersteer.training.config import TrainConfig
from tiny_hub import hub  # noqa: F401  (a fixture)

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))


def randomise(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Zero-initialised weights made random: a test on a zero adapter proves nothing."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        if name != "weights":
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return module.eval()


def build_tokenizer(captions: list[str]) -> CLIPTokenizer:
    """Each word a token. Written down, not trained: training would break ties differently in every process."""
    alphabet = sorted(ByteLevel.alphabet())
    merges: dict[tuple[str, str], None] = {}
    for word in sorted({word for caption in captions for word in caption.split()}):
        letters = [*word[:-1], f"{word[-1]}</w>"]
        for end in range(1, len(word)):
            merges["".join(letters[:end]), letters[end]] = None
    ends = [f"{letter}</w>" for letter in alphabet]
    tokens = ["<|startoftext|>", "<|endoftext|>", *alphabet, *ends, *map("".join, merges)]
    vocab = {token: i for i, token in enumerate(tokens)}
    return CLIPTokenizer(vocab, list(merges), model_max_length=12)


def build_unet(**change) -> UNet2DConditionModel:
    torch.manual_seed(0)
    shape = {
        "sample_size": 8,
        "block_out_channels": (16, 32),
        "layers_per_block": 2,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 24,
        "attention_head_dim": 2,
        "norm_num_groups": 8,
    }
    return UNet2DConditionModel(**shape | change).eval()


def build_pipe() -> StableDiffusionPipeline:
    unet = build_unet()
    vae = AutoencoderKL(
        sample_size=32,
        block_out_channels=(8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=4,
        norm_num_groups=4,
    )
    tokenizer = build_tokenizer(["a fox", "a red house", "a cat face", "two fish", "the moon"])
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=24,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=12,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    pipe = StableDiffusionPipeline(
        vae.eval(),
        text_encoder.eval(),
        tokenizer,
        unet,
        scheduler,
        None,
        None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def by_hand(unet, network, sample, timestep, text, condition):
    """What `attach` promises, without it: every row with a condition of its own, and residuals added one by one."""
    condition = condition.repeat(len(sample) // len(condition), 1, 1, 1)
    if not isinstance(network, BPSModel):
        picture = condition.expand(-1, 3, -1, -1)
        down, mid = network(sample, timestep, text, picture, return_dict=False)
        return unet(
            sample, timestep, text, down_block_additional_residuals=down, mid_block_additional_residual=mid
        ).sample
    steering = network(condition, unet.time_embedding(unet.time_proj(timestep.expand(len(sample)))))
    added = [(layer, steering.mid) for layer in (*unet.mid_block.resnets, *unet.mid_block.attentions)]
    for blocks, residuals in ((unet.down_blocks, iter(steering.down)), (unet.up_blocks, iter(steering.up))):
        for block in blocks:
            of_block = [next(residuals) for _ in block.resnets]
            added += zip(block.resnets, of_block, strict=True)
            added += zip(getattr(block, "attentions", []), of_block, strict=False)

    def add(residual):
        return lambda _, __, out: out + residual if isinstance(out, torch.Tensor) else (out[0] + residual,)

    hooks = [layer.register_forward_hook(add(residual)) for layer, residual in added]
    try:
        return unet(sample, timestep, text).sample
    finally:
        for hook in hooks:
            hook.remove()


@pytest.fixture
def pipe() -> StableDiffusionPipeline:
    return build_pipe()


@pytest.fixture
def model(pipe) -> BPSModel:
    torch.manual_seed(1)
    return randomise(BPSModel.from_unet(pipe.unet, pixel_unshuffle=4, weights=[0.5, 0.4, 0.3, 0.2]))


@pytest.fixture(scope="session")
def base_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    build_pipe().save_pretrained(folder)
    return folder


@contextmanager
def uniform_log_snr() -> Iterator[None]:
    """Information draws log-SNRs uniformly, not where a pilot gains: rounding of its gains can move draws to the next
    timestep, so that a figure that is measured twice, by two ways, differs by more than rounding."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LogSnr, "proposal", lambda self, *_: self.uniform)
        yield


def draw_pairs(folder: Path, count: int, seed: int = 0, size: int = 32) -> Path:
    """Real files: boxes of one colour with a dark outline, and the outline alone as the drawing."""
    rng = np.random.default_rng(seed)
    (folder / "images").mkdir(parents=True)
    (folder / "drawings").mkdir()
    rows = []
    for i in range(count):
        x, y = rng.integers(2, size // 2 - 2, 2).tolist()
        box = (x, y, x + size // 2, y + size // 2)
        picture, drawing = Image.new("RGB", (size, size), "white"), Image.new("L", (size, size), 0)
        ImageDraw.Draw(picture).rectangle(box, fill=tuple(rng.integers(80, 255, 3).tolist()), outline="black", width=2)
        ImageDraw.Draw(drawing).rectangle(box, outline=255, width=2)
        picture.save(folder / "images" / f"{i}.png")
        drawing.save(folder / "drawings" / f"{i}.png")
        row = {
            "file_name": f"images/{i}.png",
            "conditioning_image_file_name": f"drawings/{i}.png",
            "text": "a fox",
        }
        rows.append(json.dumps({**row, "concept": str(i)}))
    (folder / "metadata.jsonl").write_text("\n".join(rows) + "\n")
    return folder


@pytest.fixture
def pairs_dir(tmp_path) -> Path:
    return draw_pairs(tmp_path / "pairs", 12)


@pytest.fixture
def config(tmp_path, base_dir) -> TrainConfig:
    return TrainConfig(
        pretrained_model_name_or_path=str(base_dir),
        train_data_dir=str(draw_pairs(tmp_path / "train", 16)),
        validation_data_dir=draw_pairs(tmp_path / "validation", 6, seed=1),
        output_dir=tmp_path / "run",
        cache_dir=tmp_path / "cache",
        train_batch_size=4,
        max_train_steps=8,
        validation_steps=4,
        checkpointing_steps=4,
        lr_warmup_steps=2,
        mixed_precision="no",
        weights="uniform",
        learning_rate=1e-3,
        num_validation_images=0,
    )


@pytest.fixture
def adapter_dir(tmp_path, base_dir) -> Path:
    unet = UNet2DConditionModel.from_pretrained(base_dir / "unet")
    randomise(BPSModel.from_unet(unet, pixel_unshuffle=4, weights="uniform")).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.fixture
def run(monkeypatch, capsys):
    """What a person types → exit status, stdout, stderr."""

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["powersteer", *map(str, args)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        captured = capsys.readouterr()
        return stop.value.code or 0, captured.out, captured.err

    return run


@pytest.fixture(scope="module")
def one_thread():
    """Steps this small gain nothing from a second one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def clip_dir(tmp_path_factory):
    """A small CLIP in transformers' format."""
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}
    tokenizer = build_pipe().tokenizer
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    text = {**tower, **ids, "vocab_size": len(tokenizer), "max_position_embeddings": 12}
    config = CLIPConfig(text_config=text, vision_config={**tower, "image_size": 32, "patch_size": 8}, projection_dim=16)
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("clip")
    CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32).save_pretrained(folder)
    return folder

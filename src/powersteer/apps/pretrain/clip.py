"""Stage 3, CLIP: a text and a picture tower, contrastive on the icons, word meanings distilled from a teacher."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn
from transformers import CLIPConfig as HFCLIPConfig
from transformers import CLIPModel, CLIPTokenizer

from powersteer.apps.pretrain.fit import FitConfig, Session, fit
from powersteer.apps.pretrain.icons import IconSet, captions
from powersteer.apps.pretrain.teacher import Teacher
from powersteer.apps.pretrain.text import MAX_TOKENS, tokenize
from powersteer.apps.pretrain.vae import augment
from powersteer.core.records import Layers, Size


class CLIPConfig(FitConfig):
    """Both towers' size and losses."""

    hidden_size: Size = 192
    text_layers: Layers = 4
    vision_layers: Layers = 6
    patch_size: Size = 8
    dropout: float = 0.1
    distillation_weight: float = Field(default=4.0, ge=0)
    """Weight of the teacher: both towers also predict its embedding of the name, and the text tower those of
    plain English words, so that words no picture showed still land near their kin."""
    word_batch_size: Size = 128


class _Student(nn.Module):
    """CLIP, and the head that maps its embeddings to the teacher's."""

    def __init__(self, clip: CLIPModel, width: int, teacher_width: int) -> None:
        super().__init__()
        self.clip = clip
        self.to_teacher = nn.Linear(width, teacher_width)


def build_clip(config: CLIPConfig, tokenizer: CLIPTokenizer, size: int) -> CLIPModel:
    """Untrained towers, for pictures of ``size`` pixels a side."""
    tower = {
        "hidden_size": config.hidden_size,
        "intermediate_size": 4 * config.hidden_size,
        "num_attention_heads": config.hidden_size // 64,
    }
    text = {
        **tower,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": MAX_TOKENS,
        "num_hidden_layers": config.text_layers,
        "attention_dropout": config.dropout,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "projection_dim": config.hidden_size,
    }
    vision = {
        **tower,
        "image_size": size,
        "patch_size": config.patch_size,
        "num_hidden_layers": config.vision_layers,
        "attention_dropout": config.dropout,
        "projection_dim": config.hidden_size,
    }
    return CLIPModel(HFCLIPConfig(text_config=text, vision_config=vision, projection_dim=config.hidden_size))


def train_clip(
    config: CLIPConfig,
    icons: IconSet,
    tokenizer: CLIPTokenizer,
    teacher: Teacher,
    stage_dir: Path,
    session: Session,
) -> CLIPModel:
    """Train both towers; reports how often the right caption among the held-out names is in the first five."""
    device, train = session.device, icons.select(held_out=False)
    held_out = icons.select(use="all", held_out=True)
    names = sorted({icon.name for icon in icons.icons if not icon.held_out})
    row_of = {name: i for i, name in enumerate(names)}
    name_of = torch.tensor([row_of.get(icon.name, 0) for icon in icons.icons], device=device)
    phrases = [*names, *teacher.words()]
    targets = teacher.embed(phrases).to(device)
    word_tokens = tokenize(tokenizer, phrases).to(device)
    texts_of = [caption for icon in icons.icons for caption in captions(icon.name, icon.style)]
    caption_tokens = tokenize(tokenizer, texts_of).to(device).unflatten(0, (len(icons.icons), -1))  # (N, captions, 24)
    torch.manual_seed(session.seed)
    student = _Student(build_clip(config, tokenizer, icons.size), config.hidden_size, targets.shape[1])
    clip = student.clip
    if device.type == "cpu":
        clip.set_attn_implementation("eager")  # on so few tokens faster in training than the fused kernel
    read, look = torch.compile(embed_text), torch.compile(embed_images)

    def loss(_: int, generator: torch.Generator) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        def pick(most: int, count: int = config.batch_size) -> torch.Tensor:
            return torch.randint(most, (count,), generator=generator, device=device)

        picks = train[pick(len(train))]
        texts = caption_tokens[picks, pick(caption_tokens.shape[1])]
        images = augment(icons.images(picks), generator, recolour=0.05, outline=0.1, move=0.8)
        extra = pick(len(phrases), config.word_batch_size)
        states = read(clip, torch.cat([texts, word_tokens[extra]]))
        text, word = states.split([len(texts), len(extra)])
        image = look(clip, images)
        names_in_batch = name_of[picks]
        contrastive = _contrastive(image, text, clip.logit_scale, names_in_batch)
        wanted = torch.cat([targets[names_in_batch], targets[extra]])
        guess_text = F.normalize(student.to_teacher(torch.cat([text, word])).float(), dim=-1)
        guess_image = F.normalize(student.to_teacher(image).float(), dim=-1)
        text_distance = 1 - (guess_text * wanted).sum(-1).mean()
        image_distance = 1 - (guess_image * wanted[: len(texts)]).sum(-1).mean()
        figures = {"contrastive": contrastive, "text_distance": text_distance, "image_distance": image_distance}
        return contrastive + config.distillation_weight * (text_distance + image_distance), figures

    def report(_: int) -> dict[str, float]:
        candidates = sorted({icons.icons[int(i)].name for i in held_out})
        truth = torch.tensor([candidates.index(icons.icons[int(i)].name) for i in held_out])
        ranks = caption_ranks(clip, tokenizer, icons.images(held_out), candidates, truth)
        return {
            "held_out_top1": (ranks < 1).float().mean().item(),
            "held_out_top5": (ranks < 5).float().mean().item(),
        }

    fit(stage_dir, config, student, loss, report, session)
    return clip


def _contrastive(
    image: torch.Tensor, text: torch.Tensor, logit_scale: torch.Tensor, names: torch.Tensor
) -> torch.Tensor:
    """Symmetric cross-entropy; every pair of the batch that shares a name is a positive."""
    logits = logit_scale.clamp(max=4.6).exp() * image.float() @ text.float().T
    positive = (names[:, None] == names[None]).float()
    wanted = positive / positive.sum(1, keepdim=True)
    return 0.5 * (F.cross_entropy(logits, wanted) + F.cross_entropy(logits.T, wanted))


def embed_text(clip: CLIPModel, tokens: torch.Tensor) -> torch.Tensor:
    """Unit embeddings (B, D) of token ids (B, 24)."""
    return F.normalize(clip.text_projection(clip.text_model(tokens).pooler_output), dim=-1)


def embed_images(clip: CLIPModel, images: torch.Tensor) -> torch.Tensor:
    """Unit embeddings (B, D) of pictures (B, 3, H, W) in [-1, 1]."""
    return F.normalize(clip.visual_projection(clip.vision_model(images).pooler_output), dim=-1)


@torch.no_grad()
def caption_ranks(
    clip: CLIPModel,
    tokenizer: CLIPTokenizer,
    images: torch.Tensor,
    candidates: list[str],
    truth: torch.Tensor,
) -> torch.Tensor:
    """Rank (N,) of each picture's own caption, 0 best, among ``candidates``."""
    text = embed_text(clip, tokenize(tokenizer, [f"icon of {name}" for name in candidates]).to(clip.device))
    scores = (embed_images(clip, images.to(clip.device)) @ text.T).cpu()  # (N, candidates)
    return (scores > scores.gather(1, truth[:, None])).sum(1)

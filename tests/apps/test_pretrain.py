"""The stages that made the base, on a handful of icons and a few steps."""

import hashlib
import io
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import BertConfig, BertModel, BertTokenizer

from conftest import draw_pairs
from powersteer import PowersteerError
from powersteer.apps.pretrain import evaluate, stages, text
from powersteer.apps.pretrain import fit as fitting
from powersteer.apps.pretrain import icons as icons_module
from powersteer.apps.pretrain import snapshot as snapshots
from powersteer.apps.pretrain import teacher as teachers
from powersteer.apps.pretrain.clip import caption_ranks
from powersteer.apps.pretrain.config import PretrainConfig
from powersteer.apps.pretrain.fit import FitConfig, Session, fit
from powersteer.apps.pretrain.icons import (
    DataConfig,
    Icon,
    IconSource,
    _names,
    build_icons,
    captions,
    fetch_icons,
    is_held_out,
    load_icons,
)
from powersteer.apps.pretrain.snapshot import pack, unpack
from powersteer.apps.pretrain.stages import pretrain
from powersteer.apps.pretrain.teacher import KEPT, KeptTeacher, MiniLM, keep, load_teacher
from powersteer.apps.pretrain.text import tokenize
from powersteer.apps.pretrain.unet import UNetConfig, draw_weights
from powersteer.apps.pretrain.vae import augment, crop, psnr
from powersteer.backbones.load import load_base, load_clip
from powersteer.core.config import build_config, load_config

SESSION = Session(0, torch.device("cpu"))
BODY = '<path fill="#2F88FF" stroke="#000" stroke-width="4" d="M4 4h{w}v{h}H4z"/>'


def icon_package(npm_dir: Path, package: str, slugs: list[str], **extra) -> None:
    folder = npm_dir / "node_modules" / package
    folder.mkdir(parents=True)
    icons = {slug: {"body": BODY.format(w=10 + i % 7, h=8 + i % 5)} for i, slug in enumerate(slugs)}
    (folder / "package.json").write_text('{"version": "1.0.0"}')
    (folder / "icons.json").write_text(json.dumps({"icons": icons, "width": 24, "height": 24}))
    (folder / "info.json").write_text(
        json.dumps({"author": {"name": "Somebody", "url": "https://example.org"}, "license": {"spdx": "MIT"}})
    )
    for name, content in extra.items():
        (folder / f"{name}.json").write_text(json.dumps(content))


SLUGS = [
    "fox-face",
    "dog-face",
    "red-apple",
    "house",
    "four-oclock",
    "star-2",
    "flag-japan",
    "man-dark-skin-tone",
]


@pytest.fixture
def icons_dir(tmp_path):
    stage = tmp_path / "data"
    names = [
        f"thing-{word}"
        for word in ["ash", "birch", "cedar", "elm", "fir", "hazel", "ivy", "larch", "maple", "oak", "palm", "rose"]
    ]
    icon_package(stage / "npm", "@icons/a", [*SLUGS, *names], metadata={"categories": {"Flags": ["house"]}})
    icon_package(stage / "npm", "@icons/b", ["foxface", "zzz", *names])
    return stage


def data_config():
    return DataConfig(
        sources=[
            IconSource(package="@icons/a@1.0.0", style="alpha"),
            IconSource(package="@icons/b@1.0.0", style="beta", squashed_names=True, recolour="#2F88FF"),
        ],
        held_out_per_mille=200,
    )


def test_names_skin_tones_flags_and_excluded_categories(icons_dir):
    source = data_config().sources[0]
    names = _names(source, icons_dir / "npm" / "node_modules" / "@icons" / "a", ["Flags"])
    assert names["fox-face"] == "fox" and names["star-2"] == "star" and names["thing-oak"] == "thing oak"
    assert not {"flag-japan", "man-dark-skin-tone", "house"} & set(names)
    squashed = _names(data_config().sources[1], icons_dir / "npm" / "node_modules" / "@icons" / "b", [])
    assert squashed == {"foxface": "fox", "zzz": "zzz"}


def test_icons_are_drawn_split_by_name_and_credited(icons_dir):
    build_icons(data_config(), icons_dir)
    icons = load_icons(icons_dir)
    assert icons.pixels.shape[1:] == (3, 64, 64) and len(icons.icons) == len(icons.pixels)
    by_name = {icon.name: icon for icon in icons.icons}
    assert not by_name["four o’clock" if "four o’clock" in by_name else "four o'clock"].mirrored
    assert by_name["fox"].mirrored
    assert all(icon.held_out == is_held_out(icon.name, 200) for icon in icons.icons)
    assert 0 < sum(icon.held_out for icon in icons.icons) < len(icons.icons)
    first = icons.pixels[[i.name for i in icons.icons].index("fox")]
    assert first[:, 0, 0].tolist() == [255] * 3 and first[:, 24, 24].tolist() == [0x2F, 0x88, 0xFF]
    notices = json.loads((icons_dir / "notices.json").read_text())
    assert notices["@icons/a@1.0.0"]["licence"] == "MIT" and notices["@icons/a@1.0.0"]["pictures"] > 10


def test_a_folder_of_captioned_pictures_is_a_source_too(tmp_path):
    folder = draw_pairs(tmp_path / "pairs", 3, size=64)
    build_icons(DataConfig(sources=[IconSource(folder=folder, style="box")]), tmp_path / "data")
    icons = load_icons(tmp_path / "data")
    assert [(icon.name, icon.style) for icon in icons.icons] == [("a fox", "box")] * 3
    for i, pixels in enumerate(icons.pixels):
        with Image.open(folder / "images" / f"{i}.png") as picture:
            assert np.array_equal(pixels.permute(1, 2, 0).numpy(), np.asarray(picture))
    notices = json.loads((tmp_path / "data" / "notices.json").read_text())
    assert notices == {str(folder): {"pictures": 3, "use": "all"}}


def test_a_source_without_a_place_and_a_recipe_without_its_parts_are_refused(tmp_path):
    with pytest.raises(PowersteerError, match="give either package or folder"):
        build_config({"sources": [{"style": "box"}]}, DataConfig)
    with pytest.raises(PowersteerError, match="give either package or folder"):
        build_config({"sources": [{"style": "box", "folder": tmp_path, "package": "a"}]}, DataConfig)
    with pytest.raises(PowersteerError, match="give clip and vae, or init_from"):
        recipe(tmp_path, clip=None)


def test_another_recipe_and_another_version_do_not_take_what_is_there(icons_dir, monkeypatch):
    build_icons(data_config(), icons_dir)
    build_icons(data_config(), icons_dir)  # nothing to do
    other = data_config().model_copy(update={"resolution": 32})
    with pytest.raises(PowersteerError, match="were drawn by another recipe: give another output_dir"):
        build_icons(other, icons_dir)
    (icons_dir / "made-from.json").unlink()
    build_icons(other, icons_dir)
    assert load_icons(icons_dir).pixels.shape[1:] == (3, 32, 32)
    (icons_dir / "made-from.json").unlink()
    monkeypatch.setattr(shutil, "which", lambda _: None)
    newer = {"sources": [{"package": "@icons/a@1.0.1", "style": "alpha"}]}
    with pytest.raises(PowersteerError, match=r"npm is needed to fetch @icons/a@1\.0\.1"):
        build_icons(build_config(newer, DataConfig), icons_dir)


def test_pictures_drawn_by_several_processes_keep_their_names(icons_dir, tmp_path, monkeypatch):
    build_icons(data_config(), icons_dir)
    monkeypatch.setattr(icons_module, "FEW", 3)
    shutil.copytree(icons_dir / "npm", tmp_path / "again" / "npm")
    build_icons(data_config(), tmp_path / "again")
    first, again = load_icons(icons_dir), load_icons(tmp_path / "again")
    assert first.icons == again.icons and torch.equal(first.pixels, again.pixels)


def test_missing_npm_is_one_clear_error(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(PowersteerError, match="npm is needed to fetch @icons/a"):
        build_icons(data_config(), tmp_path)


def test_captions_with_and_without_style():
    assert captions("fox", "noto")[:3] == ["fox", "a fox", "icon of fox"]
    assert "noto icon of fox" in captions("fox", "noto")


def test_augmentation_is_seeded_stays_in_range_and_keeps_white_paper():
    images = torch.ones(8, 3, 64, 64)
    images[:, 0, 20:40, 20:40] = -1
    first, again = (augment(images, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, again) and first.abs().max() <= 1.0001
    assert (first[:, :, 0, 0] == 1).all()


def test_psnr_is_its_closed_form():
    a = torch.zeros(2, 3, 8, 8)
    b = torch.stack([torch.full((3, 8, 8), 0.2), torch.full((3, 8, 8), 0.02)])
    wanted = np.mean([10 * np.log10(4 / 0.04), 10 * np.log10(4 / 0.0004)])
    assert psnr(a, b) == pytest.approx(wanted, abs=1e-3)


def recipe(root: Path, **changes):
    length = {"steps": 2, "batch_size": 2, "learning_rate": 1e-3, "report_every": 1}
    values = {
        "output_dir": root,
        "data": data_config().model_dump(),
        "tokenizer": {"vocab_size": 700},
        "clip": {**length, "hidden_size": 64, "text_layers": 1, "vision_layers": 1, "word_batch_size": 2},
        "vae": {**length, "block_out_channels": [8, 8, 8], "norm_num_groups": 4},
        "unet": {
            **length,
            "block_out_channels": [16, 32],
            "attention_levels": [False, True],
            "attention_head_dim": [1, 1],
            "norm_num_groups": 8,
            "num_inference_steps": 2,
            "sample_prompts": ["fox"],
        },
    }
    return build_config({**values, **changes}, PretrainConfig)


@pytest.fixture
def teacher(tmp_path, monkeypatch):
    """A tiny real BERT in the place of the 80 MB one."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "fox", "house", "tree", "icon", "water"]
    folder = tmp_path / "teacher"
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=len(words), **size)).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    monkeypatch.setattr(teachers, "_folder", lambda: folder)
    return MiniLM()


def test_teacher_embeddings_ignore_the_padding(teacher):
    alone, padded = teacher.embed(["fox"]), teacher.embed(["fox", "house tree icon water"])
    torch.testing.assert_close(alone[0], padded[0])
    torch.testing.assert_close(padded.norm(dim=1), torch.ones(2))
    assert teacher.words() == ["fox", "house", "tree", "icon", "water"]


def test_the_tokenizer_is_the_same_each_time_and_kept(icons_dir, teacher, tmp_path):
    build_icons(data_config(), icons_dir)
    icons, config = fetch_icons(data_config(), icons_dir), text.TokenizerConfig(vocab_size=700)
    assert icons == load_icons(icons_dir).icons
    first, *others = (
        text.train_tokenizer(config, icons, teacher, tmp_path / name) for name in ("first", "second", "third")
    )
    content = (tmp_path / "first" / "tokenizer.json").read_bytes()
    assert all((tmp_path / name / "tokenizer.json").read_bytes() == content for name in ("second", "third"))
    assert all(other("a fox").input_ids == first("a fox").input_ids for other in others)
    assert first("a fox").input_ids[1:-1] == [first.get_vocab()["a</w>"], *first("fox").input_ids[1:-1]]
    before = (tmp_path / "first" / "tokenizer.json").stat().st_mtime_ns
    text.train_tokenizer(config, icons, teacher, tmp_path / "first")
    assert (tmp_path / "first" / "tokenizer.json").stat().st_mtime_ns == before
    assert len(text.train_tokenizer(text.TokenizerConfig(vocab_size=650), icons, teacher, tmp_path / "first")) <= 650


@pytest.mark.parametrize(
    "content", [b"", b"PK", {"model": 5}, {"model": {}, "optimizer": {}, "ema": {}, "step": 1}, [1]]
)
def test_a_damaged_checkpoint_of_a_stage_is_refused(tmp_path, content):
    file = tmp_path / "checkpoint.pt"
    file.write_bytes(content) if isinstance(content, bytes) else torch.save(content, file)
    model = torch.nn.Linear(2, 2)
    before = model.weight.clone()
    config = FitConfig(steps=1, batch_size=1, learning_rate=1e-3, optimizer="adamw")
    with pytest.raises(
        PowersteerError, match=r"checkpoint.pt is (truncated or no|of another recipe, or damaged)"
    ) as error:
        fit(tmp_path, config, model, None, None, SESSION)
    assert "\n" not in str(error.value) and torch.equal(model.weight, before)


def test_damaged_icons_are_refused(icons_dir):
    build_icons(data_config(), icons_dir)
    content = (icons_dir / "icons.safetensors").read_bytes()
    listed = (icons_dir / "icons.jsonl").read_text()
    for text_, pixels, told in (
        (listed, content[:-5], "is truncated or no checkpoint"),
        (listed + '{"name": 5', content, "is not JSON"),
        (listed + '{"wings": 5}', content, "is damaged"),
        (listed.split("\n", 1)[1], content, "remove both"),
    ):
        (icons_dir / "icons.jsonl").write_text(text_)
        (icons_dir / "icons.safetensors").write_bytes(pixels)
        with pytest.raises(PowersteerError, match=told):
            load_icons(icons_dir)


def test_crops_are_squares_of_their_pictures():
    images = torch.arange(2 * 3 * 16 * 16).reshape(2, 3, 16, 16).float()
    pieces = crop(images, 8, torch.Generator().manual_seed(0))
    assert pieces.shape == (2, 3, 8, 8)
    for image, piece in zip(images, pieces, strict=True):
        y, x = divmod(int(piece[0, 0, 0]) % 256, 16)
        assert torch.equal(piece, image[:, y : y + 8, x : x + 8])


def test_what_the_teacher_said_serves_without_it(teacher, tmp_path, monkeypatch):
    keep(teacher, ["red fox", "fox", "tree"], tmp_path / KEPT)
    wanted = teacher.embed(["red fox", "water"])
    monkeypatch.setattr(teachers, "_folder", None)  # it is not asked any more
    kept = load_teacher(tmp_path)
    assert kept.words() == ["fox", "house", "tree", "icon", "water"]
    assert (kept.embed(["red fox", "water"]) * wanted).sum(1).min() > 0.9999
    with pytest.raises(PowersteerError, match="does not know 'wolf': it was made for another recipe"):
        kept.embed(["fox", "wolf"])
    (tmp_path / KEPT).write_bytes((tmp_path / KEPT).read_bytes()[:-3])
    with pytest.raises(PowersteerError, match="is damaged"):
        KeptTeacher(tmp_path / KEPT)


class Line:
    """A stage that learns y = 3x, as `fit` takes it."""

    def __init__(self, folder, **config):
        values = {"steps": 60, "batch_size": 1, "learning_rate": 0.3, "optimizer": "adamw", "report_every": 20} | {
            "warmup_steps": 1,
            "ema_decay": 0.9,
        }
        torch.manual_seed(0)
        self.folder, self.config, self.model = folder, FitConfig(**{**values, **config}), torch.nn.Linear(1, 1)
        self.steps: list[int] = []

    def fit(self, session=SESSION):
        def loss(step, generator):
            self.steps.append(step)
            x = torch.rand(8, 1, generator=generator)
            return (self.model(x) - 3 * x).square().mean(), {}

        fit(self.folder, self.config, self.model, loss, lambda _: {"slope": self.model.weight.item()}, session)
        return self.model.weight.detach().clone()


def test_a_stage_goes_on_bit_for_bit_from_its_checkpoint_and_from_its_weights_without_one(tmp_path):
    whole = Line(tmp_path / "whole").fit()
    assert abs(whole.item() - 3) < 0.3
    half = Line(tmp_path / "half")

    def stop():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        half.fit(Session(0, torch.device("cpu"), saved=stop))
    again = Line(tmp_path / "half")
    assert torch.equal(again.fit(), whole) and again.steps == list(range(20, 60))
    (tmp_path / "half" / "checkpoint.pt").unlink()
    last = Line(tmp_path / "half")
    torch.testing.assert_close(last.fit(), whole, atol=2e-3, rtol=0)  # half precision
    assert last.steps == []
    further = Line(tmp_path / "half", steps=61)
    further.fit()
    assert further.steps == [60]
    (tmp_path / "half" / "weights.safetensors").write_bytes(b"?")
    (tmp_path / "half" / "checkpoint.pt").unlink()
    with pytest.raises(PowersteerError, match=r"weights\.safetensors"):
        Line(tmp_path / "half").fit()


def test_a_stage_ends_in_time_and_its_learning_rate_with_it(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(fitting.time, "monotonic", lambda: now[0])
    stage = Line(tmp_path, steps=10**6, minutes=1.0, decay_share=0.5, warmup_steps=1, report_every=10**6)
    rates = []
    step = torch.optim.AdamW.step
    monkeypatch.setattr(
        torch.optim.AdamW, "step", lambda self, *_: (rates.append(self.param_groups[0]["lr"]), step(self))[1]
    )
    monkeypatch.setattr(fitting.EMAModel, "step", lambda self, _: now.__setitem__(0, now[0] + 6))
    stage.fit()
    assert len(stage.steps) == 10  # of six seconds each
    assert rates == pytest.approx([0.3 * share for share in (1, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2)])
    # What was spent counts in the next command, and a deadline counts anew.
    stage = Line(tmp_path, steps=10**6, minutes=2.0)
    stage.fit(Session(0, torch.device("cpu"), deadline=now[0] + 30))
    assert len(stage.steps) == 5
    (tmp_path / "none").mkdir()
    with pytest.raises(PowersteerError, match="there was no time for one step of none: give more minutes"):
        Line(tmp_path / "none").fit(Session(0, torch.device("cpu"), deadline=now[0]))


def test_pieces_are_cut_put_together_and_checked(tmp_path, monkeypatch):
    root, pieces, elsewhere = tmp_path / "root", tmp_path / "pieces", tmp_path / "elsewhere"
    for name in ("tokenizer/vocab.json", "vae/weights.safetensors", "vae/checkpoint.pt", "unet/log.jsonl"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode() * 5000)
    monkeypatch.setattr(snapshots, "PIECE_BYTES", 100_000)
    unpack(pieces, elsewhere)  # nothing there yet
    pack(root, pieces)
    names = sorted(path.name for path in pieces.iterdir())
    assert (
        len(names) == 3 and names[0].endswith("-1-of-3") and max(p.stat().st_size for p in pieces.iterdir()) == 100_000
    )
    (elsewhere / "tokenizer").mkdir(parents=True)
    (elsewhere / "tokenizer" / "vocab.json").write_bytes(b"mine")
    unpack(pieces, elsewhere)
    assert (elsewhere / "tokenizer" / "vocab.json").read_bytes() == b"mine"
    assert (elsewhere / "vae" / "weights.safetensors").read_bytes() == b"vae/weights.safetensors" * 5000
    assert not (elsewhere / "vae" / "checkpoint.pt").exists()
    (root / "unet" / "weights.safetensors").write_bytes(b"new")
    pack(root, pieces)
    assert not {path.name for path in pieces.iterdir()} & set(names)
    last = sorted(pieces.iterdir())[-1]
    content = bytearray(last.read_bytes())
    content[-1] ^= 1
    last.write_bytes(content)
    with pytest.raises(PowersteerError, match=r"snapshot-[0-9a-f]{8}-1-of-3, or another piece of it, is damaged"):
        unpack(pieces, tmp_path / "third")
    last.unlink()
    with pytest.raises(PowersteerError, match=f"lacks {last.name}"):
        unpack(pieces, tmp_path / "third")
    assert not (tmp_path / "third").exists()


def test_pieces_write_nothing_outside_of_the_folder(tmp_path):
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as tar:
        member = tarfile.TarInfo("../outside")
        member.size = 4
        tar.addfile(member, io.BytesIO(b"evil"))
    name = hashlib.sha256(content.getvalue()).hexdigest()[:8]
    (tmp_path / "pieces").mkdir()
    (tmp_path / "pieces" / f"snapshot-{name}-1-of-1").write_bytes(content.getvalue())
    with pytest.raises(PowersteerError, match=r"cannot unpack \.\./outside"):
        unpack(tmp_path / "pieces", tmp_path / "root")
    assert not (tmp_path / "outside").exists()


def test_a_resolution_that_the_vae_cannot_halve_so_often_is_refused(tmp_path):
    with pytest.raises(PowersteerError, match="one latent of 4 pixels a side, of which 66 is no multiple"):
        recipe(tmp_path, data={**data_config().model_dump(), "resolution": 66})


@pytest.mark.slow
def test_all_stages_make_a_base_that_loads_and_can_go_on(icons_dir, teacher, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function: function)
    monkeypatch.setattr(evaluate, "SEEDS", 1)
    root = icons_dir.parent
    base = pretrain(recipe(root))
    pipe = load_base(str(base))
    assert pipe("a fox", num_inference_steps=2).images[0].size == (64, 64)
    assert {file.name for file in (root / "unet").iterdir()} >= {
        "checkpoint.pt",
        "log.jsonl",
        "sample-000002.png",
    }
    clip, tokenizer = load_clip(base)
    tokens = tokenize(tokenizer, ["a fox"])
    torch.testing.assert_close(clip.text_model(tokens).last_hidden_state, pipe.text_encoder(tokens)[0])
    ranks = caption_ranks(clip, tokenizer, torch.randn(3, 3, 64, 64), ["a", "b", "c"], torch.tensor([0, 1, 2]))
    assert ranks.min() >= 0 and ranks.max() <= 2

    # The same command does nothing over again; another one goes on from the finished base.
    logged = (root / "unet" / "log.jsonl").read_text()
    pretrain(recipe(root))
    assert (root / "unet" / "log.jsonl").read_text() == logged
    other = root / "other"
    shutil.copytree(icons_dir, other / "data")
    further = load_base(str(pretrain(recipe(other, init_from=str(base), clip=None, vae=None))))
    vae = further.vae.state_dict()
    assert all(torch.equal(tensor, vae[name]) for name, tensor in pipe.vae.state_dict().items())
    assert any(not torch.equal(a, b) for a, b in zip(further.unet.parameters(), pipe.unet.parameters(), strict=True))


@pytest.mark.slow
def test_what_was_learned_in_minutes_elsewhere_becomes_the_same_base_here(icons_dir, teacher, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function: function)
    monkeypatch.setattr(evaluate, "SEEDS", 1)
    monkeypatch.setattr(stages, "FINISHING_SECONDS", 0)
    root, here, pieces = icons_dir.parent / "there", icons_dir.parent / "here", icons_dir.parent / "pieces"
    data = {**data_config().model_dump(), "resolution": 32}
    for place in (root, here):
        shutil.copytree(icons_dir, place / "data")
    long = {**recipe(root).unet.model_dump(), "steps": 10**6, "report_every": 2}
    made = pretrain(recipe(root, data=data, unet=long, minutes=0.2), pieces)
    there = load_base(str(made))
    assert there("a fox", num_inference_steps=2).images[0].size == (32, 32)
    finished = load_base(str(pretrain(recipe(here, data=data, unet=long, minutes=0), pieces)))
    for part in ("unet", "vae", "text_encoder"):
        mine, theirs = getattr(finished, part).state_dict(), getattr(there, part).state_dict()
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in mine.items()), part
    assert finished.vae.config.scaling_factor == pytest.approx(there.vae.config.scaling_factor, rel=1e-3)


def test_how_often_each_picture_is_drawn():
    icons = [
        Icon(name=name, style=style, use="all", mirrored=False, held_out=False)
        for name, style in (("fox", "noto"), ("woman dancing", "noto"), ("fox", "blob"), ("man", "twemoji"))
    ]
    config = UNetConfig(
        steps=1, batch_size=1, learning_rate=1e-3, people_weight=0.25, style_weights={"noto": 20, "blob": 0}
    )
    assert draw_weights(config, icons).tolist() == [20, 5, 0, 0.25]


def test_a_style_that_no_source_has_is_refused():
    recipe = Path(__file__).parents[2] / "configs" / "powersteer-tiny.yaml"
    with pytest.raises(PowersteerError, match=r"style_weights names \['notto'\]; the sources' styles are"):
        load_config(recipe, PretrainConfig, ["unet.style_weights={notto: 20}"])

"""docs/coco17.md: its very commands, from a COCO root to a score, on a miniature of everything."""

import json
import re
import shlex

import numpy as np
import yaml
from PIL import Image, ImageDraw

from powersteer.core.config import load_config
from powersteer.data.layouts import read_rows
from powersteer.training.config import TrainConfig


def write_coco(root, train=12, validation=5):
    """Discs on a ground, wider than high, with COCO's captions; the last of val2017 lies in train2017, too."""
    chance, number = np.random.default_rng(0), 0
    (root / "annotations").mkdir(parents=True)
    for folder, count in (("train2017", train), ("val2017", validation)):
        (root / folder).mkdir()
        images, captions = [], []
        for _ in range(count):
            number += 1
            name = f"{number:012d}.jpg"
            ground, disc = (tuple(chance.integers(0, 255, 3).tolist()) for _ in range(2))
            picture = Image.new("RGB", (64, 48), ground)
            left, top = chance.integers(0, 30, 2).tolist()
            ImageDraw.Draw(picture).ellipse((left, top, left + 24, top + 16), fill=disc)
            picture.save(root / folder / name, quality=95)
            images.append({"id": number, "file_name": name, "width": 64, "height": 48})
            captions += [{"id": 2 * number + k, "image_id": number, "caption": f"{k} fish"} for k in range(2)]
        content = {"info": {}, "licenses": [], "images": images, "annotations": captions}
        (root / "annotations" / f"captions_{folder}.json").write_text(json.dumps(content))
    leaked = root / "val2017" / f"{number:012d}.jpg"
    (root / "train2017" / leaked.name).write_bytes(leaked.read_bytes())


def commands(rootpath):
    """Of the first block of the page."""
    text = (rootpath / "docs" / "coco17.md").read_text()
    block = re.search(r"```console\n(.*?)```", text, re.DOTALL)[1]
    return [shlex.split(line)[1:] for line in block.splitlines()]


def test_the_commands_of_the_page(run, request, tmp_path, monkeypatch, base_dir, clip_dir):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(request.config.rootpath / "configs")
    write_coco(tmp_path / "coco")
    small = {
        "prepare": ["--extractor", "canny", "--resolution", "32", "--workers", "1"],
        "train": [
            f"pretrained_model_name_or_path={base_dir}",
            "max_train_steps=3",
            "train_batch_size=4",
            "validation_split=0.35",
            "dataloader_num_workers=0",
            "num_validation_images=0",
            "mixed_precision=no",
        ],
        "generate": ["--base", str(base_dir), "--steps", "2"],
        "evaluate": ["--clip", str(clip_dir)],
    }

    def done(words):
        code, out, err = run(*(word.replace("inception", "clip") for word in words))
        assert code == 0, err
        return out

    steps = commands(request.config.rootpath)
    assert [words[0] for words in steps] == ["prepare", "train", "generate", "evaluate"]
    for words in steps:
        if words[0] == "train":
            plan = json.loads(done([*words, *small["train"], "--dry-run", "--json"]))
            assert plan["optimizer_updates"] == 3 and plan["config"]["learning_rate"] == 1e-5
        done([*words, *small[words[0]]])

    names = {
        s: [row.image.file.stem for row in read_rows(tmp_path / "pairs/coco17" / s)] for s in ("train", "validation")
    }
    assert [int(name) for name in names["train"]] == list(range(1, 13))  # and not the leaked one
    assert [int(name) for name in names["validation"]] == list(range(13, 18))
    assert "000000000017" in (tmp_path / "pairs/coco17/rejected.csv").read_text()
    assert (tmp_path / "runs/coco17-sketch/diffusion_pytorch_model.safetensors").exists()
    made = sorted((tmp_path / "generated/coco17").glob("0*.png"))
    settings = json.loads(Image.open(made[4]).text["powersteer"])
    assert len(made) == 5 and settings["prompt"] == "0 fish" and settings["guidance_scale"] == 9
    written = json.loads((tmp_path / "coco17.json").read_text())
    assert written["figures"]["FD, clip"]["protocol"]["pictures"] == {"real": 5, "generated": 5}
    assert "KD, clip" in written["figures"] and "2,048" in written["warnings"][0]
    before = made[0].stat().st_mtime_ns
    for words in steps:  # each goes on where it stopped: there is nothing left to do
        done([*words, *small[words[0]]])
    assert made[0].stat().st_mtime_ns == before


def test_the_configuration_is_the_reference_set_up_and_holds_nothing_of_val2017(request):
    file = request.config.rootpath / "configs" / "coco17-sketch.yaml"
    config = load_config(file, TrainConfig, [])
    assert (config.learning_rate, config.train_batch_size, config.num_train_epochs) == (1e-5, 16, 16)
    assert config.lr_scheduler == "constant" and config.prompt_mix and config.network == "paper"
    assert config.validation_data_dir is None and "train" in config.train_data_dir
    assert 235 <= config.validation_split * 118_287 <= 238
    assert not {"learning_rate", "train_batch_size"} & set(yaml.safe_load(file.read_text()))  # they are the preset's

"""Every door for foreign bytes is fuzzed: what comes out is a value that the rest may rely on, or the one error.

Inputs are drawn by Hypothesis, the same ones each time: whole files that were changed in one to three places (cut out,
put in twice, or replaced by other bytes or by what parsers trip over), and bytes of no meaning at all.
"""

import io
import json
import math
import shutil
import tarfile
import zipfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from authors import authors_names, network
from conftest import draw_pairs
from powersteer.adapters.bps.original import load_original
from powersteer.adapters.load import load_network
from powersteer.apps.studio.recipe import parse
from powersteer.apps.studio.uploads import unpack_pairs, write_drawing
from powersteer.backbones.load import load_base
from powersteer.conditions.arrays import read_features
from powersteer.conditions.palettes import Palette
from powersteer.core.config import load_config
from powersteer.core.errors import PowersteerError
from powersteer.core.images import open_picture
from powersteer.data.conditioning import conditioning_of
from powersteer.data.layouts import Columns, read_rows
from powersteer.data.stream import read_shard
from powersteer.denoising.sampling.jobs import read_manifest
from powersteer.denoising.sampling.metadata import SETTINGS_KEY, read_metadata
from powersteer.training.config import TrainConfig

pytestmark = pytest.mark.slow

TRIES = {
    "metadata": 600,
    "prompt": 300,
    "dataset": 400,
    "manifest": 600,
    "configuration": 600,
    "palette": 300,
    "shard": 400,
    "zip": 400,
    "settings": 400,
    "picture": 500,
    "drawing": 300,
    "features": 500,
    "adapter_config": 300,
    "adapter_weights": 200,
    "checkpoint": 200,
    "base": 30,  # and as many for each of its files
}
"""Inputs for each door."""

STUMBLES = [
    *(b"[" * 2000, b"{" * 50, b"\0", b"\xff", b"\xef\xbb\xbf", b"\xff\xfe", b"\r", b"\xe2\x80\xa8", b"\\ud83d"),
    *(b"NaN", b"-Infinity", b"1e999", b"-1", b"9" * 400, b"9" * 20, b"0.5", b"null", b"true", b"[]", b"{}", b'""'),
    *(b"../../../etc/passwd", b"/", b"a" * 5000, b"*a", b"&a [*a]", b": ", b"<<: ", b"!!python/name:os.system"),
    *(b"\x1b[31m", b"\n- ", b"'"),
]


@st.composite
def spoilt(draw, whole):
    """A whole file, changed in one to three places."""
    content = bytes(whole)
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(content)))
        end = min(len(content), start + draw(st.integers(0, 40)))
        part = draw(st.one_of(st.sampled_from(STUMBLES), st.binary(max_size=12), st.just(content[start:end] * 2)))
        content = content[:start] + part + content[end:]
    return content[: draw(st.integers(0, len(content)))] if draw(st.integers(0, 9)) == 0 else content


def fuzz(door, whole, read):
    """Try a door with so many inputs made of the whole ones; a value is checked by what reads it."""
    taken = []

    def once(content):
        with suppress(PowersteerError):
            read(content)
            taken.append(content)

    inputs = st.one_of(*(spoilt(one) for one in whole), st.binary(max_size=200))
    drawn = settings(
        max_examples=TRIES[door],
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    for one in whole:
        read(one)  # unspoilt, it is taken
    drawn(given(inputs)(once))()
    print(f"{door}: {TRIES[door]} inputs, {len(taken)} taken")


@pytest.fixture
def folder(tmp_path):
    return draw_pairs(tmp_path / "pairs", 3)


def check_rows(rows):
    for row in rows:
        assert all(isinstance(text, str) and text.encode() is not None for text in row.texts)
        with suppress(PowersteerError):
            assert row.image.picture().mode == "RGB"
            assert row.conditioning_image.condition(1, "sketch").mode == "L"


def test_metadata(folder):
    def read(content):
        (folder / "metadata.jsonl").write_bytes(content)
        check_rows(read_rows(folder))

    fuzz("metadata", [(folder / "metadata.jsonl").read_bytes()], read)


def test_prompts_of_controlnet(folder):
    rows = [{"source": f"drawings/{i}.png", "target": f"images/{i}.png", "prompt": "a fox"} for i in range(3)]
    (folder / "metadata.jsonl").unlink()

    def read(content):
        (folder / "prompt.json").write_bytes(content)
        check_rows(read_rows(folder))

    fuzz("prompt", ["\n".join(map(json.dumps, rows)).encode()], read)


def test_descriptions_of_data_sets(folder):
    said = {"kind": "segmentation", "channels": 3, "range": [0, 1], "palette": {"a": [1, 2, 3]}}

    def read(content):
        (folder / "dataset.json").write_bytes(content)
        found = conditioning_of(str(folder))
        assert isinstance(found.kind, str) and found.channels > 0

    fuzz("dataset", [json.dumps({"name": "x", "conditioning": said}).encode()], read)


def test_manifests(tmp_path):
    rows = [{"prompt": "a fox", "condition": "a.png", "seed": 3}]
    rows.append({"prompt": "b", "condition": ["b.png"], "negative_prompt": "c"})

    def read(content):
        (tmp_path / "it.jsonl").write_bytes(content)
        for job in read_manifest(tmp_path / "it.jsonl"):
            assert 0 <= job.seed < 2**63 and job.condition

    fuzz("manifest", ["\n".join(map(json.dumps, rows)).encode()], read)


def test_configurations(request, tmp_path):
    shipped = [request.config.rootpath / "configs" / f"{name}.yaml" for name in ("few-shot", "many-pairs")]

    def read(content):
        (tmp_path / "it.yaml").write_bytes(content)
        made = load_config(tmp_path / "it.yaml", TrainConfig, ["train_data_dir=x", "output_dir=y"])
        assert all(math.isfinite(value) for value in made.model_dump().values() if isinstance(value, float))

    fuzz("configuration", [file.read_bytes() for file in shipped], read)


def test_palettes(tmp_path):
    def read(content):
        (tmp_path / "it.json").write_bytes(content)
        assert Palette.find(str(tmp_path / "it.json")).colours.shape[1:] == (3,)

    fuzz("palette", [b'{"sky": [1, 2, 3], "sea": [4, 5, 6]}'], read)


def tar_of(folder, kind=tarfile.USTAR_FORMAT):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=kind) as tar:
        for i in range(2):
            tar.add(folder / "images" / f"{i}.png", f"{i}.image.png")
            tar.add(folder / "drawings" / f"{i}.png", f"{i}.conditioning_image.png")
            entry = tarfile.TarInfo(f"{i}.json")
            entry.size = len(b'{"text": "a fox"}')
            tar.addfile(entry, io.BytesIO(b'{"text": "a fox"}'))
    return buffer.getvalue()


def test_shards(folder, tmp_path):
    (tmp_path / "shards").mkdir()

    def read(content):
        (tmp_path / "shards" / "0.tar").write_bytes(content)
        with suppress(PowersteerError):
            check_rows(read_rows(tmp_path / "shards"))
        check_rows(read_shard(str(tmp_path / "shards" / "0.tar"), Columns()))

    fuzz("shard", [tar_of(folder), tar_of(folder, tarfile.PAX_FORMAT)], read)
    assert [file.name for file in (tmp_path / "shards").iterdir()] == ["0.tar"]  # nothing was extracted


def test_zips(folder, tmp_path):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as packed:
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                packed.write(file, file.relative_to(folder).as_posix())
    (tmp_path / "room").mkdir()

    def read(content):
        (tmp_path / "it.zip").write_bytes(content)
        try:
            unpack_pairs(tmp_path / "it.zip", tmp_path / "room" / "pairs")
        except PowersteerError:
            assert not list((tmp_path / "room").iterdir())  # nothing is left of what was refused
            raise
        shutil.rmtree(tmp_path / "room" / "pairs")

    fuzz("zip", [buffer.getvalue()], read)
    assert {file.name for file in tmp_path.iterdir()} == {"pairs", "room", "it.zip"}


def test_settings_of_pictures(tmp_path):
    whole = {"adapter": ["sketch"], "scale": [1.0], "start": [0.0], "end": [1.0], "num_inference_steps": 6, "seed": 3}
    whole |= {"prompt": "a fox", "condition": ["drawing-1.png"], "guidance_scale": 3.0, "inverted": [True]}

    def read(content):
        info = PngInfo()
        info.add_text(SETTINGS_KEY, content.decode("latin-1"), zip=True)
        Image.new("L", (8, 8)).save(tmp_path / "it.png", pnginfo=info)
        made, job = parse(read_metadata(tmp_path / "it.png").settings)
        assert all(map(math.isfinite, (*made.scale, *made.start, *made.end, made.guidance_scale))) and job.seed >= 0

    fuzz("settings", [json.dumps(whole).encode()], read)


def encoded(kind, mode="RGB", **more):
    buffer = io.BytesIO()
    Image.effect_noise((24, 24), 50).convert(mode).save(buffer, kind, **more)
    return buffer.getvalue()


def test_pictures():
    kinds = [
        ("PNG", "RGB"),
        ("PNG", "RGBA"),
        ("PNG", "P"),
        ("JPEG", "RGB"),
        ("WEBP", "RGB"),
        ("GIF", "P"),
        ("BMP", "RGB"),
    ]
    kinds += [("TIFF", "RGB"), ("TIFF", "CMYK"), ("JPEG2000", "RGB"), ("PPM", "RGB")]
    whole = [encoded(*kind) for kind in kinds]

    def read(content):
        assert open_picture(content, "it").mode in ("L", "RGB", "RGBA")

    fuzz("picture", whole, read)


def test_drawings_of_the_canvas(tmp_path):
    def read(content):
        assert write_drawing(content, tmp_path / "it.png").exists()

    fuzz("drawing", [encoded("PNG")], read)


def test_feature_maps():
    whole = []
    for array in (np.ones((2, 4, 4), np.float32), np.ones((3, 2, 2), np.float16), np.ones((1, 2, 2), np.uint8)):
        buffer = io.BytesIO()
        np.save(buffer, array)
        whole.append(buffer.getvalue())

    def read(content):
        features = read_features(content, "it.npy")
        assert features.ndim == 3 and np.isfinite(features).all()

    fuzz("features", whole, read)


def check_network(network):
    assert all(bool(parameter.isfinite().all()) for parameter in network.parameters())


@pytest.mark.parametrize("file", ["config.json", "diffusion_pytorch_model.safetensors"])
def test_adapters(adapter_dir, file):
    def read(content):
        (adapter_dir / file).write_bytes(content)
        check_network(load_network(adapter_dir))

    fuzz("adapter_config" if file == "config.json" else "adapter_weights", [(adapter_dir / file).read_bytes()], read)


def test_checkpoints_of_the_authors(tmp_path):
    buffer = io.BytesIO()
    torch.save({"state_dict": authors_names(network("sketch"))}, buffer)

    def read(content):
        (tmp_path / "it.ckpt").write_bytes(content)
        _, weights = load_original(tmp_path / "it.ckpt", conditioning_channels=1)
        assert all(bool(tensor.isfinite().all()) for tensor in weights.values())

    fuzz("checkpoint", [buffer.getvalue()], read)


def test_bases(base_dir, tmp_path):
    """Every text file of a base, and its weights."""
    base = Path(shutil.copytree(base_dir, tmp_path / "base"))
    for file in sorted(file for file in base.rglob("*") if file.is_file()):
        whole = file.read_bytes()

        def read(content, file=file):
            file.write_bytes(content)
            pipe = load_base(str(base))
            for part in (pipe.unet, pipe.vae, pipe.text_encoder):
                check_network(part)

        fuzz("base", [whole], read)
        file.write_bytes(whole)

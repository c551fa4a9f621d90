"""Shards read in order: every pair once a round, and a resumed run sees what it would have."""

import io
import json
import tarfile
from collections import Counter
from itertools import islice

import pytest
import torch

from conftest import draw_pairs
from powersteer import BPSModel, PowersteerError
from powersteer.data import stream
from powersteer.data.layouts import Columns
from powersteer.data.order import Share
from powersteer.data.pairs import Pairs, Transform, Views
from powersteer.data.stream import StreamedPairs, list_shards, read_shard
from powersteer.training.run import train


@pytest.fixture
def shards_dir(tmp_path):
    """Twelve pairs in four shards."""
    source = draw_pairs(tmp_path / "source", 12)
    folder = tmp_path / "shards"
    folder.mkdir()
    for shard in range(4):
        with tarfile.open(folder / f"{shard:03d}.tar", "w") as tar:
            for i in range(3 * shard, 3 * shard + 3):
                members = {
                    "image.png": (source / "images" / f"{i}.png").read_bytes(),
                    "conditioning_image.png": (source / "drawings" / f"{i}.png").read_bytes(),
                    "json": json.dumps({"text": ["a fox", "the moon"], "generated_text": "two fish"}).encode(),
                }
                for kind, content in members.items():
                    info = tarfile.TarInfo(f"{i:04d}.{kind}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return folder


def streamed(folder, views=None):
    return StreamedPairs(
        list_shards(str(folder)),
        None,
        None,
        transform=Transform(),
        size=(32, 32),
        views=views or Views(random_flip=True),
        columns=Columns(),
    )


def names(batches, count):
    return [[sample.name for sample in batch] for batch in islice(batches, count)]


def test_shards_by_folder_pattern_and_range(shards_dir):
    files = [f"file://{shards_dir}/{i:03d}.tar" for i in range(4)]
    assert list_shards(str(shards_dir)) == files == list_shards(f"file://{shards_dir}")
    assert list_shards(f"{shards_dir}/00*.tar") == files
    assert list_shards(f"{shards_dir}/{{001..003}}.tar") == [f"{shards_dir}/{i:03d}.tar" for i in (1, 2, 3)]
    with pytest.raises(PowersteerError, match="there are no shards"):
        list_shards(str(shards_dir.parent / "none"))
    with pytest.raises(PowersteerError, match="cannot list the shards quark://x"):
        list_shards("quark://x/{0..1}.tar")


def test_a_streamed_pair_is_the_pair_of_the_folder(shards_dir):
    rows = list(read_shard(str(shards_dir / "001.tar"), Columns()))
    wanted = Pairs(shards_dir, (32, 32))
    assert [row.where for row in rows] == [row.where for row in wanted.rows[3:6]]
    assert rows[1].texts == ("a fox", "the moon") and rows[1].generated_text == "two fish"
    for one, other in zip(Transform()(rows[1], (32, 32)), wanted[4], strict=True):
        assert torch.equal(one, other)


def test_every_pair_comes_once_a_round_in_another_order(shards_dir):
    found = names(streamed(shards_dir).micro_batches(Share(4), 0, 0, 0), 6)
    first, second = ([name for batch in found[i : i + 3] for name in batch] for i in (0, 3))
    assert len(set(first)) == len(set(second)) == 12 and first != second
    assert found == names(streamed(shards_dir).micro_batches(Share(4), 0, 0, 0), 6)
    assert found != names(streamed(shards_dir).micro_batches(Share(4), 1, 0, 0), 6)


def test_processes_share_the_pairs(shards_dir):
    seen = Counter(
        name
        for process in range(2)
        for batch in names(streamed(shards_dir).micro_batches(Share(2, 1, 2, process), 0, 0, 0), 3)
        for name in batch
    )
    assert len(seen) == 12 and set(seen.values()) == {1}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_stream_goes_on_as_it_would_have(shards_dir, monkeypatch, workers):
    monkeypatch.setattr(stream, "SHUFFLE_BUFFER", 4)
    share = Share(2, accumulation=1)
    whole = names(streamed(shards_dir).micro_batches(share, 0, 0, workers), 9)
    for first in (1, 4, 7):
        assert names(streamed(shards_dir).micro_batches(share, 0, first, workers), 9 - first) == whole[first:], first


def test_what_is_wrong_with_a_shard_is_said(shards_dir):
    with pytest.raises(PowersteerError, match="4 shards are too few for 6 readers"):
        streamed(shards_dir).micro_batches(Share(1, 1, 3, 0), 0, 0, 2)
    (shards_dir / "002.tar").write_bytes((shards_dir / "002.tar").read_bytes()[:700])
    with pytest.raises(PowersteerError, match=r"cannot read the shard .*002.tar"):
        names(streamed(shards_dir).micro_batches(Share(4), 0, 0, 0), 3)
    with pytest.raises(PowersteerError, match=r"^cannot read the shard .*002.tar: .*$"):  # of a worker: one line too
        names(streamed(shards_dir).micro_batches(Share(4), 0, 0, 2), 3)


def test_training_on_a_stream_and_resuming_it(config, shards_dir, tmp_path):
    streaming = {"train_data_dir": str(shards_dir), "streaming": True, "random_flip": True, "prompt_mix": True}
    config = config.model_copy(update=streaming)
    train(config)
    part = config.model_copy(update={"output_dir": tmp_path / "parts", "max_train_steps": 4})
    train(part)
    train(part.model_copy(update={"max_train_steps": 8}))
    one, other = (
        BPSModel.from_pretrained(run / "checkpoint-8").state_dict() for run in (config.output_dir, tmp_path / "parts")
    )
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    states = [
        json.loads((run / "checkpoint-8" / "state.json").read_text()) for run in (config.output_dir, tmp_path / "parts")
    ]
    assert states[0]["order"] == states[1]["order"]

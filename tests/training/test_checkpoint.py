"""Nothing lost: checkpoints are whole or not there, and what damages one is said."""

import json
import shutil

import pytest
import torch

from powersteer import BPSModel, PowersteerError
from powersteer.training import checkpoint
from powersteer.training.checkpoint import damage, list_checkpoints
from powersteer.training.run import train


def names(folder):
    return [path.name for path in list_checkpoints(folder)]


def test_old_checkpoints_go(config):
    train(config.model_copy(update={"checkpointing_steps": 2, "checkpoints_total_limit": 2}))
    assert names(config.output_dir) == ["checkpoint-6", "checkpoint-8"]
    assert not [path for path in config.output_dir.iterdir() if path.name.startswith(".")]
    adapter = BPSModel.from_pretrained(config.output_dir / "checkpoint-8")  # an adapter as it is
    assert adapter.mid_output.weight.abs().max() > 0


@pytest.mark.parametrize("file", ["diffusion_pytorch_model.safetensors", "training.pt", "state.json", "config.json"])
def test_a_flipped_or_missing_byte_is_found_and_the_one_before_used_where_asked(config, file):
    train(config)
    longer = config.model_copy(update={"max_train_steps": 10})
    damaged = config.output_dir / "checkpoint-8" / file
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    wanted = rf"checkpoint-8 is damaged \({file} has changed\); resume_from_checkpoint=checkpoint-4 goes on"
    with pytest.raises(PowersteerError, match=wanted):
        train(longer)
    damaged.write_bytes(content[:-1])
    with pytest.raises(PowersteerError, match=wanted):
        train(longer)
    damaged.unlink()
    with pytest.raises(PowersteerError, match=rf"checkpoint-8 is damaged \({file} is missing\)"):
        train(longer)
    assert names(config.output_dir) == ["checkpoint-4", "checkpoint-8"]  # nothing was taken away
    assert train(longer.model_copy(update={"resume_from_checkpoint": "latest-intact"})).step == 10
    assert damage(config.output_dir / "checkpoint-8") is None  # written again on the way
    assert train(longer.model_copy(update={"resume_from_checkpoint": "checkpoint-8", "max_train_steps": 9})).step == 9
    with pytest.raises(PowersteerError, match=r"no checkpoint-7 in .*; there are: checkpoint-8, checkpoint-9$"):
        train(longer.model_copy(update={"resume_from_checkpoint": "checkpoint-7"}))


def test_without_resumption_nothing_is_mixed(config):
    train(config)
    anew = config.model_copy(update={"resume_from_checkpoint": None})
    with pytest.raises(PowersteerError, match="holds checkpoint-8 of an earlier run: give another output_dir"):
        train(anew)
    for folder in list_checkpoints(config.output_dir):
        shutil.rmtree(folder)
    assert train(anew).step == 8
    rows = [json.loads(line)["step"] for line in (config.output_dir / "log.jsonl").read_text().splitlines()]
    assert rows == [0, 4, 8]  # the log is that of the new run


@pytest.mark.parametrize("writer", ["save_pretrained", "torch.save", "replace"])
def test_a_full_disk_leaves_the_checkpoint_before(config, monkeypatch, writer):
    short = config.model_copy(update={"max_train_steps": 4})
    train(short)
    before = {file.name: file.read_bytes() for file in (config.output_dir / "checkpoint-4").iterdir()}
    full = OSError(28, "No space left on device")

    def fails(*_, **__):
        raise full

    if writer == "save_pretrained":
        monkeypatch.setattr(BPSModel, "save_pretrained", fails)
    elif writer == "torch.save":
        monkeypatch.setattr(checkpoint.torch, "save", fails)
    else:
        monkeypatch.setattr(checkpoint.os, "fsync", fails)
    with pytest.raises(PowersteerError, match="No space left on device"):
        train(config)
    monkeypatch.undo()
    assert {file.name: file.read_bytes() for file in (config.output_dir / "checkpoint-4").iterdir()} == before
    assert not list(config.output_dir.glob(".checkpoint*"))
    assert train(config).step == 8


def test_another_network_in_the_folder_is_refused(config):
    train(config)
    with pytest.raises(PowersteerError, match=r"holds a run with other settings: network was paper, now lite\. Give"):
        train(config.model_copy(update={"network": "lite", "max_train_steps": 9}))


def test_nothing_is_unpickled_unsafely(config):
    train(config)

    class Bomb:
        def __reduce__(self):
            return (pytest.fail, ("the checkpoint's code was run",))

    folder = config.output_dir / "checkpoint-8"
    torch.save({"optimizer": Bomb()}, folder / "training.pt")
    digests = json.loads((folder / "digests.json").read_text())
    digests["training.pt"] = checkpoint._digest(folder / "training.pt")
    (folder / "digests.json").write_text(json.dumps(digests))
    with pytest.raises(PowersteerError, match="checkpoint-8 is damaged"):
        train(config.model_copy(update={"max_train_steps": 9}))


def test_an_unwritable_folder_is_one_clear_error(config, tmp_path):
    (tmp_path / "file").write_text("somebody's")
    with pytest.raises(PowersteerError, match="cannot write to"):
        train(config.model_copy(update={"output_dir": tmp_path / "file" / "run"}))
    with pytest.raises(PowersteerError, match="cannot write the cache"):
        train(config.model_copy(update={"cache_dir": tmp_path / "file" / "cache"}))
    assert (tmp_path / "file").read_text() == "somebody's" and not config.output_dir.exists()

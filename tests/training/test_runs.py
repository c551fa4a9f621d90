"""A run's folder: what it was begun with holds, one training is in it at a time, and nothing in it lies or is lost."""

import json
import os
import shutil
import signal
import stat
import threading

import pytest
import torch
import yaml

from conftest import draw_pairs, randomise
from powersteer import BPSModel, PowersteerError
from powersteer.backbones.load import load_base
from powersteer.core.card import model_card
from powersteer.core.config import build_config
from powersteer.training import checkpoint, folder, loop
from powersteer.training.checkpoint import list_checkpoints
from powersteer.training.config import TrainConfig
from powersteer.training.record import FACTS, FREE
from powersteer.training.run import train
from powersteer.training.setup import Setup, new_network


def everything(folder):
    """Every file's bytes, but for what is only remembered of pictures."""
    files = [path for path in folder.rglob("*") if path.is_file() and "locks" not in path.parts]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files if path.name != "contents.json"}


def short(config, **change):
    return config.model_copy(update={"max_train_steps": 2, "validation_steps": 2, **change})


def refused(config, match, **change):
    before = everything(config.output_dir)
    with pytest.raises(PowersteerError, match=match):
        train(config.model_copy(update=change))
    assert everything(config.output_dir) == before


def record_of(config):
    return json.loads((config.output_dir / "run.json").read_text())


def rewrite_state(config, change):
    """A checkpoint whose files agree with their digests, but not with a run."""
    last = list_checkpoints(config.output_dir)[-1]
    (last / "state.json").write_text(json.dumps(change(json.loads((last / "state.json").read_text()))))
    redigest(last)


def redigest(last):
    digests = {name: checkpoint._digest(last / name) for name in json.loads((last / "digests.json").read_text())}
    (last / "digests.json").write_text(json.dumps(digests))


def test_another_command_on_a_run_is_refused_by_its_keys_and_changes_no_file(config, tmp_path, capsys):
    config = short(config)
    train(config)
    other = draw_pairs(tmp_path / "other", 16, seed=7)
    words = (
        rf"holds a run with other settings: train_data_dir was {config.train_data_dir}, now {other}; "
        r"weights was uniform, now head-heavy; learning_rate was 0.001, now 0.0007\. Give another output_dir, or"
    )
    refused(config, words, train_data_dir=str(other), weights="head-heavy", learning_rate=7e-4)
    for key, value in {"seed": 5, "max_train_samples": 8, "ema_decay": None, "random_flip": True}.items():
        refused(config, f"{key} was .*, now ", **{key: value}, max_train_steps=4)
    refused(config, "train_batch_size was 4, now 8", train_batch_size=8, max_train_steps=4)
    refused(config, "resolution was null, now", resolution=(24, 40))
    refused(config, "has come to step 2, and 1 updates are asked for", max_train_steps=1)
    before = everything(config.output_dir)
    assert train(config).step == 2  # the same again does nothing
    assert everything(config.output_dir) == before
    # What bounds and reports a run may change, and so may how a batch is divided; the change is said and kept.
    on = {"max_train_steps": 4, "validation_steps": 1, "train_batch_size": 2, "gradient_accumulation_steps": 2}
    capsys.readouterr()
    assert train(config.model_copy(update=on)).step == 4
    assert "from step 2 on with max_train_steps 4 (was 2), validation_steps 1 (was 2)" in capsys.readouterr().err
    assert record_of(config)["changes"] == [{"step": 2, "max_train_steps": [2, 4], "validation_steps": [2, 1]}]
    written = yaml.safe_load((config.output_dir / "train.yaml").read_text())
    assert written["max_train_steps"] == 4 and TrainConfig(**written) == config.model_copy(update=on)


def test_every_key_is_either_free_or_decides(config):
    decided = {key for keys in FACTS.values() for key in keys} - FREE
    assert {
        "seed",
        "learning_rate",
        "weights",
        "refit",
        "streaming",
    } <= TrainConfig.model_fields.keys() - FREE - decided
    assert not (FREE | decided) - TrainConfig.model_fields.keys()


def test_pairs_are_known_by_content_not_by_path(config, tmp_path):
    config = short(config)
    train(config)
    moved = shutil.move(config.train_data_dir, tmp_path / "moved")
    on = config.model_copy(update={"train_data_dir": str(moved), "max_train_steps": 3})
    assert train(on).step == 3
    rows = (tmp_path / "moved" / "metadata.jsonl").read_text()
    (tmp_path / "moved" / "metadata.jsonl").write_text(rows.replace("a fox", "two fish", 1))
    refused(on, rf"the pairs of {moved} are not those it was begun with", max_train_steps=4)
    (tmp_path / "moved" / "metadata.jsonl").write_text(rows)
    shutil.copy(tmp_path / "moved" / "images" / "1.png", tmp_path / "moved" / "images" / "2.png")
    refused(on, r"the pairs of .* are not those it was begun with", max_train_steps=4, cache_latents=False)


def test_another_base_at_the_same_place_is_noticed(config, tmp_path, base_dir):
    base = shutil.copytree(base_dir, tmp_path / "base")
    config = short(config, pretrained_model_name_or_path=str(base))
    train(config)
    pipe = load_base(str(base))
    pipe.unet.conv_out.bias.data[0] += 0.125
    pipe.unet.save_pretrained(base / "unet")
    refused(config, rf"the base {base} is not what it was")


def test_a_falling_rate_is_of_so_many_updates(config):
    config = short(config, lr_scheduler="cosine")
    train(config)
    refused(config, "max_train_steps was 2, now 4", max_train_steps=4)


def test_epochs_given_alone_decide(config, capsys):
    given = config.model_dump() | {"num_train_epochs": 1}
    given.pop("max_train_steps")
    for preset, steps in ((None, 4), ("few-shot", 3)):
        values = given | {"preset": preset, "output_dir": config.output_dir / str(preset)}
        if preset:
            values |= {"validation_data_dir": None, "validation_split": 0.25, "num_validation_images": 0}
        run = build_config(values, TrainConfig)
        assert run.max_train_steps is None and run.num_train_epochs == 1
        assert train(run).step == steps  # 16 pairs by 4; 12 by 4
    both = build_config(config.model_dump() | {"num_train_epochs": 9, "max_train_steps": 1}, TrainConfig)
    capsys.readouterr()
    assert train(both).step == 1
    assert "num_train_epochs=9 has no effect: max_train_steps=1 decides" in capsys.readouterr().err
    paper = {"preset": "paper", "train_data_dir": "p", "output_dir": "o", "max_train_steps": 7}
    assert build_config(paper, TrainConfig).num_train_epochs is None


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"smallest_crop": 0.5}, "smallest_crop=0.5 has no effect: there are no cut-outs without random_crops"),
        ({"fixed_prompt": "x"}, "fixed_prompt=x has no effect: it is part of prompt_mix"),
        ({"lr_scheduler": "constant"}, "lr_warmup_steps=2 has no effect: lr_scheduler=constant has no warm-up"),
        ({"cache_latents": False}, "has no effect: nothing is cached with cache_latents=false"),
        ({"validation_data_dir": None, "max_validation_samples": 3}, "max_validation_samples=3 has no effect"),
        ({"validation_image_steps": 3}, "validation_image_steps=3 has no effect: num_validation_images=0"),
    ],
)
def test_a_key_without_effect_is_said(config, change, line):
    told = config.model_copy(update=change).idle()
    assert len(told) == 1 and line in told[0]
    assert not config.idle()
    for preset in ("few-shot", "paper", "low-memory"):
        assert not build_config({"preset": preset, "train_data_dir": "p", "output_dir": "o"}, TrainConfig).idle()


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("seed", [-1, 2**63]),
        ("learning_rate", [float("inf"), float("nan"), 0, 1e300]),
        ("max_train_steps", [0, 10**12]),
        ("num_train_epochs", [0, 10**12]),
        ("train_batch_size", [0, 10**9]),
        ("resolution", [0, -8, [32, 0], 10**9]),
        ("weights", [[1e300, 1], [float("nan")]]),
        ("hidden_channels", [[0], [10**9]]),
        ("max_train_minutes", [float("inf"), 0]),
        ("dataloader_num_workers", [-1, 10**6]),
        ("random_crops", [10**9]),
        ("resume_from_checkpoint", ["checkpoint-../../x", "checkpoint-x"]),
        ("train_data_dir", ["a\0b"]),
        ("dataset_split", ["validation"]),
    ],
)
def test_no_number_outside_its_range_is_taken(key, values):
    for value in values:
        with pytest.raises(PowersteerError, match=key.split("_")[0]) as fault:
            build_config({"train_data_dir": "p", "output_dir": "o", key: value}, TrainConfig)
        assert "\n" not in str(fault.value)


def test_every_number_of_the_configuration_has_a_range():
    schema = TrainConfig.model_json_schema()["properties"]
    bounds = {"maximum", "exclusiveMaximum"}
    for key, said in schema.items():
        for one in said.get("anyOf", [said]):
            if one.get("type") in ("integer", "number"):
                assert bounds & one.keys() and {"minimum", "exclusiveMinimum"} & one.keys(), key


def test_streaming_takes_no_share_of_its_pairs():
    given = {"train_data_dir": "p", "output_dir": "o", "streaming": True, "max_train_samples": 3}
    with pytest.raises(PowersteerError, match="streaming takes all pairs of its shards: give fewer shards"):
        build_config(given, TrainConfig)


def test_init_from_brings_its_own_network(config, tmp_path):
    pipe = load_base(config.pretrained_model_name_or_path)
    start = tmp_path / "start"
    randomise(BPSModel.from_unet(pipe.unet, pixel_unshuffle=4, weights="uniform")).save_pretrained(start)
    given = config.model_copy(update={"init_from": str(start)})
    new_network(Setup.of(given, pipe), pipe)  # what it is may be asked for
    new_network(Setup.of(given.model_copy(update={"weights": "head-heavy"}), pipe), pipe)  # the default
    for key, value in {
        "weights": (2.0, 2.0, 1.0, 1.0),
        "network": "lite",
        "ablation": "no-time",
        "dropout": 0.5,
        "trainable_weights": True,
        "hidden_channels": (8, 8),
    }.items():
        with pytest.raises(PowersteerError, match=rf"brings its own network, .* not of {key}="):
            new_network(Setup.of(given.model_copy(update={key: value}), pipe), pipe)
    with pytest.raises(PowersteerError, match="not of network=controlnet"):
        new_network(Setup.of(given.model_copy(update={"network": "controlnet", "weights": "head-heavy"}), pipe), pipe)
    run = short(given, weights="head-heavy")
    train(run)
    assert "weights" not in yaml.safe_load((run.output_dir / "train.yaml").read_text())  # it was not used
    BPSModel.from_unet(pipe.unet, pixel_unshuffle=4, weights="uniform").save_pretrained(start)
    refused(run, rf"the weights of {start} are not those it was begun with", max_train_steps=3)


def test_what_no_training_made_is_not_written_over(config, tmp_path):
    pipe = load_base(config.pretrained_model_name_or_path)
    for name in ("config.json", "log.jsonl", "train.yaml"):
        target = tmp_path / name
        target.mkdir()
        if name == "config.json":
            BPSModel.from_unet(pipe.unet, pixel_unshuffle=4).save_pretrained(target)
        else:
            (target / name).write_text("step: mine\n")
        refused(config, f"holds a {name} that no training here made", output_dir=target)
        assert sorted(path.name for path in target.iterdir() if path.name != folder.LOCK) == sorted(
            ["config.json", "diffusion_pytorch_model.safetensors"] if name == "config.json" else [name]
        )


def test_a_refused_run_leaves_nothing_and_one_without_learning_may_be_begun_anew(config, monkeypatch):
    with pytest.raises(PowersteerError):
        train(config.model_copy(update={"train_data_dir": str(config.output_dir / "none")}))
    assert not config.output_dir.exists()
    real = loop.squared_errors
    monkeypatch.setattr(loop, "squared_errors", lambda *args: real(*args) * torch.nan)
    with pytest.raises(PowersteerError, match="non-finite loss at step 0"):
        train(config)
    monkeypatch.undo()
    assert train(short(config, learning_rate=1e-4)).step == 2  # nothing had been learned


def test_a_run_of_an_earlier_version_is_compared_by_its_settings(config):
    config = short(config)
    train(config)
    (config.output_dir / "run.json").unlink()
    for last in list_checkpoints(config.output_dir):
        shutil.rmtree(last)
    refused(config, "learning_rate was 0.001, now 0.5", learning_rate=0.5)
    assert train(config).step == 2


def test_a_refit_stays_one_and_its_card_says_what_happened(config):
    few = {"validation_data_dir": None, "validation_split": 0.25, "max_train_steps": 4, "validation_steps": 4}
    config = config.model_copy(update=few)
    train(config)
    assert record_of(config)["refitted"] is None and "trained anew" not in model_card(config.output_dir)
    again = config.model_copy(update={"refit": True})
    result = train(again)
    assert record_of(config)["refitted"] == result.best_step == 4
    assert "trained anew on all pairs, for 4 updates" in model_card(config.output_dir)
    refused(again, "refit was true, now false", refit=False)
    # A refit that went further than was best is not taken for the one that is wanted.
    beyond = config.output_dir / "refit"
    (beyond / "checkpoint-4").rename(beyond / "checkpoint-9")
    train(again)
    assert [path.name for path in list_checkpoints(beyond)] == ["checkpoint-4"]
    named = again.model_copy(update={"resume_from_checkpoint": "checkpoint-4"})
    assert train(named).step == 4  # of the run, not of its refit


def test_one_training_at_a_time(config, monkeypatch):
    monkeypatch.setattr(folder, "LOCK_SECONDS", 0.2)
    real, entered, leave = loop.squared_errors, threading.Event(), threading.Event()

    def waiting(*args):
        entered.set()
        assert leave.wait(60)
        return real(*args)

    monkeypatch.setattr(loop, "squared_errors", waiting)
    done = []
    thread = threading.Thread(target=lambda: done.append(train(short(config))))
    thread.start()
    assert entered.wait(60)
    before = everything(config.output_dir)
    with pytest.raises(PowersteerError, match=r"another training is at work in .*: wait for its end, or give another"):
        train(short(config))
    assert everything(config.output_dir) == before
    leave.set()
    thread.join()
    assert done[0].step == 2 and train(short(config)).step == 2  # the lock is free again


def test_a_folder_that_is_removed_ends_its_training_and_stays_away(config, monkeypatch):
    real = loop.squared_errors

    def removing(*args):
        shutil.rmtree(config.output_dir)
        monkeypatch.undo()
        return real(*args)

    monkeypatch.setattr(loop, "squared_errors", removing)
    with pytest.raises(PowersteerError, match="was removed, moved or replaced while it was trained into"):
        train(config)
    assert not config.output_dir.exists()


def test_what_kills_leave_is_swept(config):
    train(short(config))
    left = [".checkpoint-7.old", ".checkpoint-7.partial", ".adapter.partial", "refit/.checkpoint-1.partial"]
    for name in left:
        (config.output_dir / name).mkdir(parents=True)
        (config.output_dir / name / "training.pt").write_bytes(b"x" * 1000)
    (config.output_dir / ".log.jsonl").write_text("{}")
    mine = config.output_dir / ".mine"
    mine.write_text("mine")
    train(short(config))
    hidden = list(config.output_dir.rglob(".*"))
    assert hidden == [mine]


def test_weights_can_be_read_by_whom_the_umask_lets(config):
    before = os.umask(0o022)
    try:
        train(short(config))
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in config.output_dir.rglob("*.safetensors")}
    modes |= {path.name: stat.S_IMODE(path.stat().st_mode) for path in config.cache_dir.glob("*.safetensors")}
    assert len(modes) >= 3 and set(modes.values()) == {0o644}


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state | {"step": "two"},
        lambda state: state | {"nonsense": 1},
        lambda state: state | {"step": 5},
        lambda state: state | {"best_step": -1},
        lambda state: state | {"order": None, "seconds": []},
        lambda state: [state],
    ],
)
def test_a_forged_state_is_one_error(config, change):
    train(short(config))
    rewrite_state(config, change)
    refused(short(config), r"checkpoint-2 is damaged \(state.json")


@pytest.mark.parametrize(
    "forge",
    [
        lambda content: b"",
        lambda content: content[: len(content) // 2],
        lambda content: b"\x80\x02" + b"]" * 100,
        lambda content: b"PK\x03\x04" + bytes(200),
        lambda content: {"optimizer": {}},
        lambda content: [1, 2],
        lambda content: content["optimizer"] and {**content, "optimizer": {"state": {}, "param_groups": []}},
        lambda content: {**content, "average": {"shadow_params": []}},
        lambda content: {**content, "average": 5},
    ],
)
def test_forged_tensors_are_one_error(config, forge):
    train(short(config))
    last = config.output_dir / "checkpoint-2"
    file = last / "training.pt"
    try:
        forged = forge(torch.load(file, weights_only=True))
    except TypeError:
        forged = forge(file.read_bytes())
    file.write_bytes(forged) if isinstance(forged, bytes) else torch.save(forged, file)
    redigest(last)
    refused(short(config), r"checkpoint-2 (is damaged \(training.pt|holds another optimizer's state)")


def test_what_a_run_needs_and_digests_do_not_know_is_damage(config):
    train(short(config))
    (config.output_dir / "checkpoint-2" / "digests.json").write_text("{}")
    refused(short(config), r"checkpoint-2 is damaged \(digests.json says nothing of config.json\)")
    (config.output_dir / "checkpoint-2" / "digests.json").write_text("[" * 100_000)
    refused(short(config), r"checkpoint-2 is damaged \(it cannot be read")


def test_captions_that_the_text_encoder_cuts_are_told(config, capsys):
    file = config.output_dir.parent / "train" / "metadata.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows[3]["text"] = "a fox " * 20
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    train(short(config))
    told = capsys.readouterr().err
    assert "captions longer than the 12 tokens that the text encoder reads" in told
    assert "is cut off: 1; one has 42: 'a fox a fox" in told


def test_figures_that_are_no_numbers_are_left_out_of_the_log(config, tmp_path):
    one = draw_pairs(tmp_path / "one", 1, seed=3)
    run = short(config, validation_data_dir=one)
    train(run)
    rows = (run.output_dir / "log.jsonl").read_text()
    assert "NaN" not in rows and "Infinity" not in rows
    assert all("gain" in json.loads(row) and "gain_error" not in json.loads(row) for row in rows.splitlines())
    assert "| " in model_card(run.output_dir)
    state = (run.output_dir / "checkpoint-2" / "state.json").read_text()
    assert "NaN" not in state and "Infinity" not in state


@pytest.mark.parametrize("ignored", [False, True])
def test_a_closing_terminal_saves_unless_it_is_ignored(config, monkeypatch, ignored):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
    real, calls = loop.squared_errors, []

    def hanging_up(*args):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGHUP)
        return real(*args)

    monkeypatch.setattr(loop, "squared_errors", hanging_up)
    try:
        result = train(config.model_copy(update={"max_train_steps": 3}))
    finally:
        signal.signal(signal.SIGHUP, before)
    assert (result.step, result.interrupted) == ((3, False) if ignored else (2, True))
    assert list_checkpoints(config.output_dir)[-1].name == f"checkpoint-{result.step}"


def test_a_base_for_inpainting_is_refused(config, tmp_path, base_dir):
    pipe = load_base(str(base_dir))
    unet = type(pipe.unet).from_config({**pipe.unet.config, "in_channels": 9})
    base = shutil.copytree(base_dir, tmp_path / "base")
    unet.save_pretrained(base / "unet")
    with pytest.raises(PowersteerError, match="U-Net reads 9 channels, its latents have 4: to train on, give a plain"):
        train(config.model_copy(update={"pretrained_model_name_or_path": str(base)}))

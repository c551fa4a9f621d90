"""What `powersteer train` is told, and what it says of it before it starts."""

import json

import pytest
import yaml

from conftest import draw_pairs
from powersteer import BPSModel, PowersteerError
from powersteer.backbones.load import load_base
from powersteer.core.config import build_config, save_config
from powersteer.training.config import PRESETS, TrainConfig
from powersteer.training.dry_run import dry_run
from powersteer.training.run import train

GIVEN = {"train_data_dir": "pairs", "output_dir": "run"}


def build(*overrides, **given):
    return build_config({**GIVEN, **given}, TrainConfig, list(overrides))


def test_presets_give_way_to_what_is_given(tmp_path):
    for name, values in PRESETS.items():
        config = build(f"preset={name}")
        assert {key: getattr(config, key) for key in values} == values
        save_config(config, tmp_path / "train.yaml")  # the resolved configuration is the same run again
        assert build_config(yaml.safe_load((tmp_path / "train.yaml").read_text()), TrainConfig) == config
    assert build("preset=few-shot", "patience=2").patience == 2
    assert build("mixed_precision=no").mixed_precision == "no"  # which YAML takes for false
    assert build("preset=paper").learning_rate == 1e-5 and build("preset=paper").num_train_epochs == 16
    assert build("preset=low-memory").train_batch_size * build("preset=low-memory").gradient_accumulation_steps == 16


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["learnig_rate=1"], "unknown key 'learnig_rate'; did you mean 'learning_rate'?"),
        (["learning_rate=-1"], "'learning_rate': Input should be greater than 0"),
        (["preset=huge"], "'preset': Input should be 'few-shot', 'paper' or 'low-memory'"),
        (["dataset_name=a/b"], "give either train_data_dir or dataset_name"),
        (["train_data_dir=null"], "give either train_data_dir or dataset_name"),
        (["max_train_steps=null"], "give max_train_steps or num_train_epochs"),
        (["refit=true"], "refit needs a validation_split"),
        (["patience=3"], "patience needs held-out pairs"),
        (["validation_split=0.2", "validation_data_dir=x"], "leave validation_data_dir out"),
        (["resume_from_checkpoint=last"], "give latest, latest-intact or checkpoint-<step>"),
        (["streaming=true", "aspect_ratio_buckets=true"], "streaming goes with neither"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(overrides, message):
    with pytest.raises(PowersteerError) as fault:
        build(*overrides)
    assert message in str(fault.value) and "\n" not in str(fault.value) and "Value error" not in str(fault.value)


def test_dry_run_tells_what_training_does(config, base_dir, monkeypatch):
    config = config.model_copy(
        update={"max_train_steps": None, "num_train_epochs": 3, "gradient_accumulation_steps": 2}
    )
    monkeypatch.setattr("powersteer.backbones.load.DiffusionPipeline.from_pretrained", None)  # no weights are loaded
    plan = dry_run(config, processes=2)
    monkeypatch.undo()
    facts = plan.facts
    assert facts["pictures"] == [3, 32, 32] and facts["latents"] == [4, 8, 8] and facts["conditions"] == [1, 32, 32]
    assert facts["effective_batch_size"] == 16 and facts["pairs"] == 16
    assert facts["optimizer_updates"] == 3 and facts["samples_seen"] == 48
    pipe = load_base(str(base_dir))
    model = BPSModel.from_unet(pipe.unet, pixel_unshuffle=4, weights="uniform")
    assert facts["trainable_parameters"] == sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = [p for part in (pipe.unet, pipe.vae, pipe.text_encoder) for p in part.parameters()]
    assert facts["frozen_parameters"] == sum(p.numel() for p in frozen)
    assert plan.memory.rows["base weights"] == 4 * facts["frozen_parameters"]
    assert plan.memory.rows["EMA"] == 4 * facts["trainable_parameters"]
    assert plan.as_json()["memory"]["total"] == sum(plan.memory.rows.values())
    assert train(config).step == 2 * 3  # one process: half the batch, twice the updates


def test_resolution_must_be_a_multiple_of_the_bases_step(config):
    assert dry_run(config.model_copy(update={"resolution": (24, 40)})).facts["latents"] == [4, 6, 10]
    with pytest.raises(PowersteerError, match="resolution 36 is no multiple of 8: give 32 or 40"):
        train(config.model_copy(update={"resolution": 36}))
    result = train(config.model_copy(update={"resolution": (24, 40), "max_train_steps": 1}))
    assert result.step == 1


def test_wrong_weights_and_too_few_pairs_are_said(config, tmp_path):
    with pytest.raises(PowersteerError, match="'weights': weights has 3 numbers; 2 levels, TP and EP need 4"):
        train(config.model_copy(update={"weights": (1.0, 1.0, 1.0)}))
    six = {"train_data_dir": str(draw_pairs(tmp_path / "six", 6)), "validation_data_dir": None, "validation_split": 0.2}
    with pytest.raises(PowersteerError, match="6 pairs are too few to hold some out: give 8 or more"):
        train(config.model_copy(update=six))
    with pytest.raises(PowersteerError, match="use_8bit_adam=true needs a GPU and bitsandbytes"):
        train(config.model_copy(update={"use_8bit_adam": True}))
    with pytest.raises(PowersteerError, match="report_to=wandb needs wandb: pip install wandb"):
        train(config.model_copy(update={"report_to": "wandb"}))


@pytest.mark.parametrize("name", ["validation", "test", "val"])
def test_what_is_held_out_is_not_trained_on(config, tmp_path, monkeypatch, name):
    held_out = draw_pairs(tmp_path / "data" / name, 8)
    assert train(config.model_copy(update={"train_data_dir": str(held_out), "max_train_steps": 1})).step == 1
    (tmp_path / "data" / "dataset.json").write_text("{}")  # now it is the split of a data set
    monkeypatch.chdir(held_out)
    for given in (str(held_out), f"{held_out}/", ".", f"{held_out}/{{000..009}}.tar"):
        other = config.model_copy(update={"train_data_dir": given, "output_dir": tmp_path / "other"})
        for refused in (train, dry_run):
            with pytest.raises(PowersteerError, match=r"train_data_dir=.* is held out of .*: train on .*data/train"):
                refused(other)
    assert not (tmp_path / "other").exists()
    same = {"train_data_dir": str(config.validation_data_dir)}
    with pytest.raises(PowersteerError, match=r"train_data_dir and validation_data_dir are both .*validation: hold"):
        train(config.model_copy(update=same))


def test_out_of_memory_says_what_to_change(config, monkeypatch):
    def full(*_, **__):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried to")

    monkeypatch.setattr("accelerate.Accelerator.backward", full)
    wanted = (
        r"out of memory \(estimate \d+\.\d GB, free \d+\.\d GB\): add gradient_checkpointing=true train_batch_size=1 "
    )
    with pytest.raises(PowersteerError, match=wanted + "gradient_accumulation_steps=4"):
        train(config.model_copy(update={"validation_steps": 100}))


def test_a_hub_data_set(config, tmp_path):
    datasets = pytest.importorskip("datasets")
    folder = draw_pairs(tmp_path / "plain", 8)
    columns = {
        "image": [str(folder / "images" / f"{i}.png") for i in range(8)],
        "conditioning_image": [str(folder / "drawings" / f"{i}.png") for i in range(8)],
        "text": [["a fox", "the moon"]] * 8,
    }
    table = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
    table.cast_column("conditioning_image", datasets.Image()).to_parquet(str(tmp_path / "hub" / "train.parquet"))
    hub = {"train_data_dir": None, "dataset_name": str(tmp_path / "hub"), "max_train_steps": 2}
    result = train(config.model_copy(update=hub))
    assert result.step == 2
    state = json.loads((config.output_dir / "checkpoint-2" / "state.json").read_text())
    assert state["order"]
    with pytest.raises(PowersteerError, match=r"cannot load the data set .* \(split nope\)"):
        train(config.model_copy(update={**hub, "dataset_split": "nope", "output_dir": tmp_path / "other"}))

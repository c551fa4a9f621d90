"""The model card: what the Hub reads of it, and what it does not swallow."""

import json

import pytest
import yaml
from huggingface_hub import ModelCard

from powersteer import PowersteerError
from powersteer.core.card import MARK, model_card

CONFIG = {
    "_class_name": "BPSModel",
    "pixel_unshuffle": 4,
    "conditioning_channels": 1,
    "conditioning": {"kind": "sketch"},
}
FIGURES = {
    "line_f1": {"better": "higher", "values": {"prior": {"value": 0.2}, "steered": {"value": 0.9, "error": 0.01}}},
    "kid": {"better": "lower", "values": {"steered": {"value": None, "error": None}}},
    "width": {"better": None, "values": {"prior": {"value": 3.0}}},
}
ROW = {
    "step": 4,
    "on": "held-out pairs",
    "prior": 0.6,
    "steered": 0.25,
    "gain": 0.35,
    "control": 0.3,
    "gain_error": 0.01,
}


def write_run(folder, **change):
    files = {"config.json": CONFIG, "metrics.json": {"figures": FIGURES}, "log.jsonl": ROW} | change
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    return folder


def test_the_hub_reads_the_results(tmp_path):
    (tmp_path / "train.yaml").write_text("pretrained_model_name_or_path: someone/base\ndataset_name: someone/pairs\n")
    card = model_card(write_run(tmp_path), "you/tiny")
    read = ModelCard(card)
    assert str(read) == card and MARK in read.text
    assert read.data.model_name == "tiny" and read.data.base_model == "someone/base"
    results = {result.metric_type: result for result in read.data.eval_results}
    assert {name: result.metric_value for name, result in results.items()} == {"denoising_loss": 0.25, "line_f1": 0.9}
    assert {result.dataset_type for result in results.values()} == {"someone/pairs"}
    assert "| 0.6000 | 0.2500 | — | 0.3500 ± 0.0100 | 0.3000 |" in card
    assert "| line_f1 ↑ | 0.2 | 0.9 ± 0.01 |\n| kid ↓ |  |  |\n| width | 3 |  |" in card


def test_a_base_is_loaded_as_it_was(tmp_path):
    config = tmp_path / "family"
    config.mkdir()
    settings = f"pretrained_model_name_or_path: someone/base.safetensors\nrevision: v2\nbase_config: {config}\n"
    (tmp_path / "train.yaml").write_text(settings)
    card = model_card(write_run(tmp_path), "you/tiny")
    assert "--base someone/base.safetensors --revision v2 --base-config family --condition" in card
    assert 'load_base("someone/base.safetensors", revision="v2", base_config="family"), load_adapter' in card
    assert str(tmp_path) not in card


def test_an_adapter_alone(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"conditioning_channels": 9}))
    card = model_card(tmp_path, "you/tiny")
    metadata = yaml.safe_load(card.split("---")[1])
    assert not {"model-index", "model_name", "base_model", "base_model_relation", "license", "widget"} & set(metadata)
    assert "## Figures" not in card and "## How it was made" not in card and "\n\n\n" not in card
    code = card.split("```python")[1].split("```")[0]
    compile(code, "card", "exec")
    assert "np.load" in code and "Image" not in code.partition("pipe(")[0]


def test_a_baselines_card_does_not_tell_to_load_it_as_bps(tmp_path):
    card = model_card(write_run(tmp_path, **{"config.json": CONFIG | {"_class_name": "ZeroStartControlNet"}}))
    assert "load_adapter" not in card and "| network | ZeroStartControlNet |" in card


def test_a_source_with_bars_and_breaks_stays_in_its_cell(tmp_path):
    pairs = tmp_path / "pairs"
    pairs.mkdir()
    (pairs / "dataset.json").write_text(json.dumps({"source": "a | b\n# c", "licence": "MIT"}))
    (tmp_path / "train.yaml").write_text(f"train_data_dir: {pairs}\n")
    card = model_card(write_run(tmp_path))
    assert "| data | a \\| b # c |" in card and "license: mit" in card


@pytest.mark.parametrize(
    "figures", [[], {"f1": 0.9}, {"f1": {"better": "maybe", "values": {}}}, {"f1": {"values": {"a": {}}}}]
)
def test_figures_of_another_make_are_refused(tmp_path, figures):
    with pytest.raises(PowersteerError, match=r"metrics.json does not hold what `powersteer evaluate --json` writes"):
        model_card(write_run(tmp_path, **{"metrics.json": {"figures": figures}}))

"""The Hub, and the card that a run leaves."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from typer.testing import CliRunner

from conftest import build_pipe, draw_pairs, randomise
from powersteer import BPSModel, PowersteerError, load_adapter, load_base
from powersteer.adapters.hub import push
from powersteer.adapters.load import load_network
from powersteer.adapters.registry import make_adapter
from powersteer.apps.cli import app
from powersteer.backbones.load import base_configs
from powersteer.core.card import MARK, model_card, write_card
from powersteer.denoising.sampling.generate import generate
from powersteer.denoising.sampling.jobs import jobs_of
from powersteer.denoising.settings import GenerateSettings
from powersteer.training.config import TrainConfig
from powersteer.training.run import train
from tiny_hub import files_of, use_endpoint


@pytest.fixture
def adapter():
    return randomise(BPSModel.from_unet(build_pipe().unet, pixel_unshuffle=4, conditioning={"kind": "sketch"}))


def test_pushed_and_loaded_again_by_its_name(hub, adapter, tmp_path):
    assert "you/tiny" in adapter.push_to_hub("you/tiny")
    assert set(hub.repos["you/tiny"]) == {"config.json", "diffusion_pytorch_model.safetensors", "README.md"}
    for load in (load_adapter, BPSModel.from_pretrained):
        loaded = load("you/tiny")
        for (name, ours), theirs in zip(adapter.state_dict().items(), loaded.state_dict().values(), strict=True):
            assert torch.equal(ours, theirs), name
    card = hub.repos["you/tiny"]["README.md"].decode()
    assert "--adapter you/tiny" in card and "**sketch**" in card


def test_generate_takes_a_name_of_the_hub(hub, adapter, base_dir, tmp_path):
    adapter.push_to_hub("you/tiny")
    drawing = draw_pairs(tmp_path / "pairs", 1) / "drawings" / "0.png"
    settings = {"base": str(base_dir), "num_inference_steps": 2}
    local = tmp_path / "local"
    adapter.save_pretrained(local)
    made = []
    for name in ("you/tiny", str(local)):
        files = generate(
            GenerateSettings(adapter=(name,), **settings),
            jobs_of("a fox", [drawing], num_images=1),
            tmp_path / name.replace("/", "-"),
        )
        made.append(Image.open(files[0]).tobytes())
    assert made[0] == made[1]


def test_no_folder_of_this_machine_is_pushed(hub, adapter, tmp_path):
    adapter.save_pretrained(tmp_path / "mine")
    BPSModel.from_pretrained(tmp_path / "mine").push_to_hub("you/named")
    config = hub.repos["you/named"]["config.json"].decode()
    assert str(tmp_path) not in config and json.loads(config)["conditioning"]["kind"] == "sketch"


def test_a_card_that_the_repository_has_is_kept(hub, adapter, tmp_path):
    adapter.push_to_hub("you/tiny")
    hub.repos["you/tiny"]["README.md"] = b"mine"
    adapter.push_to_hub("you/tiny")
    assert hub.repos["you/tiny"]["README.md"] == b"mine"
    adapter.save_pretrained(tmp_path / "run")
    push(tmp_path / "run", "you/tiny")  # a folder's card is the folder's
    assert MARK in hub.repos["you/tiny"]["README.md"].decode()


def test_what_is_no_adapter_is_refused_before_its_weights_are_fetched(hub):
    hub.repos["you/control"] = {
        "config.json": b'{"_class_name": "ControlNetModel"}',
        "diffusion_pytorch_model.safetensors": b"",
    }
    hub.repos["you/pipeline"] = {"model_index.json": b"{}", "model.safetensors": b""}
    hub.repos["you/list"] = {"config.json": b"[]"}
    for name, words in (
        ("you/control", "you/control is of the class ControlNetModel, not a BPS network"),
        ("you/pipeline", "you/pipeline holds no config.json"),
        ("you/list", "its config.json is not an adapter's"),
    ):
        with pytest.raises(PowersteerError, match=words):
            load_adapter(name)
    assert not any("safetensors" in path for path in hub.requests)


def test_an_adapter_of_a_newer_version_is_refused(hub, adapter):
    adapter.push_to_hub("you/tiny")
    config = json.loads(hub.repos["you/tiny"]["config.json"]) | {"feathers": 3}
    hub.repos["you/tiny"]["config.json"] = json.dumps(config).encode()
    with pytest.raises(PowersteerError, match=r"newer powersteer, with the setting 'feathers'.*pip install --upgrade"):
        load_adapter("you/tiny")


def test_a_base_of_the_hub_is_fetched_without_what_is_not_loaded(hub, base_dir):
    files = files_of(base_dir)
    plain = [name for name in files if name.endswith(".safetensors")]
    decoys = {name.replace(".safetensors", end): b"x" for name in plain for end in (".fp16.safetensors", ".bin")}
    decoys |= {"unet/code.py": b"x", "v1-5-pruned.safetensors": b"x", "safety_checker/model.safetensors": b"x"}
    hub.repos["you/base"] = files | decoys
    assert base_configs("you/base")["unet"]["block_out_channels"] == [16, 32]
    assert not [path for path in hub.requests if path.endswith(".safetensors")]
    pipe = load_base("you/base")
    for name, tensor in load_base(str(base_dir)).unet.state_dict().items():
        assert torch.equal(pipe.unet.state_dict()[name], tensor)
    assert not [path for path in hub.requests if path.endswith(tuple(decoys))]
    halves = {
        name.replace(".safetensors", ".fp16.safetensors") if name in plain else name: c for name, c in files.items()
    }
    hub.repos["you/half"] = halves | {"unet/diffusion_pytorch_model.fp16.bin": b"x"}
    assert load_base("you/half").unet.dtype == torch.float32


def test_a_base_of_the_hub_that_is_none_or_incomplete(hub, base_dir):
    files = files_of(base_dir)
    hub.repos["you/flux"] = {"model_index.json": b'{"_class_name": "FluxPipeline"}', "vae/model.safetensors": b"x"}
    hub.repos["you/code"] = files | {"model_index.json": b'{"_class_name": ["pipeline", "Mine"]}', "pipeline.py": b"x"}
    hub.repos["you/words"] = {name: content for name, content in files.items() if name != "tokenizer/tokenizer.json"}
    hub.repos["you/unet"] = {name: content for name, content in files.items() if not name.startswith("unet/diff")}
    hub.repos["you/single"] = {"model.safetensors": b"x"}
    for name, words in (
        ("flux", "it is a FluxPipeline without a UNet2DConditionModel"),
        ("code", r"names the class \['pipeline', 'Mine'\], no pipeline of this diffusers"),
        ("words", "tokenizer lacks tokenizer.json"),
        ("unet", "unet lacks diffusion_pytorch_model.safetensors"),
        ("single", "model_index.json"),
        ("none", "cannot fetch 'you/none': the Hub has no such model"),
    ):
        with pytest.raises(PowersteerError, match=f"cannot load the base 'you/{name}': .*{words}"):
            load_base(f"you/{name}")
    assert not any(path.endswith(("/pipeline.py", "/vae/model.safetensors")) for path in hub.requests)


def test_a_baseline_of_the_hub(hub, pipe, tmp_path):
    network = make_adapter(pipe.unet, preset="t2i-adapter", pixel_unshuffle=4)
    network.save_pretrained(tmp_path / "made")
    hub.repos["you/t2i"] = files_of(tmp_path / "made")
    loaded = load_network("you/t2i")
    assert type(loaded) is type(network)
    with pytest.raises(PowersteerError, match="is of the class ZeroStartT2IAdapter, not a BPS network"):
        load_adapter("you/t2i")


@pytest.mark.parametrize(
    "path", ["../../../escaped.json", "/tmp/escaped.json", "a/../../../../../escaped.json", "a\0b.json"]
)
def test_a_repository_whose_files_lead_out_of_it(hub, adapter, tmp_path, path):
    """What is fetched stays in the cache; of what is asked for nothing is missing."""
    adapter.push_to_hub("you/tiny")
    hub.repos["you/tiny"] |= {path: b"{}", f"diffusion_pytorch_model{path}.safetensors": b"{}"}
    try:
        load_adapter("you/tiny")
    except PowersteerError as error:
        assert "\n" not in str(error)
    outside = [place for place in tmp_path.parent.rglob("*escaped.json*") if "snapshots" not in place.parts]
    assert not outside and not Path("/tmp/escaped.json").exists()


def test_errors_of_the_hub_are_plain(hub, adapter, monkeypatch, tmp_path):
    with pytest.raises(PowersteerError, match="cannot fetch 'you/none': the Hub has no such model"):
        load_adapter("you/none")
    with pytest.raises(PowersteerError, match="there is no such folder, and a name on the Hub is user/name"):
        load_adapter("runs/that/is/not")
    with pytest.raises(PowersteerError, match=r"cannot push 'others/tiny': the Hub says 403 .*hf auth login"):
        adapter.push_to_hub("others/tiny")
    with pytest.raises(PowersteerError, match="holds no adapter"):
        push(tmp_path, "you/tiny")


def test_without_a_network(adapter, monkeypatch, tmp_path, hub):
    adapter.push_to_hub("you/tiny")
    load_adapter("you/tiny")
    use_endpoint(monkeypatch, tmp_path, "http://127.0.0.1:9")
    with pytest.raises(PowersteerError, match=r"cannot fetch 'you/other': .*the Hub cannot be reached"):
        load_adapter("you/other")
    with pytest.raises(PowersteerError, match=r"cannot push 'you/tiny': .*the Hub cannot be reached"):
        adapter.push_to_hub("you/tiny")
    load_adapter("you/tiny")  # as it was fetched before


def metadata_of(card: str) -> dict:
    return yaml.safe_load(card.split("---")[1])


def test_a_run_leaves_a_card_and_is_pushed_without_its_scratch(hub, config: TrainConfig, tmp_path):
    (tmp_path / "train" / "dataset.json").write_text(
        json.dumps(
            {"source": "my drawings", "licence": "CC BY 4.0, me", "pictures": 16, "conditioning": {"kind": "sketch"}}
        )
    )
    train(config.model_copy(update={"num_validation_images": 2}))
    folder = config.output_dir
    card, rows = (folder / "README.md").read_text(), (folder / "log.jsonl").read_text().splitlines()
    best = min(map(json.loads, rows), key=lambda row: row["steered"])
    assert f"| {best['prior']:.4f} | {best['steered']:.4f} | {best['shuffled']:.4f} |" in card
    assert f"at step {best['step']} of 8" in card and "on held-out pairs" in card
    assert "my drawings, 16 pictures" in card and "cc-by-4.0, as its data" in card
    metadata = metadata_of(card)
    assert metadata["license"] == "cc-by-4.0" and metadata["library_name"] == "powersteer"
    assert {"sketch", "diffusers", "text-to-image"} <= set(metadata["tags"])
    assert metadata["widget"][0]["output"]["url"] == "validation/step-000008.png"
    assert str(tmp_path) not in card  # where it lay is nobody's business
    settings = yaml.safe_load(card.split("```yaml")[1].split("```")[0])
    assert settings["learning_rate"] == 1e-3 and settings["train_data_dir"] == "train"

    result = CliRunner().invoke(app, ["push", str(folder), "you/run"])
    assert result.exit_code == 0 and "you/run" in result.output
    pushed = hub.repos["you/run"]
    assert set(pushed) == {
        "config.json",
        "diffusion_pytorch_model.safetensors",
        "README.md",
        "validation/step-000008.png",
    }
    assert 'load_adapter("you/run")' in pushed["README.md"].decode()
    compile(pushed["README.md"].decode().split("```python")[1].split("```")[0], "card", "exec")
    assert load_adapter("you/run").config["conditioning"]["kind"] == "sketch"


def test_a_card_names_base_and_data_of_the_hub(adapter, tmp_path):
    adapter.save_pretrained(tmp_path)
    base, data = "stable-diffusion-v1-5/stable-diffusion-v1-5", "someone/pairs"
    (tmp_path / "train.yaml").write_text(f"pretrained_model_name_or_path: {base}\ndataset_name: {data}\n")
    figures = {
        "line_f1": {
            "better": "higher",
            "values": {"prior": {"value": 0.2, "error": None}, "steered": {"value": 0.9, "error": 0.01}},
        },
        "kid": {"better": "lower", "values": {"steered": {"value": None, "error": None}}},
    }
    (tmp_path / "metrics.json").write_text(json.dumps({"figures": figures}))
    card = model_card(tmp_path, "you/tiny")
    metadata = metadata_of(card)
    assert metadata["base_model"] == base and metadata["base_model_relation"] == "adapter"
    assert metadata["datasets"] == [data] and "license" not in metadata and "widget" not in metadata
    assert "| line_f1 ↑ | 0.2 | 0.9 ± 0.01 |" in card and "| kid ↓ |  |  |" in card


def test_a_persons_card_is_left_alone(adapter, tmp_path):
    adapter.save_pretrained(tmp_path / "run")
    run = CliRunner().invoke
    assert run(app, ["card", str(tmp_path / "run")]).exit_code == 0
    path = tmp_path / "run" / "README.md"
    assert "# run" in path.read_text()
    path.write_text(path.read_text().replace(MARK, "By me."))
    assert "left as it is" in run(app, ["card", str(tmp_path / "run")]).output and "By me." in path.read_text()
    assert not write_card(tmp_path / "run")
    with pytest.raises(PowersteerError, match=r"holds no config.json"):
        write_card(tmp_path)

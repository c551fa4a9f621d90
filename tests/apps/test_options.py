"""Options are those of the settings' fields; what is typed arrives there, and faults name what was typed."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Literal

import pytest
import typer
from pydantic import Field
from typer.testing import CliRunner

from powersteer.apps import cli
from powersteer.apps.cli.options import Fields, Given, default_of, described, with_fields
from powersteer.apps.cli.pairs import PairsToCheck
from powersteer.apps.experiments.compare import ExperimentConfig
from powersteer.apps.pretrain.config import PretrainConfig
from powersteer.core.config import StrictConfig
from powersteer.core.errors import PowersteerError
from powersteer.data.prepare.config import PrepareConfig
from powersteer.denoising.settings import GenerateSettings, PictureJob
from powersteer.evaluation.settings import EvaluateSettings
from powersteer.training.config import TrainConfig

ROOT = Path(__file__).parents[2]
COMMANDS = typer.main.get_command(cli.app).commands
OF_COMMAND = [
    ("generate", PictureJob, ()),
    ("generate", GenerateSettings, ("prepared",)),
    ("evaluate", EvaluateSettings, ()),
    ("prepare", PrepareConfig, ("settings",)),
    ("data check", PairsToCheck, ()),
]
KNOWN = {
    "generate": "--condition --prompt --adapter --base --negative-prompt --seed --num-images --manifest --pairs "
    "--batch-size --steps --guidance-scale --scheduler --scale --start --end --init-image --mask-image --strength "
    "--out",
    "evaluate": "--adapter --base --real --generated --pairs --pictures --draws --seed --steps --guidance-scale "
    "--scheduler --features --clip --inception-weights --lpips --extractor --extractor-model --diversity --batch-size "
    "--save-pictures --json",
    "prepare": "--extractor --captions --resolution --background --shards --num-shards --shard-index --workers --list "
    "--json",
    "data check": "--validation --conditioning-channels --kind --image-column --conditioning-image-column "
    "--caption-column --default-prompt --base --resolution --json",
    "train": "--dry-run --json",
    "convert": "--conditioning-channels --unshuffle --attention-head-dim --norm-num-groups --kind",
    "studio": "--base --adapter --adapters-dir --host --port --auth",
    "demo": "--out --pairs --steps --pictures --seed --json",
    "compare": "--report --out",
    "pretrain": "--snapshot",
    "push": "--private --commit-message --create-pr",
    "card": "--name",
    "bench steering": "--shape --batch-size --device --dtype --compile --only --rounds --json",
    "bench train": "--shape --batch-size --device --dtype --gradient-checkpointing --only --rounds --json",
    "bench generate": "--shape --batch-size --num-inference-steps --device --dtype --compile --only --rounds --json",
    "bench prepare": "--task --pictures --side --json",
    "bench posterior": "--out --observation --pairs --methods --seeds --updates --prior-updates --json",
    "bench studio": "--strokes --chromium --json",
}
"""Options that command lines in use rely on."""


def find(name: str):
    group, _, inner = name.partition(" ")
    return COMMANDS[group].commands[inner] if inner else COMMANDS[group]


@pytest.mark.parametrize("name", KNOWN)
def test_no_option_is_lost(name):
    assert set(KNOWN[name].split()) <= {option for param in find(name).params for option in param.opts}


@pytest.mark.parametrize(("name", "kind", "left_out"), OF_COMMAND)
def test_each_field_is_an_option_with_its_default_and_description(name, kind, left_out):
    params = {param.name: param for param in find(name).params}
    for field, info in kind.model_fields.items():
        if field in left_out:
            assert field not in params or field == "settings"
            continue
        default = None if info.is_required() else info.default
        given = params[field].default
        assert (tuple(given) if isinstance(default, tuple) else given) == default or given is default is None
        assert params[field].help == described(kind, field)


@pytest.mark.parametrize(
    "kind", [PictureJob, GenerateSettings, EvaluateSettings, PrepareConfig, PairsToCheck, TrainConfig, ExperimentConfig,
             PretrainConfig]
)  # fmt: skip
def test_each_field_says_what_it_is(kind):
    for field, info in kind.model_fields.items():
        assert info.description and info.description[0].isupper() and info.description.rstrip()[-1] in ".…", field


class Settings(StrictConfig):
    """Every kind of field."""

    file: Path
    """File."""
    count: int = Field(default=3, gt=0, le=9)
    """Count."""
    share: float = Field(default=0.5, ge=0, lt=1)
    """Share
    of ``all``."""
    rate: float = Field(default=0.5, gt=0)
    """Rate."""
    mode: Literal["a", "b", "c"] | None = None
    """Mode."""
    flag: bool = True
    """Flag."""
    names: tuple[Annotated[str, Field(max_length=3)], ...] = ("x", "y")
    """Names."""


class Others(StrictConfig):
    """Shares a field."""

    flag: bool = True


@pytest.fixture
def invoke():
    got = []

    @with_fields
    def run(
        settings: Annotated[Given[Settings], Fields({"count": "--many"}, arguments=("file",))],
        extra: Annotated[int, typer.Option()] = 1,
    ) -> None:
        """Run."""
        got.append((settings.values, settings["count"], settings.build(), settings.build_as(Others), extra))

    app = typer.Typer(rich_markup_mode=None)
    app.command()(run)

    def invoke(*args):
        result = CliRunner().invoke(app, args, catch_exceptions=True)
        if isinstance(result.exception, PowersteerError):
            return str(result.exception)
        return result.output if result.exit_code else got[-1]

    return invoke


def test_what_was_typed_arrives_and_defaults_are_the_fields(invoke):
    values, count, built, others, extra = invoke("a.txt")
    assert values == {"file": Path("a.txt")} and count == 3 and extra == 1 and others.flag
    assert built == Settings(file=Path("a.txt")) and built.model_fields_set == {"file"}
    values, count, built, others, _ = invoke(
        *("a.txt", "--many", "5", "--share", "0.25", "--mode", "b", "--no-flag", "--names", "p", "--names", "q")
    )
    assert count == 5 and not others.flag
    assert built == Settings(file=Path("a.txt"), count=5, share=0.25, mode="b", flag=False, names=("p", "q"))


def test_faults_name_the_option_that_was_typed(invoke):
    assert invoke("a.txt", "--many", "0") == "run: 'many': Input should be greater than 0"
    assert invoke("a.txt", "--share", "1") == "run: 'share': Input should be less than 1"
    assert invoke("a.txt", "--mode", "d") == "run: 'mode': Input should be 'a', 'b' or 'c'"
    assert invoke("a.txt", "--names", "long") == "run: 'names.0': String should have at most 3 characters"
    assert "Missing argument" in invoke()


def test_descriptions_tell_ranges_and_choices():
    told = {name: described(Settings, name) for name in Settings.model_fields}
    assert told["count"] == "Count. From 1 to 9."
    assert told["share"] == "Share of all. From 0 to below 1."
    assert told["rate"] == "Rate. Above 0."
    assert told["mode"] == "Mode. One of a, b or c."
    assert [default_of(Settings, name) for name in ("file", "share", "flag", "names")] == [
        "",
        "0.5",
        "true",
        '["x", "y"]',
    ]
    assert described(GenerateSettings, "strength").endswith("Above 0, up to 1.")
    assert "1000" not in described(GenerateSettings, "num_inference_steps")  # a guard against slips of the hand


def test_a_field_that_no_option_can_hold_is_refused():
    class Nested(StrictConfig):
        values: dict[str, int] = Field(default_factory=dict)

    def command(settings):
        pass

    command.__annotations__ = {"settings": Given[Nested], "return": None}
    with pytest.raises(TypeError, match=r"Nested\.values: no option can be made of"):
        with_fields(command)


@pytest.mark.parametrize("words", [["generate"], ["evaluate"], ["prepare"], ["train"], ["data", "check"]])
def test_help_needs_no_torch(words):
    command = [sys.executable, "-X", "importtime", "-m", "powersteer.apps.cli", *words, "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "Usage" in done.stdout and not re.search(r"\| +(torch|diffusers|transformers)$", done.stderr, re.M)


def test_trains_help_and_page_list_every_key(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs" / "tools"))
    import hooks

    page = hooks.on_page_markdown((ROOT / "docs" / "training.md").read_text(encoding="utf-8"))
    said = "".join(CliRunner().invoke(cli.app, ["train", "--help"]).output.split())  # lines break at hyphens too
    for key, info in TrainConfig.model_fields.items():
        default = "required" if info.is_required() else f"`{default_of(TrainConfig, key) or 'null'}`"
        assert f"| `{key}` | {default} | {described(TrainConfig, key)} |" in page
        assert "".join(f"{key}{described(TrainConfig, key)}".split()) in said


def test_pages_list_options_that_exist():
    known = {name for option in KNOWN for param in find(option).params for name in param.opts}
    for page in (ROOT / "docs").glob("*.md"):
        for cell in re.findall(r"^\| (`--[^|]*)\|", page.read_text(encoding="utf-8"), re.M):
            assert set(re.findall(r"--[a-z][\w-]*", cell)) <= known | {"--json"}, f"{page.name}: {cell}"

"""A kind of condition is one file: a new one goes all the way, and those that nobody knows are plain pictures."""

import json
import sys
from importlib import import_module

import numpy as np
import pytest
import torch
from PIL import Image

from powersteer import PowersteerError
from powersteer.conditions import condition_picture, extractors, kinds, to_condition
from powersteer.conditions.discovery import import_modules
from powersteer.conditions.extractor import EXTRACTORS
from powersteer.conditions.files import fit_of, read_condition
from powersteer.conditions.kind import KINDS, Kind
from powersteer.core.pictures import as_bytes
from powersteer.data.check import check_pairs
from powersteer.data.conditioning import conditioning_of
from powersteer.data.pairs import Pairs
from powersteer.data.prepare.config import PrepareConfig
from powersteer.data.prepare.prepare import prepare
from powersteer.evaluation.measures import MeasureSettings, fidelity, load_condition_extractor

HEAT = '''
from dataclasses import dataclass

from PIL import Image, ImageOps

from powersteer.conditions.agreement import Agreement
from powersteer.conditions.kind import KINDS, Kind


@dataclass(frozen=True)
class Heat(Kind):
    """How hot it is: files hold twice the heat; people give cold as bright."""

    def as_condition(self, picture, channels, where):
        return super().as_condition(picture, channels, where).point(lambda value: value // 2)

    def from_user(self, picture, channels, where):
        return ImageOps.invert(picture.convert("L")), True

    def fit(self, channels):
        return "pad"

    def to_picture(self, condition, size):
        return super().to_picture(condition, size).clamp_min(0)

    def warnings(self, conditions, *, may_be_blank=False):
        return super().warnings(conditions, may_be_blank=may_be_blank) or ["it burns"]

    def fidelity(self, pictures, conditions, *, palette, extractor=None, batch_size=20):
        wanted = conditions.mean((1, 2, 3))
        shown = {column: images.float().mean((1, 2, 3)) / 255 for column, images in pictures.items()}
        found = {column: 1 - (mean - wanted).abs() for column, mean in shown.items()}
        return [Agreement("warmth", "higher", found | {"all": 0.5}, {"of": "means"})]


KINDS.add(Heat("heat", (1,), "hot 1", "white", Image.Resampling.NEAREST, seen_as="glowing"))
'''
GLOW = '''
from powersteer.conditions.extractor import EXTRACTORS
from powersteer.conditions.kind import extractor_record


class Glow:
    """The brightness, twice."""

    def __init__(self, model="none"):
        self.model = model

    def __call__(self, subject):
        return subject.picture.convert("L")

    def record(self):
        return extractor_record("heat", "glow", version="1", settings={"model": self.model}, channels=1)


EXTRACTORS.add("heat", "glow", needs="nothing")(Glow)
EXTRACTORS.add("glowing", "glow", needs="nothing")(Glow)
'''


@pytest.fixture
def heat(tmp_path, monkeypatch):
    """A kind and its extractor, each one new file that no list names."""
    modules = {kinds: ("heat", HEAT), extractors: ("glow", GLOW)}
    for package in modules:
        import_modules(package.__name__)  # before the copies: they register but once
    for package, (name, text) in modules.items():
        folder = tmp_path / package.__name__
        folder.mkdir()
        (folder / f"{name}.py").write_text(text)
        monkeypatch.setattr(package, "__path__", [*package.__path__, str(folder)])
    for registry in (KINDS, EXTRACTORS):
        monkeypatch.setattr(registry, "known", dict(registry.known))
    import_modules.cache_clear()
    import_modules(extractors.__name__)
    yield KINDS.find("heat")
    for package, (name, _) in modules.items():
        del sys.modules[f"{package.__name__}.{name}"]
        delattr(package, name)
    import_modules.cache_clear()


def test_a_new_kind_goes_from_files_to_figures(heat, tmp_path):
    # Files: pictures are prepared with the kind's own extractor, its default.
    ramp = np.tile(np.linspace(0, 240, 40).round().astype(np.uint8), (40, 1))
    (tmp_path / "source").mkdir()
    for i in range(4):
        Image.fromarray(ramp + i).convert("RGB").save(tmp_path / "source" / f"{i}.png")
        (tmp_path / "source" / f"{i}.txt").write_text(f"picture {i}")
    prepare(PrepareConfig(task="heat", source=str(tmp_path / "source"), out_dir=tmp_path / "pairs", workers=1))
    said = json.loads((tmp_path / "pairs" / "dataset.json").read_text())["conditioning"]
    assert (said["kind"], said["extractor"], said["polarity"], said["range"]) == ("heat", "glow", "hot 1", [0, 1])

    # Training pairs, as dataset.json tells.
    folder = tmp_path / "pairs" / "train"
    given = conditioning_of(str(folder))
    assert (given.kind, given.channels) == ("heat", 1)
    report = check_pairs(folder)
    assert report.errors == [] and report.facts["condition"]["high"] < 0.5
    pairs = Pairs(folder, (20, 20), given.channels, kind=given.kind)
    trained = pairs[0][1]
    assert set(trained.unique().tolist()) <= set((ramp // 2).flatten().tolist())  # nearest: no value between two

    # The condition tensor, and how it is shown.
    file = pairs.rows[0].conditioning_image.file
    picture = Image.open(file)
    tensor = to_condition(picture, 1, kind="heat")
    assert torch.equal(tensor[0, 0] * 255, torch.from_numpy(ramp // 2).float())
    assert condition_picture(tensor[0], (8, 8), "heat").min() == 0
    assert heat.warnings(tensor) == ["it burns"] and "blank" in heat.warnings(0 * tensor)[0]

    # Generate reads a training pair's condition as training does, and a user's as the kind wants it.
    prepared, turned = read_condition(file, 1, "heat", (20, 20), prepared=True)
    assert torch.equal(prepared * 255, trained.float()) and not turned
    assert fit_of(1, "heat", prepared=False) == "pad" and fit_of(1, "heat", prepared=True) == "crop"
    Image.fromarray(ramp[:20]).save(tmp_path / "wide.png")
    condition, turned = read_condition(tmp_path / "wide.png", 1, "heat", (40, 40))
    assert turned and (condition[0, :10] == 1).all() and (condition[0, 20] * 255 == 255 - ramp[0]).all()

    # Figures.
    pictures = {"steered": as_bytes(2 * tensor.expand(1, 3, -1, -1) - 1), "real": torch.full((1, 3, 40, 40), 255)}
    (figure,) = fidelity("heat", {}, pictures, tensor, 4)
    assert figure.heading == "warmth ↑" and figure.protocol == {"of": "means"}
    assert figure.values["steered"].value == pytest.approx(1, abs=0.01) and figure.values["all"].value == 0.5
    assert figure.values["real"].value == pytest.approx(tensor.mean().item(), abs=0.01)
    seen = load_condition_extractor(MeasureSettings(extractor="glow", extractor_model="big"), "heat")
    assert seen.record()["settings"] == {"model": "big"}


def test_its_channels_are_its_own(heat, tmp_path):
    with pytest.raises(PowersteerError, match=r"conditioning_channels must be 1 \(grey\) for heat, not 3"):
        conditioning_of(str(tmp_path), 3, "heat")


def test_every_task_of_the_extractors_is_a_kind():
    import_module("powersteer.conditions.extractors.catalogue")
    tasks = {one.task for one in EXTRACTORS.known.values()}
    KINDS.find("sketch")
    assert tasks == set(KINDS.known) - {""}


def test_a_kind_that_nobody_knows_is_a_plain_picture(tmp_path):
    kind = KINDS.find("blur")
    assert kind == Kind("blur")
    assert kind.record() == {"kind": "blur", "range": [0, 1], "polarity": None, "palette": None}
    bright = torch.full((1, 1, 4, 4), 0.8)
    bright[..., 0] = 1
    assert kind.warnings(bright) == [] and kind.fidelity({}, bright, palette={}) == []
    assert conditioning_of(str(tmp_path), 3, "blur").record == kind.record() | {"channels": 3}


def test_only_sketches_are_taken_for_inverted():
    bright = torch.full((1, 1, 4, 4), 0.8)
    bright[..., 0] = 1
    (told,) = KINDS.find("sketch").warnings(bright)
    assert told == "85% of the sketch is ink, which is 1 on 0: is it inverted?"
    assert [KINDS.find(name).warnings(bright) for name in (None, "depth", "style")] == [[], [], []]
    (told,) = KINDS.find("depth").warnings(torch.stack([bright[0], 0 * bright[0]]))
    assert told.startswith("1 of 2 conditions are blank, one value all over")
    assert KINDS.find("depth").warnings(0 * bright, may_be_blank=True) == []


def test_two_kinds_of_one_name_are_refused():
    KINDS.find("sketch")
    with pytest.raises(PowersteerError, match="there are two kinds of condition named 'sketch': rename one"):
        KINDS.add(Kind("sketch"))

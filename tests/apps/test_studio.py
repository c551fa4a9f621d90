import io
import json
import shlex
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageChops, ImageDraw
from PIL.PngImagePlugin import PngInfo
from typer.testing import CliRunner

from conftest import draw_pairs
from powersteer import PowersteerError
from powersteer.apps.cli import app
from powersteer.apps.studio.progress import Progress, Stopped, reported
from powersteer.apps.studio.recipe import as_command, as_python
from powersteer.apps.studio.serve import is_loopback, served
from powersteer.apps.studio.training import Training
from powersteer.apps.studio.wishes import Wanted, Wish
from powersteer.apps.studio.work import AS_IT_IS, Result, Studio, as_data_url, pixel_spread
from powersteer.conditions.sketch import sketch_condition
from powersteer.denoising.sampling.metadata import CONDITIONS_KEY, SETTINGS_KEY, read_metadata, save_picture
from powersteer.denoising.sampling.sample import steered_pictures


def drawing(shift: int = 0) -> str:
    sheet = Image.new("RGB", (512, 512), "white")
    ImageDraw.Draw(sheet).rectangle((100 + shift, 120, 350 + shift, 400), outline="black", width=30)
    return as_data_url(sheet)


@pytest.fixture
def studio(tmp_path, base_dir, model) -> Studio:
    model.save_pretrained(tmp_path / "runs" / "mine")
    (tmp_path / "work").mkdir()
    return Studio(str(base_dir), [str(tmp_path / "runs" / "mine")], tmp_path / "runs", tmp_path / "work")


def wish(studio: Studio, **given) -> Wish:
    scale = given.pop("scale", 1.0)
    conditions = given.pop("conditions", [Wanted(studio.adapters()[0], drawing(), scale)])
    return Wish(**{"prompt": "a fox", "conditions": conditions, "num_inference_steps": 3, **given})


def result_of(studio: Studio, wanted: Wish, who: str = "me") -> Result:
    *progress, result = studio.pictures(wanted, who)
    assert all(isinstance(one, Progress) for one in progress)
    assert isinstance(result, Result)
    return result


def same(one: Path, other: Path) -> bool:
    with Image.open(one) as a, Image.open(other) as b:
        return ImageChops.difference(a.convert("RGB"), b.convert("RGB")).getbbox() is None


def test_pictures_are_those_of_the_library_and_the_prior_starts_from_the_same_noise(studio):
    result = result_of(studio, wish(studio, num_images=2, seed=5, compare=True, negative_prompt="a house"))
    with Image.open(result.made[0].job.condition[0]) as sheet:
        condition = sketch_condition(sheet, (32, 32))[0]
    network = studio.network(studio.adapters()[0])
    for model, files in ((network, [m.picture for m in result.made]), (None, [m.prior for m in result.made])):
        wanted = steered_pictures(
            studio.pipe,
            model,
            ["a fox"] * 2,
            condition,
            seeds=[5, 6],
            negative_prompt="a house",
            num_inference_steps=3,
            guidance_scale=3.0,
        )
        for file, image in zip(files, wanted, strict=True):
            assert ImageChops.difference(Image.open(file).convert("RGB"), image).getbbox() is None
    assert not same(result.made[0].picture, result.made[0].prior)


def test_progress_goes_from_noise_to_picture_with_previews(studio):
    *progress, _ = studio.pictures(wish(studio, num_inference_steps=10), "me")
    shares = [one.share for one in progress]
    assert shares == sorted(shares)
    assert shares[-1] == 1
    assert any(one.preview is not None and one.preview.size == (32, 32) for one in progress)


def test_who_looks_away_misses_neither_the_newest_preview_nor_the_end():
    preview = Image.new("RGB", (2, 2))
    looks_away, all_said = threading.Event(), threading.Event()

    def work(report):
        report(Progress(0.1))
        looks_away.wait()
        for one in (Progress(0.4, Image.new("RGB", (1, 1))), Progress(0.5, preview), Progress(0.9), Progress(1.0)):
            report(one)
        all_said.set()
        return "done"

    said = reported(work, threading.Event())
    assert next(said) == Progress(0.1)
    looks_away.set()
    all_said.wait()
    assert list(said) == [Progress(1.0, preview), "done"]


def test_the_prior_is_made_once_however_often_the_drawing_changes(studio):
    evaluations = []
    studio.pipe.unet.register_forward_pre_hook(lambda *_: evaluations.append(1))
    first = result_of(studio, wish(studio, compare=True))
    alone = len(evaluations)
    moved = [Wanted(studio.adapters()[0], drawing(60))]
    second = result_of(studio, wish(studio, compare=True, conditions=moved))
    assert len(evaluations) - alone == alone / 2
    assert same(first.made[0].prior, second.made[0].prior)
    assert not same(first.made[0].picture, second.made[0].picture)
    result_of(studio, wish(studio, compare=True, prompt="two fish"))
    assert len(evaluations) == 2.5 * alone


def test_several_conditions_have_their_own_scale(studio):
    adapter = studio.adapters()[0]
    one, other = Wanted(adapter, drawing()), Wanted(adapter, drawing(80), scale=0.0)
    alone, both = (
        result_of(studio, wish(studio, conditions=[one])),
        result_of(studio, wish(studio, conditions=[one, other])),
    )
    assert same(alone.made[0].picture, both.made[0].picture)
    felt = result_of(studio, wish(studio, conditions=[one, Wanted(adapter, drawing(80), scale=0.5)]))
    assert not same(alone.made[0].picture, felt.made[0].picture)
    assert felt.made[0].settings.scale == (1.0, 0.5)


@pytest.mark.parametrize("way", ["python", "command"])
def test_snippet_and_command_make_the_same_picture_again(studio, tmp_path, monkeypatch, way):
    adapter = studio.adapters()[0]
    conditions = [Wanted(adapter, drawing(), 0.9, 0.0, 0.8), Wanted(adapter, drawing(70), 0.3)]
    wanted = wish(
        studio, prompt="a 'red' house", negative_prompt="-x", seed=7, scheduler="euler", conditions=conditions
    )
    made = result_of(studio, wanted).made[0]
    monkeypatch.chdir(tmp_path)
    names = [path.name for path in made.job.condition]
    for path in made.job.condition:
        (tmp_path / path.name).write_bytes(path.read_bytes())
    if way == "python":
        exec(as_python(made.settings, made.job, names), {})
    else:
        words = shlex.split(as_command(made.settings, made.job, names))
        assert words[:2] == ["powersteer", "generate"]
        run = CliRunner().invoke(app, words[1:])
        assert run.exit_code == 0, run.output
    assert same(tmp_path / "generated" / "00000-seed7.png", made.picture)


def test_a_picture_carries_all_that_makes_it_again(studio):
    conditions = [Wanted(studio.adapters()[0], drawing(), 0.9, 0.1, 0.8)]
    made = result_of(studio, wish(studio, seed=3, guidance_scale=2.5, scheduler=None, conditions=conditions)).made[0]
    again = studio.reload(made.picture)
    assert (again.prompt, again.seed, again.guidance_scale, again.scheduler) == ("a fox", 3, 2.5, None)
    assert [(one.scale, one.start, one.end) for one in again.conditions] == [(0.9, 0.1, 0.8)]
    assert same(result_of(studio, again).made[0].picture, made.picture)
    assert "/" not in read_metadata(made.picture).settings["condition"][0]


def test_pictures_that_cannot_be_made_here_are_refused(studio, tmp_path):
    made = result_of(studio, wish(studio)).made[0]
    told = read_metadata(made.picture).settings
    cases = {
        "was made on other": {"base": "other"},
        "there is no adapter '/etc'": {"adapter": ["/etc"]},
        "started from another picture": {"init_image": "/etc/passwd"},
        "unknown key 'sead'": {"sead": 1},
    }
    for said, change in cases.items():
        save_picture(Image.new("RGB", (32, 32)), tmp_path / "it.png", told | change)
        with pytest.raises(PowersteerError, match=said):
            studio.reload(tmp_path / "it.png")
    Image.new("RGB", (32, 32)).save(tmp_path / "it.png")
    with pytest.raises(PowersteerError, match="does not say how it was made"):
        studio.reload(tmp_path / "it.png")


ABSURD = [
    *({name: []} for name in ("scale", "start", "end", "adapter", "prompt", "seed", "condition", "base", "scheduler")),
    *({name: [1, 1]} for name in ("scale", "start", "end")),
    *({name: value} for name in ("scale", "start") for value in (None, "x", [None], [["a"]], {"a": 1}, [1e308], [-1])),
    *({"seed": value} for value in (-1, 2**32, 2**63, 10**290, 1.5, "x", None, [1])),
    *({"num_inference_steps": value} for value in (0, -1, 101, 10**18, "x", None)),
    *({"guidance_scale": value} for value in (0, 1e308, "x", None, [3])),
    *({"scheduler": value} for value in ("x", 1, {})),
    *({"adapter": value} for value in (["sketch"] * 4, ["mine"] * 1000, [1], "mine", [None], [""])),
    {"prompt": None},
    {"prompt": "a" * 100_000},
    {"prepared": True},
    {"base": ["a"]},
    {"strength": "x"},
    {"": 1},
]


@pytest.mark.parametrize("change", ABSURD, ids=str)
def test_absurd_settings_in_a_picture_are_refused(studio, tmp_path, change):
    adapter = studio.adapters()[0]
    made = result_of(studio, wish(studio)).made[0]
    change = {key: [adapter] * 4 if value == ["sketch"] * 4 else value for key, value in change.items()}
    told = read_metadata(made.picture).settings
    save_picture(Image.new("RGB", (32, 32)), tmp_path / "it.png", told | change, made.job.condition)
    if change == {"condition": []}:  # the drawing is carried along, whatever its file was called
        assert studio.reload(tmp_path / "it.png").prompt == "a fox"
        return
    with pytest.raises(PowersteerError) as info:
        studio.reload(tmp_path / "it.png")
    assert "\n" not in str(info.value)
    assert str(tmp_path / "it.png") not in str(info.value)


@pytest.mark.parametrize(
    ("settings", "conditions"),
    [
        ("[" * 100_000, None),
        ('{"a":' * 100_000, None),
        ("9" * 6000, None),
        ("NaN", None),
        ('{"seed": 1, "seed": 2}', None),
        ("x", None),
        ("[]", None),
        (None, "[" * 100_000),
        (None, "5"),
        (None, "[5]"),
        (None, '["!"]'),
        (None, '["AAAA"]'),
    ],
    ids=range(12),
)
def test_damaged_settings_in_a_picture_are_refused(studio, tmp_path, settings, conditions):
    made = result_of(studio, wish(studio)).made[0]
    info = PngInfo()
    info.add_text(SETTINGS_KEY, json.dumps(read_metadata(made.picture).settings) if settings is None else settings)
    if conditions is not None:
        info.add_text(CONDITIONS_KEY, conditions, zip=True)
    Image.new("RGB", (32, 32)).save(tmp_path / "it.png", pnginfo=info)
    with pytest.raises(PowersteerError):
        studio.reload(tmp_path / "it.png")


def test_messages_do_not_tell_where_the_server_keeps_pictures(studio, tmp_path):
    adapter, place = studio.adapters()[0], tmp_path / "work" / "gradio" / "0f"
    place.mkdir(parents=True)
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64)).save(buffer, "PNG")
    faults = {
        "no.png": b"no picture",
        "cut.png": buffer.getvalue()[:-30],
        "deep.png": buffer.getvalue()[:24] + b"\x10" + buffer.getvalue()[25:],
        "empty.png": b"",
    }
    for name, content in faults.items():
        (place / name).write_bytes(content)
        for way in (lambda file: studio.extract(file, adapter, AS_IT_IS), studio.reload):
            with pytest.raises(PowersteerError) as info:
                way(place / name)
            assert name in str(info.value)
            assert str(tmp_path) not in str(info.value)
    with pytest.raises(PowersteerError, match="there is no extractor 'no'"):
        (place / "it.png").write_bytes(buffer.getvalue())
        studio.extract(place / "it.png", adapter, "no")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"prompt": " "}, "the prompt is empty"),
        ({"conditions": []}, "no adapter is chosen"),
        ({"conditions": [Wanted("mine", None)]}, "canvas 1 is empty"),
        ({"conditions": [Wanted("elsewhere", drawing())]}, "there is no adapter 'elsewhere' here"),
        ({"guidance_scale": 0.5}, "guidance_scale"),
        ({"num_images": 9}, "too much at once"),
        ({"num_inference_steps": 101}, "at most 8 pictures of 100 steps"),
        ({"prompt": None}, "'prompt'"),
        ({"prompt": "a" * 5000}, "'prompt'"),
        ({"negative_prompt": 5}, "'negative_prompt'"),
        ({"seed": -1}, "'seed'"),
        ({"seed": 2**64}, "'seed'"),
        ({"seed": float("nan")}, "'seed'"),
        ({"num_images": 0}, "'num_images'"),
        ({"num_inference_steps": float("inf")}, "'num_inference_steps'"),
        ({"guidance_scale": float("nan")}, "'guidance_scale'"),
        ({"scheduler": "magic"}, "'scheduler'"),
        ({"scale": float("nan")}, "scale"),
        ({"scale": -1}, "scale"),
        ({"scale": 1e999}, "scale"),
        ({"conditions": [Wanted("mine", drawing(), 1.0, -0.1)]}, "start"),
        ({"conditions": [Wanted("mine", drawing(), 1.0, 0.0, float("nan"))]}, "end"),
        ({"conditions": [Wanted("mine", 5)]}, "drawing"),
        ({"conditions": [Wanted("mine", drawing())] * 4}, "conditions"),
    ],
)
def test_what_is_missing_is_said(studio, given, said):
    with pytest.raises(PowersteerError, match=said):
        list(studio.pictures(wish(studio, **given), "me"))


def test_who_stops_ends_their_own_picture_only(studio):
    running = studio.pictures(wish(studio, num_inference_steps=100), "me")
    next(running)
    studio.stop("someone else")
    next(running)
    studio.stop("me")
    with pytest.raises(Stopped):
        list(running)
    assert not studio.pipe.unet._forward_pre_hooks  # and nothing is left of the steering
    assert len(result_of(studio, wish(studio)).made) == 1


def test_people_who_draw_at_once_get_what_they_would_alone(studio):
    wishes = [
        wish(studio, seed=seed, conditions=[Wanted(studio.adapters()[0], drawing(20 * seed))]) for seed in range(3)
    ]
    alone = [result_of(studio, one).made[0].picture for one in wishes]
    together: dict[int, Path] = {}

    def draw(i: int) -> None:
        together[i] = result_of(studio, wishes[i], f"person {i}").made[0].picture

    threads = [threading.Thread(target=draw, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(same(together[i], alone[i]) for i in range(3))


def test_spread_is_the_standard_deviation_of_each_pixel():
    pictures = torch.full((2, 3, 1, 2), -1.0)
    pictures[1, :, 0, 1] = 1  # one pixel alike, one black and white
    assert torch.allclose(pixel_spread(pictures), torch.tensor([[0.0, 0.5**0.5]]))
    noise = torch.rand(5, 3, 4, 4)
    wanted = np.sqrt(np.var((noise.numpy() + 1) / 2, axis=0, ddof=1).mean(0))
    assert np.allclose(pixel_spread(noise).numpy(), wanted, atol=1e-6)


def test_a_pictures_lines_come_onto_the_canvas(studio, tmp_path):
    sheet = Image.new("RGB", (200, 200), "white")
    ImageDraw.Draw(sheet).rectangle((50, 50, 150, 150), fill="red")
    sheet.save(tmp_path / "it.png")
    adapter = studio.adapters()[0]
    assert {"canny", "hed", AS_IT_IS} <= set(studio.extractors(adapter))
    assert studio.extract(tmp_path / "it.png", adapter, AS_IT_IS).startswith("data:image/png;base64,")
    pytest.importorskip("cv2")
    url = studio.extract(tmp_path / "it.png", adapter, "canny")
    made = result_of(studio, wish(studio, conditions=[Wanted(adapter, url)])).made[0]
    ink = 255 - np.asarray(Image.open(made.job.condition[0]).convert("L"), dtype=float)  # 512 px: 2.56 a pixel
    edge = ink[120:140, 200:300].max(), ink[240:270, 240:270].max()
    assert edge[0] > 128 > edge[1]
    (tmp_path / "no.png").write_text("no picture")
    with pytest.raises(PowersteerError, match="not a readable picture"):
        studio.extract(tmp_path / "no.png", adapter, "canny")


def test_adapters_of_a_folder_can_be_chosen_and_nothing_else(studio, model, tmp_path):
    assert studio.adapters() == [str(tmp_path / "runs" / "mine")]
    model.save_pretrained(tmp_path / "runs" / "later")
    (tmp_path / "runs" / "other").mkdir()
    (tmp_path / "runs" / "other" / "config.json").write_text('{"_class_name": "ControlNetModel"}')
    assert studio.adapters() == [str(tmp_path / "runs" / name) for name in ("mine", "later")]
    with pytest.raises(PowersteerError, match="there is no adapter"):
        studio.network(str(tmp_path / "runs" / "other"))


@pytest.mark.parametrize(
    ("host", "wanted"),
    [("127.0.0.1", True), ("localhost", True), ("::1", True), ("127.8.8.8", True), ("0.0.0.0", False), ("::", False)],
)
def test_loopback(host, wanted):
    assert is_loopback(host) is wanted
    assert not is_loopback("example.org")


def test_the_last_seeds_are_followed_by_the_first(studio):
    result = result_of(studio, wish(studio, seed=2**32 - 1, num_images=2))
    assert [made.job.seed for made in result.made] == [2**32 - 1, 0]
    assert studio.reload(result.made[1].picture).seed == 0


def test_ipv6_loopback_is_this_machine(studio, tmp_path):
    httpx = pytest.importorskip("httpx")
    pytest.importorskip("gradio")
    for host in ("::1", "[::1]"):
        with served(studio.base, studio.adapters(), tmp_path / "runs", host=host) as address:
            assert address.startswith("http://[::1]:")
            assert httpx.get(address, trust_env=False).status_code == 200


def test_others_need_a_password():
    run = CliRunner().invoke(app, ["studio", "--host", "0.0.0.0"])
    assert isinstance(run.exception, PowersteerError)
    assert "others can reach 0.0.0.0: give --auth user:password" in str(run.exception)
    assert not is_loopback("::ffff:10.0.0.1")
    for auth in ("me", "me:", ":word"):
        with pytest.raises(PowersteerError, match="--auth is user:password"), served(auth=auth):
            pass


def test_only_who_has_the_password_sees_the_page_and_no_file_of_the_machine(studio, tmp_path):
    httpx = pytest.importorskip("httpx")
    pytest.importorskip("gradio")
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    with served(studio.base, studio.adapters(), tmp_path / "runs", auth="me:word") as address:
        with httpx.Client(base_url=address, trust_env=False, follow_redirects=True) as stranger:
            assert stranger.get("/config").status_code == 401
            assert stranger.get(f"/gradio_api/file={secret}").status_code == 401
            assert stranger.post("/login", data={"username": "me", "password": "guess"}).status_code == 400
        with httpx.Client(base_url=address, trust_env=False, follow_redirects=True) as me:
            assert me.post("/login", data={"username": "me", "password": "word"}).status_code == 200
            page = me.get("/")
            assert page.status_code == 200
            assert "default-src 'self'" in page.headers["content-security-policy"]
            for path in (secret, sys.executable, f"{tmp_path}/runs/../secret.txt", Path(__file__)):
                assert me.get(f"/gradio_api/file={path}").status_code == 403, path
            assert me.get(f"/gradio_api/file=../../../..{sys.executable}").status_code in (403, 404)
            assert me.get("/docs").status_code == 404


def test_a_name_for_the_new_adapter(tmp_path):
    training = Training("powersteer-tiny", tmp_path / "runs", tmp_path)
    found = training.look(draw_pairs(tmp_path / "pairs", 8))
    (tmp_path / "runs" / "taken").mkdir(parents=True)
    for name, said in (("../up", "cannot be a folder's name"), ("", "cannot be"), ("taken", "choose another name")):
        with pytest.raises(PowersteerError, match=said):
            training.start(found, name)
    assert training.state().status == "none"


@pytest.mark.slow
def test_a_training_is_watched_stopped_and_its_fault_told(studio, tmp_path, base_dir):
    training = Training(str(base_dir), tmp_path / "runs", studio.work_dir)
    found = training.look(draw_pairs(tmp_path / "pairs", 12))
    fast = {"train_batch_size": 4, "learning_rate": 1e-3, "weights": "uniform", "num_validation_images": 2}
    training.start(found, "good", max_train_steps=10, validation_steps=5, **fast)
    with pytest.raises(PowersteerError, match="a training is running"):
        training.start(found, "second")
    assert training._process.wait(120) == 0
    state = training.state()
    assert (state.status, [row["step"] for row in state.log]) == ("finished", [0, 5, 10])
    assert state.pictures.name == "step-000010.png"
    assert str(state.adapter) in studio.adapters()
    assert len(result_of(studio, wish(studio, conditions=[Wanted(str(state.adapter), drawing())])).made) == 1

    training.start(found, "long", max_train_steps=100_000, patience=None, **fast)
    threading.Event().wait(0.1)
    while not training.state().log:
        assert training.running
        threading.Event().wait(0.1)
    training.close()
    assert training.state().status == "stopped"
    assert training.state().adapter is not None

    training.start(training.look(draw_pairs(tmp_path / "few", 3)), "few")
    training._process.wait(120)
    assert (training.state().status, training.state().adapter) == ("failed", None)
    assert "3 pairs are too few to hold some out" in training.state().message

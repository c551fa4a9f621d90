"""The benches measure what they say, one row at a time: bytes by a closed form, ways that differ in one thing only."""

import json
import sys
import warnings
import weakref
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

from powersteer import load_base
from powersteer.adapters.bps.model import BPSModel
from powersteer.apps import cli
from powersteer.apps.bench import generate, shapes, steering, train, turns
from powersteer.apps.bench.generate import bench_generate
from powersteer.apps.bench.steering import bench_steering
from powersteer.apps.bench.train import bench_train
from powersteer.core.errors import PowersteerError
from powersteer.core.memory import TensorBytes

RESULTS = Path(__file__).parents[2] / "docs" / "results"


@pytest.fixture
def bench(monkeypatch, capsys):
    """Runs `powersteer bench`: exit status, output, errors."""

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["powersteer", "bench", *map(str, args)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        printed = capsys.readouterr()
        return stop.value.code or 0, printed.out, printed.err

    return run


@pytest.fixture
def unet_batches(monkeypatch):
    """The batch of every evaluation of a U-Net."""
    batches, forward = [], UNet2DConditionModel.forward

    def counted(self, sample, *args, **kwargs):
        batches.append(len(sample))
        return forward(self, sample, *args, **kwargs)

    monkeypatch.setattr(UNet2DConditionModel, "forward", counted)
    return batches


def out_of_memory(*_, **__):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")


def test_peak_memory_is_a_closed_form():
    weight = torch.ones(1000)
    with TensorBytes([weight]) as tracked:
        a = weight + 1  # 4,000 bytes live
        b = a * 2  # 8,000
        del a
        c = b.view(10, 100).sum(1)  # 4,040: a view is no new storage
        del b, c
        weight.mul_(2)
        torch.zeros(500)
    assert tracked.peak == 8000 and tracked.now == 0


def test_the_baseline_has_the_first_turn_and_ratios_are_of_one_round(monkeypatch):
    order, seconds = [], {"baseline": [1.0, 2.0, 4.0], "way": [2.0, 2.0, 12.0]}

    def timed(step, device):
        order.append(step)
        return seconds[step].pop(0)

    monkeypatch.setattr(turns, "timed", timed)
    assert turns.take_turns("way", "baseline", 3, "cpu") == turns.Turns(seconds=2.0, ratio=2.0)
    assert order == ["baseline", "way"] * 3
    seconds["baseline"] = [0.1, 0.3]
    assert turns.take_turns("baseline", None, 2, "cpu") == turns.Turns(seconds=0.2, ratio=1.0)


def test_names_are_known_in_any_case_and_in_short():
    names, bare = list(steering.WAYS), "bare U-Net"
    assert turns.chosen(names, []) == names
    assert turns.chosen(names, ["controlnet"]) == [bare, "ControlNet"]  # not ControlNet-XS
    assert turns.chosen(names, ["CONTROLNET-xs", "T2I-Adapter"]) == [bare, *names[-2:]]
    assert turns.chosen(names, ["bps paper, WARM plan"]) == turns.chosen(names, ["bps-paper-warm"]) == [bare, names[3]]
    assert turns.chosen(names, ["bps-lite", "bare U-Net"]) == [bare, "BPS lite, shared", "BPS lite, warm plan"]
    for unknown in ("bps-pap", "", "-", "controlnet-xs-2"):
        with pytest.raises(
            PowersteerError, match=rf"no '{unknown}' to measure: --only takes bare-u-net, bps-paper-not"
        ):
            turns.chosen(names, [unknown])


def test_waits_for_the_gpu_are_counted(monkeypatch):
    modes = []
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def step():
        warnings.warn("something else", UserWarning, stacklevel=1)
        for _ in range(3):
            warnings.warn("called a synchronizing CUDA operation (Triggered internally)", UserWarning, stacklevel=1)

    assert turns.device_waits(step, "cuda:0") == 3 and modes == ["warn", 0]
    assert turns.device_waits(lambda: pytest.fail("a step for nothing"), "cpu") is None


def test_steering_bench_at_the_embedded_shape(monkeypatch):
    networks, alive = [], []

    def make_bps(*args):
        model = shapes.make_bps(*args)
        networks.append(weakref.ref(model))
        return model

    monkeypatch.setattr(steering, "make_bps", make_bps)
    result = bench_steering(
        "tiny", rounds=1, on_row=lambda _: alive.append(sum(network() is not None for network in networks))
    )
    assert len(networks) == 5 and alive == [0] * 9  # each row's networks go with it
    rows = {row.name: row for row in result.rows}
    assert list(rows) == [
        "bare U-Net",
        "BPS paper, not shared",
        "BPS paper, shared",
        "BPS paper, warm plan",
        "BPS lite, shared",
        "BPS lite, warm plan",
        "ControlNet",
        "ControlNet-XS",
        "T2I-Adapter, once a picture",
    ]
    assert rows["bare U-Net"].ratio == 1 and rows["bare U-Net"].extra_peak_memory == 0
    assert all(row.ratio > 0 and row.warm_up_seconds > 0 and row.error is None for row in result.rows)
    assert {row.device_waits for row in result.rows} == {None}
    unet = load_base().unet
    paper = BPSModel.from_unet(unet, pixel_unshuffle=4)
    assert rows["BPS paper, shared"].parameters == paper.num_parameters()
    # A plan keeps one step: 2 residuals a down block, 1 in the middle, 3 an up block, at 16², 8² and 4².
    sizes = [64 * 16**2, 128 * 8**2, 160 * 4**2]
    assert rows["BPS paper, warm plan"].plan_bytes == 4 * (5 * sum(sizes) + sizes[-1])
    assert rows["BPS paper, shared"].extra_peak_memory > 4 * paper.num_parameters()
    # The U-Net's own weights are nobody's extra: beyond its weights and plan a warm step keeps next to nothing.
    warm = rows["BPS paper, warm plan"]
    assert abs(warm.extra_peak_memory - 4 * warm.parameters - warm.plan_bytes) < 1e6
    assert rows["ControlNet"].parameters > rows["ControlNet-XS"].parameters
    # What was written down before has the same names.
    written, now = json.loads((RESULTS / "steering-sd15-cpu.json").read_text()), result.as_json()
    assert set(written) <= set(now) and set(written["rows"][0]) <= set(now["rows"][0])
    assert [row["name"] for row in written["rows"]] == list(rows)


def test_guidance_doubles_the_batch_and_a_warm_step_runs_no_network(unet_batches, monkeypatch):
    conditions, forward = [], BPSModel.forward

    def counted(self, condition, *args):
        conditions.append(len(condition))
        return forward(self, condition, *args)

    monkeypatch.setattr(BPSModel, "forward", counted)
    only = ["bps-lite", "BPS paper, not shared"]
    result = bench_steering("tiny", rounds=2, batch_size=3, only=only)
    assert result.batch_size == 3 and [row.name for row in result.rows][1:] == [
        "BPS paper, not shared",
        "BPS lite, shared",
        "BPS lite, warm plan",
    ]
    # The bare step: warm-up, two rounds, peak; beside each way a warm-up and two rounds more.
    assert unet_batches == [6] * (4 + 3 * (4 + 3))
    assert conditions == [6] * 4 + [1] * 4 + [1]  # with a plan in the warm-up alone


def test_compiled_ways_are_compiled_apart_before_they_are_steered(monkeypatch):
    compiled = []

    def compile_(function, **settings):
        compiled.append(type(function.__self__).__name__)
        assert settings["dynamic"] is False and settings.get("isolate_recompiles", True)
        return function

    monkeypatch.setattr(torch, "compile", compile_)
    result = bench_steering("tiny", rounds=1, compiled=True, only=["bps-lite-shared", "controlnet"])
    bare = ["UNet2DConditionModel"]
    assert compiled == [*bare, "BPSModel", *bare, "ControlNetModel", *bare]
    assert result.compiled and [row.extra_peak_memory for row in result.rows] == [None] * 3


def test_a_way_that_does_not_fit_is_a_row_and_the_next_is_measured(monkeypatch, bench, tmp_path):
    monkeypatch.setattr(steering, "make_controlnet", out_of_memory)
    file = tmp_path / "bench.json"
    args = ("steering", "--shape", "tiny", "--rounds", 1, "--only", "controlnet", "--only", "t2i-adapter")
    code, printed, _ = bench(*args, "--json", file)
    bare, lost, after = json.loads(file.read_text())["rows"]
    assert code == 0 and bare["ratio"] == 1 and after["name"] == "T2I-Adapter, once a picture" and after["ratio"] > 0
    assert lost.pop("name") == "ControlNet" and lost.pop("error") == "out of memory"
    assert set(lost.values()) == {None}
    assert printed.splitlines()[2].split() == ["ControlNet", "out", "of", "memory"]

    def another_fault(*_):
        raise RuntimeError("mat1 and mat2 must have the same dtype")

    monkeypatch.setattr(steering, "make_controlnet", another_fault)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        bench_steering("tiny", rounds=1, only=["controlnet"])
    monkeypatch.setattr(steering, "make_unet", out_of_memory)
    code, printed, said = bench(*args)
    assert code == 2 and "do not fit into the memory of cpu" in said and said.count("\n") == 1


def test_rows_are_printed_and_written_as_they_come(monkeypatch, bench, tmp_path):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(steering, "make_controlnet", interrupt)
    file = tmp_path / "bench.json"
    code, printed, _ = bench("steering", "--shape", "tiny", "--rounds", 1, "--only", "controlnet", "--json", file)
    assert code == 130 and [row["name"] for row in json.loads(file.read_text())["rows"]] == ["bare U-Net"]
    assert [path.name for path in tmp_path.iterdir()] == ["bench.json"]
    heading, row = printed.splitlines()[:2]
    assert heading.split("  ")[0] == "a step, guidance batch of 2" and heading.endswith(
        "  parameters  extra memory      plan"
    )
    assert row.split()[:3] == ["bare", "U-Net", "1.000"] and row.split()[4] == "ms"
    assert row.index("1.000") == heading.index("ratio")  # aligned


@pytest.mark.parametrize("command", ["steering", "train", "generate"])
def test_the_commands_refuse_in_words(command, bench, tmp_path):
    for args, message in (
        (("--shape", "sd14"), "must be tiny, sd15 or sdxl"),
        (("--dtype", "int8"), "must be float32, bfloat16 or float16"),
        (("--device", "nothing"), "--device nothing cannot be used"),
        (("--only", "controlnets"), "there is no 'controlnets' to measure: --only takes "),
    ):
        code, printed, said = bench(command, *args, "--json", tmp_path / "bench.json")
        assert code == 2 and message in said and said.count("\n") == 1 and not printed
    assert "controlnet" in said and "t2i-adapter" in said and not list(tmp_path.iterdir())


def test_train_bench_counts_pictures_and_foretells_memory(bench, tmp_path):
    file = tmp_path / "train.json"
    code, printed, _ = bench(
        *("train", "--shape", "tiny", "--rounds", 1, "--batch-size", 2, "--only", "BPS LITE", "--json", file)
    )
    result = json.loads(file.read_text())
    baseline, lite = result["rows"]
    assert code == 0 and (baseline["name"], baseline["ratio"]) == ("ControlNet", 1.0)
    assert lite["name"] == "BPS lite" and 0.2 < lite["ratio"] < 2 and result["epochs"] == []
    for row in (baseline, lite):
        assert row["pictures_per_second"] == pytest.approx(2 / row["seconds"]) and row["error"] is None
    # The network's memory alone, whatever stands beside it in its turns.
    assert lite["peak_memory"] == pytest.approx(lite["estimated_memory"], rel=1e-3)
    assert baseline["peak_memory"] > 1.5 * lite["peak_memory"] and baseline["estimated_memory"] is None
    assert printed.splitlines()[0].startswith("training step, batch 2") and "pictures/s" in printed
    written = json.loads((RESULTS / "train-tiny-cpu.json").read_text())
    assert set(written) <= set(result) and set(written["rows"][0]) <= set(lite)


def test_a_method_that_fits_alone_is_not_said_to_be_too_large(monkeypatch):
    monkeypatch.setattr(train, "make_controlnet", out_of_memory)
    rows = bench_train("tiny", rounds=1, only=["bps-lite"]).rows
    assert [row.error for row in rows] == ["out of memory", "out of memory beside ControlNet"]
    assert {row.ratio for row in rows} == {None}


def test_generate_bench_makes_whole_pictures(unet_batches, monkeypatch):
    networks, decoded = [], []
    forward, decode = BPSModel.forward, AutoencoderKL.decode

    def counted(self, condition, *args):
        networks.append(len(condition))
        return forward(self, condition, *args)

    def decoding(self, latents, *args, **kwargs):
        decoded.append(tuple(latents.shape))
        return decode(self, latents, *args, **kwargs)

    monkeypatch.setattr(BPSModel, "forward", counted)
    monkeypatch.setattr(AutoencoderKL, "decode", decoding)
    seen = []
    result = bench_generate(
        "tiny",
        rounds=1,
        batch_sizes=(2, 1),
        num_inference_steps=2,
        only=["bps-lite"],
        on_row=lambda result: seen.append(len(result.rows)),
    )
    names = ["bare pipeline", "BPS lite, first picture", "BPS lite, further picture"]
    assert [(row.name, row.batch_size) for row in result.rows] == [(name, size) for size in (2, 1) for name in names]
    assert seen == list(range(1, 7)) and result.num_inference_steps == 2 and result.pixels == 64
    for row in result.rows:
        assert row.pictures_per_second == pytest.approx(row.batch_size / row.seconds)
        assert (row.ratio == 1 or row.name != "bare pipeline") and row.peak_memory is row.error is None
    # A warm-up and a round each, of the bare pipeline alone and of it beside either way: 10 batches of 2 steps.
    assert unet_batches == [4] * 20 + [2] * 20
    assert decoded == [(2, 4, 16, 16)] * 10 + [(1, 4, 16, 16)] * 10
    # One condition whatever the batch: the first picture at every step, a further one not at all after its warm-up.
    assert networks == [1] * 2 * (4 + 2)


def test_every_way_to_generate_runs_from_the_command(bench, tmp_path):
    file = tmp_path / "generate.json"
    args = ("--shape", "tiny", "--rounds", 1, "--num-inference-steps", 1, "--batch-size", 2, "--json", file)
    code, printed, _ = bench("generate", *args)
    rows = json.loads(file.read_text())["rows"]
    assert code == 0 and [row["name"] for row in rows] == list(generate.WAYS) and all(row["ratio"] > 0 for row in rows)
    assert [line.split("  ")[0] for line in printed.splitlines()[1:-1]] == list(generate.WAYS)
    assert printed.startswith("1 step and decoding  ")


def test_cost_is_counted_in_closed_form(bench, tmp_path):
    code, printed, err = bench("cost", "--only", "pixart", "--only", "sana-1-6b", "--json", tmp_path / "cost.json")
    assert code == 0, err
    assert "PixArt-Σ" in printed and "Sana 1.6B" in printed and "FLUX" not in printed
    rows = {row["name"]: row for row in json.loads((tmp_path / "cost.json").read_text())["rows"]}
    row, tokens, width, features, blocks = rows["PixArt-Σ"], 64 * 64, 1152, 72, 28
    heads = blocks * 2 * tokens * features * width
    assert row["warm_share"] == pytest.approx(heads / row["base_operations"])
    assert row["cold_share"] > row["warm_share"] and row["control_net_parameters"] is None
    assert row["plan_bytes"] == 4 * tokens * features * 2
    assert row["base_parameters"] == pytest.approx(611e6, rel=0.01)
    assert rows["Sana 1.6B"]["control_net_parameters"] == pytest.approx(632e6, rel=0.01)
    assert all(one["parameter_share"] < 0.02 and one["warm_share"] < 0.01 for one in rows.values())


def test_cost_of_what_is_not_there_is_refused(bench):
    for options, message in (
        (("--only", "stable-cascade"), "there is no 'stable-cascade' to measure"),
        (("--preset", "large"), "--preset must be paper or lite"),
        (("--pixels", 1000), "--pixels must be a multiple of 32"),
    ):
        code, _, err = bench("cost", *options)
        assert code == 2 and message in err and "Traceback" not in err

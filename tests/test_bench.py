"""The bench measures what it says: bytes by a closed form, ways that differ in nothing but how they steer."""

import json
import sys

import pytest
import torch

from powersteer import cli, load_base
from powersteer.bench.steering import bench_steering
from powersteer.memory import TensorBytes
from powersteer.model import BPSModel


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


def test_steering_bench_at_the_embedded_shape():
    result = bench_steering("tiny", rounds=1)
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


def test_bench_command_writes_json_and_refuses_in_words(tmp_path, monkeypatch, capsys):
    def run(*args):
        monkeypatch.setattr(sys, "argv", ["powersteer", "bench", "steering", *map(str, args)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return stop.value.code or 0, capsys.readouterr()

    code, printed = run("--shape", "tiny", "--rounds", 1, "--json", tmp_path / "bench.json")
    assert code == 0 and "ControlNet-XS" in printed.out
    assert json.loads((tmp_path / "bench.json").read_text())["rows"][0]["ratio"] == 1
    for args, message in (
        (("--shape", "sd14"), "must be tiny, sd15 or sdxl"),
        (("--dtype", "int8"), "must be float32, bfloat16 or float16"),
        (("--device", "nothing"), "--device nothing cannot be used"),
    ):
        code, printed = run(*args)
        assert code == 2 and message in printed.err and printed.err.count("\n") == 1

"""The page of a run, and its curves."""

import base64
import io
import re

import pytest
import torch
from PIL import Image

from powersteer.core.pictures import to_pil
from powersteer.evaluation.report import curves, write_report

LOG = [
    {"step": 0, "prior": 0.6, "steered": 0.6, "shuffled": 0.6},
    {"step": 50, "loss": 0.4},  # between two validations
    {"step": 100, "prior": 0.6, "steered": 0.3, "shuffled": 1.2},
    {"step": 200, "prior": 0.6, "steered": 0.2, "shuffled": 1.5},
]


def test_every_loss_is_drawn_to_the_one_scale_that_is_written():
    drawn = curves(LOG, width=720, height=260)
    lines = [re.findall(r"([\d.]+),([\d.]+)", points) for points in re.findall(r'points="([^"]*)"', drawn)]
    top = float(re.findall(r'text-anchor="end">([\d.]+)</text>', drawn)[2])
    assert 1.5 <= top < 1.7
    for name, line in zip(("prior", "steered", "shuffled"), lines, strict=True):
        rows = [row for row in LOG if name in row]
        assert [float(x) for x, _ in line] == pytest.approx([50 + 660 * row["step"] / 200 for row in rows], abs=0.1)
        # To what is written of the scale, two digits.
        assert [(235 - float(y)) / 225 * top for _, y in line] == pytest.approx([row[name] for row in rows], abs=0.01)


def test_nothing_logged_yet_is_an_empty_plot():
    assert re.findall(r'points="([^"]*)"', curves([])) == ["", "", ""]


def test_the_page_holds_figures_curves_and_pictures(tmp_path):
    metrics = {
        "parameters": 1_234_567,
        "pairs": 3000,
        "train_seconds": 90.0,
        "steps": 200,
        "held_out_pairs": 20,
        "held_out_pictures": 6,
        "denoising_loss": {"prior": 0.6, "steered": 0.2, "shuffled": 1.5},
        "line_f1": {"prior": 0.3, "steered": 0.8, "shuffled": 0.2, "artist": 0.95, "share_of_way": 0.77},
        "loss_reduction": 2 / 3,
    }
    pictures = {"drawing": torch.zeros(3, 8, 8), "the artist's": torch.rand(3, 8, 8) * 2 - 1}
    write_report(tmp_path / "report.html", metrics, [{"text": "<b>a & b</b>", "pictures": pictures}], LOG)
    page = (tmp_path / "report.html").read_text("utf-8")
    for words in ("1.2 M parameters", "for 1.5 minutes", "<b>0.2000</b>", "<b>0.800</b>", "67% below", "goes\n77% of"):
        assert words in page, words
    assert "<td>&lt;b&gt;a &amp; b&lt;/b&gt;</td>" in page and curves(LOG) in page
    for shown, picture in zip(re.findall('base64,([^"]+)', page), pictures.values(), strict=True):
        assert Image.open(io.BytesIO(base64.b64decode(shown))).tobytes() == to_pil(picture).tobytes()
    assert "{{" not in page and "{%" not in page

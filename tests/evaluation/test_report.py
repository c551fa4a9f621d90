"""The curves of a run."""

import re

import pytest

from powersteer.evaluation.report import curves

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

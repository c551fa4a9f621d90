"""Fidelity to label maps, layouts and styles, on hand-made pictures."""

import pytest
import torch

from powersteer.conditions.fidelity.colours import lab, palette_distance
from powersteer.conditions.fidelity.labels import NO_LABEL, box_iou, class_boxes, mean_iou, nearest_labels

PALETTE = {"sky": (0, 0, 255), "grass": (0, 200, 0), "wall": (255, 255, 255)}


def test_nearest_colours_are_labels_and_black_is_none():
    picture = torch.tensor([[0.1, 0, 0.9], [0, 0.6, 0.1], [0.8, 0.9, 1], [0.05, 0, 0.05]]).T.reshape(1, 3, 2, 2)
    assert nearest_labels(picture, PALETTE).tolist() == [[[0, 1], [2, NO_LABEL]]]
    black = PALETTE | {"night": (0, 0, 0)}
    assert nearest_labels(picture, black)[0, 1, 1] == 3


def test_mean_iou_by_hand():
    wanted = torch.tensor([[[0, 0, 1, 1], [0, 0, NO_LABEL, 1]]])
    found = torch.tensor([[[0, 1, 1, 1], [0, NO_LABEL, 1, 2]]])
    # sky: 2 of 4; grass: 2 of 3 wanted and 1 more found; wall is found, but nowhere wanted
    assert mean_iou(wanted, found, 3) == pytest.approx((2 / 4 + 2 / 4) / 2)
    assert mean_iou(wanted, wanted, 3) == 1
    assert mean_iou(torch.full_like(wanted, NO_LABEL), found, 3) == 0


def test_boxes_of_classes_and_a_stray_pixel():
    labels = torch.full((1, 32, 40), NO_LABEL)
    labels[0, 4:20, 10:30] = 1
    boxes = class_boxes(labels, 3)
    assert boxes[0, 1].tolist() == [10, 4, 30, 20]
    assert boxes[0, 0].isnan().all()
    labels[0, 31, 0] = 1
    assert class_boxes(labels, 3)[0, 1].tolist() == [10, 4, 30, 20]


def test_box_iou_by_hand():
    wanted = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 10], [0, 0, 10, 10], [torch.nan] * 4])
    found = torch.tensor([[0.0, 0, 10, 10], [5, 0, 15, 10], [torch.nan] * 4, [0, 0, 1, 1]])
    iou = box_iou(wanted, found)
    assert iou[:3].tolist() == pytest.approx([1, 50 / 150, 0]) and iou[3].isnan()
    assert box_iou(torch.tensor([0.0, 0, 1, 1]), torch.tensor([2.0, 2, 3, 3])).item() == 0


def test_lab_of_known_colours():
    colours = torch.tensor([[1.0, 1, 1], [0, 0, 0], [1, 0, 0], [0, 0, 1]])[:, :, None, None]
    wanted = torch.tensor([[100.0, 0, 0], [0, 0, 0], [53.24, 80.09, 67.20], [32.30, 79.19, -107.86]]).double()
    torch.testing.assert_close(lab(colours)[..., 0, 0], wanted, atol=0.02, rtol=0)


def test_palette_distance_is_of_colours_wherever_they_lie():
    generator = torch.Generator().manual_seed(0)
    picture = torch.rand(1, 3, 8, 8, generator=generator)
    mixed = picture.flatten(2)[..., torch.randperm(64, generator=generator)].view_as(picture)
    assert palette_distance(picture, mixed).item() == pytest.approx(0, abs=1e-9)
    grey = torch.tensor([0.4, 0.6])[:, None, None, None].expand(2, 3, 4, 4)
    step = (lab(grey)[1, 0, 0, 0] - lab(grey)[0, 0, 0, 0]).item()
    assert palette_distance(grey[:1], grey[1:]).item() == pytest.approx(step, rel=0.01)

import pytest
import torch

from powersteer.conditions.fidelity.lines import dark_lines, edge_scores, line_f1, line_scores, luminance


def blank():
    return torch.zeros(1, 1, 16, 16), torch.ones(1, 3, 16, 16)


def test_a_picture_with_the_drawings_own_lines_scores_one():
    drawing, picture = blank()
    drawing[..., 5, 2:14] = 1
    picture[..., 5, 2:14] = -1
    assert line_f1(drawing, picture).item() == pytest.approx(1.0)


@pytest.mark.parametrize(("shift", "wanted"), [(1, 1.0), (2, 0.0)])
def test_tolerance_is_one_pixel(shift, wanted):
    drawing, picture = blank()
    drawing[..., 5, 2:14] = 1
    picture[..., 5 + shift, 2:14] = -1
    assert line_f1(drawing, picture).item() == pytest.approx(wanted)


def test_half_the_lines_missing():
    drawing, picture = blank()
    drawing[..., 3, 2:14] = drawing[..., 12, 2:14] = 1
    picture[..., 3, 2:14] = -1
    assert line_f1(drawing, picture).item() == pytest.approx(2 / 3)  # precision 1, recall 1/2


def test_as_many_lines_too_many():
    drawing, picture = blank()
    drawing[..., 3, 2:14] = 1
    picture[..., 3, 2:14] = picture[..., 12, 2:14] = -1
    assert line_f1(drawing, picture).item() == pytest.approx(2 / 3)  # precision 1/2, recall 1


def test_the_inside_of_a_dark_area_is_not_a_line():
    drawing, picture = blank()
    drawing[..., 2:14, 2:14] = 1
    drawing[..., 4:12, 4:12] = 0  # a frame two pixels wide
    picture[..., 2:14, 2:14] = -1  # a black square
    assert line_f1(drawing, picture).item() == pytest.approx(1.0)


def test_precision_and_recall_tell_too_many_lines_from_too_few():
    drawing, picture = blank()
    drawing[..., 3, 2:14] = 1
    picture[..., 3, 2:14] = picture[..., 12, 2:14] = -1
    scores = line_scores(drawing, picture)
    assert (scores.precision.item(), scores.recall.item()) == (0.5, 1)
    assert dark_lines(picture).sum().item() == 24


@pytest.mark.parametrize(("tolerance", "wanted"), [(0, 0.0), (2, 1.0)])
def test_edges_of_any_origin_agree_within_a_given_tolerance(tolerance, wanted):
    edges, _ = blank()
    edges[..., 5, 2:14] = 1
    assert edge_scores(edges, edges.roll(2, -2), tolerance).f1.item() == pytest.approx(wanted)


def test_an_empty_picture_scores_zero():
    drawing, picture = blank()
    drawing[..., 5, 2:14] = 1
    assert line_f1(drawing, picture).item() == 0


def test_luminance_of_the_primaries():
    colours = torch.tensor([[1, -1, -1], [-1, 1, -1], [-1, -1, 1], [1, 1, 1]]).float()[:, :, None, None]
    torch.testing.assert_close(luminance(colours).flatten(), torch.tensor([0.299, 0.587, 0.114, 1.0]))

import torch
from PIL import Image

from powersteer.core.pictures import from_pil, save_grid, to_pil


def test_round_trip_through_pil_is_exact():
    levels = torch.arange(192).view(3, 8, 8) / 127.5 - 1
    assert torch.equal(from_pil(to_pil(levels)), levels)


def test_values_outside_are_clipped():
    assert to_pil(torch.full((3, 1, 1), 7.0)).getpixel((0, 0)) == (255, 255, 255)


def test_grid_places_every_picture(tmp_path):
    shades = torch.tensor([-1.0, 1.0, -1.0])[:, None, None, None].expand(3, 3, 4, 4)
    save_grid(shades, tmp_path / "deep" / "grid.png", columns=2, scale=3, headings=("a", "b"))
    with Image.open(tmp_path / "deep" / "grid.png") as grid:
        assert grid.size == (26, 18 + 26)
        places = [(6, 24), (20, 24), (6, 38), (20, 38)]
        assert [grid.getpixel(place)[0] for place in places] == [0, 255, 0, 0xBB]

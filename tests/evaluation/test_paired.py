"""Picture against picture, against scikit-image's figures and closed forms."""

import json
import sys
import types
from pathlib import Path

import pytest
import torch

from powersteer import PowersteerError
from powersteer.core.ssim import ssim
from powersteer.evaluation.paired import lpips, psnr, spread_map

sys.path.insert(0, str(Path(__file__).parents[1] / "fixtures"))
from evaluation_peers import pictures

PEERS = json.loads((Path(__file__).parents[1] / "fixtures" / "evaluation_peers.json").read_text())
ONE, OTHER = (torch.from_numpy(picture)[None] for picture in pictures())


def test_ssim_and_psnr_are_scikit_images():
    assert ssim(ONE, OTHER).item() == pytest.approx(PEERS["ssim"], rel=1e-6)
    assert psnr(ONE, OTHER).item() == pytest.approx(PEERS["psnr"], rel=1e-9)


def test_closed_forms():
    assert ssim(ONE, ONE).item() == pytest.approx(1)
    assert psnr(ONE, ONE).item() == float("inf")
    dark, bright = torch.full((2, 3, 16, 16), 0.2), torch.full((2, 3, 16, 16), 0.7)
    torch.testing.assert_close(psnr(dark, bright), torch.full((2,), 6.0206).double(), atol=1e-4, rtol=0)  # 20·log₁₀ 2
    wanted = (2 * 0.2 * 0.7 + 1e-4) / (0.04 + 0.49 + 1e-4)  # no variance: luminance alone
    torch.testing.assert_close(ssim(dark, bright), torch.full((2,), wanted).double(), atol=1e-6, rtol=0)


def test_ssim_of_a_picture_smaller_than_its_window_is_refused():
    with pytest.raises(PowersteerError, match="11×11 pixels: a picture of 10×32"):
        ssim(ONE[..., :32, :10], OTHER[..., :32, :10])


def test_spread_is_where_pictures_differ():
    made = torch.zeros(2, 3, 4, 4)
    made[1, :, 1, 2] = 1
    found = spread_map(made)
    assert found[1, 2].item() == pytest.approx(0.5**0.5) and found.sum().item() == pytest.approx(0.5**0.5)


def test_lpips_says_what_it_needs(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(PowersteerError, match=r"pip install 'powersteer\[fid\]'"):
        lpips(ONE, OTHER)


def test_lpips_gives_its_network_bytes(monkeypatch):
    class Network:
        def __init__(self, name):
            assert name == "lpips-vgg16"

        def __call__(self, one, other):
            assert one.dtype == other.dtype == torch.uint8
            return (one.float() - other.float()).abs().mean((1, 2, 3), keepdim=True) / 255

    module = types.ModuleType("torch_fidelity")
    module.SampleSimilarityLPIPS = Network
    monkeypatch.setitem(sys.modules, "torch_fidelity", module)
    dark, bright = torch.zeros(5, 3, 8, 8), torch.ones(5, 3, 8, 8)
    torch.testing.assert_close(lpips(dark, bright, batch_size=2), torch.ones(5).double())

    def offline(name):
        raise OSError("no route")

    module.SampleSimilarityLPIPS = offline
    with pytest.raises(PowersteerError, match="cannot be fetched: no route"):
        lpips(dark, bright)

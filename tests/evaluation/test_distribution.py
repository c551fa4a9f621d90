"""FID and KID, against the peers' own arithmetic and closed forms."""

import json
import sys
from pathlib import Path

import pytest
import torch

from powersteer import PowersteerError
from powersteer.evaluation.distribution import few_pictures, frechet_distance, kernel_distance

sys.path.insert(0, str(Path(__file__).parents[1] / "fixtures"))
from evaluation_peers import features

PEERS = json.loads((Path(__file__).parents[1] / "fixtures" / "evaluation_peers.json").read_text())
REAL, GENERATED = (torch.from_numpy(part) for part in features())


@pytest.mark.parametrize("peer", ["pytorch-fid", "clean-fid", "torch-fidelity"])
def test_frechet_distance_is_the_peers(peer):
    assert frechet_distance(REAL, GENERATED) == pytest.approx(PEERS["fid"][peer], rel=1e-6)


def test_frechet_distance_of_shifted_and_scaled_sets_is_known():
    assert frechet_distance(REAL, REAL) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(REAL, REAL + 0.5) == pytest.approx(12 * 0.25)
    centred = REAL - REAL.mean(0)
    assert frechet_distance(centred, 3 * centred) == pytest.approx(4 * torch.cov(REAL.T).trace().item())


def test_frechet_distance_of_fewer_pictures_than_features():
    """Singular covariances, on which the peers' matrix square root is unsure: shift and scale are known still."""
    few = torch.randn(5, 300, generator=torch.Generator().manual_seed(0)).double()
    assert frechet_distance(few, few + 1) == pytest.approx(300)
    assert frechet_distance(few - few.mean(0), 2 * (few - few.mean(0))) == pytest.approx(few.var(0).sum().item())


def test_kernel_distance_is_the_peers():
    found = kernel_distance(REAL, GENERATED, subsets=20, subset_size=35, seed=2020)
    assert found.mean == pytest.approx(PEERS["kid"]["mean"], rel=1e-6)
    assert found.spread == pytest.approx(PEERS["kid"]["std"], rel=1e-6)
    everything = kernel_distance(REAL[:70], GENERATED, subsets=1, subset_size=70)
    assert everything.mean == pytest.approx(PEERS["kid_all"], rel=1e-6)


def test_subsets_adapt_to_small_sets_and_depend_on_the_seed_alone():
    found = kernel_distance(REAL, GENERATED)
    assert (found.subsets, found.subset_size) == (100, 35) and found.spread > 0
    assert found == kernel_distance(REAL, GENERATED)
    assert found.mean != kernel_distance(REAL, GENERATED, seed=1).mean


def test_few_pictures_are_warned_of():
    assert few_pictures(2048) is None
    assert "2,048" in (few_pictures(2047) or "")


def test_bad_sets_are_refused():
    with pytest.raises(PowersteerError, match="at least 2 of each"):
        frechet_distance(REAL[:1], GENERATED)
    with pytest.raises(PowersteerError, match="width 12 and 5"):
        frechet_distance(REAL, GENERATED[:, :5])
    with pytest.raises(PowersteerError, match="at least 4 of each"):
        kernel_distance(REAL[:3], GENERATED)
    with pytest.raises(PowersteerError, match="subset of 80 is larger than the 70"):
        kernel_distance(REAL, GENERATED, subset_size=80)

"""Makes evaluation_peers.json: what the peers' own arithmetic gives on seeded arrays.

The peers want torchvision, which the tests do not: a folder of their own, with an empty module of that name, will do.

    pip install --no-deps --target peers scipy scikit-image lazy-loader \
        pytorch-fid==0.3.0 torch-fidelity==0.4.0 clean-fid==0.1.35
    PYTHONPATH=peers:src python tests/data/evaluation_peers.py
"""

import json
import sys
from importlib.metadata import version
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np


def features() -> tuple[np.ndarray, np.ndarray]:
    """Two sets of features, (90, 12) and (70, 12)."""
    rng = np.random.RandomState(0)
    mixing = rng.randn(12, 12) / 3
    return rng.randn(90, 12) @ mixing, rng.randn(70, 12) @ (mixing + 0.1 * rng.randn(12, 12)) + 0.2


def pictures() -> tuple[np.ndarray, np.ndarray]:
    """Two pictures (3, 40, 32) in [0, 1]."""
    rng = np.random.RandomState(1)
    one = np.clip(np.cumsum(rng.randn(3, 40, 32), -1) / 8 + 0.5, 0, 1)
    return one, np.clip(one + 0.1 * rng.randn(3, 40, 32), 0, 1)


if __name__ == "__main__":
    for name in ("torchvision", "torchvision.transforms", "torchvision.transforms.functional", "torchvision.datasets"):
        sys.modules[name] = MagicMock()
    import torch
    from cleanfid import fid as clean_fid
    from pytorch_fid.fid_score import calculate_frechet_distance
    from skimage.metrics import peak_signal_noise_ratio, structural_similarity
    from torch_fidelity.metric_fid import fid_statistics_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric

    real, generated = features()
    moments = [(f.mean(0), np.cov(f, rowvar=False)) for f in (real, generated)]
    statistics = [{"mu": mu, "sigma": sigma} for mu, sigma in moments]
    kid = kid_features_to_metric(
        torch.from_numpy(real), torch.from_numpy(generated), kid_subsets=20, kid_subset_size=35, rng_seed=2020
    )
    one, other = pictures()
    ssim = structural_similarity(
        one, other, data_range=1, channel_axis=0, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
    )
    figures = {
        "versions": {
            name: version(name) for name in ("pytorch-fid", "torch-fidelity", "clean-fid", "scikit-image", "scipy")
        },
        "fid": {
            "pytorch-fid": float(calculate_frechet_distance(*moments[0], *moments[1])),
            "clean-fid": float(clean_fid.frechet_distance(*moments[0], *moments[1])),
            "torch-fidelity": float(next(iter(fid_statistics_to_metric(*statistics, verbose=False).values()))),
        },
        "kid": {"mean": kid["kernel_inception_distance_mean"], "std": kid["kernel_inception_distance_std"]},
        "kid_all": float(clean_fid.kernel_distance(real[:70], generated, num_subsets=1, max_subset_size=70)),
        "ssim": float(ssim),
        "psnr": float(peak_signal_noise_ratio(one, other, data_range=1)),
    }
    Path(__file__).with_suffix(".json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")

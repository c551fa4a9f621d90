"""Every method, number of pairs and seed; what is finished is not done again."""

from __future__ import annotations

import importlib.util
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from powersteer.apps.bench.posterior.adapter import LEARNING_RATES, score, train_adapter
from powersteer.apps.bench.posterior.learning import BATCH
from powersteer.apps.bench.posterior.plot import plot
from powersteer.apps.bench.posterior.prior import frozen_prior, prior_excess
from powersteer.apps.bench.posterior.world import BANDS, EXPONENT, LENGTH_PIXELS, NOISE, SIDE, World
from powersteer.core.errors import PowersteerError
from powersteer.core.hardware import machine

PAIRS = (40, 200, 1000, 5000, 20_000)
METHODS = ("paper", "uniform", "lite", "controlnet", "controlnet-no-latents", "t2i-adapter")
UPDATES, PRIOR_UPDATES = 1000, 2500
FEWEST_PAIRS = 8
EVALUATED_PAIRS = 512
EVALUATION_SEED = 2**40
"""Far from the seeds of training pairs."""


@dataclass(frozen=True)
class Row:
    """A method at a number of pairs, over seeds; shares of the Bayes gap closed."""

    method: str
    pairs: int
    seeds: int
    share: float
    """The share closed over all timesteps, mean over the seeds."""
    error: float | None
    """Standard error of the mean; of one seed there is none."""
    share_by_band: list[float]
    parameters: int
    seconds: float
    """Seconds that training took, mean over the seeds."""


@dataclass(frozen=True)
class PosteriorBench:
    """The rows, and what they were measured in."""

    observation: str
    setup: dict[str, Any]
    machine: str
    information_nats: float
    """I(x; y): what an observation is worth."""
    bands: list[str]
    gap_by_band: list[float]
    prior_excess_by_band: list[float]
    """The frozen U-Net's loss above the exact prior's."""
    rows: list[Row]

    @property
    def prior_share(self) -> float:
        """Where every adapter starts: below zero by the U-Net's own excess."""
        return -sum(self.prior_excess_by_band) / sum(self.gap_by_band)

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self) | {"prior_share": self.prior_share}


def bench_posterior(  # the options of the command; one loop over methods, pairs and seeds
    out_dir: Path,
    *,
    observation: str = "edges",
    pairs: Sequence[int] = PAIRS,
    methods: Sequence[str] = METHODS,
    seeds: int = 1,
    updates: int = UPDATES,
    prior_updates: int = PRIOR_UPDATES,
    evaluated_pairs: int = EVALUATED_PAIRS,
    say: Callable[[str], None] = print,
) -> PosteriorBench:
    """Train what is missing in ``out_dir``, and sum up what is asked for.

    Args:
        out_dir: Gets ``prior/`` (the U-Net), ``runs/`` (one JSON a run), and for the observation a JSON and a plot.
        observation: ``blur``, ``mask`` or ``edges``.
        pairs: Numbers of training pairs.
        methods: Keys of `powersteer.apps.bench.posterior.adapter.LEARNING_RATES`.
        seeds: Runs of each, from other pairs.
        updates: Of training a run, at most.
        prior_updates: Of training the prior.
        evaluated_pairs: Fresh pairs that runs are measured on, in every band of timesteps.
        say: Hears of each run that ends.

    Raises:
        PowersteerError: An argument is out of range, matplotlib is missing, or the folder cannot be written or holds
            runs of another set-up.
    """
    for method in methods:
        if method not in LEARNING_RATES:
            raise PowersteerError(f"the method must be {', '.join(LEARNING_RATES)}, not '{method}'")
    if min(pairs) < FEWEST_PAIRS:
        raise PowersteerError(f"{min(pairs)} pairs are too few to hold some out: take {FEWEST_PAIRS} or more")
    if importlib.util.find_spec("matplotlib") is None:
        raise PowersteerError("the plot needs matplotlib: pip install 'powersteer[plots]'")
    world = World(observation)
    unet, digest = frozen_prior(out_dir / "prior", prior_updates)
    setup = {
        "side": SIDE,
        "length_pixels": LENGTH_PIXELS,
        "exponent": EXPONENT,
        "noise": NOISE,
        "prior": digest,
        "updates": updates,
        "batch": BATCH,
        "evaluated_pairs": evaluated_pairs,
    }
    rows: list[Row] = []
    for count in dict.fromkeys(pairs):
        for method in dict.fromkeys(methods):
            runs: list[dict[str, Any]] = []
            for seed in range(seeds):
                file = out_dir / "runs" / f"{observation}-{method}-{count}-{seed}.json"
                made_in = setup | {"learning_rate": LEARNING_RATES[method]}
                if file.exists():
                    runs.append(_finished(file, made_in))
                    continue
                runs.append(_run(world, unet, method, count, updates, seed, evaluated_pairs) | {"setup": made_in})
                _write(file, runs[-1])
                say(f"{method}, {count} pairs, seed {seed}: {runs[-1]['share']:.1%} of the gap closed")
            rows.append(_row(method, count, runs))
    result = PosteriorBench(
        observation,
        setup,
        machine("cpu"),
        world.observation.information(world.field),
        [world.objective.span(band, BANDS) for band in range(BANDS)],
        (world.field.loss(world.alphas) - world.posterior.around.loss(world.alphas)).view(BANDS, -1).mean(1).tolist(),
        prior_excess(unet, world, evaluated_pairs, EVALUATION_SEED),
        rows,
    )
    _write(out_dir / f"{observation}.json", result.as_json())
    plot(result, out_dir / f"{observation}.png")
    return result


def _run(
    world: World, unet: Any, method: str, count: int, updates: int, seed: int, evaluated_pairs: int
) -> dict[str, Any]:
    pairs = world.draw(count, torch.Generator().manual_seed(seed))
    trained = train_adapter(world, unet, method, pairs, updates, seed)
    scored = score(world, unet, trained.network, evaluated_pairs, EVALUATION_SEED)
    return {
        "share": scored.share,
        "share_by_band": scored.share_by_band,
        "excess_by_band": scored.excess,
        "gap_by_band": scored.gap,
        "parameters": sum(p.numel() for p in trained.network.parameters() if p.requires_grad),
        "updates": trained.updates,
        "best_update": trained.best_update,
        "held_out_loss": trained.held_out,
        "seconds": trained.seconds,
        "machine": machine("cpu"),
    }


def _row(method: str, count: int, runs: list[dict[str, Any]]) -> Row:
    shares = [run["share"] for run in runs]
    return Row(
        method,
        count,
        len(runs),
        statistics.mean(shares),
        statistics.stdev(shares) / len(runs) ** 0.5 if len(runs) > 1 else None,
        [statistics.mean(band) for band in zip(*(run["share_by_band"] for run in runs), strict=True)],
        runs[0]["parameters"],
        statistics.mean(run["seconds"] for run in runs),
    )


def _finished(file: Path, setup: dict[str, Any]) -> dict[str, Any]:
    try:
        run: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        found: dict[str, Any] = run["setup"]
    except (OSError, ValueError, KeyError, TypeError):
        raise PowersteerError(f"{file} is no finished run: delete it to do it again") from None
    if found != setup:
        other = next(key for key in setup | found if found.get(key) != setup.get(key))
        raise PowersteerError(
            f"{file} was made with {other} {found.get(other)}, not {setup.get(other)}: "
            "give another --out, or the options it was made with"
        )
    return run


def _write(file: Path, values: dict[str, Any]) -> None:
    """Written aside and renamed: what is there is whole."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        aside = file.with_suffix(".partial")
        aside.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        aside.replace(file)
    except OSError as error:
        raise PowersteerError(f"cannot write {file}: {error.strerror}") from None

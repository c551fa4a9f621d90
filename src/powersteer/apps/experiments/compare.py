"""Methods × numbers of pairs × seeds, each trained by the same loop and measured alike: one JSON a run.

An experiment file says what; the results are all that `powersteer.apps.experiments.report` needs. Data: a folder of
``train``, ``validation`` and ``test``. The validation split chooses each method's learning rate and each run's best
step; the test split is looked at once a run, at its end.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, field_validator, model_validator

from powersteer.adapters.load import load_network
from powersteer.apps.experiments.metrics import METRICS, Trial
from powersteer.backbones.load import load_base
from powersteer.backbones.options import base_options
from powersteer.backbones.protocol import base_of
from powersteer.conditions import condition_picture
from powersteer.conditions.kind import BLIND, KINDS
from powersteer.core.config import StrictConfig, build_config
from powersteer.core.console import PlainConsole
from powersteer.core.errors import NonFiniteError, PowersteerError
from powersteer.core.hardware import best_device, machine
from powersteer.core.pictures import save_grid
from powersteer.data.conditioning import conditioning_of
from powersteer.data.encode import EncodedPairs, encode_pairs
from powersteer.data.pairs import Pairs, spread
from powersteer.data.prepare.openmoji import prepare_openmoji
from powersteer.denoising.heldout import HeldOut
from powersteer.evaluation.features import weights_sha256
from powersteer.training.checkpoint import list_checkpoints
from powersteer.training.config import TrainConfig
from powersteer.training.dry_run import dry_run
from powersteer.training.monitor import LOG, memory_used
from powersteer.training.run import TrainResult, train
from powersteer.training.setup import conditioning, picture_size

SPLITS = ("train", "validation", "test")
PRIOR = "prior.json"
PAST_AN_END = 4
"""So many rates at most."""
_OWN_KEYS = (
    "train_data_dir",
    "validation_data_dir",
    "validation_split",
    "max_train_samples",
    "refit",
    "output_dir",
    "cache_dir",
    "seed",
    "learning_rate",
)


class TuningConfig(StrictConfig):
    """The sweep that chooses a learning rate for each method, by the loss on the validation split."""

    learning_rates: tuple[float, ...] = Field(default=(3e-4, 1e-3, 3e-3), min_length=1)
    """Learning rates to try. Three or more go on past an end while the lowest loss lies there."""
    pairs: int = Field(default=200, gt=0)
    """Number of training pairs."""
    max_train_steps: int = Field(default=200, gt=0)
    """Number of optimizer updates."""
    seed: int = 1000
    """Seed of the runs."""


class ExperimentConfig(StrictConfig):
    """One experiment."""

    name: str
    """Title of the report."""
    description: str = ""
    """What is compared, for the report."""
    findings: str = ""
    """Findings in Markdown, for the report; written when they are known."""
    data_dir: Path | None = None
    """Folder with ``train``, ``validation`` and ``test``. By default OpenMoji's drawings, prepared in
    ``output_dir``."""
    output_dir: Path
    """Folder for runs and their weights."""
    results_dir: Path
    """Folder for one JSON per run, and the grids. Experiments with the same folders, ``train`` and ``tuning`` share the
    runs of methods of the same name."""
    methods: dict[str, dict[str, Any]] = Field(min_length=1)
    """Keys of `TrainConfig` by which each method differs. A method with a learning rate has no sweep."""
    rates_of: dict[str, str] = Field(default_factory=dict)
    """Methods that take the learning rate of another, of which they are a variant, instead of a sweep of their own."""
    reference: str | None = None
    """Method that the report compares the others with."""
    train: dict[str, Any] = Field(default_factory=dict)
    """Keys of `TrainConfig` for all methods."""
    pairs: tuple[int | Literal["all"], ...] = Field(min_length=1)
    """Numbers of training pairs."""
    seeds: tuple[int, ...] = Field(default=(0, 1, 2), min_length=1)
    """Seeds: one run each."""
    tuning: TuningConfig = TuningConfig()
    """Sweep of learning rates."""
    metrics: tuple[str, ...] = ("information", "denoising", "lines")
    """What to measure: names in `METRICS`."""
    test_pairs: int | None = Field(default=None, gt=1)
    """Number of test pairs to use, evenly spread. All by default."""
    pictures: int = Field(default=40, gt=0)
    """Number of test pairs to make pictures for, where a metric needs some."""
    grid_rows: int = Field(default=6, ge=0)
    """Number of rows of the grid of pictures."""

    def sighted(self, method: str) -> str | None:
        """For a method that is not shown the condition: the one that is, and is otherwise the same, if there is one."""
        keys = self.methods[method]
        if keys.get("ablation") != BLIND:
            return None
        same = {key: value for key, value in keys.items() if key != "ablation"}
        return next((name for name, other in self.methods.items() if other == same), None)

    @field_validator("metrics")
    @classmethod
    def _known(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            if name not in METRICS:
                raise ValueError(f"there is no metric '{name}'; there are: {', '.join(METRICS)}")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> ExperimentConfig:
        for where, keys in {"train": self.train, **self.methods}.items():
            own = [key for key in keys if key in _OWN_KEYS and (where == "train" or key != "learning_rate")]
            if own:
                raise ValueError(f"{where}: {own[0]} is the experiment's own: leave it out")
        named = {("reference", self.reference)} if self.reference else set[tuple[str, str]]()
        named |= {("rates_of", name) for both in self.rates_of.items() for name in both}
        for key, name in sorted(named):
            if name not in self.methods:
                raise ValueError(f"{key}: there is no method '{name}'; there are: {', '.join(self.methods)}")
        twice = [method for method in self.rates_of if "learning_rate" in self.methods[method]]
        if twice:
            raise ValueError(f"rates_of: {twice[0]} gives a learning rate itself: leave out one of both")
        chained = set(self.rates_of) & set(self.rates_of.values())
        if chained:
            raise ValueError(f"rates_of: {min(chained)} takes the rate of another itself: name that one")
        return self

    def grid(self, pairs: int | str) -> Path:
        """Where pictures of all methods, trained on so many pairs, lie side by side."""
        return self.results_dir / f"{self.name}-grid-{pairs}.png"

    def training(self, method: str, pairs: int | str, seed: int, learning_rate: float, folder: str) -> TrainConfig:
        """The configuration of one run.

        Raises:
            PowersteerError: A key is unknown or a value wrong.
        """
        data = self.data_dir or self.output_dir / "openmoji"
        values = self.train | self.methods[method]
        values |= {
            "train_data_dir": str(data / "train"),
            "validation_data_dir": data / "validation",
            "max_train_samples": None if pairs == "all" else pairs,
            "seed": seed,
            "learning_rate": learning_rate,
            "output_dir": self.output_dir / folder,
            "cache_dir": self.output_dir / "cache",
        }
        return build_config(values, TrainConfig, where=f"method {method}")


def compare(experiment: ExperimentConfig) -> bool:
    """Do what is not done yet of an experiment; whether it was interrupted.

    Raises:
        PowersteerError: A method's keys, the data or a folder is unusable, or a result was made with other settings.
    """
    first_rate = experiment.tuning.learning_rates[0]
    for method in experiment.methods:  # before hours are spent, not after
        rate = experiment.methods[method].get("learning_rate", first_rate)
        experiment.training(method, experiment.pairs[0], 0, rate, "runs")
    if experiment.data_dir is None:
        prepare_openmoji(experiment.output_dir / "openmoji")
    return _Comparison(experiment).run()


class _Comparison:
    """An experiment under way."""

    def __init__(self, experiment: ExperimentConfig) -> None:
        self.experiment, self.console = experiment, PlainConsole(stderr=True)
        folder = experiment.data_dir or experiment.output_dir / "openmoji"
        self.data = {split: _folder_digest(folder / split) for split in SPLITS}
        self.test_dir = folder / "test"
        self.config = experiment.training(next(iter(experiment.methods)), "all", 0, 1.0, "runs")
        """The configuration of one run, from which is read what all runs share."""
        self.pipe: Any = load_base(self.config.pretrained_model_name_or_path, **base_options(self.config))
        self.base = {name: weights_sha256(part) for name, part in base_of(self.pipe).parts.items()}
        self.protocol = [experiment.metrics, experiment.test_pairs, experiment.pictures]
        self.memories: dict[str, int] = {}
        kind = conditioning(self.config).kind
        if "lines" in experiment.metrics and not KINDS.find(kind).line_art:
            raise PowersteerError(
                f"the metric lines is of sketches, the conditions are of the kind {kind}: give metrics=[information, "
                "denoising, fidelity]"
            )

    @cached_property
    def prior(self) -> Trial:
        """The base on the test split."""
        config, pipe = self.config, self.pipe
        pipe.to(best_device())
        base = base_of(pipe)
        size = picture_size(config, base)
        given = conditioning(config)
        conditioning_of(str(self.test_dir), given.channels, given.kind)  # which must be the same
        test = Pairs(self.test_dir, size, given.channels, kind=given.kind, vae_scale_factor=base.factor)
        if self.experiment.test_pairs is not None:
            test = test.subset(spread(len(test), self.experiment.test_pairs))
        encoded: EncodedPairs = encode_pairs(pipe, test, config.cache_dir, console=self.console)
        held_out = HeldOut(pipe, encoded)
        shown = spread(len(test), self.experiment.pictures)
        return Trial(pipe, None, held_out, held_out.losses(None), shown, given)

    def run(self) -> bool:
        """Sweeps first, then the fewest pairs with every seed, all methods side by side: what there is compares."""
        experiment = self.experiment
        rates: dict[str, float] = {}
        for method in experiment.methods:
            chosen = self.tuned(experiment.rates_of.get(method, method))
            if chosen is None:
                return True
            rates[method] = chosen
        self.measure_prior()
        for pairs in experiment.pairs:
            for seed in experiment.seeds:
                if not all(self.trained(method, pairs, seed, rates[method]) for method in experiment.methods):
                    return True
                if seed == experiment.seeds[0]:
                    self.draw_grid(pairs, seed)
        return False

    def tuned(self, method: str) -> float | None:
        """The learning rate of the lowest loss on the validation split; None when interrupted.

        A sweep of three rates or more goes on past its end until the lowest loss is not at an end.
        """
        tuning = self.experiment.tuning
        if (given_rate := self.experiment.methods[method].get("learning_rate")) is not None:
            return self.experiment.training(method, tuning.pairs, tuning.seed, given_rate, "runs").learning_rate
        given = [self.sweep(method, rate) for rate in tuning.learning_rates]
        file, digest = self.experiment.results_dir / f"tuning-{method}.json", self.digest(*given)
        found = self.read(file, digest) or {"learning_rates": [], "losses": []}
        known = [math.inf if loss is None else loss for loss in found["losses"]]
        losses: dict[float, float] = dict(zip(found["learning_rates"], known, strict=True))
        while (rate := next_rate(losses, tuning.learning_rates)) is not None:
            self.console.print(f"{method}: learning rate {rate:g}")
            config = self.sweep(method, rate)
            try:
                if train(config).interrupted:
                    return None
                losses[rate] = min(row["steered"] for row in _log(config) if row["step"] > 0)
            except NonFiniteError:
                losses[rate] = math.inf
            losses = dict(sorted(losses.items()))
            done = {"chosen": min(losses, key=lambda rate: losses[rate]), "digest": digest, **tuning.model_dump()}
            kept = [None if loss == math.inf else loss for loss in losses.values()]  # None: diverged
            done |= {"learning_rates": list(losses), "losses": kept}
            self.write(file, {"kind": "tuning", "method": method, **done})
        shutil.rmtree(self.experiment.output_dir / "tuning" / method, ignore_errors=True)  # again, if killed amid it
        return min(losses, key=lambda rate: losses[rate])

    def sweep(self, method: str, rate: float) -> TrainConfig:
        """The short run that tries a learning rate."""
        tuning = self.experiment.tuning
        config = self.experiment.training(method, tuning.pairs, tuning.seed, rate, f"tuning/{method}/{rate:g}")
        limit: dict[str, Any] = {"max_train_steps": tuning.max_train_steps, "num_train_epochs": None}
        return config.model_copy(update={**limit, "num_validation_images": 0})

    def measure_prior(self) -> None:
        """The base alone, once."""
        file = self.experiment.results_dir / PRIOR
        digest = _digest([self.experiment.train, self.protocol, self.data, self.base])
        if self.read(file, digest) is None:
            self.write(file, {"kind": "prior", "digest": digest, **self.measured(self.prior)})

    def trained(self, method: str, pairs: int | str, seed: int, rate: float) -> bool:
        """Train and measure, unless it is done; whether it is."""
        name = f"{method}-{pairs}-{seed}"
        config = self.experiment.training(method, pairs, seed, rate, f"runs/{name}")
        file, digest = self.experiment.results_dir / f"run-{name}.json", self.digest(config)
        if self.read(file, digest) is None:
            self.console.print(f"{method}: {pairs} pairs, seed {seed}, learning rate {rate:g}")
            result = train(config)
            if result.interrupted:
                return False
            self.write(file, self.row(method, config, result) | {"pairs": pairs, "digest": digest})
        for checkpoint in list_checkpoints(config.output_dir):
            shutil.rmtree(checkpoint, ignore_errors=True)
        return True

    def row(self, method: str, config: TrainConfig, result: TrainResult) -> dict[str, Any]:
        """A trained run, measured."""
        network: Any = load_network(config.output_dir)
        pipe = self.prior.pipe
        network.to(pipe.device)
        curve = [{key: row[key] for key in ("step", "seconds", "steered", "control")} for row in _log(config)]
        weights = config.output_dir / "diffusion_pytorch_model.safetensors"
        return {
            "kind": "run",
            "method": method,
            "seed": config.seed,
            "learning_rate": config.learning_rate,
            "trained_parameters": sum(p.numel() for p in network.parameters() if p.requires_grad),
            "updates": result.step,
            "best_update": result.best_step,
            "control_update": result.control_step,
            "seconds": round(result.seconds, 1),
            "memory_estimated": self.memory(method, config),
            "memory_used": memory_used(pipe.device),
            "curve": curve,
            "config": _identity(config),
            "weights": hashlib.sha256(weights.read_bytes()).hexdigest(),
            **self.measured(replace(self.prior, network=network)),
        }

    def memory(self, method: str, config: TrainConfig) -> int:
        """Bytes of a training step, estimated; neither pairs, seed nor learning rate changes it."""
        if method not in self.memories:
            self.memories[method] = dry_run(config).memory.total
        return self.memories[method]

    def measured(self, trial: Trial) -> dict[str, Any]:
        """Every metric, and where the figures come from."""
        packages = ("powersteer", "torch", "diffusers", "transformers", "numpy")
        return {
            "test": {name: METRICS[name](trial) for name in self.experiment.metrics},
            "test_pairs": len(trial.held_out),
            "data": self.data,
            "base": self.base,
            "versions": {package: version(package) for package in packages},
            "hardware": machine(str(trial.pipe.device)),
        }

    def draw_grid(self, pairs: int | str, seed: int) -> None:
        """Condition, prior, the methods whose networks are still there, and target side by side; a row has one seed."""
        file, runs = self.experiment.grid(pairs), self.experiment.output_dir / "runs"
        folders = {method: runs / f"{method}-{pairs}-{seed}" for method in self.experiment.methods}
        folders = {method: folder for method, folder in folders.items() if (folder / "config.json").exists()}
        if file.exists() or not self.experiment.grid_rows or not folders:
            return
        prior = replace(self.prior, shown=spread(len(self.prior.held_out.pairs), self.experiment.grid_rows))
        test = prior.held_out.pairs.pairs
        drawn = prior.conditions(prior.shown)
        kind = test.transform.kind
        columns = [torch.stack([condition_picture(one, test.sizes[0], kind) for one in drawn]), prior.pictures]
        for folder in folders.values():
            network: Any = load_network(folder)
            columns.append(replace(prior, network=network.to(prior.pipe.device)).pictures)
        columns.append(torch.stack([test[i][0] for i in prior.shown]))
        headings = ("condition", "prior", *folders, "target")
        cells = torch.stack(columns, 1).flatten(0, 1)
        save_grid(cells, file, len(columns), scale=max(1, 128 // cells.shape[-1]), headings=headings)

    def digest(self, *configs: TrainConfig) -> str:
        """A digest of what decides a result: configurations, what is measured on how much, data, the base's weights."""
        return _digest([[_identity(config) for config in configs], self.protocol, self.data, self.base])

    def read(self, file: Path, digest: str) -> dict[str, Any] | None:
        """A result that is there, made with these settings."""
        if not file.exists():
            return None
        try:
            found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        except ValueError:
            raise PowersteerError(f"{file} is damaged: remove it, and it is made again") from None
        if found.get("digest") != digest:
            raise PowersteerError(
                f"{file} was made with other settings or data: remove it, or give another results_dir and output_dir"
            )
        return found

    def write(self, file: Path, values: dict[str, Any]) -> None:
        """A result, never seen half-written."""
        partial = file.with_suffix(".partial")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
            partial.replace(file)
        except OSError as error:
            raise PowersteerError(f"cannot write {file}: {error.strerror}") from None


def next_rate(losses: dict[float, float], given: Sequence[float]) -> float | None:
    """The learning rate to try next: those given, then past an end where the loss is lowest; None when it is found.

    Args:
        losses: By rate, so far.
        given: Rates; fewer than three are not gone past.
    """
    for rate in given:
        if rate not in losses:
            return rate
    rates = sorted(losses)
    best = rates.index(min(rates, key=lambda rate: losses[rate]))
    if len(given) < 3 or 0 < best < len(rates) - 1 or len(rates) >= len(given) + PAST_AN_END:
        return None
    step = sorted(given)[1] / sorted(given)[0] if best == 0 else sorted(given)[-1] / sorted(given)[-2]
    rate = rates[0] / step if best == 0 else rates[-1] * step
    return float(f"{rate:.1g}")


def _identity(config: TrainConfig) -> dict[str, Any]:
    """What decides a run's outcome: its configuration without where things lie."""
    places = {"train_data_dir", "validation_data_dir", "output_dir", "cache_dir"}
    return config.model_dump(mode="json", exclude=places)


def _digest(parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _folder_digest(folder: Path) -> str:
    """A digest of every file's name and bytes."""
    if not folder.is_dir():
        raise PowersteerError(f"{folder} is missing: data_dir must hold {', '.join(SPLITS)}")
    digest = hashlib.sha256()
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(file.relative_to(folder).as_posix().encode() + b"\0")
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def _log(config: TrainConfig) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (config.output_dir / LOG).read_text(encoding="utf-8").splitlines()]

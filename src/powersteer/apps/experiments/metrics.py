"""What a comparison measures of a network on the test split; another metric is one more function in `METRICS`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from powersteer.adapters.protocol import Adapter
from powersteer.conditions.fidelity.lines import line_f1
from powersteer.core.pictures import as_bytes, from_pil
from powersteer.data.conditioning import Conditioning
from powersteer.data.pairs import condition_values
from powersteer.denoising.heldout import Gap, HeldOut
from powersteer.denoising.objective import objective_of
from powersteer.denoising.sampling.sample import steered_pictures
from powersteer.evaluation.figures import STEERED
from powersteer.evaluation.information import denoiser_errors, measure_information
from powersteer.evaluation.measures import fidelity as measured_fidelity

INFORMATION_DRAWS = 4
"""How many draws of log-SNR and noise each test pair gets."""


@dataclass(frozen=True)
class Trial:
    """What a metric measures: a network (None: the prior) on the test split."""

    pipe: Any
    network: Adapter | None
    held_out: HeldOut
    prior: torch.Tensor
    """The frozen base's losses (bands, N), on the same noise."""
    shown: list[int]
    """Test pairs that pictures are made for."""
    conditioning: Conditioning

    def conditions(self, indices: Sequence[int]) -> torch.Tensor:
        """The conditions of some test pairs (N, C, H, W), as a network reads them."""
        return condition_values(torch.stack([self.held_out.pairs.pairs[i][1] for i in indices]))

    @cached_property
    def pictures(self) -> torch.Tensor:
        """Pictures made for the shown pairs, (N, 3, H, W) in [-1, 1]; the seed of pair i is i, whatever the network."""
        pairs, made = self.held_out.pairs.pairs, list[torch.Tensor]()
        for batch in torch.tensor(self.shown).split(20):
            indices = [int(i) for i in batch]
            prompts = [pairs.texts[i] for i in indices]
            size: dict[str, Any] = dict(zip(("height", "width"), pairs.sizes[indices[0]], strict=True))
            images = steered_pictures(self.pipe, self.network, prompts, self.conditions(indices), seeds=indices, **size)
            made += [from_pil(image) for image in images]
        return torch.stack(made)


Metric = Callable[[Trial], dict[str, float]]


def denoising(trial: Trial) -> dict[str, float]:
    """The denoising loss; how far below the prior's (``reduction``, a share); what exchanged conditions cost."""
    if trial.network is None:
        return {"loss": trial.prior.mean().item()}
    steered = trial.held_out.losses(trial.network)
    control = Gap.of(trial.held_out.losses(trial.network, shuffled=True) - steered)
    gain, loss = Gap.of(trial.prior - steered), steered.mean().item()
    return {
        "loss": loss,
        "reduction": 1 - loss / trial.prior.mean().item(),
        "gain": gain.mean,
        "gain_error": gain.error,
        "control": control.mean,
        "control_error": control.error,
    }


def lines(trial: Trial) -> dict[str, float]:
    """Line fidelity (F1) of pictures made for test sketches."""
    return {"f1": line_f1(trial.conditions(trial.shown), trial.pictures).mean().item()}


def fidelity(trial: Trial) -> dict[str, float]:
    """How well pictures keep to test conditions of any kind that has a measure; see `powersteer evaluate`."""
    made = {STEERED: as_bytes(trial.pictures)}
    given = trial.conditioning
    palette = given.record.get("palette") or {}
    figures = measured_fidelity(given.kind, palette, made, trial.conditions(trial.shown), batch_size=20)
    return {figure.name: figure.values[STEERED].value for figure in figures}


def information(trial: Trial) -> dict[str, float]:
    """Nats a latent dimension taken from the condition, given the text; none by the prior."""
    if trial.network is None:
        return {"nats": 0.0}
    pairs = trial.held_out.pairs
    errors = denoiser_errors(trial.pipe, trial.network, pairs)
    objective = objective_of(trial.pipe.scheduler)
    found = measure_information(errors, objective, len(pairs), draws=INFORMATION_DRAWS)
    return {
        "nats": found.steered.mean,
        "nats_error": found.steered.error,
        "control": found.steered.mean - found.shuffled.mean,
    }


METRICS: dict[str, Metric] = {
    "information": information,
    "denoising": denoising,
    "lines": lines,
    "fidelity": fidelity,
}
"""By the names that an experiment file gives; results hold each one's figures under its name."""

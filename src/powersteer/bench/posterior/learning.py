"""What prior and adapters share in learning: a budget, a falling rate, AdamW and a running average."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from powersteer.errors import PowersteerError
from powersteer.training.optimizer import Average

BATCH, WARMUP_UPDATES, EMA_DECAY = 32, 100, 0.995


@dataclass(frozen=True)
class Budget:
    """Where learning ends at the latest; the rate falls to zero towards whichever end is nearer."""

    updates: int
    minutes: float


class Learner:
    """Fits a network's weights in place.

    Args:
        network: What is trained.
        learning_rate: The highest.
        budget: See `Budget`.
    """

    def __init__(self, network: nn.Module, learning_rate: float, budget: Budget) -> None:
        self.network, self.learning_rate, self.budget = network, learning_rate, budget
        self.parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
        self.average = Average(self.parameters, EMA_DECAY, torch.device("cpu"))
        self.seconds = 0.0

    def updates(self, loss: Callable[[], torch.Tensor]) -> Iterator[int]:
        """Take updates, and yield how many were taken after each.

        Args:
            loss: Of a fresh batch.

        Raises:
            PowersteerError: The loss is not finite.
        """
        optimizer = torch.optim.AdamW(self.parameters, self.learning_rate, (0.9, 0.99), weight_decay=0.0, fused=True)
        since = time.perf_counter()
        self.network.train()
        for update in range(self.budget.updates):
            self.seconds = time.perf_counter() - since
            way = max(update / self.budget.updates, self.seconds / (60 * self.budget.minutes))
            if way >= 1:
                return
            rise = min(1.0, (update + 1) / WARMUP_UPDATES)
            for group in optimizer.param_groups:
                group["lr"] = self.learning_rate * rise * (1 + math.cos(math.pi * way)) / 2
            value = loss()
            if not torch.isfinite(value):
                raise PowersteerError(f"the loss of {type(self.network).__name__} is {value.item()} at update {update}")
            value.backward()
            nn.utils.clip_grad_norm_(self.parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            self.average.step(self.parameters)
            yield update + 1

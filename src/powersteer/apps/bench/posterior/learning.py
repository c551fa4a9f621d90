"""What prior and adapters share in learning: a falling rate, AdamW and a running average."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator

import torch
from torch import nn

from powersteer.core.errors import PowersteerError
from powersteer.training.optimizer import Average

BATCH, WARMUP_UPDATES, EMA_DECAY = 32, 100, 0.995


class Learner:
    """Fits a network's weights in place.

    Args:
        network: What is trained.
        learning_rate: The highest; after a short warm-up it falls to zero, half a cosine.
        last_update: How many are taken at most.
    """

    def __init__(self, network: nn.Module, learning_rate: float, last_update: int) -> None:
        self.network, self.learning_rate, self.last_update = network, learning_rate, last_update
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
        for update in range(self.last_update):
            rise = min(1.0, (update + 1) / WARMUP_UPDATES)
            for group in optimizer.param_groups:
                group["lr"] = self.learning_rate * rise * (1 + math.cos(math.pi * update / self.last_update)) / 2
            value = loss()
            if not torch.isfinite(value):
                raise PowersteerError(f"the loss of {type(self.network).__name__} is {value.item()} at update {update}")
            value.backward()
            nn.utils.clip_grad_norm_(self.parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            self.average.step(self.parameters)
            self.seconds = time.perf_counter() - since
            yield update + 1

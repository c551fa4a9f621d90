"""What FSDP and DeepSpeed share out among the processes, whole again to be measured and saved.

A checkpoint is the same whatever made it: one process goes on from what eight had shared out.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from copy import deepcopy
from importlib import import_module
from itertools import chain
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor, distribute_tensor

from powersteer.adapters.protocol import Adapter
from powersteer.core.errors import PowersteerError
from powersteer.training.config import TrainConfig

_ZERO = "bit16_groups"
"""The attribute that tells DeepSpeed's optimizers from others; it holds the parameters, as the run knows them."""


class Whole:
    """A network whose weights may be sharded, as one that every process can run by itself.

    Made before the network is sharded.

    Args:
        network: The network.
        accelerator: Whether it will be sharded.

    Raises:
        PowersteerError: The base would be sharded, too.
    """

    def __init__(self, network: Adapter, accelerator: Accelerator) -> None:
        self.network = network
        sharded = accelerator.distributed_type == DistributedType.FSDP
        plugin: Any = accelerator.state.fsdp_plugin if sharded else None
        if plugin and (plugin.fsdp_version, plugin.ignored_modules) != (2, "unet"):
            raise PowersteerError("FSDP: give fsdp_version: 2 and fsdp_ignored_modules: unet")
        self._copy: Any = deepcopy(network).cpu() if sharded else None

    @contextmanager
    def gathered(self) -> Generator[Adapter]:
        """The network, or a whole copy of it that is gone after the block; all processes must come here."""
        if self._copy is None:
            yield self.network
            return
        self._copy.load_state_dict(gathered(self.network.state_dict()))
        yield self._copy.to(self.network.device)
        self._copy.cpu()


def share_out(accelerator: Accelerator, config: TrainConfig, dtype: torch.dtype) -> None:
    """Tell DeepSpeed what a run decides; the trainable weights stay in 32 bits.

    Raises:
        PowersteerError: Its configuration shares out more than gradients and optimizer states.
    """
    plugin: Any = accelerator.state.deepspeed_plugin
    settings: dict[str, Any] = plugin.deepspeed_config
    zero = settings.get("zero_optimization", {})
    if zero.get("stage") not in (1, 2) or zero.get("offload_optimizer", {}).get("device", "none") != "none":
        raise PowersteerError("DeepSpeed: give zero_stage 1 or 2, without offloading; FSDP shares out the weights too")
    settings |= {
        "train_micro_batch_size_per_gpu": config.train_batch_size,
        "gradient_accumulation_steps": config.gradient_accumulation_steps,
        "gradient_clipping": config.max_grad_norm,
        "torch_autocast": {"enabled": dtype != torch.float32, "dtype": str(dtype).removeprefix("torch.")},
    }


def optimizer_state(optimizer: Any) -> dict[str, Any]:
    """The whole state dict of a prepared optimizer, as the bare one's would be; all processes must call it."""
    zero = optimizer.optimizer
    if not hasattr(zero, _ZERO):
        return gathered(optimizer.state_dict())
    state: dict[int, Any] = {}
    groups: list[dict[str, Any]] = []
    for parameters, group in zip(zero.bit16_groups, zero.optimizer.param_groups, strict=True):
        places = range(len(state), len(state) + len(parameters))
        groups.append({**group, "params": list(places)})
        entry = zero.optimizer.state[group["params"][0]]
        sharded = [key for key, value in entry.items() if value.ndim]
        for place, parameter in zip(places, parameters, strict=True):
            whole = {key: _deepspeed().safe_get_full_optimizer_state(parameter, key).cpu() for key in sharded}
            state[place] = {**entry, **whole}
    return {"state": state, "param_groups": groups}


def load_optimizer_state(optimizer: Any, state: dict[str, Any]) -> None:
    """Go on from what `optimizer_state` gave, be it of a run that was shared out in another way or not at all."""
    zero = optimizer.optimizer
    if not hasattr(zero, _ZERO):
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        dealt_out = {i: {k: dealt(v, parameters[i]) for k, v in one.items()} for i, one in state["state"].items()}
        optimizer.load_state_dict({**state, "state": dealt_out})
        return
    entries = iter(state["state"][i] for group in state["param_groups"] for i in group["params"])
    pairs = [[(parameter, next(entries)) for parameter in parameters] for parameters in zero.bit16_groups]
    for group, saved, members in zip(zero.optimizer.param_groups, state["param_groups"], pairs, strict=True):
        (part,) = group["params"]
        group |= {key: value for key, value in saved.items() if key != "params"}
        zero.optimizer.state[part] = {k: torch.zeros_like(part) if v.ndim else v for k, v in members[0][1].items()}
    zero._lazy_init_hp_params_optimizer_state()
    for parameter, entry in chain.from_iterable(pairs):
        for key, value in entry.items():
            if value.ndim:
                _deepspeed().safe_set_full_optimizer_state(parameter, value.to(parameter.device), key)


def gathered(value: Any) -> Any:
    """``value`` (a tensor, or dicts and lists of them) with what is sharded whole, on the CPU; all must call it."""
    if isinstance(value, DTensor):
        return value.full_tensor().cpu()
    if isinstance(value, dict):
        return {key: gathered(one) for key, one in value.items()}
    return [gathered(one) for one in value] if isinstance(value, list) else value


def dealt(tensor: Any, like: torch.Tensor) -> Any:
    """This process's part of a whole tensor, if ``like`` is sharded and of its shape; else all of it."""
    if not isinstance(like, DTensor) or tensor.shape != like.shape:
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def _deepspeed() -> Any:
    return import_module("deepspeed.utils")

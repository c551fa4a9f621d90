"""The door for weights: files of tensors read, compared with what a network asks for, and finite; or the one error."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from powersteer.core.errors import PowersteerError
from powersteer.core.files import is_file, reason_of
from powersteer.core.text import read_object

ModuleT = TypeVar("ModuleT", bound=nn.Module)
HALF = "fp16"
"""The variant of weights that is taken where the plain ones are not there."""
MOST = 2**24
"""The largest size in the config of a network."""
MOST_LAYERS = 64
"""The most layers of one kind in a row; larger numbers would keep a machine busy before any weight is compared."""
MOST_LEVELS = 16
"""The most numbers in a list of widths or layers."""
_LFS = b"version https://git-lfs"
"""How a file begins that Git LFS has not fetched."""
_AGAIN = "get it again, whole"
_COUNTS = ("position_ids", "num_batches_tracked")
"""Names of whole numbers among weights."""


@dataclass(frozen=True)
class WeightFiles:
    """Where a network's weights lie."""

    files: tuple[Path, ...]
    """The one file, or the shards."""
    variant: str | None
    """Which variant of the weights, such as `HALF`; None for the plain ones."""
    safe: bool
    """Whether they are safetensors; else pickles."""

    @property
    def bytes(self) -> int:
        """How many bytes all files have together."""
        return sum(file.stat().st_size for file in self.files)


def find_weights(folder: Path, stem: str, pickled: str | None = None, variant: str | None = None) -> WeightFiles:
    """A network's weights, as diffusers and transformers name them; plain ones before those of half precision.

    Args:
        folder: The network's.
        stem: Of safetensors files: ``diffusion_pytorch_model``, or ``model``.
        pickled: Of pickles, if those are taken, too.
        variant: Taken before the others, where the folder has it.

    Raises:
        PowersteerError: There are none, or a shard is missing, cut short or no file of weights.
    """
    for wanted in dict.fromkeys((variant, None, HALF)):
        dotted = f".{wanted}" if wanted else ""
        for name, suffix in ((stem, ".safetensors"), (pickled, ".bin")):
            if name is None:
                continue
            index, single = folder / f"{name}{suffix}.index{dotted}.json", folder / f"{name}{dotted}{suffix}"
            if not is_file(index) and not is_file(single):
                continue
            files = _shards(index) if is_file(index) else (single,)
            for file in files:
                for tensor, kind in kinds_in(file).items():
                    if not kind.startswith(("F", "BF")) and not tensor.endswith(_COUNTS):
                        raise PowersteerError(f"{file}: {shown(tensor)} holds {kind}, no weights: {_AGAIN}")
            return WeightFiles(files, wanted, suffix == ".safetensors")
    raise PowersteerError(f"{folder} lacks {stem}.safetensors")


def _shards(index: Path) -> tuple[Path, ...]:
    names = read_object(index).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise PowersteerError(f"{index} names no files of weights")
    for name in names.values():
        if Path(name).name != name:
            raise PowersteerError(f"{index} names a file outside its folder, '{shown(name)}'")
    return tuple(index.parent / name for name in sorted(set(names.values())))


def kinds_in(file: Path) -> dict[str, str]:
    """Names and kinds (``F16``) of the tensors of a safetensors file.

    Raises:
        PowersteerError: It is not there, or not all there.
    """
    if not is_file(file):
        raise PowersteerError(f"{file.parent} lacks {file.name}")
    try:
        with file.open("rb") as opened:
            if opened.read(len(_LFS)) == _LFS:
                raise PowersteerError(f"{file} is a pointer of Git LFS, not the weights: run `git lfs pull` there")
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as tensors:
                return {name: str(tensors.get_slice(name).get_dtype()) for name in tensors.keys()}  # noqa: SIM118
    except PowersteerError:
        raise
    except Exception as error:  # of the operating system, or safetensors' own
        raise PowersteerError(f"{file} is truncated or no checkpoint ({reason_of(error)})") from None
    return {}


def read_tensors(file: Path) -> dict[str, torch.Tensor]:
    """All of a safetensors file.

    Raises:
        PowersteerError: It cannot be read.
    """
    kinds_in(file)
    try:
        return load_file(file)
    except Exception as error:  # of the operating system, or safetensors' own
        raise PowersteerError(f"{file} is truncated or no checkpoint ({reason_of(error)})") from None


def unpickle(file: Path, device: torch.device | str = "cpu") -> Any:
    """What `torch.save` wrote, of tensors and plain values; no code of the file runs.

    Raises:
        PowersteerError: It holds more, or cannot be read.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the pickle's protocol
            return torch.load(file, map_location=device, weights_only=True)
    except Exception as error:  # the unpickler meets whatever the file says
        told = str(error).strip()
        reason = told.split("\n")[0][:160] or type(error).__name__
        if "Unsupported operand" in told:  # a byte that is none of a pickle's
            reason = "it is no file of torch.save"
        elif isinstance(error, pickle.UnpicklingError) and "Weights only load failed" in told:
            raise PowersteerError(
                f"{file} holds more than tensors (code that would run on loading), so it is not opened: save its "
                "state dict alone, or as .safetensors"
            ) from None
        raise PowersteerError(f"{file} is truncated or no checkpoint ({reason})") from None


def check_sizes(config: Mapping[str, Any], where: str) -> None:
    """Refuse a configuration with numbers that no network has, before one is built.

    Args:
        config: What its file says.
        where: The file, for messages.

    Raises:
        PowersteerError: A whole number is beyond `MOST`; or a number of layers beyond `MOST_LAYERS`, or a list of them
            longer than `MOST_LEVELS`.
    """
    for key, value in _numbers(config):
        layers = "layers" in key or "res_blocks" in key
        if isinstance(value, list):
            if (layers or "channels" in key) and len(value) > MOST_LEVELS:
                raise PowersteerError(f"{where}: '{shown(key)}' has {len(value)} numbers, no network that many levels")
        elif abs(value) > (MOST_LAYERS if layers else MOST):
            raise PowersteerError(f"{where}: '{shown(key)}' is {str(value)[:20]}, no network is that large")


def _numbers(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Whole numbers by their key, and lists that hold any."""
    waiting: list[tuple[str, Any]] = [(str(key), value) for key, value in config.items()]
    while waiting:
        key, value = waiting.pop()
        if isinstance(value, int):
            yield key, value
        elif isinstance(value, list):
            if any(isinstance(one, int) for one in value):
                yield key, value
            waiting += [(key, one) for one in value]
        elif isinstance(value, dict):
            waiting += [(str(inner), one) for inner, one in value.items()]


def check_found(found: Mapping[str, Any], where: str) -> None:
    """Refuse weights that are not those of the network they were loaded into.

    Args:
        found: What ``from_pretrained(…, output_loading_info=True)`` tells; ``unexpected_keys`` are those that matter.
        where: The file, for messages.

    Raises:
        PowersteerError: Weights are missing, of another shape, or left over.
    """
    missing, other = sorted(found["missing_keys"]), sorted(found["mismatched_keys"])
    unexpected = sorted(found["unexpected_keys"])
    if missing:
        raise PowersteerError(f"{where} lacks the weights {_listed(missing)}: {_AGAIN}")
    if other:
        name, shape, asked = other[0]
        raise PowersteerError(
            f"{where}: {name} has the shape {_shape(shape)}, its config.json asks for {_shape(asked)}{_more(other)}: "
            "get both files again"
        )
    if unexpected:
        raise PowersteerError(
            f"{where} holds weights that its config.json does not ask for, {_listed(unexpected)}: get both files again"
        )


def filled(make: Callable[[], ModuleT], state: Mapping[str, torch.Tensor], where: str) -> ModuleT:
    """A network with weights that are all its own.

    Args:
        make: Makes it; called on the device ``meta`` first, so that no wrong size is ever made.
        state: Its weights.
        where: The file, for messages.

    Raises:
        PowersteerError: There is no such network, or weights are missing, left over, of another shape or not finite.
    """
    try:
        with torch.device("meta"):
            asked = {name: tensor.shape for name, tensor in make().state_dict().items()}
    except PowersteerError:
        raise
    except Exception as error:  # whatever a class makes of its arguments
        raise PowersteerError(f"{where}: there is no such network ({reason_of(error)})") from None
    other = [(name, state[name].shape, shape) for name, shape in asked.items() if name in state]
    found = {
        "missing_keys": asked.keys() - state.keys(),
        "mismatched_keys": [(name, shape, wanted) for name, shape, wanted in other if shape != wanted],
        "unexpected_keys": state.keys() - asked.keys(),
    }
    check_found(found, where)
    check_finite(state, where)
    whole = next((name for name, one in state.items() if not (one.is_floating_point() or name.endswith(_COUNTS))), None)
    if whole is not None:
        raise PowersteerError(f"{where}: {whole} holds {_kind(state[whole])}, no weights: {_AGAIN}")
    network = make()
    network.load_state_dict(state)
    return network


def check_whole(network: nn.Module, where: str) -> None:
    """Refuse a network that lacks weights, or has some that are no finite numbers: pictures would be black, or noise.

    Args:
        network: As it was loaded.
        where: The file, for messages.

    Raises:
        PowersteerError: There are some; the tensor is named.
    """
    parameters = dict(network.named_parameters())
    missing = sorted(name for name, parameter in parameters.items() if parameter.is_meta)
    if missing:
        raise PowersteerError(f"{where} lacks the weights {_listed(missing)}: {_AGAIN}")
    whole = next((name for name, parameter in parameters.items() if not parameter.is_floating_point()), None)
    if whole is not None:
        raise PowersteerError(f"{where}: {whole} holds {_kind(parameters[whole])}, no weights: {_AGAIN}")
    check_finite(network.state_dict(), where)


def check_finite(tensors: Mapping[str, torch.Tensor], where: str) -> None:
    """Refuse tensors that hold infinite values, or no numbers.

    Args:
        tensors: By name.
        where: The file, for messages.

    Raises:
        PowersteerError: There are some; the tensor is named.
    """
    for name, tensor in tensors.items():
        if tensor.is_meta or not tensor.is_floating_point() or not tensor.numel():
            continue
        least, largest = (tensor if tensor.element_size() > 1 else tensor.float()).aminmax()  # NaN is both
        if not (least.isfinite() and largest.isfinite()):
            raise PowersteerError(
                f"{where}: {shown(name)} holds values that are infinite or no numbers ({_kind(tensor)}): get it again, "
                "or use another"
            )


def _kind(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def shown(name: str) -> str:
    """A name that a file gives, fit for one line."""
    return "".join(letter if letter.isprintable() else "�" for letter in name[:100])


def _listed(names: list[str]) -> str:
    return f"{shown(names[0])}{_more(names)}"


def _more(names: list[Any]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""


def _shape(shape: Any) -> str:
    return "×".join(str(side) for side in shape) or "of one number"

"""A base in one file: Stable Diffusion under LDM's names, told by its tensors, its weights renamed by diffusers."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from safetensors import safe_open

from powersteer.backbones.parts import CONFIG, SCHEDULER_CONFIG, SUPPORTED, empty_network, quiet, that_matter
from powersteer.core.errors import PowersteerError
from powersteer.core.files import reason_of
from powersteer.core.text import read_object
from powersteer.core.weights import check_found, check_whole, kinds_in, shown

_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)
SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth")
"""How the names of checkpoints end."""
_UNET, _VAE = "model.diffusion_model.", "first_stage_model."
_FIRST = f"{_UNET}input_blocks.0.0.weight"
_REFINER = "conditioner.embedders.0.model."
_TASKS = {4: "text to picture", 8: "InstructPix2Pix", 9: "inpainting"}
"""What a U-Net is for, by the channels that it reads."""
_MARKS: dict[str, tuple[str, Any]] = {
    "v_pred": ("prediction_type", "v_prediction"),
    "ztsnr": ("rescale_betas_zero_snr", True),
}
"""Empty tensors by which a file says how it was trained → the scheduler's setting."""
_PREDICTIONS = {"v": "v_prediction", "epsilon": "epsilon"}
"""``modelspec.prediction_type`` in a file's header → the scheduler's setting."""
_OTHERS = (
    (r".*(?:lora|hada_w|lokr_w|dora_scale)", "a LoRA or the like: load its base, then `pipe.load_lora_weights(FILE)`"),
    (r"control_model\.|input_hint_block\.|controlnet_|zero_convs\.", "a ControlNet"),
    (r"(?:model\.diffusion_model\.)?(?:joint|double|single)_blocks\.", "a diffusion transformer"),
    (r"(?:down_outputs|up_outputs)\.", "an adapter: give its folder as the adapter"),
    (r"(?:unet\.)?down_blocks\.|input_blocks\.", "a lone U-Net"),
    (r"(?:vae\.)?(?:decoder\.|encoder\.(?:conv_in|down))", "a lone VAE"),
    (r"(?:text_model|text_encoder\w*|embeddings|encoder|transformer)\.", "a lone text encoder"),
    (r"emb_params|string_to_param|clip_[lg]$", "a textual inversion"),
)
"""How the name of a tensor begins → what a file with such a tensor is."""


@dataclass(frozen=True)
class Family:
    """Bases that name their text encoders alike."""

    name: str
    text: Mapping[str, str]
    """Part of the pipeline → how the names of its weights begin."""
    configs: Mapping[int, str]
    """Channels that the U-Net reads → the model of the Hub that has the configuration, where tensors tell which."""


FAMILIES = (
    Family(
        "Stable Diffusion 1.x",
        {"text_encoder": "cond_stage_model.transformer."},
        {
            4: "stable-diffusion-v1-5/stable-diffusion-v1-5",
            8: "timbrooks/instruct-pix2pix",
            9: "stable-diffusion-v1-5/stable-diffusion-inpainting",
        },
    ),
    Family(  # of the plain ones, some predict ε and some v, and their tensors are alike
        "Stable Diffusion 2.x",
        {"text_encoder": "cond_stage_model.model."},
        {9: "stabilityai/stable-diffusion-2-inpainting"},
    ),
    Family(
        "Stable Diffusion XL",
        {
            "text_encoder": "conditioner.embedders.0.transformer.",
            "text_encoder_2": "conditioner.embedders.1.model.",
        },
        {
            4: "stabilityai/stable-diffusion-xl-base-1.0",
            8: "diffusers/sdxl-instructpix2pix-768",
            9: "diffusers/stable-diffusion-xl-1.0-inpainting-0.1",
        },
    ),
)


@dataclass(frozen=True)
class SingleFile:
    """What the header of a checkpoint says."""

    path: Path
    shapes: Mapping[str, tuple[int, ...]]
    """Name of a tensor → its shape."""
    said: Mapping[str, str]
    """The header's own remarks."""
    family: Family

    @property
    def channels(self) -> int:
        """Channels that the U-Net reads."""
        return self.shapes[_FIRST][1]

    @property
    def title(self) -> str:
        """What it is, for messages."""
        return f"{self.family.name} ({_TASKS[self.channels]})"

    @property
    def text_width(self) -> int | None:
        """Numbers a token that the U-Net reads."""
        keys = (shape for name, shape in self.shapes.items() if name.endswith(".attn2.to_k.weight"))
        return next((shape[1] for shape in keys if len(shape) == 2), None)

    def prefixes(self) -> dict[str, str]:
        """Part of the pipeline → how the names of its weights begin."""
        return {"unet": _UNET, "vae": _VAE, **self.family.text}

    def names(self, part: str) -> list[str]:
        """The tensors of a part."""
        return [name for name in self.shapes if name.startswith(self.prefixes()[part])]


def look_at(path: Path) -> SingleFile:
    """What a checkpoint is, by the names and shapes in its header; no weights are read.

    Args:
        path: The file.

    Raises:
        PowersteerError: It is no safetensors file, not whole, or no base that is taken.
    """
    shapes, said = _header(path)
    other = next((words for begin, words in _OTHERS if any(re.match(begin, name) for name in shapes)), None)
    if other is not None:
        raise PowersteerError(f"the file is {other}: give {SUPPORTED}, whole")
    if not any(name.startswith((_UNET, _VAE, "cond_stage_model.", "conditioner.")) for name in shapes):
        first = f"its first tensor is '{shown(min(shapes))}'" if shapes else "it has no tensors"
        raise PowersteerError(
            f"the file is no checkpoint of Stable Diffusion in LDM's names ({first}): give {SUPPORTED}"
        )
    if any(name.startswith(_REFINER) for name in shapes):
        raise PowersteerError(f"the file is XL's refiner, which only finishes the base's pictures: give {SUPPORTED}")
    if len(shapes.get(_FIRST, ())) != 4:
        raise PowersteerError(f"the file holds no U-Net of Stable Diffusion ({_FIRST}): give {SUPPORTED}, whole")
    if shapes[_FIRST][1] not in _TASKS:
        raise PowersteerError(f"the file's U-Net reads {shapes[_FIRST][1]} channels: give {SUPPORTED}")
    marked = next((name for name in shapes if name.startswith("edm_")), None)
    if marked is not None:
        raise PowersteerError(f"the file is marked '{marked}', for EDM's noise levels: give {SUPPORTED}")
    absent = [] if any(name.startswith(_VAE) for name in shapes) else ["VAE"]
    begins = [family for family in FAMILIES if any(n.startswith(p) for p in family.text.values() for n in shapes)]
    if not begins:
        absent.append("text encoder")
    elif len(begins) > 1:
        raise PowersteerError(
            f"the file holds text encoders of {begins[0].name} and of {begins[1].name}: give {SUPPORTED}"
        )
    else:
        absent += [p for p, begin in begins[0].text.items() if not any(name.startswith(begin) for name in shapes)]
    if absent:
        raise PowersteerError(f"the file holds no {' and no '.join(absent)}: give the whole checkpoint, {SUPPORTED}")
    return SingleFile(path, shapes, said, begins[0])


def check_config(file: SingleFile, folder: Path, kinds: Mapping[str, type]) -> None:
    """Refuse a configuration that is another base's.

    Args:
        file: See `look_at`.
        folder: Holds the configuration.
        kinds: Its parts; see `powersteer.backbones.parts.read_index`.

    Raises:
        PowersteerError: It is of another family, for other inputs, or predicts something else than the file is marked
            for.
    """
    unet = read_object(folder / "unet" / CONFIG)
    texts = {name for name in kinds if name.startswith("text_encoder")}
    read, width = unet.get("in_channels", 4), unet.get("cross_attention_dim")
    if texts != set(file.family.text) or file.text_width not in (None, width):
        raise PowersteerError(
            f"the file is {file.title}, whose U-Net reads {file.text_width} numbers a token; the configuration has "
            f"{' and '.join(sorted(texts))}, and a U-Net that reads {width}: give `base_config` of its own family"
        )
    if read != file.channels:
        raise PowersteerError(
            f"the file is {file.title}, whose U-Net reads {file.channels} channels; that of the configuration reads "
            f"{read}: give `base_config` of its own kind"
        )
    scheduler = read_object(folder / "scheduler" / SCHEDULER_CONFIG)
    wanted = {key: value for mark, (key, value) in _MARKS.items() if mark in file.shapes}
    said = _PREDICTIONS.get(file.said.get("modelspec.prediction_type", ""))
    wanted |= {} if said is None else {"prediction_type": said}
    defaults = {"prediction_type": "epsilon", "rescale_betas_zero_snr": False}
    for key, value in wanted.items():
        if scheduler.get(key, defaults[key]) != value:
            raise PowersteerError(
                f"the file is marked for the scheduler's setting {key}: {value}, the configuration's is "
                f"{scheduler.get(key, defaults[key])}: give `base_config` with a {SCHEDULER_CONFIG} that says so"
            )


def load_networks(
    file: SingleFile, folder: Path, kinds: Mapping[str, Any], dtype: torch.dtype
) -> dict[str, torch.nn.Module]:
    """The networks in a checkpoint, each with all of its weights.

    Args:
        file: See `look_at`.
        folder: Holds the configuration of each part.
        kinds: Classes of the parts.
        dtype: Precision of the weights.

    Raises:
        PowersteerError: Weights are missing, left over, of another shape or not finite, or a configuration is damaged.
    """
    return {part: _network(file, part, folder / part, kinds[part], dtype) for part in file.prefixes()}


def _header(path: Path) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """Shapes of the tensors by name, and the remarks."""
    try:
        with safe_open(path, "pt") as opened:
            shapes = {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
            said = opened.metadata() or {}
    except Exception as error:  # of the operating system, or safetensors' own
        begins = _begins(path)
        if begins.startswith((b"PK\x03\x04", b"\x80")):
            raise PowersteerError(
                "the file is a pickle (.ckpt), which could run code when it is opened: save its weights as .safetensors"
            ) from None
        if begins == b"GGUF":
            raise PowersteerError("the file is GGUF, of rounded weights: give the .safetensors file") from None
        kinds_in(path)  # tells a pointer of Git LFS
        raise PowersteerError(f"{path} is truncated or no checkpoint ({reason_of(error)})") from None
    return shapes, said


def _begins(path: Path) -> bytes:
    """A file's first bytes; none where it cannot be read."""
    try:
        with path.open("rb") as opened:
            return opened.read(4)
    except OSError:
        return b""


def _network(file: SingleFile, part: str, folder: Path, kind: type, dtype: torch.dtype) -> torch.nn.Module:
    network, where = empty_network(folder, kind), f"{part} of the file"
    try:
        with quiet():
            state = _RENAMED.get(part, _renamed_text)(_tensors(file, part), network, file.prefixes()[part])
    except PowersteerError:
        raise
    except Exception as error:  # the converter meets names that the configuration does not lead to
        raise PowersteerError(f"{where} is not what {folder / CONFIG} describes ({reason_of(error)})") from None
    asked = {name: tensor.shape for name, tensor in network.state_dict().items()}
    own = {name: state[name] for name in asked if name in state}
    found = {
        "missing_keys": asked.keys() - own.keys(),
        "mismatched_keys": [(n, tensor.shape, asked[n]) for n, tensor in own.items() if tensor.shape != asked[n]],
        "unexpected_keys": that_matter(network, state.keys() - own.keys()),
    }
    check_found(found, where)
    network.load_state_dict({n: tensor.to(dtype, copy=True).contiguous() for n, tensor in own.items()}, assign=True)
    check_whole(network, where)
    return network


def _tensors(file: SingleFile, part: str) -> dict[str, torch.Tensor]:
    with safe_open(file.path, "pt") as opened:
        tensors: dict[str, torch.Tensor] = {name: opened.get_tensor(name) for name in file.names(part)}
    for name, tensor in tensors.items():
        if tensor.dtype not in _FLOATS and not name.endswith("position_ids"):
            kind = str(tensor.dtype).removeprefix("torch.")
            raise PowersteerError(
                f"the file's {shown(name)} holds {kind}, no weights: give a file that is not quantized"
            )
    return tensors


def _renamed_unet(tensors: dict[str, torch.Tensor], network: Any, prefix: str) -> dict[str, torch.Tensor]:
    state = convert_ldm_unet_checkpoint(tensors, dict(network.config))
    _check_all_taken(tensors, state, prefix)
    return state


def _renamed_vae(tensors: dict[str, torch.Tensor], network: Any, prefix: str) -> dict[str, torch.Tensor]:
    begins = tuple(f"{prefix}{room}." for room in ("encoder", "decoder", "quant_conv", "post_quant_conv"))
    own = {name: tensor for name, tensor in tensors.items() if name.startswith(begins)}  # not the losses of training
    state = convert_ldm_vae_checkpoint(own, dict(network.config))
    _check_all_taken(own, state, prefix)
    return state


def _renamed_text(tensors: dict[str, torch.Tensor], network: Any, prefix: str) -> dict[str, torch.Tensor]:
    """Newer transformers leave ``text_model.`` out of the names."""
    if prefix.endswith(".model."):  # OpenCLIP's names
        state = convert_open_clip_checkpoint(network, tensors, prefix=prefix)
    else:
        state = convert_ldm_clip_checkpoint(tensors)
    inner = {name.removeprefix("text_model."): name for name in network.state_dict()}
    return {inner.get(name.removeprefix("text_model."), name): tensor for name, tensor in state.items()}


def _check_all_taken(given: Mapping[str, torch.Tensor], taken: Mapping[str, torch.Tensor], prefix: str) -> None:
    """Refuse weights that the converter passes over: the network would not be the file's."""
    places = {tensor.data_ptr() for tensor in taken.values()}
    left = sorted(name for name, tensor in given.items() if tensor.data_ptr() not in places)
    if left:
        raise PowersteerError(
            f"the file holds weights that the configuration does not ask for, {shown(left[0])}"
            f"{f' and {len(left) - 1} more' if len(left) > 1 else ''}: give `base_config` of this very base"
        )


_RENAMED: dict[str, Callable[[dict[str, torch.Tensor], Any, str], dict[str, torch.Tensor]]] = {
    "unet": _renamed_unet,
    "vae": _renamed_vae,
}

"""A base's parts, and trained networks: each loaded whole from its folder, or refused in words."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from threading import RLock
from typing import Any

import diffusers
import torch
import transformers
from accelerate import init_empty_weights
from diffusers import (
    AsymmetricAutoencoderKL,
    AutoencoderKL,
    DiffusionPipeline,
    ModelMixin,
    SchedulerMixin,
    UNet2DConditionModel,
)
from torch import nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, PreTrainedModel, PreTrainedTokenizerBase

from powersteer.core.errors import PowersteerError, PowersteerWarning
from powersteer.core.files import is_file, is_folder, reason_of
from powersteer.core.hub import fetch_weights
from powersteer.core.records import settings_of
from powersteer.core.text import read_object
from powersteer.core.weights import check_found, check_sizes, check_whole, find_weights, shown

INDEX = "model_index.json"
CONFIG = "config.json"
SCHEDULER_CONFIG = "scheduler_config.json"
SUPPORTED = "Stable Diffusion 1.x, 2.x or XL, its inpainting, or InstructPix2Pix"
NEEDED = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
MOST_TIMESTEPS = 100_000
_WANTED: dict[str, tuple[type, ...]] = {
    "vae": (AutoencoderKL, AsymmetricAutoencoderKL),
    "text_encoder": (CLIPTextModel, CLIPTextModelWithProjection),
    "tokenizer": (PreTrainedTokenizerBase,),
    "scheduler": (SchedulerMixin,),
}
_WORDS = 32
"""Looked up in a vocabulary that should know them."""
_LOADING = RLock()
"""Held while the libraries are quiet, for they are so in every thread."""


def stems(kind: type) -> tuple[str, str]:
    """How a class of diffusers or transformers names its weights: safetensors, and pickles."""
    if issubclass(kind, ModelMixin):
        return "diffusion_pytorch_model", "diffusion_pytorch_model"
    return "model", "pytorch_model"


def read_index(file: Path) -> dict[str, type]:
    """A base's parts, by name, with the class of each.

    Args:
        file: Its ``model_index.json``.

    Raises:
        PowersteerError: It is not a pipeline's, or one that cannot be steered, or names classes that are not of
            diffusers or transformers: no others are loaded, for they would run the base's own code.
    """
    index = read_object(file)
    named: Any = index.get("_class_name")
    pipeline = _class_of(diffusers, named)
    if pipeline is None or not issubclass(pipeline, DiffusionPipeline):
        raise PowersteerError(f"its {INDEX} names the class {_short(named)}, no pipeline of this diffusers")
    if index.get("unet") != ["diffusers", UNet2DConditionModel.__name__]:
        raise PowersteerError(f"it is a {named} without a {UNet2DConditionModel.__name__}: give {SUPPORTED}")
    arguments = [name for name in signature(pipeline.__init__).parameters if isinstance(index.get(name), list)]
    parts = {name: _known_class(name, index[name]) for name in arguments if index[name] != [None, None]}
    absent = [name for name in NEEDED if name not in parts]
    if absent:
        raise PowersteerError(f"it is a {named} without {absent[0]}: give {SUPPORTED}")
    return parts


def load_parts(
    folder: Path, parts: Mapping[str, type], dtype: torch.dtype, variant: str | None = None
) -> dict[str, Any]:
    """A base's parts, from its folder.

    Args:
        folder: The base's.
        parts: See `read_index`.
        dtype: Precision of the weights.
        variant: Weights that are taken before the plain ones, where a network has some: ``fp16``.

    Raises:
        PowersteerError: A part is missing, incomplete or damaged, or no network has weights of the variant.
    """
    if variant is not None:
        networks = {name: stems(kind)[0] for name, kind in parts.items() if issubclass(kind, nn.Module)}
        if not any(any((folder / name).glob(f"{stem}*.{variant}[.-]*")) for name, stem in networks.items()):
            raise PowersteerError(
                f"none of its parts has weights of the variant '{variant}' (files named *.{variant}.safetensors): give "
                "another variant, or none"
            )
    return {name: load_part(folder / name, kind, dtype, variant) for name, kind in parts.items()}


def check_fit(loaded: Mapping[str, Any], folder: Path) -> None:
    """Refuse parts that do not fit one another.

    Args:
        loaded: The parts, by name.
        folder: Holds their configurations and the tokenizers, for messages.

    Raises:
        PowersteerError: A part was made for another base.
    """
    unet, vae, width = loaded["unet"].config, loaded["vae"].config, 0
    for text, words in (("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2")):
        if text in loaded:
            if words not in loaded:
                raise PowersteerError(f"its {INDEX} names no {words}: give {SUPPORTED}")
            check_tokenizer(loaded[words], loaded[text].config, folder / words)
            width += loaded[text].config.hidden_size
    read = unet["encoder_hid_dim"] or unet["cross_attention_dim"]
    if {width} != set(read if isinstance(read, (list, tuple)) else [read]):
        raise PowersteerError(
            f"the text encoder gives {width} numbers a token, the U-Net reads {read}: one is another base's"
        )
    latent, scale = vae["latent_channels"], vae["scaling_factor"]
    if not isinstance(scale, (int, float)) or scale <= 0:
        raise PowersteerError(f"{folder / 'vae' / CONFIG}: 'scaling_factor' must be more than 0, not {_short(scale)}")
    if unet["in_channels"] not in (latent, 2 * latent, 2 * latent + 1):  # plain, InstructPix2Pix, inpainting
        raise PowersteerError(
            f"the VAE's latents have {latent} channels, the U-Net reads {unet['in_channels']}: one is another base's"
        )


def load_part(folder: Path, kind: type, dtype: torch.dtype = torch.float32, variant: str | None = None) -> Any:
    """One part, from its folder; see `load_parts`."""
    if not is_folder(folder):
        raise PowersteerError(f"the folder {folder} is missing")
    if issubclass(kind, (ModelMixin, PreTrainedModel)):
        return load_model(folder, kind, dtype, variant)
    if issubclass(kind, PreTrainedTokenizerBase):
        return load_tokenizer(folder, kind)
    if issubclass(kind, SchedulerMixin):
        return load_scheduler(folder, kind)
    return from_folder(folder, kind)  # what prepares pictures


def load_model(folder: Path, kind: Any, dtype: torch.dtype = torch.float32, variant: str | None = None) -> Any:
    """A network of diffusers or transformers, with all of its weights, and no others that matter.

    Args:
        folder: Holds config.json and the weights.
        kind: Its class; of transformers, an ``AutoModel…``, too.
        dtype: Precision of the weights.
        variant: See `load_parts`.

    Raises:
        PowersteerError: Something is missing, damaged, of another shape or not finite.
    """
    config, of_diffusers = read_object(folder / CONFIG), issubclass(kind, ModelMixin)
    check_sizes(config, str(folder / CONFIG))
    weights = find_weights(folder, *stems(kind), variant)
    options: dict[str, Any] = {"variant": weights.variant, "use_safetensors": weights.safe}
    if of_diffusers:
        check_settings(folder, config, kind)
        options["torch_dtype"] = dtype
    else:
        _check_room(folder, kind, weights.bytes)
        options |= {"dtype": dtype, "trust_remote_code": False}
    network, found = from_folder(folder, kind, output_loading_info=True, ignore_mismatched_sizes=True, **options)
    where = str(weights.files[0] if len(weights.files) == 1 else folder)
    if not of_diffusers:
        found = found | {"unexpected_keys": that_matter(network, found["unexpected_keys"])}
    check_found(found, where)
    check_whole(network, where)
    return network


def load_tokenizer(folder: Path, kind: Any) -> Any:
    """A tokenizer, from files that are all there: without them transformers makes one that knows no word.

    Raises:
        PowersteerError: A file is missing or damaged.
    """
    files = dict(kind.vocab_files_names)
    whole = files.pop("tokenizer_file", None)
    missing = [name for name in files.values() if not is_file(folder / name)]
    if not (whole and is_file(folder / whole)) and (missing or not files):
        others = f" (or {' and '.join(files.values())})" if whole and len(missing) == len(files) and files else ""
        lacking = whole if others or not missing else missing[0]
        raise PowersteerError(f"{folder} lacks {lacking}{others}: get the folder again, whole")
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if is_file(folder / name):
            read_object(folder / name)
    return from_folder(folder, kind)


def check_tokenizer(tokenizer: Any, config: Any, folder: Path) -> None:
    """Refuse a tokenizer that is not the text encoder's, or does not tell captions apart.

    Args:
        tokenizer: Of transformers.
        config: The text encoder's.
        folder: The tokenizer's, for messages.

    Raises:
        PowersteerError: It has more tokens than the text encoder, takes longer captions, or lost its words.
    """
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    if tokenizer.model_max_length > config.max_position_embeddings:
        raise PowersteerError(
            f"{folder} takes captions of {str(tokenizer.model_max_length)[:9]} tokens, the text encoder "
            f"{config.max_position_embeddings}: its tokenizer_config.json is missing, or another model's"
        )
    if max(vocabulary.values(), default=0) >= config.vocab_size:
        raise PowersteerError(
            f"{folder} knows {len(vocabulary)} tokens, the text encoder {config.vocab_size}: one is another model's"
        )
    # Whole words of a byte-pair vocabulary, of which each should be one token: the last to be merged, and some between.
    words = sorted(
        (token for token in vocabulary if token.endswith("</w>") and token[:-4].isascii() and token[:-4].isalpha()),
        key=vocabulary.__getitem__,
    )
    words = [word[:-4] for word in words if len(word) > 5 and word.islower()]
    chosen = [*words[-_WORDS // 2 :], *words[:: max(1, 2 * len(words) // _WORDS)]]
    ids: list[list[int]] = tokenizer([*chosen, "a fox", "the moon"], add_special_tokens=False).input_ids
    split = sum(len(one) != 1 for one in ids[:-2])
    if 10 * split > len(chosen) or ids[-1] == ids[-2]:
        raise PowersteerError(f"{folder} does not know its own words: its files are incomplete; get them again")


def load_scheduler(folder: Path, kind: Any) -> Any:
    """A scheduler whose noise levels are numbers.

    Raises:
        PowersteerError: Its configuration is missing, or no schedule follows from it.
    """
    file = folder / SCHEDULER_CONFIG
    check_schedule(read_object(file), file)
    scheduler = from_folder(folder, kind)
    kept = getattr(scheduler, "alphas_cumprod", None)
    if kept is not None and not ((kept >= 0) & (kept <= 1)).all():
        raise PowersteerError(f"{file}: no noise schedule follows from its betas")
    if not hasattr(scheduler, "init_noise_sigma"):
        scheduler.init_noise_sigma = 1.0  # those of flow matching leave it out, and the U-Nets' pipelines ask for it
    return scheduler


def check_schedule(config: Mapping[str, Any], file: Path) -> None:
    """Refuse a scheduler's configuration whose length or prediction type cannot be.

    Raises:
        PowersteerError: As said.
    """
    steps, predicted = config.get("num_train_timesteps", 1), config.get("prediction_type", PREDICTION_TYPES[0])
    if not isinstance(steps, int) or not 1 <= steps <= MOST_TIMESTEPS:
        raise PowersteerError(f"{file}: 'num_train_timesteps' must be 1 to {MOST_TIMESTEPS}, not {_short(steps)}")
    if predicted not in PREDICTION_TYPES:
        raise PowersteerError(
            f"{file}: 'prediction_type' must be one of {', '.join(PREDICTION_TYPES)}, not {_short(predicted)}"
        )


def from_folder(folder: Path, kind: Any, **options: Any) -> Any:
    """The boundary to the libraries' ``from_pretrained``, which raise whatever they meet in the files.

    Args:
        folder: What is loaded.
        kind: Its class.
        **options: Of the class.

    Raises:
        PowersteerError: It cannot be loaded.
    """
    try:
        with quiet():
            return kind.from_pretrained(str(folder), **options)
    except PowersteerError:
        raise
    except Exception as error:
        reason = reason_of(error)
        if isinstance(error, MemoryError) or "allocate memory" in reason:  # torch's words
            reason = f"its {CONFIG} asks for more memory than there is"
        raise PowersteerError(f"{folder} is no {kind.__name__} ({reason})") from None


def folder_of(name_or_path: str, kind: type) -> Path:
    """Where a model of transformers lies: a folder, or fetched from the Hub.

    Raises:
        PowersteerError: There is none of this name.
    """
    path = Path(name_or_path)
    return path if is_folder(path) else fetch_weights(name_or_path, {"": stems(kind)}, "*.json", "*.txt")


@contextmanager
def quiet() -> Generator[None]:
    """Loading takes a moment: the libraries' bars would bury what a person wants to read, and what they warn of is
    told here, or refused."""
    libraries = (diffusers.utils.logging, transformers.utils.logging)
    with _LOADING:
        shown = [(library, library.is_progress_bar_enabled(), library.get_verbosity()) for library in libraries]
        for library in libraries:
            library.disable_progress_bar()
            library.set_verbosity(logging.CRITICAL)
        try:
            yield
        finally:
            for library, bars, verbosity in shown:
                library.set_verbosity(verbosity)
                if bars:
                    library.enable_progress_bar()


def check_settings(folder: Path, config: Mapping[str, Any], kind: Any) -> None:
    """Refuse another class's configuration; say what diffusers would leave out of it."""
    named = config.get("_class_name", kind.__name__)
    if named != kind.__name__:
        raise PowersteerError(f"{folder / CONFIG} is of the class {_short(named)}, not {kind.__name__}")
    unknown = sorted(key for key in config.keys() - settings_of(kind) if not key.startswith("_"))
    if unknown:
        warnings.warn(
            f"{folder / CONFIG} has the setting '{shown(unknown[0])}', which this diffusers does not know: left out",
            PowersteerWarning,
            stacklevel=2,
        )


def empty_network(folder: Path, kind: Any) -> nn.Module:
    """A network of diffusers or transformers, with parameters that take no memory.

    Args:
        folder: Holds config.json.
        kind: Its class.

    Raises:
        PowersteerError: The configuration is missing, or not the class's.
    """
    config = read_object(folder / CONFIG)
    check_sizes(config, str(folder / CONFIG))
    of_diffusers = hasattr(kind, "from_config")
    if of_diffusers:
        check_settings(folder, config, kind)
    try:
        with quiet(), init_empty_weights():
            return kind.from_config(config) if of_diffusers else kind(kind.config_class.from_dict(config))
    except Exception as error:  # whatever a class makes of its arguments
        raise PowersteerError(f"{folder / CONFIG} describes no {kind.__name__} ({reason_of(error)})") from None


def _check_room(folder: Path, kind: Any, size: int) -> None:
    """Refuse a configuration that asks for more numbers than the files can hold.

    Transformers would make the missing ones, at random.
    """
    try:
        with quiet(), torch.device("meta"):
            if issubclass(kind, PreTrainedModel):
                configuration: Any = kind.config_class
                network: nn.Module = kind(configuration.from_pretrained(str(folder)))
            else:  # an AutoModel
                config = transformers.AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
                network = kind.from_config(config)
            asked = sum(parameter.numel() for parameter in network.parameters())
    except Exception as error:  # whatever a class makes of its arguments
        raise PowersteerError(f"{folder / CONFIG} describes no {kind.__name__} ({reason_of(error)})") from None
    if asked > size:  # a number takes one byte or more
        raise PowersteerError(f"{folder / CONFIG} asks for {asked} weights, the files hold {size} bytes")


def that_matter(network: nn.Module, unexpected: Any) -> list[str]:
    """Weights in the network's own rooms: a CLIP's file may hold its other tower."""
    rooms = {name.split(".")[0] for name in network.state_dict()}
    inner = {name: name.removeprefix("text_model.") for name in unexpected if not name.endswith("position_ids")}
    return [name for name, short in inner.items() if name.split(".")[0] in rooms or short.split(".")[0] in rooms]


def _known_class(part: str, named: list[Any]) -> type:
    """A class of diffusers, of one of its pipelines' own folders, or of transformers."""
    library, name = named if len(named) == 2 else (None, named)
    places = {"transformers": transformers, "diffusers": diffusers}
    if library == "transformers" and isinstance(name, str):
        name = name.replace("FeatureExtractor", "ImageProcessor")  # its former name
    found = _class_of(places.get(str(library)) or getattr(diffusers.pipelines, str(library), None), name)
    wanted = _WANTED.get(part.removesuffix("_2"), (object,))
    if found is None or not hasattr(found, "from_pretrained") or not issubclass(found, wanted):
        raise PowersteerError(
            f"its {INDEX} names the class {_short(name)} of {_short(library)} as {part}, which is not loaded: give "
            f"{SUPPORTED}"
        )
    return found


def _class_of(library: Any, name: Any) -> type | None:
    """A class by its name; None where there is none, or what it needs is not installed."""
    try:
        found = getattr(library, name) if isinstance(name, str) and name.isidentifier() else None
    except Exception:  # of a lazy import
        return None
    return found if isinstance(found, type) else None


def _short(value: Any) -> str:
    return repr(value)[:60]

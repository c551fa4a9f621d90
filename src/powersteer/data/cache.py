"""Files of encoded pairs: named after all that their content depends on, and checked before they are used."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import safe_open
from safetensors.torch import save

from powersteer.core.digests import tensors_digest, weights_digest
from powersteer.core.files import reason_of

ALGORITHM = 2
"""Raise it with every change of what a row's bytes become on their way into the cache."""
LOCKS = "locks"
_DIGEST = "sha256"


def key_of(*parts: Any) -> str:
    """A name for what depends on these parts."""
    return hashlib.sha256(json.dumps([ALGORITHM, *parts], default=str).encode()).hexdigest()[:24]


def module_digest(module: Any) -> str:
    """A digest of a model's weights, their precision, and its configuration."""
    return key_of(settings_digest(module.config), weights_digest(module))


def settings_digest(config: Any) -> str:
    """A digest of a configuration of diffusers or transformers, without the names and versions of what wrote it."""
    values: Mapping[str, Any] = config if isinstance(config, Mapping) else config.to_dict()
    kept = {key: value for key, value in values.items() if not key.startswith("_") and key != "transformers_version"}
    return hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode()).hexdigest()[:24]


def tokenizer_digest(tokenizer: Any) -> str:
    """A digest of what makes tokens of text: vocabulary, merges and rules, special tokens, the longest text."""
    fast: Any = getattr(tokenizer, "backend_tokenizer", None)
    rules = {} if fast is None else json.loads(fast.to_str())
    for changing in ("truncation", "padding"):  # what the last call left behind
        rules.pop(changing, None)
    merges = sorted((str(pair), rank) for pair, rank in getattr(tokenizer, "bpe_ranks", {}).items())
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    parts = [type(tokenizer).__name__, rules, merges, sorted(tokenizer.get_vocab().items()), special]
    whole = json.dumps([*parts, tokenizer.model_max_length, tokenizer.padding_side], sort_keys=True)
    return hashlib.sha256(whole.encode()).hexdigest()[:24]


def write_tensors(file: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write a file of the cache, with the digest of its tensors; never seen half-written.

    Raises:
        OSError: It cannot be written.
    """
    partial = file.with_suffix(".partial")
    partial.write_bytes(save(tensors, {_DIGEST: tensors_digest(tensors)}))
    partial.replace(file)


def fault_of(file: Path) -> str | None:
    """What is wrong with a file of the cache, all of which is read; None when it is as it was written."""
    try:
        with safe_open(file, "pt") as opened:
            wanted = (opened.metadata() or {}).get(_DIGEST)
            found = tensors_digest({name: opened.get_tensor(name) for name in opened.keys()})  # noqa: SIM118
    except FileNotFoundError:
        return "it is missing"
    except Exception as error:  # whatever safetensors meets in a damaged file
        return reason_of(error)
    return None if wanted == found else "its content has changed"


def sweep(cache_dir: Path) -> None:
    """Remove what killed processes left half-written; what another process is writing now is left alone."""
    for partial in cache_dir.glob("*.partial"):
        try:
            with FileLock(cache_dir / LOCKS / partial.stem, timeout=0):
                partial.unlink(missing_ok=True)
        except Timeout:
            continue

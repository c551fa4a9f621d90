"""Adapters pushed to the Hugging Face Hub, with their card."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from diffusers import ModelMixin
from huggingface_hub import HfApi

from powersteer.core.card import CARD, pictures_of, write_card
from powersteer.core.errors import PowersteerError
from powersteer.core.hub import CONFIG, WEIGHTS, told_plainly
from powersteer.core.weights import check_found, check_whole


class HubMixin(ModelMixin):
    """Diffusers' model, pushed with a card that says what it steers."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **options: Any) -> Any:
        """Diffusers' own, but weights that are missing, or not finite, are refused, not told or left to be met later.

        Args:
            pretrained_model_name_or_path: A folder, or ``user/name``.
            **options: Diffusers'; with ``output_loading_info`` nothing is refused.

        Raises:
            PowersteerError: The weights are not those of the network.
        """
        inherited: Any = super()
        if options.get("output_loading_info"):
            return inherited.from_pretrained(pretrained_model_name_or_path, **options)
        options["output_loading_info"] = True
        model, found = inherited.from_pretrained(pretrained_model_name_or_path, **options)
        where = f"the adapter in {pretrained_model_name_or_path}"
        check_found(found, where)
        if options.get("device_map") is None:
            check_whole(model, where)
        return model

    def push_to_hub(self, repo_id: str, **options: Any) -> str:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Upload weights, config and a model card; a card that is there already is kept.

        Of a run, ``powersteer push`` uploads more: its figures, settings and pictures are in the card.

        Args:
            repo_id: ``user/name``; made if need be.
            **options: See `push`.

        Returns:
            The address.

        Raises:
            PowersteerError: See `push`.
        """
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return push(Path(folder), repo_id, keep_card=True, **options)

    def to_json_string(self) -> str:
        """The config as it is saved: without the folder that it was loaded from, which is nobody's business."""
        inherited: Any = super()
        config = json.loads(inherited.to_json_string())
        config.pop("_name_or_path", None)
        return json.dumps(config, indent=2, sort_keys=True) + "\n"


def push(
    folder: Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    commit_message: str = "Upload adapter",
    create_pr: bool = False,
    keep_card: bool = False,
) -> str:
    """Upload an adapter's folder: config, weights, the card and its pictures; no checkpoints, caches or logs.

    Args:
        folder: What `powersteer train` or ``save_pretrained`` wrote; its card is written anew, unless it is a person's.
        repo_id: ``user/name``; made if need be.
        private: Whether a new repository is; the account's default if not given.
        token: Of the account; by default the one of ``hf auth login`` or ``HF_TOKEN``.
        commit_message: Of the commit.
        create_pr: Open a pull request instead.
        keep_card: Leave a card that the repository has as it is.

    Returns:
        The address.

    Raises:
        PowersteerError: ``folder`` holds no adapter, the account may not write there, or the Hub cannot be reached.
    """
    if not (folder / CONFIG).exists() or not any(folder.glob(WEIGHTS)):
        raise PowersteerError(f"{folder} holds no adapter ({CONFIG} and weights): give a folder that `train` wrote")
    api = HfApi(token=token)
    with told_plainly(repo_id, "push"):
        made = api.create_repo(repo_id, private=private, exist_ok=True)
        write_card(folder, made.repo_id)
        files = [CONFIG, WEIGHTS, *pictures_of(folder)]
        if not (keep_card and api.file_exists(made.repo_id, CARD)):
            files.append(CARD)
        api.upload_folder(
            repo_id=made.repo_id,
            folder_path=folder,
            allow_patterns=files,
            commit_message=commit_message,
            create_pr=create_pr,
        )
    return str(made)

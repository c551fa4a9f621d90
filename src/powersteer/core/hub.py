"""The Hugging Face Hub: files fetched by ``user/name``, and its errors told plainly."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from powersteer.core.errors import PowersteerError
from powersteer.core.files import reason_of
from powersteer.core.weights import HALF

CONFIG = "config.json"
WEIGHTS = "diffusion_pytorch_model*.safetensors*"


def fetch(repo_id: str, *patterns: str, revision: str | None = None) -> Path:
    """The folder with a repository's files of these names; without a network, as they were fetched before.

    Args:
        repo_id: ``user/name``.
        *patterns: Names of files, with ``*``.
        revision: Branch, tag or commit; the main branch by default.

    Raises:
        PowersteerError: There is no such repository, or it cannot be reached and was not fetched before.
    """
    with told_plainly(repo_id, "fetch"):
        return Path(snapshot_download(repo_id, allow_patterns=list(patterns), revision=revision))


def fetch_weights(
    repo_id: str,
    stems: Mapping[str, tuple[str, str]],
    *patterns: str,
    variant: str | None = None,
    revision: str | None = None,
) -> Path:
    """`fetch`, and the weights of networks in one form: safetensors or else pickles, plain or else of half precision.

    Args:
        repo_id: ``user/name``.
        stems: Folder in the repository, or "" → how its weights are named, as safetensors and as pickles.
        *patterns: Names of the other files.
        variant: Weights that are taken before the others, where there are some: ``fp16``.
        revision: See `fetch`.

    Raises:
        PowersteerError: See `fetch`. Weights that there are not are left to whoever loads them.
    """
    waiting, folder = dict(stems), Path()
    for wanted in dict.fromkeys((variant, None, HALF)):
        dotted = f".{wanted}" if wanted else ""
        for form, suffix in enumerate((".safetensors", ".bin")):
            names = {
                part: [f"{part and f'{part}/'}{stem[form]}{dotted}{end}{suffix}" for end in ("", "-*-of-*")]
                for part, stem in waiting.items()
            }
            weights = [name for pair in names.values() for name in pair]
            folder = fetch(repo_id, *patterns, *weights, revision=revision)
            waiting = {p: s for p, s in waiting.items() if not any(any(folder.glob(name)) for name in names[p])}
            if not waiting:
                return folder
    return folder


@contextmanager
def told_plainly(repo_id: str, task: str) -> Generator[None]:
    """The Hub's many errors as the few that a person can mend."""
    cannot = f"cannot {task} '{repo_id[:200]}'"
    try:
        yield
    except PowersteerError:
        raise
    except HFValidationError:
        raise PowersteerError(f"{cannot}: there is no such folder, and a name on the Hub is user/name") from None
    except LocalTokenNotFoundError:
        raise PowersteerError(f"{cannot}: log in first, with `hf auth login` or HF_TOKEN") from None
    except RepositoryNotFoundError:
        hint = "or log in with `hf auth login` if it is private"
        raise PowersteerError(
            f"{cannot}: the Hub has no such model, nor is it a folder here; check it, {hint}"
        ) from None
    except RevisionNotFoundError:
        raise PowersteerError(
            f"{cannot}: the Hub has the model, but not this revision of it; check `revision`"
        ) from None
    except HfHubHTTPError as error:
        status = error.response.status_code
        hint = "log in with `hf auth login` as one who may" if status in (401, 403) else "try again later"
        raise PowersteerError(f"{cannot}: the Hub says {status} ({_first_line(error)}); {hint}") from None
    except (EntryNotFoundError, HTTPError) as error:
        raise PowersteerError(
            f"{cannot}: there is no such folder, and the Hub cannot be reached ({_first_line(error)}); check name and "
            "network"
        ) from None
    except (OSError, ValueError) as error:  # of the disk, or names of files that lead out of the repository's folder
        raise PowersteerError(f"{cannot}: {reason_of(error)}") from None


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:160]

"""Downloads models of the Hugging Face hub into its cache: when told to, and never else."""

from __future__ import annotations

from pathlib import Path

from gemma_mtp.errors import CheckpointError, missing_extra
from gemma_mtp.locate import is_hub_name

#: what a checkpoint is read from; pickles and other programs' files are left there
PATTERNS = (
    "config.json", "generation_config.json", "model.safetensors", "model-*.safetensors", "model.safetensors.index.json",
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.*",
    "additional_chat_templates/*", "LICENSE*", "README.md",
)  # fmt: skip


def download(name: str, revision: str | None = None, optional: bool = False) -> Path | None:
    """Returns the directory of a model in the cache, downloaded as far as it is not there; on a terminal the hub's own
    progress bars are shown.

    Returns None where there is no such model and it is `optional`. Raises CheckpointError for a name that is none, a
    model that is not there or may not be read, and where the network does not answer.
    """
    if not is_hub_name(name):
        raise CheckpointError(
            f"{name!r} is no name on the Hugging Face hub; give OWNER/MODEL, such as google/gemma-4-E2B-it."
        )
    try:
        from huggingface_hub import constants, snapshot_download
        from huggingface_hub import errors as hub
    except ImportError:
        raise CheckpointError(missing_extra("pull", "huggingface_hub", "hub")) from None
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(PATTERNS)))
    except hub.GatedRepoError:
        raise CheckpointError(
            f"{name} may be read only by those who accepted its terms at {constants.ENDPOINT}/{name}; do so, and set"
            " HF_TOKEN to a token of that account."
        ) from None
    except hub.RepositoryNotFoundError:
        if optional:
            return None
        raise CheckpointError(
            f"{constants.ENDPOINT} has no model {name}, or none that may be read without a token; correct the name, or"
            " set HF_TOKEN."
        ) from None
    except hub.RevisionNotFoundError:
        raise CheckpointError(
            f"{name} has no revision {revision}; give one of its branches, tags or commits."
        ) from None
    except (hub.LocalEntryNotFoundError, hub.OfflineModeIsEnabled, hub.HfHubHTTPError, OSError, RuntimeError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{name} could not be downloaded from {constants.ENDPOINT} ({first.rstrip('.')}); try again with a network,"
            " or copy the files and give their directory."
        ) from None

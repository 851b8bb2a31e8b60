"""Pushing an export to the Hugging Face hub, or to whatever HF_ENDPOINT names. Nothing here runs unless asked for."""

from pathlib import Path
from typing import Any

from heal_jax.errors import RunError, one_line
from heal_jax.share import cards, dataset

CARD = "README.md"
WHOLE = (".safetensors", ".safetensors.index.json", ".parquet")  # of an older export, these go
FOLDERS = {"model": ("export", cards.FOLDER), "dataset": ("dataset", dataset.FOLDER)}


def push(folder: Path, kind: str, repository: str, public: bool) -> str:
    """Upload DIR/export (kind: model) or DIR/dataset (dataset) in one commit; the repository's address.

    A repository that is not there is made, private unless `public`; one that is there stays as it is in that. The token
    is huggingface_hub's own: HF_TOKEN, or that of `hf auth login`. Raises RunError, in one line, for whatever goes
    wrong; the files on disk stay as they are.
    """
    name, placeholder = FOLDERS[kind]
    # Imported here: it reads its environment when it is imported, and nothing else needs it.
    import huggingface_hub as hub
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    try:
        if hub.get_token() is None:
            raise RuntimeError("no token of the Hugging Face hub is found; set HF_TOKEN or give `hf auth login`")
        api = hub.HfApi(library_name="heal_jax")
        address = api.create_repo(repository, private=not public, repo_type=kind, exist_ok=True)
        there = api.list_repo_files(repository, repo_type=kind)
        paths = sorted(path for path in folder.iterdir() if path.is_file())
        gone = [file for file in there if file.endswith(WHOLE) and file not in {path.name for path in paths}]
        operations: list[Any] = [hub.CommitOperationDelete(file) for file in gone]
        for path in paths:
            content: Any = path
            if path.name == CARD:
                content = cards.addressed(path.read_text(encoding="utf-8"), repository, placeholder).encode()
            operations.append(hub.CommitOperationAdd(path.name, content))
        api.create_commit(repository, operations, commit_message="Export of heal_jax", repo_type=kind)
    except Exception as error:  # of many kinds: networks, permissions, names that the hub refuses
        raise RunError(
            f"{repository}: not pushed ({_reason(error)}); {name}/ is on disk, the same command tries again"
        ) from error
    return str(address)


def _reason(error: BaseException) -> str:
    said = getattr(error, "server_message", None)
    return one_line(f"{said}: {error}" if said and str(said) not in str(error) else error)[:300] or type(error).__name__

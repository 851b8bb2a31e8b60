"""Writing a model as a Hugging Face folder and its adapters as a PEFT one; the student of a run into export/."""

import contextlib
import functools
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from heal_jax.config import LoraSpec
from heal_jax.errors import InputError, RunError
from heal_jax.evaluate import trained
from heal_jax.model.config import both_spellings, read_config_json
from heal_jax.model.lm import LanguageModel
from heal_jax.model.lora import merged
from heal_jax.model.weights import save_adapter_weights, save_weights
from heal_jax.processes import once, primary
from heal_jax.run import Run
from heal_jax.share import dataset
from heal_jax.share.cards import licence, model_card
from heal_jax.summary import summarise

# What a tokenizer may consist of; copied byte for byte, so that every engine reads what the source model shipped.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)

CARD = "README.md"


def export(run: Run) -> None:
    """The student after HEAL into DIR/export, what it learned into DIR/dataset, both with their cards; with LoRA, its
    adapters into DIR/adapter too.

    Cards have no checksum in the manifest, so that they can be edited: an export that is done again writes them anew.
    """
    spec = run.config.train.lora
    with run.work("export"):
        student = trained(run, "heal")
        save(student, run.root / "export", once(lambda: _card(run)))
        with _new(run.root / "dataset") as partial:
            if primary():
                dataset.write(run, partial)
        made = [run.root / "export", run.root / "dataset"]
        if spec.rank:
            save_adapters(student, spec, run.root / "adapter")
            made.append(run.root / "adapter")
    files = (path for folder in made for path in sorted(folder.iterdir()) if path.name != CARD)
    written = once(lambda: [str(path.relative_to(run.root)) for path in files])
    run.directory.finish("export", [run.root / name for name in written])
    run.progress.update("export", len(made), len(made), "folders")


def _card(run: Run) -> str:
    tokenizer = run.tokenizers["student"]
    chat = tokenizer.hf.chat_template is not None
    return model_card(run.config, run.directory.manifest, summarise(run), licence(tokenizer.folder), chat)


def _written_here(path: Path) -> bool:
    """Whether this may be a file of an export."""
    if path.name == CARD:
        return path.is_file() and "heal_jax" in path.read_text(encoding="utf-8", errors="replace")
    found = re.fullmatch(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?|stage[123]\.parquet", path.name)
    others = *TOKENIZER_FILES, "config.json", "adapter_config.json", "adapter_model.safetensors"
    return path.is_file() and (path.name in others or found is not None)


def save(lm: LanguageModel, folder: Path, card: str = "") -> None:
    """Write config.json, safetensors and the source tokenizer's files, and its card if one is given; a model folder
    of that name is replaced.

    Adapters are merged into their kernels. Written beside it first and renamed, so that the folder is whole or not
    there. Raises InputError where it cannot be made or holds something else, RunError where writing fails, as on a full
    disk; an older folder then stays.
    """
    model = merged(lm.model)
    with _new(folder) as partial:
        if primary():
            _write_files(lm, partial)
            if card:
                (partial / CARD).write_text(card, encoding="utf-8")
        save_weights(model, partial)


def save_adapters(lm: LanguageModel, spec: LoraSpec, folder: Path) -> None:
    """Write a model's adapters as PEFT's LoraModel reads them (`PeftModel.from_pretrained`), float32; as `save` does.

    The model beneath them is named by its folder.
    """
    config = {
        "base_model_name_or_path": str(lm.folder),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "lora_alpha": spec.alpha,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": spec.rank,
        "target_modules": sorted(set(spec.targets)),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }
    with _new(folder) as partial:
        if primary():
            (partial / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        save_adapter_weights(lm.model, spec.targets, partial)


@contextlib.contextmanager
def _new(folder: Path) -> Iterator[Path]:
    """A folder to write in, which takes the place of `folder` in the end."""
    folder = folder.resolve()
    partial, old = (folder.with_name(f".{folder.name}.{state}") for state in ("partial", "old"))
    once(functools.partial(_make_room, folder, partial, old))
    try:
        yield partial
        once(functools.partial(_replace, folder, partial, old))
    except OSError as error:
        raise RunError(f"{folder}: cannot be written ({error.strerror}); make room and try again") from None
    finally:
        if primary():
            shutil.rmtree(partial, ignore_errors=True)


def _make_room(folder: Path, partial: Path, old: Path) -> None:
    if old.exists() and not folder.exists():
        old.rename(folder)  # a replacement that was cut off between its two renames
    if folder.exists() and (not folder.is_dir() or not all(map(_written_here, folder.iterdir()))):
        raise InputError(f"{folder}: holds other things than a model, so it is not replaced; give another path")
    for leftover in (partial, old):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise InputError(f"{folder}: cannot be written ({error.strerror}); give another path") from None


def _write_files(lm: LanguageModel, partial: Path) -> None:
    """All but the weights."""
    config = both_spellings(read_config_json(lm.folder), str(lm.model.params["embed"][...].dtype))
    (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for name in TOKENIZER_FILES:
        if (lm.folder / name).is_file():
            shutil.copyfile(lm.folder / name, partial / name)


def _replace(folder: Path, partial: Path, old: Path) -> None:
    for path in partial.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    if folder.exists():
        folder.rename(old)
    try:
        partial.rename(folder)
    except OSError:
        if old.exists():
            old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)

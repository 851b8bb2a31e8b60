"""What was run? Command, versions, device, hashes, config."""

import re
import shlex
from collections.abc import Iterable, Mapping
from typing import Any

import yaml

from heal_jax.config import Config
from heal_jax.report.data import RunData
from heal_jax.report.markup import Html, join, table, tag, todo
from heal_jax.strict import flatten, to_dict

OWN_PLACE = (
    "stages",
    "shards",
    "files",
    "inputs",
    "work",
    "command",
    "sha256",
    "models",
)  # of the manifest: not among the facts


def what_ran(run: RunData) -> Iterable[Html]:
    manifest = run.manifest
    if "command" in manifest:
        yield tag("p", "Command: ", tag("code", manifest["command"]))
    if run.config is not None:
        yield tag("h3", "To run it again")
        yield _copied(reproduce(manifest, run.config))
        yield tag(
            "p",
            "In a clone of heal_jax. The config has every field as it was; models and problem files that it names must "
            "be where it says. The same versions, processor type, mesh and number of threads give the same bytes.",
            class_="caption",
        )
    else:
        yield todo("the config (config.yaml).")
    models = manifest.get("models")
    entries = {**manifest, **(models if isinstance(models, dict) else {})}
    facts = [[name, text] for name, value in entries.items() if name not in OWN_PLACE and (text := _fact(value))]
    yield tag("h3", "Versions, device, seeds")
    if facts:
        yield table([], facts, class_="facts-table")
    else:
        yield todo("versions, device and hashes (manifest.json).")
    several = {name: manifest.get(name) for name in ("files", "inputs", "models") if manifest.get(name)}
    sums = {**manifest["shards"], **{name: value for name, value in flatten(several).items() if is_sum(value)}}
    if sums:
        rows = [[name, tag("code", digest)] for name, digest in sorted(sums.items())]
        yield tag("details", tag("summary", "Checksums (SHA-256)"), table([], rows, class_="facts-table"))


def is_sum(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def _fact(value: object) -> Html:
    """An entry of the manifest on few lines: its parts, with the checksums of single files left to their own table."""
    parts = flatten(value) if isinstance(value, dict) else {"": value}
    lines = [
        [tag("span", key, " ", class_="key") if key else None, tag("code", part) if is_sum(part) else str(part)]
        for key, part in parts.items()
        if ".files." not in f".{key}"
    ]
    return join(tag("div", line, class_="fact") for line in lines)


def reproduce(manifest: Mapping[str, Any], config: Config) -> str:
    """The commands that make a run anew, for a shell: ASCII that hides nothing, and whatever the run directory says is
    quoted."""
    versions = manifest.get("versions") if isinstance(manifest.get("versions"), dict) else {}
    pins = [f"{name}=={version}".encode("unicode_escape").decode() for name, version in (versions or {}).items()]
    device, threads = manifest.get("device"), manifest.get("threads")
    cpu = isinstance(device, dict) and device.get("kind") == "cpu" and isinstance(threads, int)
    lines = [
        " ".join(["pip install .", *map(shlex.quote, pins)]),
        "cat > config.yaml <<'END_OF_CONFIG'",
        yaml.safe_dump(to_dict(config), sort_keys=False).rstrip("\n"),
        "END_OF_CONFIG",
        f"{f'NPROC={threads} ' if cpu else ''}heal run config.yaml --out runs/again",
    ]
    return "\n".join(lines)


def _copied(text: str) -> Html:
    """Text with a button that copies it; the button is there where there are scripts."""
    button = tag("button", "Copy", type="button", hidden="", aria_label="Copy the commands")
    return tag("div", button, tag("pre", text, tabindex="0", aria_label="commands"), class_="copied")

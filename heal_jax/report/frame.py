"""What the pages have in common: one self-contained file that asks nothing of any network."""

import base64
import hashlib
import os
import string
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path

from plotly.offline import get_plotlyjs

from heal_jax import store
from heal_jax.report import colours
from heal_jax.report.markup import Html, join, tag

Section = tuple[str, str, Iterable[Html]]  # its id, its title, what is in it


def write_page(
    path: Path,
    title: str,
    header: Html,
    sections: Sequence[Section],
    first: str = "",
    style: str = "",
    index: str = "",
    blocks: str = "",
) -> Path:
    """Write a page of sections, and return its path. first: a script before the others; index, blocks: elements before
    and after the scripts.
    """
    contents = [tag("li", tag("a", shown, href=f"#{name}")) for name, shown, _ in sections]
    body = join(
        [
            tag("a", "Skip to the first answer", href=f"#{sections[0][0]}", class_="skip"),
            header,
            tag("nav", tag("ol", contents), aria_label="Contents"),
            tag("main", [tag("section", tag("h2", shown), *made, id=name) for name, shown, made in sections]),
        ]
    )
    # Nothing may be asked of any network, and only these scripts run, whatever the page holds.
    plotly = get_plotlyjs().replace("</script", "<\\/script")
    scripts = [*[first] * bool(first), plotly, asset("draw.js"), asset("copy.js")]
    hashes = " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(s.encode()).digest()).decode()}'" for s in scripts)
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src {hashes}; base-uri 'none'"
    text = string.Template(asset("template.html")).substitute(
        policy=policy,
        title=tag("title", title)[len("<title>") : -len("</title>")],
        style=colours.css() + asset("style.css") + style,
        body=body,
        index=index,
        scripts=join(tag("script", Html(script)) for script in scripts),
        blocks=blocks,
    )
    store.write_text(path, text, f".{os.getpid()}")  # heal report may write it while heal run does
    return path


def asset(name: str) -> str:
    return resources.files("heal_jax.report").joinpath(name).read_text(encoding="utf-8")

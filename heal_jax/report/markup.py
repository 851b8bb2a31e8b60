"""HTML from Python values: everything that is not `Html` already is escaped, and written out where it could reorder or
hide what is around it."""

import html
import json
import math
from collections.abc import Iterable
from typing import Any
from urllib.parse import quote

from heal_jax.report.terminal import clean

VOID = {"meta", "br", "hr", "col"}


class Html(str):
    """Text that is HTML already."""


def escape(value: object) -> Html:
    return value if isinstance(value, Html) else Html(html.escape(clean(str(value)), quote=True))


def join(children: Iterable[Any]) -> Html:
    """Children one after another; None is nothing, a list stands for its members."""
    parts = (join(c) if isinstance(c, (list, tuple)) else escape(c) for c in children if c is not None)
    return Html("".join(parts))


def tag(name: str, *children: Any, **attributes: Any) -> Html:
    """An element. In attribute names a trailing `_` is dropped and `_` becomes `-`; None leaves an attribute out."""
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Html(f"<{name}{written}>" if name in VOID else f"<{name}{written}>{join(children)}</{name}>")


def script_json(value: Any) -> Html:
    """JSON that no HTML parser takes for markup and no script parser for a line's end; NaN and infinity become null."""
    text = json.dumps(_shown(value), allow_nan=False, separators=(",", ":"))  # ASCII: U+2028 is escaped
    return Html(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def _shown(value: Any) -> Any:
    if isinstance(value, str):
        return clean(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _shown(item) for key, item in value.items()}
    return [_shown(item) for item in value] if isinstance(value, (list, tuple)) else value


def table(head: Iterable[Any], rows: Iterable[Iterable[Any]], class_: str | None = None) -> Html:
    """A table that scrolls by itself where it is too wide; the first cell of a row is its heading."""
    names = list(head)
    body = [
        tag("tr", [tag("td" if i else "th", cell, scope=None if i else "row") for i, cell in enumerate(row)])
        for row in rows
    ]
    titles = tag("thead", tag("tr", [tag("th", name, scope="col") for name in names])) if names else None
    return tag("div", tag("table", titles, tag("tbody", body), class_=class_), class_="scroll")


def plot(figure: dict[str, Any], title: str, wide: bool = False) -> Html:
    """A figure and its data; drawn by draw.js. A wide one scrolls on small screens."""
    place = [
        tag("div", class_="plot", role="img", aria_label=title, style=f"height:{figure['layout']['height']}px"),
        tag("script", script_json(figure), type="application/json"),
    ]
    scrolls = {"class_": "wide", "tabindex": "0", "role": "group", "aria_label": title} if wide else {}
    return tag("div", place, **scrolls)


def todo(text: str) -> Html:
    return tag("p", "Still to come: ", text, class_="todo")


def rollout_link(rollout_id: str) -> Html:
    """To a rollout in the page's browser."""
    return tag("a", rollout_id, href=f"#rollout={quote(rollout_id, safe='', errors='replace')}", class_="id")


def number(value: float | None, digits: int = 0) -> str:
    """A figure with thousands separators; a dash where there is none."""
    if value is None or math.isnan(value):
        return "–"
    return f"{value:,.{digits}f}" if math.isfinite(value) else "∞"


def percent(value: float | None) -> str:
    return "–" if value is None or math.isnan(value) else f"{100 * value:.1f} %"


def points(value: float | None) -> str:
    """A difference of shares, in percentage points with its sign (a true minus)."""
    if value is None or math.isnan(value):
        return "–"
    shown = round(100 * value, 1)
    return f"{shown:+.1f}".replace("-", "\u2212") if shown else "0.0"

"""The colours of the report, by name: the style sheet has them as --accent, a figure as "$accent"."""

from typing import Any

NAMES = ("page", "panel", "text", "strong", "middle", "faint", "line", "soft", "accent", "on-accent", "veil",
         "accentveil")  # fmt: skip
SCHEMES = {
    "light": dict(zip(NAMES, (
        "#f7f7f5", "#ffffff", "#1e2126", "#3d434c", "#8c939e", "#c3c7cd", "#e3e4e2", "#f0f0ee", "#2f5fc4", "#ffffff",
        "rgba(120, 128, 140, .22)", "rgba(47, 95, 196, .28)"), strict=True)),
    "dark": dict(zip(NAMES, (
        "#16181c", "#1d2025", "#e4e6ea", "#b9bfc8", "#7d8590", "#4d545e", "#31353c", "#25282e", "#86aefc", "#10131a",
        "rgba(150, 160, 175, .22)", "rgba(134, 174, 252, .3)"), strict=True)),
}  # fmt: skip


def css() -> str:
    """Both schemes as custom properties; which one holds is the reader's setting."""
    light, dark = ("".join(f"--{name}: {colour}; " for name, colour in found.items()) for found in SCHEMES.values())
    return (
        f":root {{ color-scheme: light dark; {light}}}\n@media (prefers-color-scheme: dark) {{ :root {{ {dark}}} }}\n"
    )


def resolve(figure: dict[str, Any], scheme: str = "light") -> dict[str, Any]:
    """A figure with real colours (`scheme`: light or dark) on a ground of its own, for use outside of the page:
    `plotly.graph_objects.Figure(resolve(figure))`.
    """
    colours = SCHEMES[scheme]

    def paint(value: Any, key: str) -> Any:
        if isinstance(value, dict):
            return {name: paint(item, name) for name, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [paint(item, key) for item in value]
        return colours[value[1:]] if key.endswith("color") and isinstance(value, str) and value[:1] == "$" else value

    painted = paint(figure, "")
    ground = {"paper_bgcolor": colours["panel"], "plot_bgcolor": colours["panel"], "template": {}}
    return painted | {"layout": painted["layout"] | ground}

"""What a check found."""

import dataclasses

OK, WARNING, PROBLEM = "ok", "warning", "problem"


@dataclasses.dataclass(frozen=True)
class Finding:
    """level: ok, warning (it may go wrong), problem (it will). advice: what to do, where there is something."""

    topic: str
    level: str
    text: str
    advice: str = ""


def size(count: float) -> str:
    """Bytes in words."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"

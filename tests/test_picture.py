"""The README's picture is the one that its command makes, of the figures that are kept."""

import json
import xml.etree.ElementTree as ET
from pathlib import Path

from heal_jax.report import picture

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "configs" / "results"
SEEDS = sorted(RESULTS.glob("quickstart-seed*.json"))


def test_the_picture_is_what_the_command_makes(tmp_path):
    made = tmp_path / "made.svg"
    picture.main([str(ROOT / "configs" / "quickstart.yaml"), *map(str, SEEDS), "--out", str(made)])
    assert made.read_bytes() == (RESULTS / "quickstart.svg").read_bytes()
    texts = [node.text for node in ET.parse(made).iter("{http://www.w3.org/2000/svg}text")]
    accuracies = [json.loads(path.read_text())["accuracy"] for path in SEEDS]
    for model in ("teacher", "student_base", "rejection_sampling", "heal"):
        hard = [found[model]["per_level"]["hard"]["mean"] for found in accuracies]
        for values in ([found[model]["mean"] for found in accuracies], hard):
            assert f"{100 * sum(values) / len(values):.0f}" in texts
    assert "configs/results/quickstart.svg" in (ROOT / "README.md").read_text()


def test_a_dot_lies_where_its_accuracy_is():
    summaries = [json.loads(path.read_text()) for path in SEEDS]
    from heal_jax.config import Config

    root = ET.fromstring(picture.picture(Config(), summaries))
    dots = [float(node.get("cx")) for node in root.iter("{http://www.w3.org/2000/svg}circle")]
    left, width = picture.PANELS[0], picture.PANEL
    expected = [
        left + width * summary["accuracy"][model]["mean"]
        for model in ("teacher", "student_base", "rejection_sampling", "heal")
        for summary in summaries
    ]
    assert [round(dot, 1) for dot in dots[: len(expected)]] == [round(x, 1) for x in expected]

"""`heal bench`: the arithmetic of its figures, the turns, and a whole quick run."""

import json
import re
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import WITH_TORCH, start
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from heal_jax.bench import ours
from heal_jax.bench.context import Bench
from heal_jax.bench.figure import Figure, digits, markdown, show
from heal_jax.bench.machine import Products
from heal_jax.bench.opponents import Absent, Peer
from heal_jax.bench.timing import median, take_turns
from heal_jax.plan import flops

ROOT = Path(__file__).parents[1]
SECONDS = st.lists(st.floats(1e-4, 1e4), min_size=1, max_size=9).map(tuple)


@given(st.integers(1, 4), st.integers(1, 6))
def test_sides_take_turns(sides, repeats):
    order = []

    def side(name):
        def once():
            order.append(name)
            return float(len(order))

        return once

    names = [str(i) for i in range(sides)]
    took = take_turns({name: side(name) for name in names}, repeats)
    assert order == names * (repeats + 1)
    # The first of each is warm-up: no figure holds it.
    for i, name in enumerate(names):
        assert took[name] == tuple(float(sides * (r + 1) + i + 1) for r in range(repeats))


@given(SECONDS, SECONDS, SECONDS, st.floats(0.1, 10), st.floats(1, 1e6))
def test_figures(ours_took, theirs_took, limit, reach, work):
    figure = Figure("a", "b", ours_took, theirs_took, work, reach=reach, limit=limit)
    assert figure.ratio == pytest.approx(np.median(theirs_took) / np.median(ours_took))
    assert figure.ratio == pytest.approx(figure.rate(ours_took) / figure.rate(theirs_took))
    assert figure.reached == (figure.ratio >= reach)
    assert figure.fraction == pytest.approx(median(limit) / median(ours_took))
    twice = tuple(2 * x for x in ours_took)
    assert Figure("a", "b", twice, theirs_took).ratio == pytest.approx(figure.ratio / 2)
    bare = Figure("a", "b", ours_took, theirs_took).to_json()
    assert (bare["limit_fraction"], bare["limit_flops_per_second"], bare["reached"]) == (None, None, None)
    again = Figure.from_json(json.loads(json.dumps(figure.to_json(), allow_nan=False)))
    assert again == figure and markdown([again]) == markdown([figure])


@given(st.floats(1e-3, 1e9))
def test_digits(x):
    assert float(digits(x).replace(",", "")) == pytest.approx(x, rel=5.1e-3)


def test_the_table_fits_a_terminal(capsys):
    name, against = "decode, 128 rows of 32 + 128 tokens", "transformers, static cache"
    show(
        [
            Figure(name, against, (1.0,), (2.5,), 123456.0, reach=2.2, limit=(0.5,)),
            Figure("memory of repairs", "prefixes not shared", (1e9,), (3e9,), reach=3.0, quantity="bytes"),
        ],
        Console(width=80),
    )
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80
    words = printed.split()
    assert {"123,456", "49,382", "2.50", "2.20", "50%", "MB", "1,000", "3,000", "3.00"} <= set(words)
    assert set(f"{name} {against}".split()) <= set(words)  # wrapped, not cut


def test_the_limit_counts_what_a_decoder_needs(teacher):
    config = teacher.model.config
    products = Products(teacher.model)
    linear = sum(flops.linear(config, layer) for layer in range(config.num_layers))
    assert products.flops(5, 2) == 5 * linear + 2 * flops.head(config)
    assert products.flops(5, 5, backward=True) == 3 * products.flops(5, 5)


def test_our_side_makes_every_token(teacher):
    prompts = np.full((3, 4), 20, np.int32)
    sample, each = ours.sampling(teacher, prompts, 2, 6), ours.reading_each(teacher, prompts, 2, 6)
    first, again, other = (sample(seed).tokens for seed in (0, 0, 1))
    assert first.shape == each(0).tokens.shape == (6, 6)
    assert jnp.array_equal(first, again) and not jnp.array_equal(first, other)


@pytest.mark.parametrize(
    ("python", "said"),
    [
        (None, "tunix: not installed: pip install google-tunix==0.1.7"),
        ("/nowhere/python", "tunix: /nowhere/python cannot be started"),
        (sys.executable, "tunix: "),  # not installed here, or no Tunix model of this family
    ],
)
def test_an_absent_tool_is_one_line(tmp_path, python, said):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(Absent, match=f"^{said}") as absent:
        Peer("tunix", python, tmp_path)
    assert "\n" not in str(absent.value)


def test_a_tool_that_fails_is_left_out(teacher):
    """Its process goes on: only what was asked for is missing."""
    bench = Bench(teacher, True, 1, None, lambda text: None)
    assert bench.asking("torch", "decode", prompts=[[10**9]], new=2, seed=0, cache="dynamic") is None
    assert len(bench.notes) == 1 and "failed" in bench.notes[0] and "\n" not in bench.notes[0]
    side = bench.asking("torch", "decode", prompts=[[20]], new=2, seed=0, cache="dynamic")
    assert side is not None and side() > 0
    bench.close()


def test_the_readme_has_what_was_measured():
    """Its table is that of the stored run, made by a full run of the command that it names."""
    result = json.loads((ROOT / "configs" / "results" / "bench-smollm2.json").read_text())
    assert not result["quick"] and result["repeats"] >= 5
    table = markdown([Figure.from_json(figure) for figure in result["figures"]])
    assert table in (ROOT / "README.md").read_text()


def test_a_quick_run(tmp_path):
    file = tmp_path / "bench.json"
    process = start("bench", "all", "--quick", "--json", file, command=WITH_TORCH)
    stdout, stderr = process.communicate()
    assert process.returncode == 0, stderr
    assert max(map(len, stdout.splitlines())) <= 80
    result = json.loads(file.read_text())
    assert set(result) == {"machine", "model", "quick", "repeats", "seconds", "figures", "notes"}
    assert {"processor", "device", "threads", "versions", "bytes_per_second"} <= set(result["machine"])
    assert {"jax", "jaxlib", "torch", "transformers"} <= set(result["machine"]["versions"])
    against = {figure["against"] for figure in result["figures"]}
    assert {"transformers", "PyTorch eager", "matrix products alone", "whole texts from nothing"} <= against
    assert {"stages, nothing shared", "reading each prefix", "with a copy of its cache each"} <= against
    for figure in result["figures"]:
        assert min(figure["ours"] + figure["theirs"] + figure["limit"]) > 0
        if figure["quantity"] == "seconds":
            assert len(figure["ours"]) == len(figure["theirs"]) == result["repeats"]
        if figure["limit"]:
            assert len(figure["limit"]) == result["repeats"] and figure["limit_flops_per_second"] > 0
    notes = " ".join(result["notes"])
    assert "tunix: not installed: pip install google-tunix" in notes and "PURE's share" in notes
    assert "differ in what they decoded" not in notes  # fused or not, shared or not: the same rollouts
    assert float(re.search(r"the two ways: (\S+)", notes)[1]) < 1e-4
    assert "google-tunix" in stdout


def test_bad_arguments_are_one_line(tmp_path):
    for arguments in (["bench", "flops"], ["bench", "train", "--json", tmp_path], ["bench", "all", "--model", "x"]):
        process = start(*arguments)
        _, stderr = process.communicate()
        assert process.returncode == 2 and len(stderr.splitlines()) == 1, stderr

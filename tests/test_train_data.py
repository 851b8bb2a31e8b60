"""PACE stages on disk, and the batches made of them."""

import contextlib
import itertools
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tfds
from hypothesis import given, settings
from hypothesis import strategies as st

from heal_jax.errors import InputError
from heal_jax.train.data import Example, batches, read_stage, row_length, unpack, write_stage


def example(index: int, tokens: int = 6, prompt: int = 2) -> Example:
    """Tokens that name their example: 100 * index, then counting up."""
    return Example(f"r{index}", f"p{index}", "base", tuple(range(100 * index, 100 * index + tokens)), prompt)


ORIGIN = {"teacher": "models/teacher", "problems": "rg:chain_sum"}
EXAMPLES = [example(i, tokens=3 + i, prompt=1 + i % 2) for i in range(1, 8)]

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


@st.composite
def any_example(draw: st.DrawFn) -> Example:
    tokens = draw(st.lists(st.integers(0, 2**31 - 1), min_size=2, max_size=40))
    return Example(draw(texts), draw(texts), draw(texts), tuple(tokens), draw(st.integers(1, len(tokens) - 1)))


@settings(max_examples=10, deadline=None)
@given(st.lists(any_example(), min_size=1, max_size=30))
def test_a_stage_comes_back_as_it_was_written(examples: list[Example]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        stage = Path(folder) / "curriculum" / "stage2"
        write_stage(stage, 2, examples, ORIGIN)
        assert read_stage(stage) == examples


def test_the_folder_is_the_dataset(tmp_path: Path) -> None:
    write_stage(tmp_path / "stage1", 1, EXAMPLES, ORIGIN)
    assert [path.name for path in tmp_path.iterdir()] == ["stage1"]
    assert sorted(path.name for path in (tmp_path / "stage1").iterdir()) == [
        "README.md",
        "dataset_info.json",
        "features.json",
        "pace-train.array_record-00000-of-00001",
    ]
    assert not [path for path in (tmp_path / "stage1").iterdir() if str(tmp_path) in path.read_text(errors="ignore")]
    said = (tmp_path / "stage1" / "README.md").read_text()
    learned = sum(len(e.tokens) - e.prompt_length for e in EXAMPLES)
    assert "examples: 7, of 7 problems" in said and f"learn: {learned}, " in said and "models/teacher" in said
    source = tfds.builder_from_directory(tmp_path / "stage1").as_data_source(split="train")
    assert len(source) == len(EXAMPLES)
    assert source[2]["tokens"].tolist() == list(EXAMPLES[2].tokens) and source[2]["tokens"].dtype == np.int32


def test_order_is_kept_for_many_examples(tmp_path: Path) -> None:
    examples = [example(i) for i in range(2000)]
    write_stage(tmp_path / "stage3", 3, examples, ORIGIN)
    assert read_stage(tmp_path / "stage3") == examples


def test_writing_again_replaces_and_failing_leaves_the_old(tmp_path: Path) -> None:
    stage = tmp_path / "stage1"
    write_stage(stage, 1, EXAMPLES, ORIGIN)
    write_stage(stage, 1, EXAMPLES[:2], ORIGIN)
    assert read_stage(stage) == EXAMPLES[:2]
    beyond_int32 = Example("r", "p", "base", (1, 2**40), 1)
    with pytest.raises(Exception, match="out of bounds"):
        write_stage(stage, 1, [*EXAMPLES, beyond_int32], ORIGIN)
    assert read_stage(stage) == EXAMPLES[:2]
    with pytest.raises(Exception, match="out of bounds"):
        write_stage(tmp_path / "stage2", 2, [*EXAMPLES, beyond_int32], ORIGIN)
    assert not (tmp_path / "stage2").exists()
    write_stage(tmp_path / "stage2", 2, EXAMPLES, ORIGIN)
    assert read_stage(tmp_path / "stage2") == EXAMPLES


def test_an_empty_stage_and_a_missing_one_are_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="stage 2 has no examples"):
        write_stage(tmp_path / "stage2", 2, [], ORIGIN)
    assert not (tmp_path / "stage2").exists()
    with pytest.raises(InputError, match="heal curate"):
        read_stage(tmp_path / "stage2")


def test_nothing_is_printed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_stage(tmp_path / "stage1", 1, EXAMPLES, ORIGIN)
    read_stage(tmp_path / "stage1")
    assert capfd.readouterr() == ("", "")


def test_tensorflow_is_never_imported(tmp_path: Path) -> None:
    """Even where it is installed: here as a package that fails when imported."""
    (tmp_path / "tensorflow").mkdir()
    (tmp_path / "tensorflow" / "__init__.py").write_text("raise RuntimeError('TensorFlow was imported')")
    code = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
from pathlib import Path
from heal_jax.train.data import Example, batches, read_stage, write_stage
examples = [Example("r", "p", "base", (1, 2, 3), 1)]
stage = Path({str(tmp_path)!r}) / "stage1"
write_stage(stage, 1, examples, {{}})
assert read_stage(stage) == examples
stream = batches(read_stage(stage), 2, 4, 0, 0)
next(stream)
stream.close()
assert "tensorflow" not in sys.modules
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("prompt_length", [0, 3, 4])
def test_an_example_has_a_prompt_and_something_to_learn(prompt_length: int) -> None:
    with pytest.raises(ValueError, match="r7"):
        Example("r7", "p", "base", (1, 2, 3), prompt_length)


def packed(examples: list[Example], rows: int, length: int, seed: int, pad: int = 0) -> Iterator[tuple[Any, Any]]:
    with contextlib.closing(batches(examples, rows, length, seed, pad)) as stream:
        yield from map(unpack, stream)


def test_the_mask_is_the_target_and_ignores_token_ids() -> None:
    pad = eos = 2
    row = Example("r", "p", "base", (5, 2, 7, 2, 8, eos), 2)  # the prompt and the target hold the pad id too
    batch, example = next(packed([row], 2, 15, 0, pad))
    tokens, segments, positions, mask = batch
    assert tokens.dtype == segments.dtype == positions.dtype == np.int32 and mask.dtype == np.bool_
    assert tokens.tolist() == [[5, 2, 7, 2, 8, 2] * 2 + [2, 2, 2]] * 2
    assert mask.tolist() == [([False] * 2 + [True] * 4) * 2 + [False] * 3] * 2
    assert segments.tolist() == [[1] * 6 + [2] * 6 + [0] * 3] * 2
    assert positions.tolist() == [[*range(6), *range(6), 0, 0, 0]] * 2
    assert example.tolist() == [[0] * 12 + [-1] * 3] * 2


@settings(max_examples=8, deadline=None)
@given(st.lists(any_example(), min_size=1, max_size=9), st.integers(1, 5), st.integers(0, 9), st.integers(0, 2**9))
def test_a_batch_holds_whole_examples_and_padding_alone(
    examples: list[Example], rows: int, more: int, seed: int
) -> None:
    length = max(len(e.tokens) for e in examples) + more
    for batch, example in itertools.islice(packed(examples, rows, length, seed), 4):
        assert batch.tokens.shape == batch.mask.shape == example.shape == (rows, length)
        for tokens, segments, positions, mask, index in zip(*batch, example, strict=True):
            end = int((segments > 0).sum())
            assert not tokens[end:].any() and not mask[end:].any() and not positions[end:].any()
            assert end > 0 and not segments[end:].any() and (np.diff(segments[:end]) >= 0).all()
            for segment in range(1, segments.max() + 1):
                (at,) = np.nonzero(segments == segment)
                of = examples[index[at[0]]]
                assert tuple(tokens[at].tolist()) == of.tokens and (index[at] == index[at[0]]).all()
                assert positions[at].tolist() == list(range(len(at)))
                assert mask[at].tolist() == [t >= of.prompt_length for t in range(len(at))]


def order_of(count: int, length: int = 16, seed: int = 5) -> list[int]:
    """First tokens of the examples of so many rows, in their order: which examples they are."""
    stream = packed(EXAMPLES, 1, length, seed)
    starts = [batch.tokens[0][batch.positions[0] == 0] for batch, _ in itertools.islice(stream, count)]
    return [int(token) // 100 for found in starts for token in found if token]


def test_every_epoch_has_each_example_once_in_a_new_order() -> None:
    order = order_of(84, max(len(e.tokens) for e in EXAMPLES))
    assert len(order) >= 84
    seen = np.bincount(order)[1:]
    # As the rows that are open at once are filled, an example comes at most an epoch of them too early.
    assert len(seen) == len(EXAMPLES) and seen.max() - seen.min() <= 2
    alone = [Example(f"r{i}", "p", "base", (100 * i + 1, *range(9, 18)), 1) for i in range(1, 8)]  # one a row
    with contextlib.closing(batches(alone, 1, 16, 5, 0)) as stream:
        rows = [int(unpack(next(stream))[0].tokens[0, 0]) // 100 for _ in range(84)]
    epochs = [rows[i : i + 7] for i in range(0, 84, 7)]
    assert all(sorted(epoch) == list(range(1, 8)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 8


def test_order_follows_from_the_seed() -> None:
    assert order_of(9) == order_of(9) != order_of(9, seed=6)


@pytest.mark.parametrize("done", [1, 4, 130])
def test_a_state_goes_on_where_it_was_taken(done: int) -> None:
    with contextlib.closing(batches(EXAMPLES, 3, 32, 5, 0)) as stream:
        for _ in range(done):
            next(stream)
        state = json.loads(json.dumps(stream.get_state()))
        expected = [unpack(next(stream))[0].tokens for _ in range(30)]
    with contextlib.closing(batches(EXAMPLES, 3, 32, 5, 0)) as other:
        other.set_state(state)
        np.testing.assert_array_equal([unpack(next(other))[0].tokens for _ in range(30)], expected)


def test_rows_of_long_and_short_examples_are_filled() -> None:
    """Lengths spread tenfold: an example a row would fill little more than half."""
    sizes = np.random.default_rng(0).integers(20, 200, 300)
    mixed = [Example(f"r{i}", "p", "base", (7,) * n, 1) for i, n in enumerate(sizes)]
    taken = list(itertools.islice(packed(mixed, 8, 512, 0), 40))
    assert np.mean([batch.segments > 0 for batch, _ in taken]) > 0.97 > 0.6 > sizes.mean() / 200


def test_lengths() -> None:
    assert [row_length([example(1, tokens=n)]) for n in (3, 32, 33, 64)] == [32, 32, 64, 64]
    assert [row_length([example(1, tokens=40)], n) for n in (0, 50, 64, 100)] == [64, 64, 64, 100]
    with pytest.raises(ValueError, match="longer than 9"):
        batches(EXAMPLES, 2, 9, 0, 0)
    with pytest.raises(ValueError, match="no examples"):
        batches([], 2, 9, 0, 0)

"""PACE stages on disk, and the batches made of them."""

import itertools
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from hypothesis import given, settings
from hypothesis import strategies as st

from heal_jax.errors import InputError
from heal_jax.train.data import Example, batches, read_stage, row_length, write_stage


def example(index: int, tokens: int = 6, prompt: int = 2) -> Example:
    """Tokens that name their example: 100 * index, then counting up."""
    return Example(f"r{index}", f"p{index}", "base", tuple(range(100 * index, 100 * index + tokens)), prompt)


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
        write_stage(stage, 2, examples)
        assert read_stage(stage) == examples


def test_the_folder_is_the_dataset(tmp_path: Path) -> None:
    write_stage(tmp_path / "stage1", 1, EXAMPLES)
    assert [path.name for path in tmp_path.iterdir()] == ["stage1"]
    assert sorted(path.name for path in (tmp_path / "stage1").iterdir()) == [
        "dataset_info.json",
        "features.json",
        "pace-train.array_record-00000-of-00001",
    ]
    assert not [path for path in (tmp_path / "stage1").iterdir() if str(tmp_path) in path.read_text(errors="ignore")]
    source = tfds.builder_from_directory(tmp_path / "stage1").as_data_source(split="train")
    assert len(source) == len(EXAMPLES)
    assert source[2]["tokens"].tolist() == list(EXAMPLES[2].tokens) and source[2]["tokens"].dtype == np.int32


def test_order_is_kept_for_many_examples(tmp_path: Path) -> None:
    examples = [example(i) for i in range(2000)]
    write_stage(tmp_path / "stage3", 3, examples)
    assert read_stage(tmp_path / "stage3") == examples


def test_writing_again_replaces_and_failing_leaves_the_old(tmp_path: Path) -> None:
    stage = tmp_path / "stage1"
    write_stage(stage, 1, EXAMPLES)
    write_stage(stage, 1, EXAMPLES[:2])
    assert read_stage(stage) == EXAMPLES[:2]
    beyond_int32 = Example("r", "p", "base", (1, 2**40), 1)
    with pytest.raises(Exception, match="out of bounds"):
        write_stage(stage, 1, [*EXAMPLES, beyond_int32])
    assert read_stage(stage) == EXAMPLES[:2]
    with pytest.raises(Exception, match="out of bounds"):
        write_stage(tmp_path / "stage2", 2, [*EXAMPLES, beyond_int32])
    assert not (tmp_path / "stage2").exists()
    write_stage(tmp_path / "stage2", 2, EXAMPLES)
    assert read_stage(tmp_path / "stage2") == EXAMPLES


def test_an_empty_stage_and_a_missing_one_are_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="stage 2 has no examples"):
        write_stage(tmp_path / "stage2", 2, [])
    assert not (tmp_path / "stage2").exists()
    with pytest.raises(InputError, match="heal curate"):
        read_stage(tmp_path / "stage2")


def test_nothing_is_printed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_stage(tmp_path / "stage1", 1, EXAMPLES)
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
write_stage(stage, 1, examples)
assert read_stage(stage) == examples
next(batches(read_stage(stage), 2, 4, 0, 0))
assert "tensorflow" not in sys.modules
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("prompt_length", [0, 3, 4])
def test_an_example_has_a_prompt_and_something_to_learn(prompt_length: int) -> None:
    with pytest.raises(ValueError, match="r7"):
        Example("r7", "p", "base", (1, 2, 3), prompt_length)


def test_the_mask_is_the_target_and_ignores_token_ids() -> None:
    pad = eos = 2
    row = Example("r", "p", "base", (5, 2, 7, 2, 8, eos), 2)  # the prompt and the target hold the pad id too
    tokens, mask = next(batches([row], 2, 9, 0, pad))
    assert tokens.dtype == np.int32 and mask.dtype == np.bool_
    assert tokens.tolist() == [[5, 2, 7, 2, 8, 2, 2, 2, 2]] * 2
    assert mask.tolist() == [[False] * 2 + [True] * 4 + [False] * 3] * 2


@settings(max_examples=25, deadline=None)
@given(st.lists(any_example(), min_size=1, max_size=9), st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_a_batch_holds_its_examples_and_padding_alone(examples: list[Example], rows: int, seed: int) -> None:
    length = row_length(examples)
    expected = {(e.tokens, e.prompt_length) for e in examples}
    for tokens, mask in itertools.islice(batches(examples, rows, length, seed, 0), 4):
        assert tokens.shape == mask.shape == (rows, length)
        for row, learned in zip(tokens, mask, strict=True):
            start, end = int(learned.argmax()), length - int(learned[::-1].argmax())
            assert learned[start:end].all()
            assert (tuple(row[:end].tolist()), start) in expected
            assert not row[end:].any()


def firsts(count: int, *, rows: int = 3, seed: int = 5, skip: int = 0) -> list[list[int]]:
    """First token of each row of `count` batches: which example it is."""
    stream = batches(EXAMPLES, rows, 16, seed, 0, skip)
    return [(tokens[:, 0] // 100).tolist() for tokens, _ in itertools.islice(stream, count)]


def test_every_epoch_has_each_example_once_in_a_new_order() -> None:
    order = list(itertools.chain(*firsts(7 * 4)))  # 84 rows: 12 epochs of 7, over the ends of which batches go on
    epochs = [order[i : i + 7] for i in range(0, 84, 7)]
    assert all(sorted(epoch) == list(range(1, 8)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 8


def test_a_batch_may_be_larger_than_the_stage() -> None:
    counts = np.bincount(firsts(1, rows=17)[0])[1:]
    assert counts.sum() == 17 and set(counts) == {2, 3}


def test_order_follows_from_the_seed_and_skipping_is_dropping() -> None:
    assert firsts(9) == firsts(9)
    assert firsts(9, seed=6) != firsts(9)
    for skip in (1, 4, 8):
        assert firsts(5, skip=skip) == firsts(5 + skip)[skip:]
    assert len(firsts(1, skip=10**12)[0]) == 3  # at once, however far


def test_lengths() -> None:
    assert [row_length([example(1, tokens=n)]) for n in (3, 32, 33, 64)] == [32, 32, 64, 64]
    with pytest.raises(ValueError, match="longer than 9"):
        batches(EXAMPLES, 2, 9, 0, 0)
    with pytest.raises(ValueError, match="no examples"):
        batches([], 2, 9, 0, 0)

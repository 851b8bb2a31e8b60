"""Problems from files and sets: JSON lines, Parquet, tensorflow-datasets, the datasets package."""

import datetime
import decimal
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sets import ROWS, write

from heal_jax.config import ProblemSpec
from heal_jax.errors import InputError
from heal_jax.problems import sources
from heal_jax.problems.sources import load

KINDS = ("jsonl", "parquet", "tfds_dir", "hf")
FIELDS = {"question": "problem", "answer": "solution", "id": "uuid", "level": "hard"}
SHARED = {"fields": FIELDS, "answer_pattern": "#### (.+)"}
GOOD = {"question": "1 + 1?", "answer": "2"}


@pytest.fixture(scope="module", autouse=True)
def caches(tmp_path_factory):
    """The datasets package writes what it reads to a cache, tensorflow-datasets looks into a folder."""
    import datasets

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("hf"))
        patch.setenv("TFDS_DATA_DIR", str(tmp_path_factory.mktemp("tfds")))
        yield


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """ROWS as a source of each kind."""
    folder = tmp_path_factory.mktemp("sets")
    return {kind: write(kind, folder / kind, ROWS) for kind in KINDS}


def refusal(source, **fields):
    with pytest.raises(InputError) as caught:
        load(ProblemSpec(source=source, **fields), "auto")
    message = str(caught.value)
    assert "\n" not in message and len(message) < 800
    return message


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_gives_the_same_problems(written, kind):
    spec = ProblemSpec(source=written[kind], **SHARED)
    problems = load(spec, "auto")
    assert [(p.id, p.level, p.question, p.answer, p.scorer, p.split) for p in problems] == [
        (row["uuid"], str(row["hard"]), row["problem"].strip(), str(2 * row["hard"]), "math", "train") for row in ROWS
    ]
    assert {p.source for p in problems} == {written[kind]} and load(spec, "auto") == problems
    part = load(ProblemSpec(source=written[kind], skip=2, limit=3, **SHARED), "exact")
    assert [p.id for p in part] == ["u3", "u4", "u5"] and {p.scorer for p in part} == {"exact"}


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_read_by_index(written, kind):
    source = sources.open_source(ProblemSpec(source=written[kind], **SHARED), "auto")
    assert len(source) == len(ROWS) and [source[i].id for i in (6, 0, 3)] == ["u7", "u1", "u4"]
    where = ":4" if kind == "jsonl" else " row 4"
    assert source[3].place.endswith(where)


def test_only_the_rows_asked_for_are_read(tmp_path):
    source = write("jsonl", tmp_path, [GOOD | {"answer": n} for n in range(3)] + [{"question": "no answer"}])
    assert len(load(ProblemSpec(source=source, limit=3), "auto")) == 3
    assert "sums.jsonl:4: no 'answer'" in refusal(source)


def test_later_rows_do_not_repeat_those_skipped(tmp_path):
    rows = [{"question": q, "answer": "1"} for q in ("a", "b", "a ", "c", "c")]
    source = write("jsonl", tmp_path, rows)
    assert [p.question for p in load(ProblemSpec(source=source), "auto")] == ["a", "b", "a", "c", "c"]
    assert [p.question for p in load(ProblemSpec(source=source, skip=2, split="test"), "auto")] == ["c", "c"]
    assert "problems.skip: 3" in refusal(write("jsonl", tmp_path, [rows[0]] * 5), skip=3)


def test_the_split_of_a_set(written):
    for kind in ("tfds_dir", "hf"):
        said = refusal(written[kind], split="dev", **SHARED)
        assert "dev" in said and "train" in said
        whole = load(ProblemSpec(source=written[kind], split="dev", options={"split": "train"}, **SHARED), "auto")
        assert {p.split for p in whole} == {"dev"} and len(whole) == len(ROWS)
    few = ProblemSpec(source=written["tfds_dir"], split="test", options={"split": "validation"}, **SHARED)
    assert len(load(few, "auto")) == 2 and load(few, "auto")[0].place.endswith("validation row 1")


@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_row_is_named(tmp_path, kind):
    rows = [{"question": f"{n} + 1?", "answer": f"#### {n + 1}", "id": f"i{n}"} for n in range(6)]
    bad = {1: {"answer": "  "}, 2: {"question": ""}, 3: {"answer": "5"}, 4: {"id": "i0"}, 5: {"answer": "#### "}}
    source = write(kind, tmp_path / "a", [row | bad.get(n, {}) for n, row in enumerate(rows)])
    said = refusal(source, answer_pattern="####(.*)")
    row = ":2" if kind == "jsonl" else " row 2"
    assert f"{row}: 'answer' is empty" in said and "(4 more are refused: 3, 4, 5, 6)" in said
    for n, expected in (
        (2, "'question' is empty"),
        (3, "'answer' does not match problems.answer_pattern: '5'"),
        (4, f"the same id 'i0' as in {'line' if kind == 'jsonl' else 'row'} 1"),
        (5, "'answer' has nothing in the group of problems.answer_pattern"),
    ):
        # Rows before the bad one are right here, and only they are read.
        source = write(kind, tmp_path / str(n), [row | (bad[n] if i == n else {}) for i, row in enumerate(rows)])
        said = refusal(source, answer_pattern="####(.*)", limit=n + 1)
        assert expected in said and f"{':' if kind == 'jsonl' else ' row '}{n + 1}: " in said


@pytest.mark.parametrize("kind", ("parquet", "tfds_dir", "hf"))
def test_a_column_that_is_not_there_is_named(written, kind):
    said = refusal(written[kind], fields=FIELDS | {"question": "prompt"})
    assert "no column 'prompt'" in said and "'solution'" in said and "problems.fields.question" in said
    assert "no column 'question'" in refusal(written[kind])


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"fields": {"questoin": "q"}}, "problems.fields.questoin: no field of a problem, did you mean 'question'?"),
        ({"answer_pattern": "("}, "problems.answer_pattern: '(' is not a regular expression"),
        ({"answer_pattern": "####"}, "has no group"),
        ({"options": {"split": "train"}}, "problems.options: has no meaning"),
        ({"seed": 3}, "problems.seed: has no meaning"),
        ({"counts": {"easy": 1}}, "problems.counts: has no meaning"),
    ],
)
def test_settings_that_mean_nothing_are_refused(tmp_path, fields, said):
    assert said in refusal(write("jsonl", tmp_path, [GOOD]), **fields)
    assert "problems.fields: has no meaning" in refusal("rg:chain_sum", fields={"question": "q"})


def test_options_of_sets_are_checked(written):
    assert "did you mean 'split'?" in refusal(written["tfds_dir"], options={"splt": "train"})
    assert "problems.options.revision: 3 is not text" in refusal(written["hf"], options={"revision": 3})


# Values


def test_numbers_are_written_out(tmp_path):
    table = pa.table(
        {
            "question": [f"q{n}" for n in range(6)],
            "answer": pa.array([3.0, 0.1, -2.5, 1e-7, 1e20, 123456789.0]),
            "level": pa.array([1, None, 3, 4, 5, 6], pa.int8()),
            "id": pa.array([decimal.Decimal("1.50"), *map(decimal.Decimal, range(2, 7))], pa.decimal128(10, 2)),
        }
    )
    pq.write_table(table, tmp_path / "n.parquet")
    problems = load(ProblemSpec(source=f"parquet:{tmp_path}/n.parquet"), "auto")
    answers = ["3", "0.1", "-2.5", "0.0000001", "100000000000000000000", "123456789"]
    assert [p.answer for p in problems] == answers
    assert [p.level for p in problems] == ["1", "", "3", "4", "5", "6"] and problems[0].id == "1.50"


@pytest.mark.parametrize(
    "value", [float("nan"), float("inf"), None, True, [1], {"a": 1}, datetime.date(2026, 1, 2), b"\xff"]
)
def test_values_that_are_no_answer_are_refused(tmp_path, value):
    pq.write_table(pa.Table.from_pylist([{"question": "q", "answer": value}]), tmp_path / "n.parquet")
    assert "n.parquet row 1: 'answer' is" in refusal(f"parquet:{tmp_path}/n.parquet")


@given(st.one_of(st.integers(-(2**60), 2**60), st.floats(allow_nan=False, allow_infinity=False, width=32)))
def test_numpy_numbers_mean_what_they_were(value):
    from heal_jax.problems.text import field_text

    number = np.int64(value) if isinstance(value, int) else np.float32(value)
    try:
        text = field_text({"a": number}, "a", number=True)
    except InputError as error:
        assert "too long" in str(error) and not 1e-50 < abs(value) < 1e50
        return
    assert type(number)(text) == number and "e" not in text


TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip)


@given(st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=5))
def test_text_comes_through_unchanged(tmp_path_factory, pairs):
    folder = tmp_path_factory.mktemp("text")
    rows = [{"question": question, "answer": answer} for question, answer in pairs]
    for kind in ("jsonl", "parquet"):
        problems = load(ProblemSpec(source=write(kind, folder / kind, rows)), "exact")
        assert [(p.question, p.answer) for p in problems] == [(q.strip(), a.strip()) for q, a in pairs]


# Files and folders that are not what they should be


def test_damaged_files_are_one_line(tmp_path):
    source = write("parquet", tmp_path, [GOOD])
    path = Path(source.partition(":")[2])
    whole = path.read_bytes()
    for data in (b"", b"PAR1", whole[:-9], whole[: len(whole) // 2] + b"\0" * 20 + whole[len(whole) // 2 + 20 :]):
        path.write_bytes(data)
        assert str(path) in refusal(source)
    assert "no such problem file" in refusal(f"parquet:{tmp_path}/none.parquet")
    assert "no prepared set here" in refusal(f"tfds_dir:{tmp_path}")


def test_a_set_that_names_code_is_refused(tmp_path):
    folder = Path(write("tfds_dir", tmp_path, [GOOD]).partition(":")[2])
    path = folder / "features.json"
    text = path.read_text().replace("tensorflow_datasets.core.features.text_feature.Text", "antigravity.Text")
    path.write_text(text)
    assert "antigravity.Text is no feature" in refusal(f"tfds_dir:{folder}") and "antigravity" not in sys.modules
    path.write_text(text[:40])
    assert "cannot be read" in refusal(f"tfds_dir:{folder}")


def test_a_set_that_only_tensorflow_reads_is_refused(tmp_path):
    folder = Path(write("tfds_dir", tmp_path, [GOOD]).partition(":")[2])
    info = json.loads((folder / "dataset_info.json").read_text())
    (folder / "dataset_info.json").write_text(json.dumps(info | {"fileFormat": "tfrecord"}))
    assert "stored as tfrecord" in refusal(f"tfds_dir:{folder}")


def test_a_package_that_is_missing_is_named_with_its_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "pip install 'heal-jax[hf]'" in refusal("hf:some/set")


def test_a_set_of_the_hub_that_cannot_be_reached_is_one_line(tmp_path):
    assert refusal("hf:nobody/no-such-set").startswith("hf:nobody/no-such-set: cannot be read (")


def test_names_of_sets(monkeypatch):
    assert "NAME/CONFIG" in refusal("tfds:gsm8k/a=True,b=3")
    said = refusal("tfds:no_such_set")
    assert "tfds build no_such_set" in said and "tfds_dir:" in said


def test_what_is_at_hand_is_known_without_fetching(tmp_path, written):
    for kind in KINDS:
        assert sources.at_hand(ProblemSpec(source=written[kind]))
    assert sources.at_hand(ProblemSpec()) and sources.at_hand(ProblemSpec(source="rg:chain_sum"))
    for source in ("jsonl:none", "parquet:none", "tfds_dir:none", "hf:openai/gsm8k", "tfds:gsm8k"):
        assert not sources.at_hand(ProblemSpec(source=source))


# The stock set gsm8k, prepared from files of this machine, where TensorFlow would end the process when imported.
GSM8K = """
import functools, http.server, json, pathlib, sys, threading
folder = pathlib.Path(sys.argv[1])
import tensorflow_datasets.text.gsm8k.gsm8k as stock
for split in stock._URLS:
    rows = [{"question": f"{split}: {n} apples, eat one?", "answer": f"{n} - 1 = {n - 1}.\\n#### {n - 1:,}"}
            for n in (5, 1235)]
    (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in rows))
handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=folder)
server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
threading.Thread(target=server.serve_forever, daemon=True).start()
stock._URLS = {split: f"http://127.0.0.1:{server.server_address[1]}/{split}.jsonl" for split in stock._URLS}
from heal_jax.config import ProblemSpec
from heal_jax.problems.sources import at_hand, load
found = []
for fields in ({"answer_pattern": "#### (.+)"}, {"fields": {"answer": "short_answer"}}):
    spec = ProblemSpec(source="tfds:gsm8k", split="test", **fields)
    there = at_hand(spec)
    found.append([there, sorted((p.question, p.answer) for p in load(spec, "auto"))])
    server.shutdown()  # the second time it is there
print(json.dumps([found, "tensorflow" in sys.modules]))
"""


def test_tfds_gsm8k_is_prepared_once_and_tensorflow_is_never_imported(tmp_path):
    (tmp_path / "tensorflow").mkdir()
    (tmp_path / "tensorflow" / "__init__.py").write_text("raise SystemExit('TensorFlow is imported')")
    environment = {"PYTHONPATH": f"{Path(__file__).parents[1]}:{tmp_path}", "TFDS_DATA_DIR": str(tmp_path / "tfds")}
    process = subprocess.run(
        [sys.executable, "-c", GSM8K, str(tmp_path)],
        capture_output=True,
        text=True,
        env={"PATH": "", "HOME": str(tmp_path), **environment},
    )
    assert process.returncode == 0, process.stderr
    pairs = [["test: 1235 apples, eat one?", "1,234"], ["test: 5 apples, eat one?", "4"]]
    assert json.loads(process.stdout) == [[[False, pairs], [True, pairs]], False]


def test_other_libraries_load_no_torch(written):
    """Reading sets imports neither torch nor TensorFlow, which are installed for these tests or not at all."""
    code = (
        "import sys\nfrom heal_jax.config import ProblemSpec\nfrom heal_jax.problems.sources import load\n"
        f"for source in {[written['tfds_dir'], written['hf']]}:\n"
        f"    assert len(load(ProblemSpec(source=source, **{SHARED}), 'auto')) == {len(ROWS)}\n"
        "print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "tensorflow", "jax"} & set(done.stdout.split())

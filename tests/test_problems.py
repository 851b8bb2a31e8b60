"""Problem sources and where answers stand."""

import json
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from heal_jax.config import GradeSpec, ProblemSpec
from heal_jax.errors import InputError
from heal_jax.problems import families
from heal_jax.problems.answers import answer_span, extract
from heal_jax.problems.sources import load
from heal_jax.world.problems import split_of
from heal_jax.world.sums import Sums, terms_of


def write(folder, *lines):
    path = folder / "set.jsonl"
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines))
    return path


def load_lines(folder, *lines, **fields):
    return load(ProblemSpec(source=f"jsonl:{write(folder, *lines)}", **fields), "auto")


def refusal(spec, by="auto"):
    with pytest.raises(InputError) as caught:
        load(spec, by)
    message = str(caught.value)
    assert "\n" not in message
    return message


# The built-in world


def test_world_gives_the_levels_asked_for():
    spec = ProblemSpec(split="test", counts={"easy": 3, "hard": 4}, seed=2)
    problems = load(spec, "auto")
    assert [p.level for p in problems].count("easy") == 3 and [p.level for p in problems].count("hard") == 4
    assert len({p.id for p in problems}) == 7 and all(p.id.startswith("sums-test-2-") for p in problems)
    for p in problems:
        terms = terms_of(p.question)
        assert terms is not None and Sums().level(p.question) == p.level and split_of(p.question) == "test"
        assert int(p.answer) == sum(terms)
        assert (p.source, p.split, p.scorer) == ("world:sums", "test", "reasoning_gym")
    assert load(spec, "auto") == problems
    assert {p.scorer for p in load(spec, "exact")} == {"exact"}


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        (ProblemSpec(), "problems.counts"),
        (ProblemSpec(counts={"easy": 0}), "problems.counts"),
        (ProblemSpec(counts={"hart": 3}), "did you mean 'hard'?"),
        (ProblemSpec(counts={"easy": 1, "hard": -1}), "problems.counts.hard"),
        (ProblemSpec(source="world:moon", counts={"easy": 1}), "world:sums, world:rewriting"),
        (ProblemSpec(counts={"easy": 1}, limit=3), "problems.limit"),
        (ProblemSpec(counts={"easy": 1}, options={"a": 1}), "problems.options"),
        (ProblemSpec(counts={"easy": 1}, skip=3), "problems.skip"),
        (ProblemSpec(source="jsonl:x", counts={"easy": 1}), "problems.counts"),
        (ProblemSpec(source="sums"), "rg:FAMILY"),
        (ProblemSpec(source="rg:"), "rg:FAMILY"),
        (ProblemSpec(source="csv:x"), "jsonl:FILE"),
    ],
)
def test_a_bad_source_is_refused_with_its_field(spec, said):
    assert said in refusal(spec)


# reasoning-gym


def test_a_family_is_the_same_in_every_process():
    spec = ProblemSpec(source="rg:isomorphic_strings", limit=8, seed=3, split="dev")  # depends on the hash seed
    first, again = load(spec, "auto"), load(spec, "auto")
    assert first == again and [p.metadata for p in first] == [p.metadata for p in again]
    assert len({p.question for p in first}) == len(first) == 8
    assert all(p.metadata["source_dataset"] == "isomorphic_strings" and p.answer for p in first)


def test_a_family_that_draws_from_the_global_generator_is_the_same_each_time():
    assert families.entries("list_functions", 5, 3, {}) == families.entries("list_functions", 5, 3, {})


def test_options_reach_the_family_and_repeats_are_skipped():
    options = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    problems = load(ProblemSpec(source="rg:chain_sum", options=options), "math")
    assert 10 < len(problems) < 100  # of a hundred one-digit sums some are the same
    assert len({p.question for p in problems}) == len(problems)
    assert {p.level for p in problems} == {"num_terms=2,num_digits=1"} and {p.scorer for p in problems} == {"math"}
    assert all(p.metadata["source_options"] == options and len(p.answer) <= 2 for p in problems)


def test_skip_splits_a_family_with_few_questions():
    options = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}

    def drawn(**fields):
        return load(ProblemSpec(source="rg:chain_sum", options=options, **fields), "auto")

    first, rest = drawn(limit=60), drawn(skip=60, limit=140, split="test")
    whole = [question for question, _, _ in families.entries("chain_sum", 200, 0, options)]
    assert [p.question for p in first + rest] == list(dict.fromkeys(whole)) and len(rest) < 140
    assert not {p.question for p in first} & {p.question for p in rest}
    assert "problems.skip" in refusal(ProblemSpec(source="rg:chain_sum", options=options, skip=2000, limit=1))


def test_an_unknown_family_is_one_line():
    assert "did you mean 'chain_sum'?" in refusal(ProblemSpec(source="rg:chain_sums"))


@pytest.mark.parametrize(
    ("family", "options", "said"),
    [
        ("chain_sum", {"min_term": 3}, "did you mean 'min_terms'?"),
        ("chain_sum", {"min_terms": 9, "max_terms": 2}, "max_terms must be >= min_terms"),
        ("chain_sum", {"size": 3}, "use problems.limit"),
        ("graph_color", {}, "without an answer"),
        ("composite", {}, "refuses its defaults"),
    ],
)
def test_what_a_family_refuses_is_named(family, options, said):
    with pytest.raises(InputError) as caught:
        families.entries(family, 2, 0, options)
    assert said in str(caught.value) and f"rg:{family}" in str(caught.value)


# JSON lines


def test_json_lines(tmp_path):
    problems = load_lines(
        tmp_path,
        b'\xef\xbb\xbf{"question": " What? ", "answer": " \\\\frac12 ", "id": "a", "level": 5, "subject": "x"}\r',
        b"   ",
        {"question": "One\u2028two", "answer": 7},
        b'{"question": "small", "answer": 1e-7}',
        b'{"question": "kept digits", "answer": 1.50}',
        b"",
    )
    assert [(p.id, p.level, p.question, p.answer) for p in problems] == [
        ("a", "5", "What?", "\\frac12"),
        ("set-train-3", "", "One\u2028two", "7"),
        ("set-train-4", "", "small", "0.0000001"),
        ("set-train-5", "", "kept digits", "1.50"),
    ]
    assert {p.scorer for p in problems} == {"math"}


def test_a_relative_path_and_a_limit(tmp_path, monkeypatch):
    write(tmp_path, *({"question": f"q{i}", "answer": i} for i in range(5)))
    monkeypatch.chdir(tmp_path)
    assert [p.answer for p in load(ProblemSpec(source="jsonl:set.jsonl", limit=2), "exact")] == ["0", "1"]
    assert [p.answer for p in load(ProblemSpec(source="jsonl:set.jsonl", skip=1, limit=2), "exact")] == ["1", "2"]
    assert "problems.skip" in refusal(ProblemSpec(source="jsonl:set.jsonl", skip=5000))
    assert "grade.by" in refusal(ProblemSpec(source="jsonl:set.jsonl"), "reasoning_gym")


GOOD = {"question": "1 + 1?", "answer": "2"}


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ({"problem": "x", "answer": "2"}, "no 'question' (there is: 'problem', 'answer')"),
        ({"question": "x"}, "no 'answer'"),
        ({"question": "x", "answer": "  "}, "'answer' is empty"),
        ({"question": "", "answer": "2"}, "'question' is empty"),
        ({"question": "x", "answer": None}, "'answer' is null; text or a number"),
        ({"question": "x", "answer": True}, "'answer' is true"),
        ({"question": "x", "answer": ["2"]}, "'answer' is [\"2\"]"),
        ({"question": 3, "answer": "2"}, "'question' is 3; text is expected"),
        ({"question": "x", "answer": float("nan")}, "'answer' is NaN"),
        ({"question": "x", "answer": "2", "id": ""}, "'id' is empty"),
        ({"question": "x", "answer": "2", "level": {}}, "'level'"),
        ({"question": "\ud800", "answer": "2"}, "surrogate"),
        (b'{"question": "x", "answer": 1e999999999}', "give it as text"),
        (b'{"question": "x", "answer": 1e99999999999999999999}', "not JSON"),
        (b'{"question": "x", "answer": ' + b"9" * 9999 + b"}", "not JSON"),
        (b'{"question": "x"', "not JSON"),
        (b'{"question": "x", "answer": "1"}{"question": "y", "answer": "2"}', "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'["x", "2"]', "is not an object"),
        (b'{"question": "\xff", "answer": "2"}', "not UTF-8 at byte 15"),
        ({"question": "x", "answer": "2", "id": "set-train-1"}, "the same id 'set-train-1' as in line 1"),
    ],
)
def test_a_bad_line_is_named(tmp_path, bad, said):
    path = write(tmp_path, GOOD, b"", bad)
    message = refusal(ProblemSpec(source=f"jsonl:{path}"))
    assert message.startswith(f"{path}:3: ") and said in message and len(message) < len(str(path)) + 250


def test_files_that_hold_nothing_are_refused(tmp_path):
    assert "holds no problems" in refusal(ProblemSpec(source=f"jsonl:{write(tmp_path, b'', b' ')}"))
    assert "no such problem file" in refusal(ProblemSpec(source=f"jsonl:{tmp_path}/missing.jsonl"))
    assert "cannot be read" in refusal(ProblemSpec(source=f"jsonl:{tmp_path}"))


def test_nothing_heavy_is_imported():
    code = "import sys, heal_jax.problems.grading, heal_jax.problems.scorers as s; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"jax", "transformers", "numpy", "sympy", "reasoning_gym", "math_verify"} & set(modules)


# Answers

PIECES = ["\\boxed{", "{", "}", "\\", "a", "5 ", "</think>", "\n", "<a>", "</a>", "\\{"]
TEXTS = st.lists(st.sampled_from(PIECES), max_size=14).map("".join)


def brute_force(text, opening, closing, think_end):
    """By the definition: all openings, all closings, the last opening alone counts."""
    after = 0
    if think_end:
        ends = [i + len(think_end) for i in range(len(text)) if text.startswith(think_end, i)]
        if not ends:
            return None
        after = max(ends)
    begins = [i + len(opening) for i in range(after, len(text)) if text.startswith(opening, i)]
    if not begins:
        return None
    begin = max(begins)

    def braces(piece):
        """Unescaped braces; a brace is escaped after an odd number of backslashes."""
        found = []
        for i, letter in enumerate(piece):
            run = len(piece[:i]) - len(piece[:i].rstrip("\\"))
            if letter in "{}" and run % 2 == 0:
                found.append((i, letter))
        return found

    if (opening[-1], closing) == ("{", "}"):
        ends = [
            begin + i
            for i, letter in braces(text[begin:])
            if letter == "}" and sum(1 if other == "{" else -1 for _, other in braces(text[begin : begin + i])) == 0
        ]
    else:
        ends = [i for i in range(begin, len(text)) if text.startswith(closing, i)]
    return (begin, min(ends)) if ends else None


@settings(max_examples=500)
@given(TEXTS, st.sampled_from([("\\boxed{", "}"), ("<a>", "</a>"), ("{", "}"), ("a", "\n")]), st.booleans())
def test_answer_span_is_what_its_definition_says(text, marks, thinks):
    think_end = "</think>" if thinks else ""
    assert answer_span(text, *marks, think_end) == brute_force(text, *marks, think_end)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("so \\boxed{5}.", "5"),
        ("\\boxed{ \\frac{1}{2} } done }", "\\frac{1}{2}"),
        ("\\boxed{4} no, \\boxed{5}", "5"),
        ("\\boxed{4} no, \\boxed{5", None),  # the last one is malformed: the earlier one does not count
        ("\\boxed{\\left\\{1,2\\right.}", "\\left\\{1,2\\right."),
        ("\\boxed{a\\\\} b}", "a\\\\"),
        ("\\boxed{\\boxed{5}}", "5"),
        ("\\boxed{}", ""),
        ("\\boxed 5", None),
        ("", None),
    ],
)
def test_extract(text, answer):
    assert extract(text, GradeSpec()) == answer


def test_thinking_is_not_an_answer():
    spec = GradeSpec(think_end="</think>")
    assert extract("\\boxed{4}</think> \\boxed{5}", spec) == "5"
    assert extract("\\boxed{4}</think> five", spec) is None
    assert extract("\\boxed{4} never ends", spec) is None
    assert extract("\\boxed{3</think>4}", spec) is None
    assert extract("</think>\\boxed{3}</think>", spec) is None


def test_marks_that_open_and_close_alike_are_read_in_pairs():
    assert extract("$$1$$ and $$2$$", GradeSpec(answer_open="$$", answer_close="$$")) == "2"
    assert extract("$$1$$ and $$2", GradeSpec(answer_open="$$", answer_close="$$")) is None
    assert extract("answer 1 /answer", GradeSpec(answer_open="answer", answer_close="/answer")) == "1"


def test_the_field_named_is_the_one_that_was_given() -> None:
    with pytest.raises(InputError, match=r"^evaluate\.problems\.counts: world:sums needs"):
        load(ProblemSpec(split="test"), "auto", "evaluate.problems")

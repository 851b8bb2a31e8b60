"""What is left out of the training problems, and what is not."""

import json
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from heal_jax.config import HygieneSpec, load
from heal_jax.errors import InputError
from heal_jax.problems import hygiene, sources
from heal_jax.problems.hygiene import LEAST, SHARE, clean, counts, grams, normal, words
from heal_jax.problems.sources import Problem

CONFIGS = Path(__file__).parents[1] / "configs"
EXACT = HygieneSpec(near=0.0, ngram=0)
STORY = (
    "A farmer keeps {} hens and {} geese behind the old mill; each hen lays an egg a day and each goose two a week. "
    "How many eggs does she collect in a fortnight?"
)
BOOK = "Lena reads {} pages of her novel every evening except on Sundays. How many pages has she read after {} weeks?"


def problems(split, *pairs, source="jsonl:set"):
    """From questions, or (question, answer)."""
    return [
        Problem(f"{split}{n}", f"{source}-{split}", split, "", question, answer, "math", place=f"{split}.jsonl:{n + 1}")
        for n, (question, answer) in enumerate(pair if isinstance(pair, tuple) else (pair, "1") for pair in pairs)
    ]


def outcome(train, held_out=(), spec=HygieneSpec()):  # noqa: B008 (frozen)
    """Ids that stay, and (id, reason, other) of those that do not."""
    left, removed = clean(train, held_out, spec)
    assert len(left) + len(removed) == len(train) and {p.id for p in left}.isdisjoint(r.id for r in removed)
    assert [p for p in train if p in left] == left
    figures = counts(train, removed)
    assert figures["loaded"] == len(train) and figures["kept"] == len(left)
    assert sum(figures.values()) == 2 * len(train)
    return [p.id for p in left], [(r.id, r.reason, r.other_id) for r in removed]


# Repeats


def test_repeats_are_left_out_and_the_first_stays():
    train = problems(
        "train", ("What is  x²?", "4"), ("what IS x²? ", "4 "), ("What is x2?", "4"), ("What is x²?", "5"),
        ("Café?", "1"), ("Cafe\u0301?", "1"),
    )  # fmt: skip
    left, removed = outcome(train, spec=EXACT)
    assert left == ["train0", "train2", "train4"]
    assert removed == [
        ("train1", "duplicate", "train0"),
        ("train3", "conflict", "train0"),
        ("train5", "duplicate", "train4"),
    ]


def test_near_repeats_are_left_out_and_the_first_stays():
    first = STORY.format(12, 5)
    train = problems(
        "train",
        (first, "188"),
        (first.replace(";", ",").upper().replace("MILL", "BARN"), "188"),
        (first.replace("hens", "ducks", 1), "190"),  # another answer
        (STORY.format(11, 5), "188"),  # other numbers
        (BOOK.format(12, 5), "188"),  # another question
    )
    left, removed = outcome(train)
    assert left == ["train0", "train2", "train3", "train4"] and removed == [("train1", "near-duplicate", "train0")]
    _, found = clean(train, [], HygieneSpec())
    assert 0.7 <= found[0].similarity < 1 and found[0].ngram is None and found[0].place == "train.jsonl:2"
    assert outcome(train, spec=HygieneSpec(near=0.99))[1] == [] == outcome(train, spec=EXACT)[1]


WORD = st.sampled_from(["tom", "has", "ten", "red", "hats", "and", "3", "7"])
QUESTION = st.lists(WORD, min_size=1, max_size=9).map(" ".join)


@given(st.lists(st.tuples(QUESTION, st.sampled_from(["1", "2"])), max_size=12), st.sampled_from([0.2, 0.5, 0.7, 1.0]))
def test_near_repeats_are_those_of_the_definition(pairs, threshold):
    """Against every pair, one after another, without an index."""
    train = problems("train", *{normal(question): (question, answer) for question, answer in pairs}.values())
    content = hygiene._content(train, 4)
    kept, expected = [], []
    for p in train:
        shingles = {content[p.question][i : i + 3] for i in range(len(content[p.question]) - 2)}
        numbers = sorted(word for word in p.question.split() if word.isdigit())
        whole = {tuple(p.question.split()[i : i + 3]) for i in range(len(p.question.split()) - 2)}
        for q, (theirs, all_theirs), same in kept:
            shares = [len(a & b) / len(a | b) for a, b in ((shingles, theirs), (whole, all_theirs)) if a and b]
            if len(shares) == 2 and same == (p.answer, numbers) and min(shares) >= threshold:
                expected.append((p.id, "near-duplicate", q.id))
                break
        else:
            kept.append((p, (shingles, whole), (p.answer, numbers)))
    assert outcome(train, spec=HygieneSpec(near=threshold, ngram=0))[1] == expected


# What is held out


def test_a_question_that_is_held_out_is_not_trained_on():
    train = problems("train", "What is 1 + 1?", "What is 2 + 2?")
    left, removed = outcome(train, problems("test", "Other?", "WHAT is\n2 + 2?"), EXACT)
    assert left == ["train0"] and removed == [("train1", "held out", "test1")]
    said = "no training problem is left: 2 of 2 .*2 held out.*train.jsonl:1 goes for test.jsonl:1"
    with pytest.raises(InputError, match=said):
        clean(train, train and problems("test", "What is 1 + 1?", "What is 2 + 2?"), EXACT)
    assert clean([], train, HygieneSpec()) == ([], [])


def test_words_in_a_row_that_are_held_out_are_not_trained_on():
    shared = "behind the old mill each hen lays an egg"  # nine words
    train = problems(
        "train",
        STORY.format(12, 5),
        BOOK.format(9, 4),
        f"Say: {shared.replace('old', 'new')}",
        f"BEHIND, {shared[7:]}!",
    )
    held_out = problems("test", BOOK.format(3, 7)[:50], STORY.format(7, 6))
    left, removed = outcome(train, held_out)
    assert left == ["train1", "train2"]
    assert removed == [("train0", "n-gram", "test1"), ("train3", "n-gram", "test1")]
    _, found = clean(train, held_out, HygieneSpec())
    assert found[0].ngram == "geese behind the old mill each hen lays" and found[1].ngram == shared[:-3].strip()
    assert outcome(train, held_out, HygieneSpec(ngram=10))[0] == ["train1", "train2", "train3"]
    assert outcome(train, held_out, HygieneSpec(ngram=0))[1] == []


LINE = st.lists(st.integers(0, 30).map("w{}".format), min_size=1, max_size=12).map(" ".join)


@given(st.lists(LINE, min_size=1, max_size=8, unique=True), st.lists(LINE, max_size=4), st.integers(4, 6))
def test_no_words_in_a_row_are_left_in_common(lines, held, size):
    train, held_out = problems("train", *lines), problems("test", *held)
    content = hygiene._content([*train, *held_out], 4)
    shared = {g for p in held_out for g in grams(content[p.question], size)}
    bad = {p.id for p in train if p.question in held or shared & set(grams(content[p.question], size))}
    try:
        left, removed = outcome(train, held_out, HygieneSpec(near=0.0, ngram=size))
    except InputError:
        assert len(bad) == len(train)
        return
    assert {id for id, *_ in removed} == bad and all(reason in ("held out", "n-gram") for _, reason, _ in removed)


# The source's own wording


def test_the_wording_of_a_source_does_not_count():
    template = "Please state the final answer to the following simple arithmetic problem without any words: {}"

    def made(split, numbers):
        return problems(split, *((template.format(f"{n} + {n + 1} ="), str(2 * n + 1)) for n in numbers))

    train, held_out = made("train", range(100, 140)), made("test", range(200, 260))
    assert outcome(train, held_out)[1] == []
    # The same words are no wording where they are rare: of two questions nobody knows.
    assert [reason for _, reason, _ in outcome([*train[:1], *problems("x", BOOK)], held_out[:1])[1]] == ["n-gram"]
    # What is asked is still compared: a copy in other words around it.
    story = STORY.format(12, 5)
    copied = problems("copy", template.format(story), template.format("7 + 8 ="))
    left, removed = outcome([*train, *copied], [*held_out, *problems("story", f"Think. {story}")])
    assert removed == [("copy0", "n-gram", "story0")] and len(left) == 41


@pytest.mark.parametrize(("among", "least"), [(20, LEAST - 1), (1000, SHARE * 1000)])
def test_what_is_wording_is_counted(among, least):
    """`least`: questions for training that make it wording, where one held-out question has it, too."""
    phrase = "the quick brown fox jumps over the lazy"

    def questions(holders):
        free = (" ".join(f"w{n}x{i}" for i in range(9)) for n in range(among - holders))
        return problems("train", *(f"{phrase} dog number{n} of{n} them{n}" for n in range(holders)), *free)

    held_out = problems("test", f"{phrase} cat sleeps", "nothing of the kind")
    for holders in (int(least) - 1, int(least)):
        removed = outcome(questions(holders), held_out, HygieneSpec(near=0.0))[1]
        assert len(removed) == (holders if holders < least else 0)


def test_words_that_differ_in_the_wording_still_differ():
    """Both wordings of the template are common, so that they leave the same words."""
    parts = [(n, k, way) for n in range(30, 60) for k in (7, 8) for way in ("at least", "exactly")]
    text = "What are the odds in the long run of getting {} {} red and {} blue of {} fair and square balls drawn?"
    train = problems("train", *((text.format(way, k, n, n + k), "1/2") for n, k, way in parts))
    content = hygiene._content(train, 4)
    assert content[normal(train[0].question)] == content[normal(train[1].question)]
    assert outcome(train, spec=HygieneSpec(near=0.8))[1] == []


def test_what_problems_of_one_generator_share_does_not_count():
    def made(source, n, split):
        question = f"Tom has {n} red hats and loses one on the way to a fair in the town."
        return [Problem(f"{split}{n}", source, split, "", question, "1", "reasoning_gym")]

    for train, held_out, removed in (("rg:a", "rg:a", False), ("rg:a", "rg:b", True), ("jsonl:a", "jsonl:a", True)):
        mine = [*made(train, 2, "first"), *made(train, 3, "second"), *problems("third", BOOK, source=train)]
        found = outcome(mine, [*made(held_out, 2, "test"), *made(held_out, 4, "other")])[1]
        assert found == [("first2", "held out", "test2"), *[("second3", "n-gram", "test2")] * removed]


@pytest.mark.parametrize("name", ["tiny", "quickstart"])
def test_shipped_configs_lose_no_problem(name):
    config = load(CONFIGS / f"{name}.yaml")
    train = sources.load(config.problems, config.grade.by)
    held_out = sources.load(config.evaluate.problems, config.grade.by)
    assert clean(train, held_out, config.hygiene) == (train, [])


@pytest.mark.parametrize("name", ["smollm2", "smollm2-gpu"])
def test_families_with_few_words_lose_no_problem(name):
    from heal_jax.problems import families

    raw = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())["problems"]
    entries = families.entries("chain_sum", 2 * raw["limit"], 0, raw["options"])
    drawn = list({question: answer for question, answer, _ in entries}.items())
    half = len(drawn) // 2
    assert outcome(problems("train", *drawn[:half]), problems("test", *drawn[half:]))[1] == []


def test_what_is_removed_is_listed_and_is_the_same_each_time():
    train = problems("train", STORY.format(1, 2), STORY.format(1, 2), "What is 3 + 4?", "Ünïcode?")
    held_out = problems("test", STORY.format(5, 6))
    left, removed = clean(train, held_out, HygieneSpec())
    assert clean(train, held_out, HygieneSpec()) == (left, removed)
    rows = [json.loads(line) for line in hygiene.to_json_lines(removed).splitlines()]
    assert [row["reason"] for row in rows] == ["duplicate", "n-gram"]
    assert rows[1]["other_place"] == "test.jsonl:1" and len(rows[1]["ngram"].split()) == 8
    assert counts(train, removed) == {
        "loaded": 4, "duplicates": 1, "conflicts": 0, "near_duplicates": 0, "held_out": 0, "ngrams": 1, "kept": 2,
    }  # fmt: skip
    assert hygiene.described(counts(train, removed)) == (
        "2 of 4 training problems are left out (1 duplicates, 1 ngrams)"
    )


def test_words():
    assert words("Tom's 1,234 apples: 3.5 kg, $x^2$ – no. 7!") == (
        "tom", "s", "1,234", "apples", "3.5", "kg", "x", "^", "2", "no", "7", "!",
    )  # fmt: skip
    assert list(grams(("a", "b", "c"), 2)) == [("a", "b"), ("b", "c")] and not list(grams(("a",), 2))

"""Grades, the scorers, and a grading process that hangs, dies or is killed."""

import os
import random
import signal
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from heal_jax.config import GradeSpec, ProblemSpec
from heal_jax.errors import InputError, RunError
from heal_jax.problems import grading, scorers
from heal_jax.problems.grading import Grade, Grader
from heal_jax.problems.sources import Problem, load

HANG = "9^{9^{9^{9}}}"


def problem(answer="5", scorer="math", id="p", **metadata):
    return Problem(id, "test", "train", "", "What?", answer, scorer, metadata)


def boxed(answer):
    return f"It follows that \\boxed{{{answer}}}."


@pytest.fixture(scope="module")
def grader():
    with Grader(GradeSpec(timeout=1.0)) as grader:
        yield grader


@pytest.fixture
def started(monkeypatch):
    """Processes as they are started."""
    out = []

    class Noted(grading._Process):
        def __init__(self, timeout):
            super().__init__(timeout)
            out.append(self)

    monkeypatch.setattr(grading, "_Process", Noted)
    return out


# The five grades


def test_grades(grader):
    assert grader.grade(problem(), boxed("5"), "stop") == Grade("correct", "5", "")
    assert grader.grade(problem(), boxed("6"), "stop") == Grade("wrong", "6", "")
    assert grader.grade(problem(), boxed("5"), "length").grade == "truncated"
    assert grader.grade(problem(), "5", "length").grade == "truncated"
    for text in ("5", "\\boxed{5} or rather \\boxed{5", boxed(" ")):
        grade = grader.grade(problem(), text, "stop")
        assert (grade.grade, grade.answer) == ("unparsable", "") and grade.reason
    grade = grader.grade(problem(), boxed("x^2+"), "stop")
    assert grade.grade == "unparsable" and "cannot read" in grade.reason
    assert grader.grade_many([]) == []
    with pytest.raises(ValueError, match="eos"):
        grader.grade(problem(), boxed("5"), "eos")


def test_order_and_repeats_are_kept(grader):
    draw = random.Random(0)
    items = [
        (problem(str(n), draw.choice(["exact", "math"]), id=str(n)), boxed(draw.choice([n, n + 1])), "stop")
        for n in (draw.randrange(40) for _ in range(2000))
    ]
    assert [grade.grade for grade in grader.grade_many(items)] == [
        "correct" if boxed(problem.answer) == text else "wrong" for problem, text, _ in items
    ]


def test_problems_that_share_an_id_are_kept_apart(grader):
    items = [(problem("1"), boxed("1"), "stop"), (problem("2"), boxed("1"), "stop")]
    assert [grade.grade for grade in grader.grade_many(items)] == ["correct", "wrong"]


# Scorers


def test_world_answers_are_scored_by_the_family(grader):
    for item in load(ProblemSpec(counts={"easy": 2, "hard": 2}), "auto"):
        assert grader.grade(item, boxed(item.answer), "stop").grade == "correct"
        assert grader.grade(item, boxed("0" + item.answer), "stop").grade == "correct"
        grade = grader.grade(item, boxed(f"{item.answer} or so"), "stop")
        assert grade.grade == "wrong" and "partial credit" in grade.reason
        assert grader.grade(item, boxed(int(item.answer) + 1), "stop").grade == "wrong"


def test_a_family_is_scored_with_its_options(grader):
    for options, grade in (({}, "correct"), ({"max_value": 3}, "wrong")):
        item = problem("1*2*3*4", "reasoning_gym", str(options), source_dataset="puzzle24", source_options=options)
        assert grader.grade(item, boxed("4*3*2*1"), "stop").grade == grade


def test_what_a_family_raises_is_unparsable_with_its_reason(grader):
    item = problem("2 × 3", "reasoning_gym", source_dataset="prime_factorization")
    grade = grader.grade(item, boxed("none"), "stop")
    assert grade.grade == "unparsable" and grade.reason.startswith("ValueError")


def test_families_that_accept_wrong_answers_are_held_to_more(grader):
    item = problem("0.25", "reasoning_gym", source_dataset="coin_flip")
    assert [grader.grade(item, boxed(a), "stop").grade for a in ("0", "0.25")] == ["wrong", "correct"]
    item = problem("False", "reasoning_gym", source_dataset="game_of_life_halting")
    assert [grader.grade(item, boxed(a), "stop").grade for a in ("True", "False")] == ["wrong", "correct"]
    item = problem("2 + 9 + 6 + 7", "reasoning_gym", source_dataset="puzzle24")
    assert [grader.grade(item, boxed(a), "stop").grade for a in ("6+6+6+6", "(9+7)+6+2")] == ["wrong", "correct"]


def test_gsm_symbolic_wants_the_number_and_no_other(grader):
    item = problem("28", "reasoning_gym", source_dataset="gsm_symbolic")
    for answer, grade in (
        *((a, "correct") for a in ("28", "28.0", "£28", "\\$28", "28 apples", "28 red apples.")),
        *((a, "wrong") for a in ("28 or 7", "-28", "28%", "28/2", "28,000", "7, 28", "not 28", "28 28", "29")),
    ):
        assert grader.grade(item, boxed(answer), "stop").grade == grade, answer


def test_an_answer_that_a_family_evaluates_does_no_harm(grader, tmp_path):
    item = problem("1 2", "reasoning_gym", source_dataset="spiral_matrix")
    for code in (f"open('{tmp_path}/x', 'w')", f"__import__('os').system('touch {tmp_path}/x')"):
        assert grader.grade(item, boxed(code), "stop").grade == "wrong"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("gold", "answer", "grade"),
    [
        ("5", "5.0", "correct"),
        ("5", "$x = 5$", "correct"),
        ("1/2", "\\frac{1}{2}", "correct"),
        ("1/3", "0.333333", "correct"),
        ("1/3", "0.33", "wrong"),
        ("1,234", "1234", "correct"),
        ("1000", "1\\,000", "correct"),
        ("x^2-1", "(x-1)(x+1)", "correct"),
        ("(1,2)", "(2,1)", "wrong"),
        ("\\{1,2\\}", "2, 1", "correct"),
        ("[1,2]", "(1,2)", "wrong"),
        # a subset of a multi-part answer
        ("1331 and 1728", "1728", "wrong"),
        ("$1331$ and $1728$", "1728, 1331", "correct"),
        ("\\pm 2", "2", "wrong"),
        ("x=1,y=2", "2", "wrong"),
        ("x=1,y=2", "y=2", "wrong"),
        ("x=1,y=2", "2,1", "wrong"),
        ("x=2,y=1", "(1,2)", "wrong"),
        ("x=1,y=2", "1,2", "correct"),
        ("x=1,y=2", "y=2, x=1", "correct"),
        ("x=1 \\text{ or } x=2", "2, 1", "correct"),
        ("1,1", "1", "wrong"),
        ("1,1,2", "1,2,2", "wrong"),
        ("1,1,2", "2,1,1", "correct"),
        # percent
        ("9", "9%", "wrong"),
        ("9\\%", "9", "wrong"),
        ("9\\%", "9\\text{ percent}", "correct"),
        ("9", "9\\text{ percent}", "wrong"),
        ("9\\%", "0.09", "correct"),
        ("9%", "9", "wrong"),
        ("\\frac{9}{100}", "9%", "correct"),
        # words, bases, tiny numbers, numbers side by side
        ("apple", "papel", "wrong"),
        ("\\text{Tuesday}", "tuesday.", "correct"),
        ("101_2", "101_{3}", "wrong"),
        ("101_2", "101_{2}", "correct"),
        ("1.6\\times 10^{-19}", "9.1\\times 10^{-31}", "wrong"),
        ("1.6\\times 10^{-19}", "1.6e-19", "correct"),
        ("10^{-30}", "10^{-40}", "wrong"),
        ("0", "0.0000001", "wrong"),
        ("3", "1 2", "unparsable"),
        # references that are no expression
        ("A \\cup B", "A", "wrong"),
        ("A \\cup B", "A  \\cup B", "correct"),
        ("2k+1, k \\in \\mathbb{Z}", "2k+1", "wrong"),
        ("\\frac{1}{0}", "1", "wrong"),
    ],
)
def test_mathematics(grader, gold, answer, grade):
    assert grader.grade(problem(gold), boxed(answer), "stop").grade == grade


NUMBERS = st.lists(st.integers(-50, 50), min_size=2, max_size=5, unique=True)


@settings(max_examples=40, deadline=None)
@given(NUMBERS, st.randoms(use_true_random=False))
def test_every_part_counts_in_any_order(numbers, draw):
    gold = {"answer": " and ".join(map(str, numbers))}
    draw.shuffle(numbers)
    assert scorers.math(gold, ", ".join(map(str, numbers)))[0] == "correct"
    assert scorers.math(gold, ", ".join(map(str, numbers[1:])))[0] == "wrong"
    assert scorers.math(gold, ", ".join(map(str, [*numbers, 99])))[0] == "wrong"
    assert scorers.math(gold, ", ".join(map(str, [numbers[0] + 100, *numbers[1:]])))[0] == "wrong"


@settings(max_examples=60, deadline=None)
@given(st.fractions(max_denominator=50), st.fractions(max_denominator=50))
def test_fractions_are_equal_when_their_values_are(gold, answer):
    grade, _ = scorers.math({"answer": str(gold)}, f"\\frac{{{answer.numerator}}}{{{answer.denominator}}}")
    assert grade == ("correct" if gold == answer else "wrong")


@settings(max_examples=50)
@given(st.text(max_size=20), st.text(max_size=20))
def test_exact_is_equality_of_words(gold, answer):
    same = scorers.exact({"answer": gold}, answer)[0] == "correct"
    assert same or gold != answer
    assert scorers.exact({"answer": f" {gold}\n"}, f"\u00a0{gold} ")[0] == "correct"
    assert scorers.exact({"answer": gold}, gold + "x")[0] == "wrong"
    assert scorers.exact({"answer": "caf\u00e9"}, "cafe\u0301")[0] == "correct"
    assert scorers.exact({"answer": "x\u00b2"}, "x2")[0] == "wrong"


# Multiple choice

LETTERS = st.sampled_from("ABCDEFGHIJ")
FORMS = [
    *(
        "{}",
        "({})",
        "[{}]",
        "{}.",
        "{})",
        " {} ",
        "{}:",
        "({}).",
        "$({})$",
        "\\text{{({})}}",
        "\\mathbf{{{}}}",
        "**{}**",
    ),
    *(
        "Answer: {}",
        "answer: ({})",
        "The answer is {}",
        "the correct answer is: ({}).",
        "Option {}",
        "Answer: option {}",
    ),
]
OPTIONS = ["42", "x = 3", "a triangle", "Not enough information", "Vitamin C", "12 apples, 3 pears", "f(x)", "New York"]
TWO = [
    *("{} or {}", "{}, {}", "{} and {}", "({}) or ({})", "({}), ({})", "({})({})", "{}/{}", "{}{}", "{} {}", "{}. {}"),
    *("{}) {})", "either {} or {}", "Answer: {} or {}", "{}. No, {}", "{}) 42 or {}", "({}) and also ({})"),
]


@settings(max_examples=200)
@given(LETTERS, LETTERS, st.sampled_from(FORMS), st.sampled_from(FORMS), st.booleans())
def test_a_choice_is_its_letter(gold, given, form, written, small):
    answer = form.format(given.lower() if small and "mathbf" not in form else given)
    grade, _ = scorers.choice({"answer": written.format(gold)}, answer)
    assert grade == ("correct" if gold == given else "wrong")


@settings(max_examples=200)
@given(
    LETTERS,
    st.sampled_from(["({}) {}", "{}) {}", "{}. {}", "{}: {}", "Answer: {}) {}", "[{}] {}"]),
    st.sampled_from(OPTIONS),
)
def test_the_text_of_an_option_may_follow(letter, form, option):
    assert scorers.choice_letter(form.format(letter, option)) == letter


@settings(max_examples=200)
@given(LETTERS, LETTERS, st.sampled_from(TWO))
def test_two_letters_are_wrong(gold, other, form):
    for answer in (form.format(gold, other), form.format(other, gold)):
        assert scorers.choice({"answer": gold}, answer)[0] == "wrong"


@pytest.mark.parametrize(
    "answer",
    [
        *(
            "not B",
            "not (B)",
            "B is wrong",
            "(B) is wrong",
            "B. not C",
            "B because",
            "Because B",
            "neither B",
            "all but B",
        ),
        *("42", "", "()", "B?", "none", "Answer:", "the", "B) or C", "b or so", "A, B and C", "ABB", "β"),
    ],
)
def test_what_names_no_one_letter_is_wrong(answer):
    assert scorers.choice_letter(answer) is None and scorers.choice({"answer": "B"}, answer)[0] == "wrong"


@settings(max_examples=200)
@given(st.text(max_size=30))
def test_no_text_upsets_the_choice(text):
    assert scorers.choice_letter(text) in {None, *"ABCDEFGHIJKLMNOPQRSTUVWXYZ"}


def test_choices_are_graded(grader, tmp_path):
    (tmp_path / "c.jsonl").write_text(
        '{"question": "Which?", "answer": "(b)"}\n{"question": "Who?", "answer": "Bob"}\n'
    )
    (item,) = load(ProblemSpec(source=f"jsonl:{tmp_path}/c.jsonl", limit=1), "choice")
    assert [grader.grade(item, boxed(a), "stop").grade for a in ("B) 42", "A", "A or B")] == [
        "correct",
        "wrong",
        "wrong",
    ]
    with pytest.raises(InputError, match="c.jsonl:2: 'answer' is 'Bob'; grade.by: choice expects a letter"):
        load(ProblemSpec(source=f"jsonl:{tmp_path}/c.jsonl"), "choice")


# Reference answers


READ = [
    "x^2+1",
    "\\frac12",
    "\\{1,2\\}",
    "[0, \\infty)",
    "x=1,y=2",
    "3/4",
    "50\\%",
    "\\sqrt{2}",
    "\\begin{pmatrix}1\\\\2\\end{pmatrix}",
]
PLAIN = ["5", "-1.5", "1,234", "Tuesday", "(B)", "\\text{no solution}", "New York", "10:30 am", "5 cm", "π"]
UNREAD = dict.fromkeys(["x^2+", "\\frac{1}{", "\\frac{1}{0}", "2k+1, k \\in \\mathbb{Z}", "3 1/2"], "cannot read it")
UNREAD[HANG] = "processor time"


def test_reference_answers_that_cannot_be_compared_are_found(started):
    with Grader(GradeSpec(timeout=1.0)) as grader:
        assert grader.unreadable([problem(a, id=a) for a in PLAIN]) == [] == started  # what is plain costs no process
        asked = [problem(a, id=a) for a in (*READ, *PLAIN, *UNREAD)]
        found = grader.unreadable([*asked, *(problem(a, "exact") for a in UNREAD)])
        assert [item.answer for item, _ in found] == list(UNREAD) and len(started) == grading.ATTEMPTS
        assert all(UNREAD[item.answer] in reason for item, reason in found)


# The pool


ENDLESS, DEADLY = "all(iter(lambda: 1, 0))", "__import__('os')._exit(3)"  # to a scorer that evaluates Python


def evaluated(id):
    return problem("1 2", "reasoning_gym", id, source_dataset="spiral_matrix")


def test_grades_are_the_same_for_any_number_of_processes(monkeypatch, started):
    monkeypatch.setattr(grading, "CHUNK", 7)
    items = [(problem(str(n), "exact", str(n)), boxed(n + (n % 3 == 0)), "stop") for n in range(60)]
    items[20] = (evaluated("hang"), boxed(ENDLESS), "stop")
    items[30] = (evaluated("crash"), boxed(DEADLY), "stop")
    items[40] = (problem("7", "exact", "long"), boxed("7"), "length")
    found = []
    for workers in (1, 3):
        started.clear()
        with Grader(GradeSpec(timeout=0.5, workers=workers)) as grader:
            found.append(grader.grade_many(items))
            assert len(grader.processes) <= workers
            assert len(started) <= workers + 2 * grading.ATTEMPTS  # the hang and the crash cost their own and no other
        assert all(process.popen.poll() is not None for process in started)
    assert found[0] == found[1]
    assert {grade.grade for grade in found[0]} == {"correct", "wrong", "unparsable", "timeout", "truncated"}
    assert found[0][20].grade == "timeout" and found[0][30].reason == "the scoring process died (exit status 3)"


def test_processes_are_started_where_there_is_work_for_them(monkeypatch, started):
    monkeypatch.setattr(grading, "CHUNK", 5)
    monkeypatch.setattr(grading.os, "cpu_count", lambda: 3)
    for count, processes in ((0, 0), (5, 1), (6, 2), (40, 3)):
        started.clear()
        items = [(problem(str(n), "exact", str(n)), boxed(n), "stop") for n in range(count)]
        with Grader(GradeSpec()) as grader:
            assert {grade.grade for grade in grader.grade_many(items)} <= {"correct"}
            assert len(started) == processes


def test_the_others_go_on_while_one_hangs(monkeypatch):
    monkeypatch.setattr(grading, "CHUNK", 4)
    items = [(problem(str(n), "exact", str(n)), boxed(n), "stop") for n in range(40)]
    items[0] = (evaluated("hang"), boxed(ENDLESS), "stop")
    with Grader(GradeSpec(timeout=0.5, workers=2)) as grader:
        assert [grade.grade for grade in grader.grade_many(items)] == ["timeout", *["correct"] * 39]
        scored = [item.id for item, _ in grader._known]
        assert set(scored[: scored.index("hang")]) >= {str(n) for n in range(4, 40)}  # all but what waits behind it


# Hangs and crashes


def test_a_hang_costs_itself_alone():
    with Grader(GradeSpec(timeout=0.2)) as grader:
        started = time.process_time()
        items = [(problem(str(n), id=str(n)), boxed(HANG if n == 7 else n), "stop") for n in range(20)]
        grades = grader.grade_many(items)
        assert [grade.grade for grade in grades] == ["timeout" if n == 7 else "correct" for n in range(20)]
        assert "processor time" in grades[7].reason and grades[7].answer == HANG
        (process,) = grader.processes
        assert grader.grade_many(items) == grades  # from memory
        assert grader.processes == [process] and process.popen.poll() is None
        assert time.process_time() - started < 0.5  # waiting costs the parent nothing
    assert process.popen.poll() is not None


def test_an_answer_that_kills_the_process_costs_itself_alone(grader):
    item = problem("1 2", "reasoning_gym", source_dataset="spiral_matrix")
    answers = ["1 2", "__import__('os')._exit(3)", "1  2", "1 2 "]
    grades = grader.grade_many([(item, boxed(answer), "stop") for answer in answers])
    assert [grade.grade for grade in grades] == ["correct", "unparsable", "wrong", "correct"]
    assert grades[1].reason == "the scoring process died (exit status 3)"


def test_a_killed_process_is_replaced(grader):
    grader.grade(problem(), boxed("5"), "stop")
    os.kill(grader.processes[0].popen.pid, signal.SIGKILL)
    items = [(problem(f"{n}/7", id=f"killed {n}"), boxed(f"\\frac{{{n}}}{{7}}"), "stop") for n in range(400)]
    killer = threading.Timer(0.2, lambda: os.kill(grader.processes[0].popen.pid, signal.SIGKILL))
    first = grader.processes[0]
    assert grader.grade(*items[0]).grade == "correct" and first not in grader.processes
    killer.start()
    assert {grade.grade for grade in grader.grade_many(items)} == {"correct"}
    killer.join()


def test_a_process_that_does_nothing_is_given_up(monkeypatch):
    with Grader(GradeSpec(timeout=0.01)) as grader:
        assert grader.grade(problem("a", "exact"), boxed("a"), "stop").grade == "correct"
        monkeypatch.setattr(grading, "ATTEMPTS", 1)
        monkeypatch.setattr(grading, "STALL_SECONDS", 0.2)
        os.kill(grader.processes[0].popen.pid, signal.SIGSTOP)
        grade = grader.grade(problem("b", "exact"), boxed("b"), "stop")
        assert grade.grade == "timeout" and "did nothing" in grade.reason
        monkeypatch.undo()
        assert grader.grade(problem("c", "exact"), boxed("c"), "stop").grade == "correct"


def test_memory_is_bounded(grader):
    item = problem("1 2", "reasoning_gym", source_dataset="spiral_matrix")
    started = time.monotonic()
    assert grader.grade(item, boxed("bytes(10**11)"), "stop").grade in ("wrong", "unparsable")
    assert time.monotonic() - started < 10


def test_a_scorer_that_cannot_be_loaded_ends_the_run(grader):
    with pytest.raises(RunError, match="no_such_family"):
        grader.grade(problem("1", "reasoning_gym", source_dataset="no_such_family"), boxed("1"), "stop")
    assert grader.grade(problem("1", "exact"), boxed("1"), "stop").grade == "correct"


def test_an_interrupted_batch_leaves_no_replies_behind(grader, monkeypatch):
    def interrupt(data):
        raise KeyboardInterrupt

    items = [(problem(str(n), "exact", id=f"interrupted {n}"), boxed(n), "stop") for n in range(9)]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(grading.json, "loads", interrupt)
        grader.grade_many(items)
    assert {grade.grade for grade in grader.grade_many(items[::-1])} == {"correct"}

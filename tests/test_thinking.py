"""Thinking models: a scripted teacher through the real stages, and thinking parts against their decoded text.

The script stands in for the decode loop alone: it writes rollouts as such models do, well-formed or not, in random
tokens that say the text (some hold a tag and its neighbours), with random entropies. What it is given as context is
what the model would see. Everything else is the pipeline's own.
"""

import dataclasses
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
from folders import own_student, thinking_teacher
from hypothesis import given, settings
from hypothesis import strategies as st
from test_steps import by_text

from heal_jax import collect
from heal_jax.config import Config, GradeSpec, ModelSpec, ProblemSpec
from heal_jax.curriculum import curate
from heal_jax.errors import InputError
from heal_jax.model.lm import open_tokenizer
from heal_jax.model.tokenizer import WHITE_SPACE, newline_table
from heal_jax.progress import Progress
from heal_jax.report.data import load as load_report
from heal_jax.report.view import view
from heal_jax.rollout.generate import Decoded
from heal_jax.rollout.thinking import thinking_steps
from heal_jax.run import open_run
from heal_jax.train.data import read_stage

END = "</think>"
PIECES = [
    "<eos>", "<think>", "<think>\n", "<think>\n\n", "<think>a", "<thi", "nk>", "</think>", "</think>\n\n", "\n\n</",
    "\n</", "think>", "a</think>b", "b\n\n</thi", "nk>c", " ", "\n", "\n\n", "a", "b\n\n", "\n\nc", "",
]  # fmt: skip
SPECS = [GradeSpec(think_end=END), GradeSpec(think_end=END, think_open="<think>\n"), GradeSpec()]


def inside(pieces: list[str], opens: bool) -> tuple[int, int] | None:
    """Characters of the thinking part, from the text alone; None where there is none."""
    text = "".join(pieces)
    tag = re.match(r"\s*<think>", text) if opens else None
    close = text.find(END, tag.end() if tag else 0)
    if opens and not tag and close < 0:
        return None
    begin = 0
    if tag:  # the last token that ends between the tag and the first word; none where these share a token
        word = re.compile(r"\s*").match(text, tag.end()).end()
        begin = max((end for end in np.cumsum(list(map(len, pieces))) if tag.end() <= end <= word), default=0)
    return begin, close if close >= 0 else len(text) + 1


def opening_tokens(pieces: list[str], begin: int) -> int:
    """How many tokens say what stands before the thinking part; one without text belongs to what follows it."""
    ends = np.cumsum(list(map(len, pieces)))
    return max((i + 1 for i, piece in enumerate(pieces) if piece and ends[i] <= begin), default=0)


def reference(pieces: list[str], spec: GradeSpec) -> list[int]:
    """Step of each token: what it says inside the thinking part, split as text is; -1 where it says nothing there."""
    if not spec.think_end:
        return by_text(pieces)
    bounds = inside(pieces, bool(spec.think_open))
    if bounds is None:
        return [-1] * len(pieces)
    begin, close = bounds
    starts, opening = np.cumsum([0, *map(len, pieces)]).tolist(), opening_tokens(pieces, begin)
    parts: list[str | None] = []
    for i, piece in enumerate(pieces):
        cut = piece[: max(0, close - starts[i])]
        torn = starts[i] < close < starts[i + 1] and not cut.strip(WHITE_SPACE)
        parts.append(None if i < opening or starts[i] >= close or torn else cut)
    steps = iter(by_text([part for part in parts if part is not None]))
    return [-1 if part is None else next(steps) for part in parts]


@settings(max_examples=200)
@given(st.lists(st.integers(1, len(PIECES) - 1), max_size=13), st.booleans(), st.sampled_from(SPECS))
def test_steps_are_those_of_the_thinking_part(ids, ends, spec):
    pieces = [PIECES[i] for i in ids]
    starts = np.cumsum([0, *map(len, pieces)]).tolist()
    tokenizer = SimpleNamespace(
        spans=lambda tokens: [(PIECES[t], s) for t, s in zip([t for t in tokens if t], starts)],
        without_eos=lambda tokens: [t for t in tokens if t],
        newlines=newline_table(PIECES),
    )
    index, begins, count = thinking_steps(SimpleNamespace(tokenizer=tokenizer), [[*ids, *[0] * ends]], 16, spec)
    want = reference(pieces, spec)
    assert index[0, : len(ids)].tolist() == want
    assert count[0] == len({k for k in want if k >= 0})
    assert np.flatnonzero(begins[0]).tolist() == [i for i, k in enumerate(want) if k >= 0 and k not in want[:i]]
    closed = spec.think_end and END in "".join(pieces)
    if ends:  # an EOS belongs to the last step, unless the thinking part was closed before
        assert index[0, len(ids)] == (-1 if closed else max(want, default=-1)) or not want
    assert (index[0, len(ids) + ends :] == -1).all()


class Script:
    """Stands in for `generate`: rollouts of a thinking model, good and bad, seeded by their ids."""

    def __init__(self, opens: bool):
        self.opens, self.answers = opens, {}

    def __call__(self, lm, groups, shape, rules):
        said = [[self.rollout(lm, name, group.budget) for name in group.rollout_ids] for group in groups]
        assert all(len(g.context) <= shape.context_length for g in groups)
        return said

    def rollout(self, lm, name: str, budget: int) -> Decoded:
        problem, kind, *_ = name.rsplit("/", 3)
        rng = np.random.default_rng(collect.key_of(name))
        right = rng.random() < (0.03 if kind == "base" else 0.6)
        answer = self.answers[problem] if right else "12"
        text = ""
        if kind != "repair" and not self.opens:  # a repair is in its thinking part already
            text = rng.choice(["<think>\n", "<think>\n\n", "\n<think>", ""], p=[0.6, 0.15, 0.1, 0.15])
        for _ in range(rng.integers(0, 12)):
            text += rng.choice(["1+2=3", "= 1\n2", "\\boxed{12}", "so \\boxed{" + self.answers[problem] + "}"])
            text += rng.choice(["\n\n", "\n\n\n", "\n\n \n\n"])
        text += rng.choice(["</think>\n\n", "\n</think>1", "", "</think>\n\n1\n\n</think>"], p=[0.6, 0.15, 0.1, 0.15])
        text += rng.choice(["", "so\n\nit is\n\n"]) + f"\\boxed{{{answer}}}"
        ids = [*self.tokens(lm.tokenizer, text, rng), lm.tokenizer.eos_ids[0]]
        n = min(len(ids), budget)
        values = rng.random((3, n)).astype(np.float32)
        finish = "stop" if n == len(ids) else "length"
        return Decoded(name, np.array(ids[:n], np.int32), values[0], -values[1], -values[2], finish)

    def tokens(self, tokenizer, text: str, rng: np.random.Generator) -> list[int]:
        """Tokens that say the text, drawn among all that do."""
        pieces = [(i, p) for i, p in enumerate(tokenizer.pieces) if p and not p.startswith("<|") and p != "<pad>"]
        ids, at = [], 0
        while at < len(text):
            here = [(i, len(p)) for i, p in pieces if text.startswith(p, at)]
            i, n = here[rng.integers(len(here))]
            ids.append(i)
            at += n
        return ids


CONFIG = Config(
    problems=ProblemSpec(counts={"easy": 2, "medium": 2, "hard": 2}),
    evaluate=dataclasses.replace(Config().evaluate, problems=ProblemSpec(split="test", counts={"hard": 1})),
    sample=dataclasses.replace(Config().sample, n=12, batch=48, max_new_tokens=160),
    hindsight=dataclasses.replace(Config().hindsight, n=6),
    gear=dataclasses.replace(Config().gear, paths=8, repairs=3, window=0.6),
    pure=dataclasses.replace(Config().pure, threshold=1e9),
    train=dataclasses.replace(Config().train, max_tokens=512, batch=8),  # of eight devices
)
HINT = "Hint: The final answer is {}.\n\n"


@pytest.fixture(scope="module", params=[True, False], ids=["template opens", "model opens"])
def thought(request, tmp_path_factory):
    """A run up to the curriculum: rows, what the teacher is, whether its template opens the thinking part."""
    folder, opens = tmp_path_factory.mktemp("thinking"), request.param
    spec = GradeSpec(think_end=END, think_open="" if opens else "<think>\n")
    models = {
        "teacher": ModelSpec(str(thinking_teacher(folder / "teacher", opens))),
        "student": ModelSpec(str(own_student(folder / "student"))),
    }
    config = dataclasses.replace(CONFIG, grade=spec, **models)
    with pytest.MonkeyPatch.context() as patch, open_run(config, folder / "run", Progress(quiet=True)) as run:
        script = Script(opens)
        script.answers = {p.id: p.answer for p in run.problems}
        patch.setattr(collect, "generate", script)
        for stage in (collect.sample, collect.hindsight, collect.repair, curate):
            stage(run)
        rows = run.directory.rollouts().to_pylist()
        strata = run.directory.done("sample")["strata"]
        yield SimpleNamespace(rows=rows, run=run, opens=opens, spec=spec, strata=strata, hf=run.teacher.tokenizer.hf)


def pieces_of(thought, tokens: list[int]) -> list[str]:
    """The text of each token, as what it adds to the text before it; the EOS is left out."""
    eos = thought.run.teacher.tokenizer.eos_ids
    tokens = [t for t in tokens if t not in eos]
    whole = [thought.hf.decode(tokens[:i]) for i in range(len(tokens) + 1)]
    return [after[len(before) :] for before, after in zip(whole, whole[1:])]


def test_only_what_follows_the_thinking_part_is_graded(thought):
    grades = set()
    for row in thought.rows:
        said = "".join(pieces_of(thought, row["tokens"][row["kept_tokens"] or 0 :]))
        after = said.rpartition(END)[2] if END in said else ""
        answers = re.findall(r"\\boxed\{(\d+)\}", after)
        right = thought.run.by_id[row["problem_id"]].answer
        want = "unparsable" if not answers else "correct" if answers[-1] == right else "wrong"
        want = "truncated" if row["finish"] == "length" else want
        assert row["grade"] == want and (row["answer"] == (answers[-1] if answers else ""))
        grades.add((want, right in said))
    assert {("correct", True), ("wrong", True), ("unparsable", True)} <= grades  # seen in thoughts, yet not counted


def test_steps_and_pure_are_of_the_thinking_part_and_the_answer(thought):
    answered = 0
    for row in thought.rows:
        pieces = pieces_of(thought, row["tokens"])
        steps, kept = reference(pieces, thought.spec), row["kept_tokens"] or 0
        assert row["step_starts"] == [i for i, k in enumerate(steps) if k >= 0 and k not in steps[:i]]
        if row["pure_score"] is None:
            assert row["grade"] != "correct"
            continue
        text, ends = "".join(pieces), np.cumsum(list(map(len, pieces))).tolist()
        boxes = [m for m in re.finditer(r"\\boxed\{(\d+)\}", text) if m.start() >= text.rfind(END) >= 0]
        begun = [k for k in dict.fromkeys(steps) if k >= 0 and steps.index(k) >= kept]
        groups = [[i for i, k in enumerate(steps) if k == step] for step in begun]
        if boxes:
            a, b = boxes[-1].span(1)
            answer = [i for i, end in enumerate(ends) if end > a and end - len(pieces[i]) < b]
            assert all(steps[i] < 0 for i in answer)
            groups.append(answer)
            answered += 1
        assert len(row["step_ppl"]) == len(groups)
        if row["kind"] == "base":
            if groups and END not in text and row["finish"] == "stop":
                assert len(row["tokens"]) == len(pieces) + 1  # the EOS is not scored
            want = [math.exp(-np.mean(np.float64(row["logprob"])[g])) for g in groups]
            np.testing.assert_allclose(row["step_ppl"], want, rtol=1e-5)
    assert answered > 50


def test_breakpoint_kept_prefix_and_hint_lie_inside_the_thinking_part(thought):
    rows, run = thought.rows, thought.run
    base = {row["rollout_id"]: row for row in rows if row["kind"] == "base"}
    repairs = [row for row in rows if row["kind"] == "repair"]
    kinds = set()
    for row in repairs:
        parent = base[row["parent_id"]]
        assert parent["grade"] != "correct" and thought.strata[row["problem_id"]] == "unsolved"
        pieces = pieces_of(thought, parent["tokens"])
        steps, text = reference(pieces, thought.spec), "".join(pieces)
        count = max(steps, default=-1) + 1
        eos = [count - 1] if parent["finish"] == "stop" and END not in text and count else []
        h = [np.mean([e for e, k in zip(parent["entropy"], [*steps, *eos]) if k == step]) for step in range(count)]
        last = max(1, math.ceil(count * 0.6 - 1e-9) - 1)
        best = 1 + int(np.argmax(np.diff(h)[:last])) if count > 1 else None
        assert row["breakpoint_step"] == best
        steps_kept = bool(best and best > 1)
        begin = (inside(pieces, not thought.opens) or (0,))[0]
        kept = steps.index(best - 1) if steps_kept else opening_tokens(pieces, begin)
        said = "".join(pieces[:kept]) or ("" if thought.opens else "<think>\n")
        if kept:
            assert row["kept_tokens"] == kept and row["tokens"][:kept] == parent["tokens"][:kept]
        assert thought.hf.decode(row["tokens"][: row["kept_tokens"]]) == said
        prompt = thought.hf.decode(row["prompt_tokens"])
        context = thought.hf.decode(row["context_tokens"])
        assert context == prompt + said + HINT.format(run.by_id[row["problem_id"]].answer)
        turn = context.partition("<|assistant|>")[2]
        assert END not in turn
        opened = not thought.opens and bool(re.match(r"\s*<think>", text))
        implicit = not thought.opens and not opened and steps_kept  # the parent closed what it never opened
        assert turn.count("<think>") == (0 if implicit else 1)  # it was opened, and the hint comes after
        kinds.add((steps_kept, opened, END in text))
    if thought.opens:
        assert kinds >= {(a, False, c) for a in (True, False) for c in (True, False)}
    else:
        assert kinds >= {(True, True, True), (False, True, True), (False, False, False), (False, False, True)}


def test_nothing_drops_the_thinking_part_on_the_way_to_the_student(thought):
    student = thought.run.tokenizers["student"].hf
    rows, thoughts = {row["rollout_id"]: row for row in thought.rows}, 0
    for folder in thought.run.root.glob("curriculum/stage*"):
        for example in read_stage(folder):
            row = rows[example.rollout_id]
            turn = [{"role": "user", "content": thought.run.by_id[row["problem_id"]].question}]
            prompt = student.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
            assert prompt.endswith("<|im_start|>assistant\n")
            text = "".join(pieces_of(thought, row["tokens"]))
            assert student.decode(example.tokens) == prompt + text + "<|im_end|>"
            assert END in text and HINT[:5] not in text
            thoughts += bool(row["step_starts"])
            # Rendered through its chat template the thought would be gone.
            whole = student.apply_chat_template([*turn, {"role": "assistant", "content": text}], tokenize=False)
            assert END not in whole
    assert thoughts > 5


def test_the_report_shows_rollouts_whole(thought):
    data = load_report(thought.run.root)
    for row in thought.rows[::5]:
        shown = view(data, row)
        assert "".join(shown.texts).startswith(row["text"])
        assert [text for step in shown.steps for text in step.texts] == list(shown.texts[: shown.after])
        starts = row["step_starts"] or [0]
        assert [step.kept for step in shown.steps] == [start < (row["kept_tokens"] or 0) for start in starts]


@pytest.mark.parametrize("opens", [True, False])
def test_prompts_of_templates_for_thinking_models(tmp_path, opens):
    teacher = open_tokenizer(thinking_teacher(tmp_path / "teacher", opens))
    prompt = teacher.prompt("1 + 2 =")
    assert teacher.text(prompt) == "<|user|>1 + 2 =<|assistant|>" + "<think>\n" * opens
    assert teacher.turn_end == teacher.eos_ids[0]
    (tag,) = (teacher.hf.get_vocab()["<think>"],)
    assert (prompt[-2:-1] == [tag]) == opens  # one token, as the models have it
    student = open_tokenizer(own_student(tmp_path / "student"))
    assert student.text(student.prompt("a")) == "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"


def test_a_tag_that_the_prompt_has_already_is_refused(tmp_path):
    teacher = ModelSpec(str(thinking_teacher(tmp_path / "teacher", True)))
    grade = GradeSpec(think_end=END, think_open="<think>\n")
    config = dataclasses.replace(CONFIG, teacher=teacher, student=teacher, grade=grade)
    refused = pytest.raises(InputError, match="its chat template opens the thinking part")
    with refused, open_run(config, tmp_path / "out", Progress(quiet=True)):
        pass
    assert not (tmp_path / "out").exists()

"""The built-in worlds: problems, planted faults, tokenizers, and the recipes of the models."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import reasoning_gym
from conftest import refused, start
from hypothesis import given
from hypothesis import strategies as st
from reasoning_gym.algorithmic.ab import compute_steps
from transformers import AutoTokenizer

import heal_jax.world
from heal_jax.model.config import decoder_config, parse
from heal_jax.problems.sources import Problem
from heal_jax.store import RunDirectory
from heal_jax.world import check, legs, make, problems, rewriting, sums, tokenizer, traces
from heal_jax.world.base import LEVELS, PERFECT, Skill
from heal_jax.world.worlds import WORLDS, world_of

SUMS, REWRITING, LEGS = WORLDS.values()
numbers = st.integers(10**9, 10**12 - 1)
terms = st.lists(numbers, min_size=3, max_size=3)
seeds = st.integers(0, 2**32 - 1)
each_world = pytest.mark.parametrize("world", WORLDS.values(), ids=WORLDS)


def drawn(world, seed: int) -> str:
    return world.draw(np.random.default_rng(seed), plain=False)


def carries(terms: list[int]) -> list[int]:
    """The carry into each place but the units, by whole-number arithmetic."""
    return [sum(t % 10**p for t in terms) // 10**p for p in range(1, len(str(max(terms))))]


@given(terms)
def test_columns_and_levels(terms):
    cells = sums.columns(terms)
    assert [carry for _, carry in cells] == [0, *carries(terms)]
    twos = carries(terms).count(2)
    nines = sum(c == 1 and "9" in {str(t)[::-1][p + 1 : p + 2] for t in terms} for p, c in enumerate(carries(terms)))
    want = "hard" if twos >= 4 else None if twos else "medium" if nines >= 3 else "easy" if nines <= 1 else None
    assert SUMS.level(sums.question_of(terms)) == want


@given(seeds)
def test_programs_end_the_same_in_whatever_order(seed):
    """And as the generator has it; the meetings that make the level do not depend on the order either."""
    question = drawn(REWRITING, seed)
    program, rng = rewriting.program_of(question), np.random.default_rng(seed)
    steps, halts = compute_steps(list(program))
    end, count, ab, ba = rewriting.run(program)
    assert not halts and (list(end), count) == (steps[-1], len(steps) - 1)
    met = []
    while at := rewriting.meetings(program):
        chosen = at[int(rng.integers(0, len(at)))]
        met.append(program[chosen : chosen + 2])
        program = rewriting.rewritten(program, chosen)
    assert (program, len(met)) == (end, count)
    assert (met.count(("A#", "#B")), met.count(("B#", "#A"))) == (ab, ba)


@each_world
def test_problems_are_the_generators_own_and_splits_do_not_meet(world):
    counts = dict.fromkeys(LEVELS, 5)
    seen = set()
    for split in ("train", "dev", "test"):
        for seed in (0, 1):
            taken = problems.take(world, split, counts, seed)
            assert taken == problems.take(world, split, counts, seed)
            assert sorted(level for _, level, _, _ in taken) == sorted([*LEVELS] * 5)
            mine = set()
            for index, level, question, answer in taken:
                data = reasoning_gym.create_dataset(
                    world.family, size=index + 1, seed=problems.SCAN_SEED + seed * problems.SCAN_STRIDE, **world.options
                )
                assert (data[index]["question"], data[index]["answer"]) == (question, answer)
                assert world.level(question) == level and world.answer(question) == answer
                assert problems.split_of(question) == split
                mine.add(question)
            assert len(mine) == 15
            seen |= {(split, question) for question in mine}
    assert len({question for _, question in seen}) == len(seen)
    rng = np.random.default_rng(0)
    assert {problems.split_of(make.question(world, rng, False)) for _ in range(50)} == {"pretrain"}


@each_world
@given(seed=seeds)
def test_flawless_solutions_reach_the_answer(world, seed):
    question, rng = drawn(world, seed), np.random.default_rng(seed)
    text = traces.unaided(world, question, PERFECT, rng)
    assert text.endswith(f"\\boxed{{{world.answer(question)}}}")
    assert check.first_wrong_step(world, question, text) is None
    steps = text.split("\n\n")
    for k in range(len(steps)):
        assert check.first_wrong_step(world, question, "\n\n".join([*steps[:k], "z", *steps[k + 1 :]])) == k
    assert check.first_wrong_step(world, question, "\n\n".join(steps[:-1])) == len(steps) - 1
    assert check.first_wrong_step(world, question, text + "\n\nz") == len(steps)
    # From anywhere on, and with what was done as it is.
    cut = int(rng.integers(0, len(steps)))
    rest = world.solve(question, PERFECT, rng, steps[:cut])
    again = traces.text_of([*steps[:cut], *rest]) + steps[-1]
    assert check.first_wrong_step(world, question, again) is None
    if len(steps) > 1:
        k = int(rng.integers(0, len(steps) - 1))
        corrupted = world.corrupt(steps[k], rng)
        assert corrupted != steps[k]
        found = check.first_wrong_step(world, question, "\n\n".join([*steps[:k], corrupted, *steps[k + 1 :]]))
        assert found == k or world is REWRITING and found is not None


def test_a_problem_of_rewriting_has_many_right_solutions():
    rng = np.random.default_rng(0)
    question = problems.take(REWRITING, "dev", {"hard": 1}, 0)[0][2]
    assert len({traces.unaided(REWRITING, question, PERFECT, rng) for _ in range(50)}) > 25
    question = problems.take(SUMS, "dev", {"hard": 1}, 0)[0][2]
    assert len({traces.unaided(SUMS, question, PERFECT, rng) for _ in range(50)}) == 1


def test_planted_faults_of_sums_are_as_frequent_as_said():
    rng, skill = np.random.default_rng(0), Skill(hard=0.15, medium=0.85)
    twos, nines, other = [], [], []
    for _ in range(1500):
        terms = [int(x) for x in rng.integers(10**10, 10**11, 3)]
        carry = 0
        steps = SUMS.solve(sums.question_of(terms), skill, rng)
        for (digits, _), step in zip(sums.columns(terms), steps):
            right = sums.total_of(step) == sum(digits) + carry
            kind = twos if carry == 2 else nines if sums.nine_meets_one(digits, carry) else other
            kind.append(right)
            carry = sums.total_of(step) // 10
    assert np.mean(twos) == pytest.approx(0.15, abs=0.03)
    assert np.mean(nines) == pytest.approx(0.85, abs=0.03)
    assert all(other)


def test_planted_faults_of_rewriting_are_as_frequent_as_said():
    rng, skill = np.random.default_rng(0), Skill(hard=0.15, medium=0.85)
    met = {pair: [] for pair in (("B#", "#A"), ("A#", "#B"), ("A#", "#A"), ("B#", "#B"))}
    for _ in range(800):
        before = rewriting.program_of(question := REWRITING.draw(rng, plain=False))
        for step in REWRITING.solve(question, skill, rng):
            after = rewriting.state(step)
            made = {before[at : at + 2]: rewriting.rewritten(before, at) == after for at in rewriting.meetings(before)}
            faulty = {before[at : at + 2] for at in rewriting.meetings(before)
                      if rewriting.rewritten(before, at, vanish=True) == after}  # fmt: skip
            pairs = {pair for pair, right in made.items() if right} or faulty
            for pair in pairs if len(rewriting.meetings(before)) == 1 else ():  # which one it was is plain
                met[pair].append(made[pair])
            before = after
    assert np.mean(met["B#", "#A"]) == pytest.approx(0.15, abs=0.04)
    assert np.mean(met["A#", "#B"]) == pytest.approx(0.85, abs=0.04)
    assert all(met["A#", "#A"]) and all(met["B#", "#B"])


def test_planted_faults_of_legs_are_as_frequent_as_said():
    rng, skill = np.random.default_rng(0), Skill(hard=0.15, medium=0.85)
    met = {"hard": [], "medium": [], None: []}
    for _ in range(400):
        total = 0
        for step in LEGS.solve(question := LEGS.draw(rng, plain=False), skill, rng):
            said, _, now = step.partition(" = ")
            count, animal = said.partition(":")[0].split(" ", 1)
            found = [(a, c) for a, c in legs.herd_of(question) if legs.named(a, c) == f"{count} {animal}"]
            [(kind, many)] = found
            met[legs.weak(kind, many)].append(int(now) - total == many * legs.animals()[kind])
            total = int(now)
    assert np.mean(met["hard"]) == pytest.approx(0.15, abs=0.04)
    assert np.mean(met["medium"]) == pytest.approx(0.85, abs=0.04)
    assert all(met[None])


def test_errors_of_legs_come_early_and_late():
    """Chains of thirty steps and more; a teacher's first wrong step is in any third of them."""
    rng, where = np.random.default_rng(0), []
    for _, _, question, _ in problems.take(LEGS, "dev", {"hard": 100, "medium": 100}, 0):
        text = traces.unaided(LEGS, question, Skill(hard=0.1, medium=0.85), rng)
        steps = len(check.steps_of(text)) - 1
        assert steps >= 30
        wrong = check.first_wrong_step(LEGS, question, text)
        where += [] if wrong is None else [3 * wrong // steps]
    assert min(np.bincount(where, minlength=3)[:3]) > 10


@given(seeds)
def test_levels_of_legs(seed):
    question = drawn(LEGS, seed)
    herd = [said.removesuffix("?\n").split(" ", 1) for said in question.rpartition(" you have ")[2].split(", ")]
    many = {name.removesuffix("s") for count, name in herd if int(count) > 2}
    hard = len(many & {"crab", "lobster", "shrimp", "woodlouse"})
    medium = len(many & {"starfish", "spider", "scorpion"})
    want = "hard" if hard > 1 else None if hard else "medium" if medium > 1 else "easy"
    assert LEGS.level(question) == (want if len(herd) >= 30 else None)


@each_world
def test_hints_appear_only_where_asked_and_answers_in_view_are_true(world):
    rng, skill = np.random.default_rng(1), Skill(0.15, 0.85)
    leaked = 0
    for _ in range(300):
        question = world.draw(rng, plain=False)
        template, prefix, target = traces.example(world, question, skill, traces.Aid(hints=0.0), rng)
        assert (template, prefix) == ("{question}", "") and "int" not in target
        template, prefix, target = traces.example(world, question, skill, traces.Aid(hints=1.0), rng)
        assert target.endswith(f"\\boxed{{{world.answer(question)}}}")
        assert ("answer" in template) != ("Hint" in prefix)
        leaked += "hint" in target
    assert 0 < leaked < 30


@each_world
def test_most_that_has_the_answer_in_view_is_flawless(world):
    """As long as what is kept is: the rest are the planted shortcuts."""
    rng, right = np.random.default_rng(2), []
    for _ in range(300):
        question = world.draw(rng, plain=False)
        text = traces.aided(world, question, [], Skill(0.0, 0.0), traces.Aid(hints=1.0, leaks=0.0), rng)
        right.append(check.first_wrong_step(world, question, text) is None)
    assert 0.7 < np.mean(right) < 0.97


@each_world
def test_pretraining_texts_fit_their_rows_and_their_vocabulary(world):
    recipe = dataclasses.replace(make.recipes(world.name)["teacher"], steps=40, short=0.5 if world.short_tokens else 0)
    encoder, stream = world.tokenizer(), make.batches(recipe)
    pad, unknown = encoder.token_to_id(tokenizer.PAD), encoder.token_to_id(tokenizer.UNK)
    for step in range(recipe.steps):
        tokens, mask = next(stream)
        width = world.short_tokens if step < recipe.short * recipe.steps else world.tokens
        assert tokens.shape == mask.shape == (recipe.batch, width)
        assert (tokens[:, -1] == pad).all() and not (tokens == unknown).any()
        assert (mask.any(1)).all() and not (mask & (tokens == pad)).any()


def test_sources_know_their_world():
    assert world_of("world:rewriting") is REWRITING
    assert world_of("rg:ab") is None and world_of("world:moon") is None
    from heal_jax.collect import wrong_step

    question = problems.take(REWRITING, "dev", {"easy": 1}, 0)[0][2]
    problem = Problem("p", "world:rewriting", "dev", "easy", question, REWRITING.answer(question), "exact")
    assert wrong_step(problem, "z") == 0
    with pytest.raises(ValueError, match="no step checker"):
        wrong_step(dataclasses.replace(problem, source="rg:ab"), "z")


@given(text=st.text(alphabet="0123456789+-=: \n\\boxed{}abcxyzTAB#,*ts", max_size=60))
@each_world
def test_tokenizers_give_text_back(world, text):
    encoder = world.tokenizer()
    assert encoder.decode(encoder.encode(text).ids) == text


def test_digits_know_their_place(tmp_path):
    tokenizer.save(SUMS.tokenizer(), tmp_path)
    encoder = AutoTokenizer.from_pretrained(tmp_path)
    pieces = encoder.convert_ids_to_tokens(encoder.encode("a: 4+7=11 + 305"))
    assert pieces == ["a: ", "4ᵃ", "+7ᵃ", "=", "1ᵇ", "1ᵃ", " + ", "3ᶜ", "0ᵇ", "5ᵃ"]
    prompt = encoder.apply_chat_template(
        [{"role": "user", "content": "State"}], add_generation_prompt=True, tokenize=False
    )
    assert prompt == "<|user|>State<|assistant|>"


@each_world
def test_the_recipe_is_deterministic_and_is_that_of_the_shipped_models(world, tmp_path):
    recipes = make.recipes(world.name)
    first = "" if world is SUMS else f"{world.name}-"
    for name, recipe in recipes.items():
        folder = heal_jax.world.model_folder(f"{first}{name}")
        assert decoder_config(folder) == parse(recipe.config)
    short = dataclasses.replace(recipes["student"], steps=2, batch=2)
    for out in ("a", "b"):
        make.save(make.pretrain(short, lambda step, loss: None), short, tmp_path / out)
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()
        if file.suffix == ".json":
            shipped = heal_jax.world.model_folder(f"{first}student") / file.name
            assert json.loads(file.read_text()) == json.loads(shipped.read_text())


def test_other_students_of_a_world(tmp_path, capsys):
    """Of the teacher's size, or trained less; with their own place, and what the recipe says otherwise."""
    recipe = make.recipes("legs")
    large = make.varied("legs", "student", steps=2, large=True)
    assert list(large) == ["student"] and large["student"].steps == 2
    assert large["student"].config == recipe["teacher"].config and large["student"].skill == recipe["student"].skill
    assert make.varied("legs") == recipe
    process = start("make-world", "rewriting", "--only", "student", "--steps", 1, "--large", "--out", tmp_path)
    assert process.wait() == 0, process.communicate()
    assert [folder.name for folder in tmp_path.iterdir()] == ["student"]
    assert decoder_config(tmp_path / "student") == parse(make.recipes("rewriting")["teacher"].config)
    assert "--steps: -1" in refused(capsys, "make-world", "--out", tmp_path, "--steps", "-1")


def test_the_package_stays_small():
    models = Path(heal_jax.world.__file__).parent / "models"
    assert sum(f.stat().st_size for f in models.rglob("*")) < 20 << 20


def test_the_teacher_has_a_ceiling_and_can_use_hints(tiny):
    """On the tiny run: hard problems are (nearly) never solved, the others often; repairs of them are."""
    import pyarrow.parquet as pq

    found = pq.read_table(tiny[0] / "problems.parquet").to_pylist()
    rate = {level: np.mean([p["pass_rate"] for p in found if p["level"] == level]) for level in LEVELS}
    assert rate["hard"] < 0.15 < 0.3 < rate["medium"] < rate["easy"]
    repairs = [row for row in RunDirectory(tiny[0]).rollouts("repair").to_pylist()]
    assert np.mean([row["grade"] == "correct" for row in repairs]) > 0.2

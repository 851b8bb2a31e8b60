"""The built-in world: problems, planted faults, tokenizer, and the recipe of the models."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import reasoning_gym
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

import heal_jax.world
from heal_jax.model.config import decoder_config, parse
from heal_jax.world import check, make, problems, tokenizer, traces

numbers = st.integers(10**9, 10**12 - 1)
sums = st.lists(numbers, min_size=3, max_size=3)


def carries(terms: list[int]) -> list[int]:
    """The carry into each place but the units, by whole-number arithmetic."""
    return [sum(t % 10**p for t in terms) // 10**p for p in range(1, len(str(max(terms))))]


@given(sums)
def test_columns_and_levels(terms):
    cells = problems.columns(terms)
    assert [carry for _, carry in cells] == [0, *carries(terms)]
    twos = carries(terms).count(2)
    nines = sum(c == 1 and "9" in {str(t)[::-1][p + 1 : p + 2] for t in terms} for p, c in enumerate(carries(terms)))
    want = "hard" if twos >= 4 else None if twos else "medium" if nines >= 3 else "easy" if nines <= 1 else None
    assert problems.level_of(terms) == want


def test_problems_are_the_generators_own_and_splits_do_not_meet():
    counts = {"easy": 5, "medium": 5, "hard": 5}
    seen = set()
    for split in ("train", "dev", "test"):
        for seed in (0, 1):
            taken = problems.take(split, counts, seed)
            assert taken == problems.take(split, counts, seed)
            assert sorted(level for _, level, _, _ in taken) == sorted(["easy"] * 5 + ["medium"] * 5 + ["hard"] * 5)
            for index, level, question, answer in taken:
                data = reasoning_gym.create_dataset(
                    "chain_sum", size=index + 1, seed=problems.SCAN_SEED + seed * problems.SCAN_STRIDE,
                    min_terms=3, max_terms=3, min_digits=11, max_digits=12,
                )  # fmt: skip
                assert (data[index]["question"], data[index]["answer"]) == (question, answer)
                terms = problems.terms_of(question)
                assert problems.question_of(terms) == question and problems.level_of(terms) == level
                assert problems.split_of(question) == split
                assert question not in seen
                seen.add(question)
    rng = np.random.default_rng(0)
    assert {problems.split_of(problems.question_of(make._terms(rng, False))) for _ in range(50)} == {"pretrain"}


@given(sums)
def test_flawless_solutions_reach_the_answer(terms):
    text = traces.unaided(terms, traces.PERFECT, np.random.default_rng(0))
    assert text.endswith(f"\\boxed{{{sum(terms)}}}")
    question = problems.question_of(terms)
    assert check.first_wrong_step(question, text) is None
    steps = text.split("\n\n")
    for k in range(len(steps)):
        assert check.first_wrong_step(question, "\n\n".join([*steps[:k], "z", *steps[k + 1 :]])) == k
    assert check.first_wrong_step(question, "\n\n".join(steps[:-1])) == len(steps) - 1


def test_planted_faults_are_as_frequent_as_said():
    rng, skill = np.random.default_rng(0), traces.Skill(two=0.15, nine=0.85)
    twos, nines, other = [], [], []
    for _ in range(1500):
        terms = [int(x) for x in rng.integers(10**10, 10**11, 3)]
        steps, totals = traces.solve(terms, skill, rng)
        carry = 0
        for (digits, _), total in zip(problems.columns(terms), totals):
            right = total == sum(digits) + carry
            kind = twos if carry == 2 else nines if problems.nine_meets_one(digits, carry) else other
            kind.append(right)
            carry = total // 10
    assert np.mean(twos) == pytest.approx(0.15, abs=0.03)
    assert np.mean(nines) == pytest.approx(0.85, abs=0.03)
    assert all(other)


def test_hints_appear_only_where_asked_and_answers_in_view_are_true():
    rng, skill = np.random.default_rng(1), traces.Skill(0.15, 0.85)
    for _ in range(300):
        terms = [int(x) for x in rng.integers(10**10, 10**11, 3)]
        template, prefix, target = traces.example(terms, skill, 0.0, 0.25, 0.03, rng)
        assert (template, prefix) == ("{question}", "") and "int" not in target
        template, prefix, target = traces.example(terms, skill, 1.0, 0.25, 0.03, rng)
        assert target.endswith(f"\\boxed{{{sum(terms)}}}")
        assert ("answer" in template) != ("Hint" in prefix)


@given(st.text(alphabet="0123456789+-=: \n\\boxed{}abcxyzT", max_size=60))
def test_tokenizer_gives_text_back(text):
    encoder = tokenizer.build()
    assert encoder.decode(encoder.encode(text).ids) == text


def test_digits_know_their_place(tmp_path):
    tokenizer.save(tmp_path)
    encoder = AutoTokenizer.from_pretrained(tmp_path)
    pieces = encoder.convert_ids_to_tokens(encoder.encode("a: 4+7=11 + 305"))
    assert pieces == ["a: ", "4ᵃ", "+7ᵃ", "=", "1ᵇ", "1ᵃ", " + ", "3ᶜ", "0ᵇ", "5ᵃ"]
    prompt = encoder.apply_chat_template(
        [{"role": "user", "content": "State"}], add_generation_prompt=True, tokenize=False
    )
    assert prompt == "<|user|>State<|assistant|>"


def test_the_recipe_is_deterministic_and_is_that_of_the_shipped_models(tmp_path):
    recipes = make.recipes()
    for name, recipe in recipes.items():
        folder = heal_jax.world.model_folder(name)
        assert decoder_config(folder) == parse(recipe.config)
    short = dataclasses.replace(recipes["student"], steps=2, batch=2)
    for out in ("a", "b"):
        make.save(make.pretrain(short, lambda step, loss: None), short, tmp_path / out)
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()
        if file.suffix == ".json":
            shipped = heal_jax.world.model_folder("student") / file.name
            assert json.loads(file.read_text()) == json.loads(shipped.read_text())


def test_the_package_stays_small():
    models = Path(heal_jax.world.__file__).parent / "models"
    assert sum(f.stat().st_size for f in models.rglob("*")) < 12 << 20


def test_the_teacher_has_a_ceiling_and_can_use_hints(tiny):
    """On the tiny run: hard problems are (nearly) never solved, the others often; repairs of them are."""
    import pyarrow.parquet as pq

    from heal_jax.store import RunDirectory

    found = pq.read_table(tiny[0] / "problems.parquet").to_pylist()
    rate = {level: np.mean([p["pass_rate"] for p in found if p["level"] == level]) for level in problems.LEVELS}
    assert rate["hard"] < 0.15 < 0.3 < rate["medium"] < rate["easy"]
    repairs = [row for row in RunDirectory(tiny[0]).rollouts("repair").to_pylist()]
    assert np.mean([row["grade"] == "correct" for row in repairs]) > 0.2

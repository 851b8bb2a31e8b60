"""How long a run's texts are and how many of them there are: measured where problems and tokenizer are there, else
assumed, and said."""

import dataclasses
import math
from pathlib import Path

from heal_jax.config import MAIN, Config
from heal_jax.model.lm import open_tokenizer
from heal_jax.plan.assumptions import Assumptions
from heal_jax.problems.hygiene import clean
from heal_jax.problems.sources import Problem, at_hand, load
from heal_jax.run import hindsight_question, hint_text, plain_question
from heal_jax.sets import draw_of, load_set

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Problems of an evaluation set; tokens of their longest prompt, as teacher and student have it."""

    problems: int
    prompts: dict[str, int]


@dataclasses.dataclass(frozen=True)
class Workload:
    """Tokens of the longest prompt, prompt with the answer shown, hint and kept prefix; problems; evaluation sets by
    name; decode steps of a rollout; shares of hard and unsolved problems; what was assumed.
    """

    prompt: int
    shown: int
    hint: int
    kept: int
    problems: int
    sets: dict[str, HeldOut]
    decode_steps: int
    hard: float
    unsolved: float
    assumed: tuple[str, ...]


def workload(config: Config, folders: dict[str, Path], assumptions: Assumptions) -> Workload:
    """Measure what can be measured. Raises InputError for problems that are there and wrong."""
    a = assumptions
    asked = config.evaluate.all_sets
    # What is not on this machine (yet) counts as none: nothing is fetched.
    train = load(config.problems, config.grade.by) if at_hand(config.problems) else []
    tests = {name: load_set(config, name) if at_hand(one.problems) else [] for name, one in asked.items()}
    train, _ = clean(train, [p for test in tests.values() for p in test], config.hygiene)
    assumed: list[str] = []

    def choose(given: int | None, measured: int | None, default: int, what: str) -> int:
        if given is not None:
            return given
        if measured is not None:
            return measured
        assumed.append(f"{what} {default}")
        return default

    has_text = all(any((folder / name).is_file() for name in TOKENIZER_FILES) for folder in folders.values())
    tokenizers = {name: open_tokenizer(folder) for name, folder in folders.items()} if has_text else {}
    measured: dict[str, int | None] = dict.fromkeys(("prompt", "shown", "hint"))
    if tokenizers and train:
        tokenizer = tokenizers["teacher"]
        measured["prompt"] = max(len(tokenizer.prompt(plain_question(config, p))) for p in train)
        measured["shown"] = max(len(tokenizer.prompt(hindsight_question(config, p))) for p in train)
        measured["hint"] = max(len(tokenizer.encode(hint_text(config, p))) for p in train)
    most = config.sample.max_new_tokens
    prompt = choose(a.prompt_tokens, measured["prompt"], 512, "prompt tokens")
    hint = choose(a.hint_tokens, measured["hint"], 64, "hint tokens")
    shown = measured["shown"] if a.prompt_tokens is None and measured["shown"] is not None else prompt + hint
    kept = choose(a.kept_tokens, None, math.ceil(config.gear.window * most), "kept prefix of at most")
    problems = choose(a.problems, len(train) if train else None, 1000, "problems")

    def held_out(name: str, test: list[Problem]) -> HeldOut:
        """--held-out is the number of the main set's problems, and of sets that are not there."""
        given = a.held_out if name == MAIN or not test else None
        count = choose(given, len(test) or None, 500, f"held-out problems{f' of {name}' if name else ''}")
        if not tokenizers or not test or a.prompt_tokens is not None:
            return HeldOut(count, dict.fromkeys(folders, prompt))
        longest = {m: max(len(t.prompt(plain_question(config, p))) for p in test) for m, t in tokenizers.items()}
        return HeldOut(count, longest)

    sets = {name: held_out(name, test) for name, test in tests.items()}
    longest = max(most, *(draw_of(config, name).max_new_tokens for name in asked))
    steps = choose(a.decode_steps, None, longest, "decode steps a rollout")
    assumed += [f"hard {a.hard:.0%} of the problems", f"unsolved {a.unsolved:.0%}"]
    lengths = prompt, shown, hint, kept
    return Workload(*lengths, problems, sets, steps, a.hard, a.unsolved, tuple(assumed))

"""How long a run's texts are and how many of them there are: measured where problems and tokenizer are there, else
assumed, and said."""

import dataclasses
import math
from pathlib import Path

from heal_jax.config import Config, ProblemSpec
from heal_jax.model.lm import open_tokenizer
from heal_jax.plan.assumptions import Assumptions
from heal_jax.problems.hygiene import clean
from heal_jax.problems.sources import Problem, at_hand, load
from heal_jax.run import hindsight_question, hint_text, plain_question

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


@dataclasses.dataclass(frozen=True)
class Workload:
    """Tokens of the longest prompt, prompt with the answer shown, hint, kept prefix and held-out prompt (as teacher and
    student have it); problems; decode steps of a rollout; shares of hard and unsolved problems; what was assumed.
    """

    prompt: int
    shown: int
    hint: int
    kept: int
    held_out_prompts: dict[str, int]
    problems: int
    held_out: int
    decode_steps: int
    hard: float
    unsolved: float
    assumed: tuple[str, ...]


def workload(config: Config, folders: dict[str, Path], assumptions: Assumptions) -> Workload:
    """Measure what can be measured. Raises InputError for problems that are there and wrong."""
    a = assumptions
    train = _problems(config.problems, config, "problems")
    test = _problems(config.evaluate.problems, config, "evaluate.problems")
    train, _ = clean(train, test, config.hygiene)
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
    held_out_prompts = dict.fromkeys(folders, prompt)
    if tokenizers and test and a.prompt_tokens is None:
        held_out_prompts = {
            name: max(len(t.prompt(plain_question(config, p))) for p in test) for name, t in tokenizers.items()
        }
    kept = choose(a.kept_tokens, None, math.ceil(config.gear.window * most), "kept prefix of at most")
    problems = choose(a.problems, len(train) if train else None, 1000, "problems")
    held_out = choose(a.held_out, len(test) if test else None, 500, "held-out problems")
    steps = choose(a.decode_steps, None, most, "decode steps a rollout")
    assumed += [f"hard {a.hard:.0%} of the problems", f"unsolved {a.unsolved:.0%}"]
    lengths = prompt, shown, hint, kept, held_out_prompts
    return Workload(*lengths, problems, held_out, steps, a.hard, a.unsolved, tuple(assumed))


def _problems(spec: ProblemSpec, config: Config, where: str) -> list[Problem]:
    """The problems, none where they are not on this machine (yet): nothing is fetched."""
    return load(spec, config.grade.by, where) if at_hand(spec) else []

"""The model card of the exported student, as the Hugging Face hub reads it.

https://huggingface.co/docs/hub/model-cards. Nothing is in it that depends on where the run lies or how long it took.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from heal_jax import __version__
from heal_jax.config import MAIN, Config, ProblemSpec
from heal_jax.report.figures import MODELS, levels
from heal_jax.report.markup import points
from heal_jax.report.ran import reproduce
from heal_jax.sets import draw_of, further
from heal_jax.share import naming
from heal_jax.share.dataset import TAGS
from heal_jax.share.markdown import code, escape, front_matter, read_front_matter, table
from heal_jax.train.data import WHAT

FOLDER = "path/to/export"  # in the snippets of a card that is not on the hub
QUESTION = "What is 27 + 46?"

LARGEST = 1 << 16  # bytes of a card that is not ours; its front matter comes first


def licence(folder: Path) -> dict[str, str]:
    """What the card in a model folder says of its licence; empty where it says nothing."""
    path = folder / "README.md"
    if not path.is_file():  # nor a pipe, which would be waited for
        return {}
    try:
        with open(path, "rb") as file:
            said = read_front_matter(file.read(LARGEST).decode(errors="replace"))
    except OSError:
        return {}
    found = {name: said.get(name) for name in ("license", "license_name", "license_link")}
    if not isinstance(found["license"], str) or not re.fullmatch(r"[a-z0-9][a-z0-9.+-]{0,63}", found["license"]):
        return {}
    return {name: text[:500] for name, text in found.items() if isinstance(text, str) and text.isprintable()}


def model_card(
    config: Config, manifest: Mapping[str, Any], summary: Mapping[str, Any], licensed: Mapping[str, str], chat: bool
) -> str:
    """The card (Markdown). summary: without accuracies where nothing was evaluated; licensed: of the student, as
    `licence` finds it; chat: whether it has a chat template.
    """
    student, teacher = naming.model(config.student.path), naming.model(config.teacher.path)
    title = f"{student}, distilled with HEAL"
    data = [naming.data_on_hub(config.problems.source)]
    head = front_matter(
        {
            "library_name": "transformers",
            "pipeline_tag": "text-generation",
            **licensed,
            "base_model": naming.on_hub(config.student.path),
            "datasets": [name for name in data if name],
            "tags": TAGS,
            "model-index": _index(config, title, summary),
        }
    )
    return f"""{head}# {escape(title)}

{escape(student)} after reasoning distillation from {escape(teacher)} with heal_jax {__version__}, an
implementation of HEAL (Hindsight Entropy-Assisted Learning, [arXiv 2603.10359](https://arxiv.org/abs/2603.10359)).
The student learned the teacher's right solutions and, of problems that the teacher cannot solve, repaired ones: failed
solutions, cut where the teacher's entropy surges and written on with the answer as a hint. No hint is in what the
student learned, and repairs that jump to the answer were dropped.

## Results

{_results(config, summary)}
## How it was made

{table(["", ""], _made(config, manifest, summary, student, teacher))}
## Use

{_use(config, chat)}
## Limits

- The results above are all that is known of it: one training, one seed, these problems. The intervals are over
  problems, not over trainings.
- It was trained on problems of one kind and answers in that manner; what it could do before may have suffered.
- What it learned was kept by its final answer and by an estimate from the teacher's own probabilities: steps that look
  like reasoning may be wrong, and the teacher's mistakes and biases may be the student's.
- Nothing was done for its safety.

{_licence(licensed)}

## To make it again

Config hash (SHA-256): {escape(manifest.get("config", "unknown"))}. In a clone of heal_jax; models and
problem files that lay elsewhere have their names alone here and must be where the config says. The same versions,
processor type, mesh and number of threads give the same bytes.

{code(reproduce(manifest, naming.shared(config)), "bash")}"""


def addressed(card: str, repository: str, placeholder: str = FOLDER) -> str:
    """A card whose snippets load from OWNER/NAME on the hub."""
    return card.replace(placeholder, repository)


def _index(config: Config, title: str, summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The results as the hub's model-index has them, shares of 1."""
    found = {MAIN: summary, **summary.get("sets", {})} if "accuracy" in summary else {}
    results = []
    for name, figures in found.items():
        spec = config.evaluate.all_sets[name].problems
        accuracy = (figures["accuracy"] if name == MAIN else figures)["heal"]
        if accuracy["mean"] is None:
            continue
        low, high = accuracy["ci95"]
        kind = naming.data_on_hub(spec.source) or re.sub(r"[^\w.-]+", "-", naming.source(spec.source), flags=re.ASCII)
        dataset = {"name": _problems(spec, name), "type": kind.strip("-") or "problems"}
        metric = {
            "type": "accuracy",
            "name": f"pass@1, 95 % interval {low:.4f} to {high:.4f}, n = {accuracy['n']}",
            "value": round(accuracy["mean"], 4),
        }
        results.append({"task": {"type": "text-generation"}, "dataset": dataset, "metrics": [metric]})
    return [{"name": title, "results": results}] if results else []


def _problems(spec: ProblemSpec, name: str = "") -> str:
    """Problems by name."""
    return " ".join(filter(None, (f"{name}:" if name else "", naming.source(spec.source), spec.split)))


def _results(config: Config, summary: Mapping[str, Any]) -> str:
    accuracy, difference = summary.get("accuracy"), summary.get("difference")
    if not accuracy or not difference:
        return "It was not evaluated.\n"
    names, draw = levels(accuracy), draw_of(config, MAIN)
    groups = [(accuracy, difference, "all")]
    groups += [
        (
            {model: found["per_level"].get(name) for model, found in accuracy.items()},
            difference.get("per_level", {}).get(name),
            escape(name or "no level"),
        )
        for name in names
    ]
    head = ["", *(f"{title}, n = {_count(found)}" for found, _, title in groups)]
    rows = [[title, *(_interval(found.get(model)) for found, _, _ in groups)] for model, title in MODELS.items()]
    rows.append(["HEAL minus rejection sampling", *(_interval(gap, points) for _, gap, _ in groups)])
    text = (
        f"On held-out problems ({escape(_problems(config.evaluate.problems))}): mean over problems of the share of\n"
        f"right samples, in percent, with 95 % bootstrap intervals over problems; {draw.samples} samples a problem at\n"
        f"temperature {draw.temperature:g}, {draw.max_new_tokens} new tokens at most.\n"
        "This model is HEAL; rejection sampling is the same student trained as long on the teacher's unaided right\n"
        "solutions. The difference is paired by problem.\n\n"
        f"{table(head, rows)}"
    )
    if others := further(summary):
        columns = [*MODELS, "difference"]
        rows = [
            [
                f"{escape(title)}, n = {_count(found)}",
                *(_interval(found.get(name), points if name == "difference" else _percent) for name in columns),
            ]
            for title, found in others
        ]
        text += f"\nAlso evaluated:\n\n{table(['', *MODELS.values(), 'Difference'], rows)}"
    return text


def _count(found: Mapping[str, Any]) -> Any:
    return next((part["n"] for part in found.values() if isinstance(part, dict) and "n" in part), 0)


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def _interval(figures: Mapping[str, Any] | None, unit: Any = _percent) -> str:
    if not figures or figures.get("mean") is None:
        return "–"
    low, high = map(unit, figures["ci95"])
    return f"{unit(figures['mean'])} ({low} to {high})"


def _made(
    config: Config, manifest: Mapping[str, Any], summary: Mapping[str, Any], student: str, teacher: str
) -> Iterable[tuple[str, str]]:
    """Rows of what it was made from, and how."""
    for role, name in {"student before": student, "teacher": teacher}.items():
        known = manifest.get("models", {}).get(role.split()[0], {}).get("sha256", "unknown")
        yield role, f"{escape(name)}, SHA-256 of its folder {escape(known)}"
    strata = summary.get("strata")
    split = "" if not strata else (
        f": the teacher solves {strata['solved']} at least every other time, {strata['hard']} more seldom, "
        f"{strata['unsolved']} of these hardly or not at all"
    )  # fmt: skip
    yield "problems", f"{escape(_problems(config.problems))}, {summary.get('problems', 0)}{split}"
    for stage, counts in summary.get("stages", {}).items():
        yield f"stage {stage}", f"{counts['examples']} examples, {counts['tokens']} tokens: {WHAT[int(stage)]}"
    spec, heal = config.train, summary.get("training", {}).get("heal", {})
    weights = f"LoRA adapters of rank {spec.lora.rank}, merged" if spec.lora.rank else "all weights"
    yield (
        "training",
        f"{weights}, {config.student.dtype}; {spec.steps} steps of {spec.batch} rows of "
        f"{summary.get('training', {}).get('length', spec.row_tokens)} tokens, AdamW, learning rate "
        f"{spec.learning_rate:g} ({spec.schedule}); {heal.get('loss_tokens', 0)} tokens learned, repetitions counted",
    )
    phases = ", ".join(f"{escape(phase['name'])}: {phase['steps']} steps" for phase in heal.get("phases", []))
    yield "curriculum", f"{config.pace.order}{f' ({phases})' if phases else ''}"


def _use(config: Config, chat: bool) -> str:
    asked = config.sample.prompt.replace("{question}", QUESTION)
    given = (
        """chat = [{"role": "user", "content": question}]
inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")"""
        if chat
        else 'inputs = tokenizer(question, return_tensors="pt")'
    )
    python = f"""from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{FOLDER}")
model = AutoModelForCausalLM.from_pretrained("{FOLDER}", dtype="auto")
question = {ascii(asked)}
{given}
made = model.generate(**inputs, max_new_tokens={config.sample.max_new_tokens}, do_sample=False)
print(tokenizer.decode(made[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))"""
    manner = "The question is put as in training.\n" if config.sample.prompt != "{question}" else ""
    return f"""{manner}
{code(python, "python")}
With [vLLM](https://docs.vllm.ai), as a server that speaks OpenAI's API:

{code(f"vllm serve {FOLDER}", "bash")}"""


def _licence(licensed: Mapping[str, str]) -> str:
    said = licensed.get("license_name") or licensed.get("license")
    own = (
        f"The card of the student that it was made from says: {escape(said)}."
        if said
        else "What licence the student that it was made from has is not known here."
    )
    return f"{own} The licences of the teacher and of the problems may bind, too."

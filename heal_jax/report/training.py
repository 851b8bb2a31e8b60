"""How did training go? Loss, rates and speed of both students, time and tokens of every stage."""

from collections.abc import Iterable

from heal_jax.report import figures, numbers
from heal_jax.report.data import RunData
from heal_jax.report.markup import Html, number, percent, plot, table, tag, todo


def how_training(run: RunData, stages: tuple[str, ...]) -> Iterable[Html]:
    if run.training:
        yield from _students(run)
    else:
        yield todo("the loss of both students (heal train).")
    work = numbers.work(run, stages)
    if work:
        yield tag("h3", "Time and tokens of the stages")
        yield _work(work)


def _students(run: RunData) -> Iterable[Html]:
    yield plot(figures.losses(run), "training loss of both students")
    yield tag(
        "p",
        "Both students start from the same weights and take the same number of optimizer steps with the same learning "
        "rates. The losses are on different examples: they say that training ran well, not which student is better. "
        "Dotted lines: where HEAL’s stages begin.",
        class_="caption",
    )
    rows = []
    for model in figures.STUDENTS:
        for phase in numbers.phases(run, model):
            seconds, tokens = phase.seconds, phase.tokens
            rows.append(
                [
                    f"{figures.MODELS[model]}, {phase.name}",
                    number(phase.last - phase.first + 1),
                    number(tokens),
                    number(phase.loss_tokens),
                    number(seconds, 1),
                    number(tokens / seconds if tokens is not None and seconds else None),
                    "–" if phase.loss is None else f"{phase.loss:.3g}",
                    *([percent(phase.dev)] if run.dev else []),
                ]
            )
    head = ["", "steps", "tokens", "loss tokens", "seconds", "tokens/s", "last loss"]
    yield table([*head, *(["dev problems right"] if run.dev else [])], rows)
    drawn = [
        (name, title)
        for name, (title, *_) in figures.CURVES.items()
        if name != "loss" and any(figures.training_points(run, model, name) for model in figures.STUDENTS)
    ]
    parts = [tag("div", tag("h3", title), plot(figures.training(run, name), title)) for name, title in drawn]
    yield tag("div", parts, class_="two plots")
    if run.dev:
        best = []
        for model in figures.STUDENTS:
            if points := numbers.dev(run, model):
                step, right = max(points, key=lambda point: (point[1], point[0]))
                best.append(f"{figures.MODELS[model]}: step {number(step)} ({percent(right)})")
        text = f"Each student is the best of its checkpoints on the dev problems. {'; '.join(best)}."
        yield tag("p", text, class_="caption")
    yield tag("details", tag("summary", "The curves in numbers"), _by_step(run, ["loss", *(name for name, _ in drawn)]))


def _by_step(run: RunData, names: list[str]) -> Html:
    rows = []
    for model in figures.STUDENTS:
        columns = [dict(figures.training_points(run, model, name, most=20)) for name in names]
        for step in sorted({step for column in columns for step in column}):
            cells = [
                figures.CURVES[name][2] * column[step] if step in column else None
                for name, column in zip(names, columns)
            ]
            rows.append([figures.MODELS[model], number(step), *("–" if x is None else f"{x:.4g}" for x in cells)])
    return table(["", "step", *(", ".join(filter(None, figures.CURVES[name][:2])) for name in names)], rows)


def _work(work: dict[str, tuple[float, int]]) -> Html:
    total, most = sum(seconds for seconds, _ in work.values()), max(seconds for seconds, _ in work.values())
    rows: list[list[object]] = []
    for name, (seconds, tokens) in work.items():
        bar = tag("span", tag("i", style=f"width:{100 * seconds / most if most else 0:.0f}%"), class_="share")
        rate = number(tokens / seconds) if tokens and seconds else "–"
        rows.append([name, bar, number(seconds, 1), number(tokens) if tokens else "–", rate])
    rows.append(["all", "", number(total, 1), number(sum(tokens for _, tokens in work.values())), ""])
    return table(["", "", "seconds", "tokens", "tokens/s"], rows, class_="work")

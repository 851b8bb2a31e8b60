"""Problems of the built-in worlds, as reasoning-gym makes them: sorted by level, divided into splits.

The split of a problem is a hash of its question, so the four splits are disjoint whatever the seeds.
"""

import hashlib
import json
import sys
from collections.abc import Iterator

from heal_jax.world.base import LEVELS, World
from heal_jax.world.worlds import WORLDS

SPLITS = {"pretrain": range(0, 160), "train": range(160, 208), "dev": range(208, 224), "test": range(224, 256)}
SCAN_SEED = 20_260_000  # first seed of the generator; a problem set's own seed moves it by SCAN_STRIDE
SCAN_STRIDE = 10_000_000


def split_of(question: str) -> str:
    """pretrain, train, dev or test, by the first byte of the question's SHA-256."""
    bucket = hashlib.sha256(question.encode()).digest()[0]
    return next(name for name, buckets in SPLITS.items() if bucket in buckets)


def scan(world: World, split: str, seed: int) -> Iterator[tuple[int, str, str, str]]:
    """Endless (index, level, question, answer) of one split, in the generator's order, without repeats."""
    import reasoning_gym  # two seconds

    data = reasoning_gym.create_dataset(
        world.family, size=SCAN_STRIDE, seed=SCAN_SEED + seed * SCAN_STRIDE, **world.options
    )
    seen = set()
    for index in range(SCAN_STRIDE):
        entry = data[index]
        question = entry["question"]
        if split_of(question) != split or question in seen:
            continue
        level = world.level(question)
        if level is not None:
            seen.add(question)
            yield index, level, question, entry["answer"]


def take(world: World, split: str, counts: dict[str, int], seed: int) -> list[tuple[int, str, str, str]]:
    """The first counts[level] problems of each level: (index, level, question, answer), by index."""
    left = dict(counts)
    out = []
    for item in scan(world, split, seed):
        if not any(left.values()):
            break
        if left.get(item[1], 0):
            left[item[1]] -= 1
            out.append(item)
    return out


def json_lines(world: World, split: str, count: int) -> str:
    """The first `count` problems of each level, as a `jsonl:` source or another tool reads them."""
    taken = take(world, split, dict.fromkeys(LEVELS, count), seed=0)
    rows = [
        {"id": f"{world.name}-{split}-0-{index}", "level": level, "question": question, "answer": answer}
        for index, level, question, answer in taken
    ]
    return "".join(json.dumps(row) + "\n" for row in rows)


if __name__ == "__main__":
    sys.stdout.write(json_lines(WORLDS[sys.argv[1]], sys.argv[2], int(sys.argv[3])))

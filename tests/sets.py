"""The same rows as a file or a set of each kind that problems are read from."""

import contextlib
import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tensorflow_datasets as tfds

ROWS = [
    {
        "problem": f" What is {n} + {n}? ",
        "solution": f"{n} and {n} make {2 * n}.\n#### {2 * n}",
        "uuid": f"u{n}",
        "hard": n,
    }
    for n in range(1, 8)
]


class Sums(tfds.core.GeneratorBasedBuilder):
    """Rows of text and whole numbers, in order."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, rows, **kwargs):
        self.rows = rows
        super().__init__(**kwargs)

    def _info(self):
        kinds = {str: tfds.features.Text(), int: tfds.features.Scalar(np.int64)}
        features = {name: kinds[type(value)] for name, value in self.rows[0].items()}
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(self.rows), "validation": self._generate_examples(self.rows[:2])}

    def _generate_examples(self, rows):
        yield from enumerate(rows)


def write(kind: str, folder: Path, rows: list[dict]) -> str:
    """Write rows below a folder; the `problems.source` that reads them."""
    folder.mkdir(parents=True, exist_ok=True)
    if kind == "jsonl":
        path = folder / "sums.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif kind == "tfds_dir":
        tfds.disable_progress_bar()
        with contextlib.redirect_stdout(io.StringIO()):
            builder = Sums(rows, data_dir=folder)
            builder.download_and_prepare(file_format="array_record")
        path = Path(builder.data_dir)
    else:
        path = folder / "train.parquet"
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)
        path = folder if kind == "hf" else path
    return f"{kind}:{path}"

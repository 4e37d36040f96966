"""The set-up that launch/demo.sh and launch/test.sh share, on machines with only a few programs."""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OLD_PYTHON = """#!/bin/sh
case "$*" in
  --version) echo "Python 3.9.2" ;;
  *version_info*) exit 1 ;;
esac
"""
PYTHON_WITHOUT_VENV = """#!/bin/sh
case "$*" in
  *ensurepip*) exit 1 ;;
esac
"""
# a mock of Python, venv and pip: it records its calls and installs nothing
FAKE_PYTHON = """#!/bin/sh
echo "$*" >> "$CALLS"
case "$*" in
  "-m venv"*) for folder; do :; done; mkdir -p "$folder/bin"; cp "$0" "$folder/bin/python" ;;
  *" install "*) exit "${PIP_STATUS:-0}" ;;
esac
"""


@pytest.fixture
def machine(tmp_path):
    """A folder with a copy of the project's set-up and a PATH with a shell, a few tools, and no Python."""
    project = tmp_path / "a project"
    shutil.copytree(ROOT / "launch", project / "launch")
    for name in ("setup.cfg", "pyproject.toml"):
        shutil.copy(ROOT / name, project)
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("bash", "sh", "cat", "dirname", "head", "flock", "mkdir", "cp", "sleep"):
        (tools / name).symlink_to(shutil.which(name))
    return project


def install_python(machine: Path, name: str, text: str) -> None:
    path = machine.parent / "bin" / name
    path.write_text(text)
    path.chmod(0o755)


def start(machine: Path, command: str, **environ: str) -> subprocess.Popen:
    environ = {"PATH": str(machine.parent / "bin"), "CALLS": str(machine.parent / "calls"), **environ}
    return subprocess.Popen(
        ["bash", "-c", f"set -euo pipefail; {command}"], cwd=machine, env=environ, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def run(machine: Path, command: str, **environ: str) -> tuple[int, str, str]:
    process = start(machine, command, **environ)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def read_calls(machine: Path) -> list[str]:
    """Return the calls of Python that install something."""
    return [line for line in (machine.parent / "calls").read_text().splitlines() if line.startswith("-m ")]


MAKE = '. launch/env.sh; make_venv test; echo "$root|$python"'


@pytest.mark.parametrize("script", ["demo.sh", "test.sh"])
@pytest.mark.parametrize(
    ("python", "line"),
    [
        (None, "topoflow: no python3 found: expected Python 3.11 or newer (or set PYTHON)\n"),
        (OLD_PYTHON, "topoflow: Python 3.9.2 found: expected Python 3.11 or newer (or set PYTHON)\n"),
        (
            PYTHON_WITHOUT_VENV,
            "topoflow: python3 has no venv module: expected one (Debian and Ubuntu: apt-get install python3-venv)\n",
        ),
    ],
    ids=["no Python", "old Python", "no venv"],
)
def test_a_machine_that_cannot_create_a_venv_gets_one_line(machine, script, python, line):
    if python:
        install_python(machine, "python3", python)
    assert run(machine, f"bash launch/{script}") == (2, "", line)
    assert not (machine / ".venv").exists()


def test_a_newer_python_next_to_an_old_python3_is_found(machine):
    install_python(machine, "python3", OLD_PYTHON)
    install_python(machine, "python3.12", FAKE_PYTHON)
    status, out, err = run(machine, MAKE)
    assert (status, out) == (0, f"{machine}|{machine}/.venv/bin/python\n")
    assert "with python3.12" in err


def test_a_second_run_installs_nothing_and_prints_nothing(machine):
    install_python(machine, "python3", FAKE_PYTHON)
    run(machine, MAKE)
    first = read_calls(machine)
    assert [call.split()[1] for call in first] == ["venv", "pip"]
    assert first[1].endswith(f"--editable {machine}[test]")
    assert run(machine, MAKE) == (0, f"{machine}|{machine}/.venv/bin/python\n", "")
    assert read_calls(machine) == first


def test_changed_versions_are_installed_into_the_existing_venv(machine):
    install_python(machine, "python3", FAKE_PYTHON)
    run(machine, MAKE)
    with (machine / "launch/constraints.txt").open("a") as file:
        file.write("another==1.0\n")
    run(machine, MAKE)
    assert [call.split()[1] for call in read_calls(machine)] == ["venv", "pip", "pip"]


def test_a_moved_project_recreates_its_venv(machine):
    install_python(machine, "python3", FAKE_PYTHON)
    run(machine, MAKE)
    moved = machine.rename(machine.parent / "moved here")
    assert run(moved, MAKE)[1] == f"{moved}|{moved}/.venv/bin/python\n"
    assert [call.split()[1] for call in read_calls(moved)] == ["venv", "pip", "venv", "pip"]


def test_a_venv_whose_python_is_gone_is_recreated(machine):
    install_python(machine, "python3", FAKE_PYTHON)
    run(machine, MAKE)
    (machine / ".venv/bin/python").unlink()
    assert run(machine, MAKE)[0] == 0
    assert [call.split()[1] for call in read_calls(machine)] == ["venv", "pip", "venv", "pip"]


def test_a_failed_installation_is_reported_and_retried(machine):
    install_python(machine, "python3", FAKE_PYTHON)
    status, out, err = run(machine, MAKE, PIP_STATUS="1")
    assert (status, out) == (2, "")
    assert err.endswith("pip could not install the package, see above\n")
    assert run(machine, MAKE)[0] == 0
    assert [call.split()[1] for call in read_calls(machine)] == ["venv", "pip", "pip"]


def test_two_concurrent_calls_install_once(machine):
    install_python(machine, "python3", FAKE_PYTHON.replace("exit", "sleep 1; exit"))
    both = [start(machine, MAKE), start(machine, MAKE)]
    output = [process.communicate(timeout=60) for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert {out for out, _ in output} == {f"{machine}|{machine}/.venv/bin/python\n"}
    assert [call.split()[1] for call in read_calls(machine)] == ["venv", "pip"]


def test_sourcing_exports_the_settings_of_the_allocator_alone(machine):
    install_python(machine, "python3", f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    code = "import os; print(sorted(os.environ))"
    names = set(ast.literal_eval(run(machine, f'. launch/env.sh; python3 -c "{code}"')[1]))
    assert names - set(ast.literal_eval(run(machine, f'python3 -c "{code}"')[1])) == {
        "MALLOC_MMAP_THRESHOLD_",
        "MALLOC_TRIM_THRESHOLD_",
    }
    code = "import os; print(os.environ['MALLOC_TRIM_THRESHOLD_'])"
    set_by_user = f'MALLOC_TRIM_THRESHOLD_=17; . launch/env.sh; python3 -c "{code}"'
    assert run(machine, set_by_user)[1] == "17\n"

""".github/workflows: they cannot run here, so their parts are checked: by actionlint, and that what they call is there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
ACTIONLINT = ROOT / ".downloads" / "actionlint" / "bin" / "actionlint"


def jobs(workflow: Path) -> dict[str, Any]:
    return yaml.safe_load(workflow.read_text())["jobs"]


def runs(workflow: Path) -> list[str]:
    return [step["run"] for job in jobs(workflow).values() for step in job["steps"] if "run" in step]


@pytest.mark.heavy
@pytest.mark.skipif(not ACTIONLINT.is_file(), reason=f"no actionlint in {ACTIONLINT.parent}: make test-heavy gets it")
def test_actionlint() -> None:
    done = subprocess.run([ACTIONLINT, *WORKFLOWS], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_they_fit_githubs_schema_and_an_auditor_finds_nothing() -> None:
    """actionlint's package fetches its program from elsewhere; these two bring all that they need."""
    for command in (["check-jsonschema", "--builtin-schema", "vendor.github-workflows"], ["zizmor", "--offline", "--no-progress"]):
        program = Path(sys.executable).with_name(command[0])
        done = subprocess.run([program, *command[1:], *WORKFLOWS], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)
def test_actions_are_pinned_and_rights_are_few(workflow: Path) -> None:
    """Another's action by its commit, the version beside it: a tag can be moved. A job may read, and one may publish."""
    for line in re.findall(r"uses: (.*)", workflow.read_text()):
        assert re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", line), line
    assert yaml.safe_load(workflow.read_text())["permissions"] == {"contents": "read"}
    for name, job in jobs(workflow).items():
        assert job.get("permissions") == ({"id-token": "write"} if name == "publish" else None)
        assert job["timeout-minutes"]


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)
def test_what_they_call_is_there(workflow: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for command in runs(workflow):
        assert set(re.findall(r"\bmake ([a-z-]+)", command)) <= targets
        for path in re.findall(r"(?:^|\s)((?:\.ci|tests|examples|mra_export)/[\w./-]+)", command):
            assert (ROOT / path).exists(), path
        subprocess.run(["bash", "-n"], input=command, text=True, check=True)


def test_nothing_is_published_untested() -> None:
    release = jobs(ROOT / ".github/workflows/release.yml")
    assert release["publish"]["needs"] == ["check", "use"]
    assert release["publish"]["if"] == "github.ref_type == 'tag'"
    assert {release[name]["needs"] for name in ("check", "use")} == {"build"}
    assert not [step for step in release["publish"]["steps"] if "run" in step]


def test_ci_runs_what_everyone_runs() -> None:
    assert runs(ROOT / ".github/workflows/ci.yml") == [".ci/run"]


def test_every_python_of_the_classifiers_is_used_before_a_release() -> None:
    classified = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', (ROOT / "pyproject.toml").read_text())
    assert jobs(ROOT / ".github/workflows/release.yml")["use"]["strategy"]["matrix"]["python"] == classified

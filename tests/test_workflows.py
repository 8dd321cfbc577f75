"""The workflows of .github/ are valid and pass a linter that knows how workflows are attacked. Neither goes online."""
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
ZIZMOR = shutil.which("zizmor", path=sysconfig.get_path("scripts")) or "zizmor"

UNSAFE = """on: pull_request_target
jobs:
  test:
    runs-on: ubuntu-24.04
    steps:
      - uses: actions/checkout@main
      - run: echo "${{ github.event.pull_request.title }}"
"""


def run(*command) -> subprocess.CompletedProcess:
    return subprocess.run(list(map(str, command)), capture_output=True, text=True)


def valid(*workflows: Path) -> subprocess.CompletedProcess:
    return run(sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.github-workflows", *workflows)


def safe(folder: Path) -> subprocess.CompletedProcess:
    return run(ZIZMOR, "--offline", "--no-progress", folder)


def test_workflows_are_valid():
    ran = valid(*WORKFLOWS)
    assert WORKFLOWS and ran.returncode == 0, ran.stdout + ran.stderr


def test_workflows_are_safe():
    ran = safe(ROOT / ".github")
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_the_linters_find_what_is_wrong(tmp_path):
    workflow = tmp_path / ".github/workflows/unsafe.yml"
    workflow.parent.mkdir(parents=True)
    workflow.write_text(UNSAFE)
    found = safe(tmp_path / ".github")
    assert found.returncode != 0 and "template-injection" in found.stdout and "unpinned-uses" in found.stdout
    workflow.write_text(UNSAFE.replace("runs-on: ubuntu-24.04", "runs-in: ubuntu-24.04"))
    assert valid(workflow).returncode != 0


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)
def test_actions_are_pinned_by_commit_and_say_their_version(workflow):
    used = re.findall(r"uses: (.*)", workflow.read_text())
    assert used and [line for line in used if not re.fullmatch(r"[\w./-]+@[0-9a-f]{40} # v\d+(\.\d+)*", line)] == []


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)
def test_no_workflow_may_write_by_default(workflow):
    assert re.search(r"^permissions:\n  contents: read$", workflow.read_text(), re.M)

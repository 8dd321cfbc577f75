"""The notebooks, the package, the README and what they say of each other agree; and each check is able to fail."""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from execnb.nbio import nb2str

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))
import checks  # noqa: E402
import nb  # noqa: E402

FIRST = """# %% [markdown]
# # First
#
# > Comes before the second.
# %%
#| default_exp core.first
# %%
#| export
def one() -> int:
    return 1
# %%
print(one())
"""
SECOND = """# %%
#| default_exp model.second
# %%
#| export
from deerml.core.first import one


def two() -> int:
    return one() + 1
# %%
from deerml.model.second import two

assert two() == 2
# %%
!true
"""
INDEX = """# %% [markdown]
# # A title
#
# [first](00_core/00_first.ipynb), [on Colab](../colab/train.ipynb), [home]({git_url}), ![plot](images/plot.png)
# %%
from deerml.model.second import two

two()
"""
COLAB = """# %% tags=parameters
epochs = 30
"""


@pytest.mark.parametrize("check", checks.CHECKS, ids=lambda check: check.__name__)
def test_holds_for_this_project(check):
    assert check(ROOT) == []


# -- small projects with one thing wrong --------------------------------------------------------------------------


def write_notebook(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    notebook = nb.from_text(text)
    for place, cell in enumerate(notebook.cells):
        cell.id = f"{place:08x}"
    path.write_text(nb2str(notebook), encoding="utf-8")


def change(path: Path, edit) -> None:
    "Lets `edit` change the notebook at `path`, as JSON"
    notebook = json.loads(path.read_text(encoding="utf-8"))
    edit(notebook)
    path.write_text(json.dumps(notebook, sort_keys=True, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def add_cell(path: Path, source: str) -> None:
    cell = {"cell_type": "code", "execution_count": None, "id": "ffffffff", "metadata": {}, "outputs": []}
    change(path, lambda notebook: notebook["cells"].append({**cell, "source": source.splitlines(True)}))


def show(path: Path, output: dict) -> None:
    "Keeps one output in the last cell of the notebook"
    change(path, lambda notebook: notebook["cells"][-1].update(outputs=[output]))


def printed(text: str) -> dict:
    return {"name": "stdout", "output_type": "stream", "text": text.splitlines(True)}


def export(root: Path) -> None:
    environ = {name: value for name, value in os.environ.items() if name != "IN_TEST"}
    command = [sys.executable, "-c", "from nbdev.doclinks import nbdev_export; nbdev_export()"]
    subprocess.run(command, cwd=root, env=environ, check=True, capture_output=True)


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("sound")
    shutil.copy(ROOT / "settings.ini", root)
    write_notebook(root / "nbs/00_core/00_first.ipynb", FIRST)
    write_notebook(root / "nbs/10_model/01_second.ipynb", SECOND)
    write_notebook(root / "nbs/index.ipynb", INDEX)
    write_notebook(root / "colab/train.ipynb", COLAB)
    colab = {"accelerator": "GPU", "colab": {"gpuType": "T4"}}
    change(root / "colab/train.ipynb", lambda notebook: notebook["metadata"].update(colab))
    export(root)
    nb.write_copies(root)
    (root / "README.md").write_text(nb.readme_text(root), encoding="utf-8")
    return root


@pytest.fixture
def project(sound, tmp_path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "project"))


def first(root: Path) -> Path:
    return root / "nbs/00_core/00_first.ipynb"


def second(root: Path) -> Path:
    return root / "nbs/10_model/01_second.ipynb"


@pytest.mark.parametrize("check", checks.CHECKS, ids=lambda check: check.__name__)
def test_a_sound_project_passes(project, check):
    (project / "deerml/model/page.html").write_text("<p>data beside the modules</p>")
    assert check(project) == []


def edit_module(root):
    with (root / "deerml/core/first.py").open("a") as module:
        module.write("# by hand\n")


def edit_notebook(root):
    add_cell(first(root), "#| export\nTHREE = 3")


def orphan_module(root):
    (root / "deerml/core/orphan.py").write_text("")


def renamed_without_a_new_index(root):
    first(root).rename(first(root).with_name("03_first.ipynb"))


def unexported_notebook(root):
    text = "# %%\n#| default_exp model.third\n# %%\n#| export\nTHREE = 3\n"
    write_notebook(root / "nbs/10_model/02_third.ipynb", text)


def broken_notebook(root):
    add_cell(first(root), "#| export\ndef broken(:")


@pytest.mark.parametrize("damage", [
    edit_module, edit_notebook, orphan_module, renamed_without_a_new_index, unexported_notebook, broken_notebook,
])
def test_a_package_that_is_not_what_the_notebooks_export(project, damage, monkeypatch):
    monkeypatch.setenv("IN_TEST", "1")  # nbdev_export would do nothing
    damage(project)
    assert checks.stale_modules(project)


@pytest.mark.parametrize("which", ["nbs/00_core/00_first.ipynb", "colab/train.ipynb"])
@pytest.mark.parametrize("dirt", [
    lambda notebook: notebook["cells"][-1].update(execution_count=3),
    lambda notebook: notebook["cells"][-1]["metadata"].update(scrolled=True),
    lambda notebook: notebook["metadata"].update(language_info={"name": "python"}),
    lambda notebook: notebook["cells"][-1].update(outputs=[printed("<object at 0x7f0000000000>\n")]),
    lambda notebook: notebook["cells"].append({**notebook["cells"][-1]}),
    lambda notebook: notebook["cells"][-1].pop("id"),
])
def test_a_notebook_that_is_not_clean(project, which, dirt):
    change(project / which, dirt)
    assert len(checks.unclean_notebooks(project)) == 1


def test_white_space_counts(project):
    path = first(project)
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    assert checks.unclean_notebooks(project)


def test_a_stale_readme(project):
    change(project / "nbs/index.ipynb", lambda notebook: notebook["cells"][0]["source"].append("\nMore."))
    assert checks.stale_readme(project)
    (project / "README.md").unlink()
    assert checks.stale_readme(project)


def test_links_that_name_another_owner(project):
    link = "[Open](https://colab.research.google.com/github/somebody/else/blob/main/colab/train.ipynb), git+https://github.com/somebody/else"
    change(project / "colab/train.ipynb", lambda notebook: notebook["cells"][0]["source"].append(link))
    assert checks.stale_links(project)
    path = project / "colab/train.ipynb"
    nb.write_nb(nb.with_owner(nb.read_nb(path), project), path)
    assert not checks.stale_links(project) and "github.com/deerml/deerml" in path.read_text()


def test_a_stale_copy_of_the_review_notebook(project):
    write_notebook(project / "colab/review.ipynb", COLAB)
    copy = project / "deerml/review/static/review.ipynb"
    assert len(checks.stale_copies(project)) == 1
    nb.write_copies(project)
    assert not checks.stale_copies(project) and copy.read_bytes() == (project / "colab/review.ipynb").read_bytes()
    add_cell(project / "colab/review.ipynb", "1")
    assert len(checks.stale_copies(project)) == 1
    (project / "colab/review.ipynb").unlink()
    assert len(checks.stale_copies(project)) == 1


def test_links_of_the_readme_start_at_the_root(project):
    text = (project / "README.md").read_text()
    assert "[first](nbs/00_core/00_first.ipynb), [on Colab](colab/train.ipynb)" in text
    assert "[home](https://github.com/" in text and "![plot](nbs/images/plot.png)" in text


@pytest.mark.parametrize("source", [
    "from deerml.model.second import two",
    "#| export\nfrom deerml.model.second import two",
    "from deerml.model import second",
    "import deerml.model.second",
    "def lazily():\n    from deerml.model.second import two\n    return two()",
    "#| eval: false\nfrom deerml.model.second import two",
    "!true\nfrom deerml.model.second import two",
    "import importlib\nimportlib.import_module('deerml.model.second')",
    "#| export\nfrom ..model.second import two",
])
def test_a_notebook_that_imports_from_one_behind_it(project, source):
    add_cell(first(project), source)
    assert len(checks.backward_imports(project)) == 1


def test_order_is_by_number_and_the_index_is_last(project):
    assert [path.name for path in nb.notebooks(project)] == ["00_first.ipynb", "01_second.ipynb", "index.ipynb"]
    write_notebook(project / "nbs/10_model/00_earlier.ipynb", "# %%\nfrom deerml.model.second import two\n")
    assert len(checks.backward_imports(project)) == 1


@pytest.mark.parametrize("output", [
    printed("saved /home/ann/x\n"), printed("saved /root/x\n"), printed("/Users/ann/x\n"), printed("C:\\Users\\ann\n"),
    printed("/tmp/tmpa1b2/x\n"), printed("/var/folders/a1/x\n"), printed("Traceback (most recent call last):\n"),
    printed(" 50%|#####     | 1/2\n"), printed("10%\r20%\n"), printed("8.1it/s\n"), printed("━━━━━━━━ 40%\n"),
    {"output_type": "error", "ename": "ValueError", "evalue": "no", "traceback": []},
    {"output_type": "display_data", "metadata": {}, "data": {"text/html": ["<b>/home/ann/x</b>"]}},
])
@pytest.mark.parametrize("which", ["nbs/00_core/00_first.ipynb", "colab/train.ipynb"])
def test_an_untidy_output(project, which, output):
    show(project / which, output)
    assert checks.untidy_outputs(project)


@pytest.mark.parametrize("output", [
    printed("recall 90 %, 3 visits\n┏━━━━━━┓\n"),
    {"output_type": "display_data", "metadata": {}, "data": {"image/png": "AA/root/AA"}},
])
def test_a_tidy_output(project, output):
    show(first(project), output)
    assert checks.untidy_outputs(project) == []


@pytest.mark.parametrize(("name", "text"), [
    ("00_core/01_again.ipynb", "# %%\n#| default_exp core.first\n"),
    ("00_core/01_again.ipynb", "# %%\n#| default_exp core.again\n# %%\n#| export core.first\nAGAIN = 1\n"),
    ("00_core/00_same_number.ipynb", "# %%\n#| default_exp core.same\n"),
    ("05_core/00_first.ipynb", "# %%\n#| default_exp model.other\n"),
    ("00_core/unnumbered.ipynb", "# %%\n1\n"),
    ("loose.ipynb", "# %%\n1\n"),
])
def test_a_misplaced_notebook(project, name, text):
    write_notebook(project / "nbs" / name, text)
    assert len(checks.misplaced_notebooks(project)) == 1


# -- notebooks as tests -------------------------------------------------------------------------------------------


def run_notebooks(root: Path, *options: str) -> subprocess.CompletedProcess:
    (root / "tools").mkdir(exist_ok=True)
    for name in ("nbs/conftest.py", "tools/nb.py", "conftest.py", "pyproject.toml"):
        shutil.copy(ROOT / name, root / name)
    outer = ("COV_", "COVERAGE_", "PYTEST_", "IN_TEST")
    environ = {name: value for name, value in os.environ.items() if not name.startswith(outer)}
    environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # half of the time would go into importing what is not used
    command = [sys.executable, "-m", "pytest", "-p", "pytest_cov", "--no-cov", "-p", "no:cacheprovider", "nbs", *options]
    return subprocess.run(command, cwd=root, env=environ, capture_output=True, text=True)


def test_sound_notebooks_pass(project):
    ran = run_notebooks(project)
    assert ran.returncode == 0 and "3 passed" in ran.stdout, ran.stdout + ran.stderr


def test_examples_run_against_the_package(project):
    module = project / "deerml/core/first.py"
    module.write_text(module.read_text().replace("return 1", "return 5"))
    ran = run_notebooks(project)
    assert ran.returncode == 1 and "2 passed" in ran.stdout
    assert "01_second.ipynb" in ran.stdout and "assert two() == 2" in ran.stdout


@pytest.mark.parametrize(("source", "said"), [
    ("assert one() == 2", "AssertionError"),
    ("#| export\nTHREE = 3", "has no attribute 'THREE'"),
    ("#| export\nprint(one())", "may only import, define and assign"),
    ("#| export\ndef broken(:", "SyntaxError"),
])
def test_a_cell_that_fails(project, source, said):
    add_cell(first(project), source)
    ran = run_notebooks(project)
    assert ran.returncode == 1 and said in ran.stdout and "00_first.ipynb cell 4 #ffffffff" in ran.stdout


@pytest.mark.parametrize(("options", "fails"), [
    (("--nbflags", "gpu"), 0), (("--nbflags", "slow"), 1), *(pytest.param(*pair, marks=pytest.mark.slow) for pair in (((), 0), (("--slow",), 1)))])
def test_flagged_cells_run_only_when_asked(project, options, fails):
    add_cell(first(project), "#| slow\n#| hide\nassert one() == 2")
    assert run_notebooks(project, *options).returncode == fails

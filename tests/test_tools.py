"""tools/nb.py: notebooks to text and back, without a change; and what text cannot hold is refused, not dropped."""
import sys
from pathlib import Path

import pytest
from execnb.nbio import nb2str, read_nb
from nbdev.clean import clean_nb

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))
import nb  # noqa: E402

NOTEBOOKS = [*nb.notebooks(), *sorted((ROOT / "colab").glob("*.ipynb"))]
TEXT = """# %% [markdown] #aaaaaaaa
# # A title
#
# A line that breaks.\u0020\u0020
#     code in prose
# %% tags=parameters,hide-input #bbbbbbbb
epochs = 30

# a comment
# %% #cccccccc
print(epochs)
# %% #dddddddd
#| eval: false
!nvidia-smi
"""


@pytest.fixture
def project(tmp_path, monkeypatch) -> Path:
    "An empty project that the tool takes for its own"
    monkeypatch.setattr(nb, "ROOT", tmp_path)
    monkeypatch.setattr(nb, "TEXT", tmp_path / ".nbtext")
    (tmp_path / "settings.ini").write_bytes((ROOT / "settings.ini").read_bytes())
    return tmp_path


def save(project: Path, text: str, name: str = "00_core/01_box.py") -> Path:
    path = project / ".nbtext" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return nb.save(path)


def text_of(notebook: Path) -> str:
    return nb.text_path(notebook).read_text(encoding="utf-8")


def sources(notebook: Path) -> list[str]:
    return [cell.source for cell in read_nb(notebook).cells]


def keep_output(notebook: Path, place: int) -> None:
    "As if the cell had been run"
    saved = read_nb(notebook)
    saved.cells[place].outputs = [{"name": "stdout", "output_type": "stream", "text": ["30\n"]}]
    notebook.write_text(nb2str(saved), encoding="utf-8")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_notebook_comes_back_byte_for_byte(path):
    notebook = read_nb(path)
    back = nb.from_text(nb.to_text(notebook), notebook)
    nb.clean(back, clean_nb)
    assert nb2str(back).encode() == path.read_bytes()


def test_a_saved_notebook_says_what_the_text_says(project):
    path = save(project, TEXT)
    assert path == project / "nbs/00_core/01_box.ipynb"
    assert sources(path) == ["# A title\n\nA line that breaks.  \n    code in prose", "epochs = 30\n\n# a comment",
                             "print(epochs)", "#| eval: false\n!nvidia-smi"]
    saved = read_nb(path)
    assert [cell.id for cell in saved.cells] == ["aaaaaaaa", "bbbbbbbb", "cccccccc", "dddddddd"]
    assert saved.cells[1].metadata["tags"] == ["parameters", "hide-input"]
    assert saved.metadata["kernelspec"]["name"] == "python3" and saved.nbformat_minor == 5


def test_saving_again_changes_nothing(project):
    path = save(project, TEXT)
    bytes_before, text_before = path.read_bytes(), text_of(path)
    save(project, text_before)
    assert path.read_bytes() == bytes_before and text_of(path) == text_before


@pytest.mark.parametrize(("text", "notebook"), [
    ("index.py", "nbs/index.ipynb"), ("90_app/09_cli.py", "nbs/90_app/09_cli.ipynb"),
    ("colab/train.py", "colab/train.ipynb"),
])
def test_folders_and_colab_have_their_place(project, text, notebook):
    path = save(project, TEXT, text)
    assert path == project / notebook and nb.text_path(path) == project / ".nbtext" / text


def test_colab_keeps_what_papermill_and_colab_need(project):
    path = save(project, TEXT, "colab/train.py")
    notebook = read_nb(path)
    notebook.metadata.update({"accelerator": "GPU", "colab": {"gpuType": "T4"}, "language_info": {"name": "python"}})
    path.write_text(nb2str(notebook))
    nb.write_text(path)
    saved = read_nb(save(project, text_of(path).replace("epochs = 30", "epochs = 60"), "colab/train.py"))
    assert set(saved.metadata) == {"accelerator", "colab", "kernelspec"}
    assert saved.cells[1].metadata == {"tags": ["parameters", "hide-input"]}
    assert saved.cells[1].source.startswith("epochs = 60")


def test_new_cells_get_ids_and_the_text_learns_them(project):
    path = save(project, "# %% [markdown]\n# Hello\n# %%\n1\n")
    ids = [cell.id for cell in read_nb(path).cells]
    assert len(set(ids)) == 2 and all(f"#{cell}" in text_of(path) for cell in ids)


def test_a_cell_copied_with_its_marker_gets_an_id_of_its_own(project):
    ids = [cell.id for cell in read_nb(save(project, TEXT + "# %% #cccccccc\nprint(epochs)\n")).cells]
    assert ids[2] == "cccccccc" and len(set(ids)) == 5


def test_outputs_stay_where_the_cell_did_and_go_where_it_changed(project):
    path = save(project, TEXT)
    keep_output(path, 1)
    keep_output(path, 2)
    save(project, text_of(path).replace("epochs = 30", "epochs = 60"))
    changed, unchanged = read_nb(path).cells[1:3]
    assert changed.outputs == [] and unchanged.outputs[0]["text"] == ["30\n"]


def test_attachments_of_prose_stay(project):
    path = save(project, TEXT)
    notebook = read_nb(path)
    notebook.cells[0].attachments = {"a.png": {"image/png": "AA=="}}
    path.write_text(nb2str(notebook))
    save(project, text_of(path).replace("A title", "Another"))
    assert read_nb(path).cells[0].attachments == {"a.png": {"image/png": "AA=="}}


def damaged(path: Path, **change) -> bytes:
    notebook = read_nb(path)
    notebook.cells[2].update(change)
    path.write_text(nb2str(notebook))
    return path.read_bytes()


@pytest.mark.parametrize("change", [
    {"cell_type": "raw"}, {"source": 'text = """\n# %%\n"""'}, {"source": "#%% old"},
    {"cell_type": "markdown", "source": "%% mermaid"},
])
def test_what_text_cannot_hold_is_refused(project, change):
    path = save(project, TEXT)
    text = text_of(path)
    before = damaged(path, **change)
    with pytest.raises(SystemExit, match="cell cccccccc"):
        nb.write_text(path)
    with pytest.raises(SystemExit, match="cell cccccccc"):
        save(project, text)
    assert path.read_bytes() == before


@pytest.mark.parametrize("marker", ["# %% [raw]", "# %%[markdown]", "#%%", "# %% #an id", "# %% note"])
def test_a_marker_with_a_slip_is_refused(project, marker):
    with pytest.raises(SystemExit, match="no start of a cell"):
        save(project, TEXT + f"{marker}\n1\n")
    assert not (project / "nbs").exists()


@pytest.mark.parametrize(("source", "found"), [
    ("#| export\nfrom a import b", {"export": ""}),
    ("#| hide\n#| slow\n1", {"hide": "", "slow": ""}),
    ("#|default_exp core.box", {"default_exp": "core.box"}),
    ("# | eval: false", {"eval": "false"}),
    ("# no directive | here", {}),
])
def test_directives(source, found):
    assert nb.directives(source) == found


@pytest.fixture
def restored(monkeypatch):
    "What running a notebook in this process changes"
    monkeypatch.setenv("IN_TEST", "1")
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])


def test_run_refreshes_outputs_skips_flagged_cells_and_cleans(project, restored):
    path = save(project, TEXT + "# %%\n#| slow\nprint('took an hour')\n# %%\n1 / 1\n")
    keep_output(path, 4)
    nb.run(path)
    outputs = [cell.get("outputs", []) for cell in read_nb(path).cells]
    assert outputs[2][0]["text"] == ["30\n"] and outputs[3] == [] and outputs[4][0]["text"] == ["30\n"]
    assert outputs[5][0]["data"]["text/plain"] == ["1.0"]
    before = path.read_bytes()
    nb.run(path)
    assert path.read_bytes() == before


def test_a_run_that_fails_leaves_the_notebook_alone(project, restored):
    path = save(project, TEXT + "# %%\n1 / 0\n")
    before = path.read_bytes()
    with pytest.raises(ZeroDivisionError):
        nb.run(path)
    assert path.read_bytes() == before


def test_the_readme_holds_prose_code_and_text_outputs(project):
    path = save(project, """# %% [markdown]
# # {repo} by {user}
# %%
#| hide
import secrets
# %%
#| echo: false
print("only its output")
# %%
user = "ann"
f"{user}"
# %%
#| eval: false
chart()
""", "index.py")
    notebook = read_nb(path)
    notebook.cells[2].outputs = [{"name": "stdout", "output_type": "stream", "text": ["shown\n"]}]
    notebook.cells[3].outputs = [{"output_type": "execute_result", "execution_count": None, "metadata": {},
                                  "data": {"text/plain": ["'ann'"]}}]
    notebook.cells[4].outputs = [{"output_type": "display_data", "metadata": {},
                                  "data": {"image/png": "AA==", "text/plain": ["<Figure>"]}}]
    path.write_text(nb2str(notebook))
    first, *rest = nb.readme_text(project).split("\n\n")
    assert first.startswith("<!--") and rest == [
        "# deerml by deerml", "```\nshown\n```", '```python\nuser = "ann"\nf"{user}"\n```', "```\n'ann'\n```",
        "```python\nchart()\n```\n"]


@pytest.mark.parametrize(("arguments", "said"), [
    ([], "Edit the notebooks"), (["--help"], "nb.py text"), (["fold"], "unknown command"),
])
def test_help_and_unknown_commands(arguments, said):
    with pytest.raises(SystemExit, match=said):
        nb.main(arguments)


def test_the_command_line(project, capsys):
    path = save(project, TEXT)
    nb.main(["text"])
    nb.main(["save", str(project / ".nbtext/00_core/01_box.py")])
    nb.main(["order"])
    assert capsys.readouterr().out.split() == [".nbtext/00_core/01_box.py", *["nbs/00_core/01_box.ipynb"] * 2]
    assert path.exists()

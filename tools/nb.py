"""Edit the notebooks from a shell and a text editor. The notebooks stay the source of truth.

    python tools/nb.py text nbs/00_core/01_box.ipynb     # -> .nbtext/00_core/01_box.py, percent text with cell ids
    $EDITOR .nbtext/00_core/01_box.py
    python tools/nb.py save .nbtext/00_core/01_box.py    # -> the notebook; ids kept, outputs kept where unchanged
    nbdev_export                                         # -> deerml/core/box.py
    python tools/nb.py run nbs/00_core/01_box.ipynb      # fresh outputs, then cleaned
    python tools/nb.py readme                            # nbs/index.ipynb -> README.md
    python tools/nb.py order                             # every notebook in reading order

`text` and `save` also take colab/*.ipynb. `text` without a file writes all notebooks.
"""
import os
import re
import secrets
import sys
from pathlib import Path

from execnb.nbio import mk_cell, nb2str, new_nb, read_nb, write_nb

ROOT = Path(__file__).resolve().parents[1]
TEXT = ROOT / ".nbtext"
MARKER = re.compile(r"^# %%(?P<markdown> \[markdown\])?(?P<tags> tags=\S+)?(?: #(?P<id>[\w-]+))?[ \t]*$", re.M)
DIRECTIVE = re.compile(r"^#\s*\|\s*([\w-]+)\s*:?[ \t]*(.*)$", re.M)
HIDDEN = {"hide", "export", "exporti", "exports", "default_exp"}


def directives(source: str) -> dict[str, str]:
    "nbdev directives of a cell: `#| eval: false` gives `{'eval': 'false'}`"
    return {match[1]: match[2].strip() for match in DIRECTIVE.finditer(source)}


def notebooks() -> list[Path]:
    "The notebooks of `nbs/` in reading order (folder number, notebook number); the index comes last"
    found = [path for path in (ROOT / "nbs").rglob("*.ipynb") if not any(p[0] in "._" for p in path.relative_to(ROOT).parts)]
    return sorted(found, key=lambda path: (path.name == "index.ipynb", path.relative_to(ROOT / "nbs").as_posix()))


def to_text(notebook) -> str:
    "Percent text in which every marker carries its cell id"
    parts = []
    for cell in notebook.cells:
        if cell.cell_type not in ("code", "markdown"):
            raise SystemExit(f"cell {cell.id} is of type {cell.cell_type}: only code and markdown are supported")
        prose = cell.cell_type == "markdown"
        body = "".join(f"# {line}".rstrip() + "\n" for line in cell.source.splitlines()) if prose else cell.source + "\n"
        tags = cell.get("metadata", {}).get("tags") or []
        parts.append(f"# %%{' [markdown]' if prose else ''}{' tags=' + ','.join(tags) if tags else ''} #{cell.id}\n{body}")
    return "\n".join(parts)


def from_text(text: str, old=None):
    "The notebook that `text` describes, with ids, metadata and unchanged outputs of `old`"
    before = {cell.id: cell for cell in old.cells} if old else {}
    markers = list(MARKER.finditer(text))
    cells = []
    for marker, following in zip(markers, [*markers[1:], None]):
        source = text[marker.end():following.start() if following else None].strip("\n")
        if marker["markdown"]:
            source = "\n".join(re.sub(r"^# ?", "", line) for line in source.splitlines())
        cell = mk_cell(source, "markdown" if marker["markdown"] else "code")
        cell.id = marker["id"] or secrets.token_hex(4)
        if marker["tags"]:
            cell.metadata["tags"] = marker["tags"].removeprefix(" tags=").split(",")
        if cell.cell_type == "code":
            past = before.get(cell.id)
            unchanged = past is not None and past.cell_type == "code" and past.source == source
            cell.execution_count, cell.outputs = None, past.outputs if unchanged else []
        cells.append(cell)
    notebook = new_nb(cells)
    notebook.metadata = old.metadata if old else {"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}}
    return notebook


def text_path(notebook: Path) -> Path:
    relative = notebook.resolve().relative_to(ROOT)
    inside = relative.relative_to("nbs") if relative.parts[0] == "nbs" else relative
    return (TEXT / inside).with_suffix(".py")


def notebook_path(text: Path) -> Path:
    inside = text.resolve().relative_to(TEXT)
    folder = ROOT if inside.parts[0] == "colab" else ROOT / "nbs"
    return (folder / inside).with_suffix(".ipynb")


def write_text(path: Path) -> Path:
    target = text_path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(to_text(read_nb(path)), encoding="utf-8")
    return target


def save(text: Path) -> Path:
    "Write the notebook of `text`, and the text again with the ids that new cells were given"
    from nbdev.clean import clean_nb

    path = notebook_path(text)
    old = read_nb(path) if path.exists() else None
    notebook = from_text(text.read_text(encoding="utf-8"), old)
    clean(notebook, clean_nb)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_nb(notebook, path)
    write_text(path)
    return path


def clean(notebook, clean_nb) -> None:
    "nbdev's cleaning, with the metadata that papermill and Colab need left in place"
    clean_nb(notebook, allowed_metadata_keys=["accelerator", "colab"], allowed_cell_metadata_keys=["tags"])


def run(path: Path, flags: set[str] = frozenset()) -> None:
    "Run the notebook as `nbdev_test` does and keep what its cells displayed"
    from execnb.shell import CaptureShell
    from nbdev.clean import clean_nb
    from nbdev.config import get_config

    path = path.resolve()
    skipped = set(get_config(path=ROOT).tst_flags.split()) - flags
    notebook = read_nb(path)

    def passed_over(cell) -> bool:
        if cell.cell_type != "code":
            return True
        found = directives(cell.source)
        if found.keys() & skipped or found.get("eval", "").lower() == "false" or "nbdev_export(" in cell.source:
            return True
        cell.outputs = []
        return False

    sys.path.insert(0, str(ROOT))
    here, os.environ["IN_TEST"] = Path.cwd(), "1"
    os.chdir(path.parent)
    try:
        CaptureShell(mpl_format="png").run_all(notebook, exc_stop=True, preproc=passed_over)
    finally:
        os.chdir(here)
    clean(notebook, clean_nb)
    write_nb(notebook, path)


def readme_text() -> str:
    "The README that `nbs/index.ipynb` makes: prose, code and text outputs; pictures stay in the notebook's folder"
    from nbdev.config import get_config

    config = get_config(path=ROOT)
    parts = ["<!-- Made from nbs/index.ipynb: edit that, then run `python tools/nb.py readme`. -->"]
    for cell in read_nb(ROOT / "nbs" / "index.ipynb").cells:
        found = directives(cell.source)
        if found.keys() & HIDDEN:
            continue
        if cell.cell_type == "markdown":
            parts.append(cell.source)
            continue
        code = "\n".join(line for line in cell.source.splitlines() if not DIRECTIVE.match(line)).strip()
        if code and found.get("echo", "").lower() != "false":
            parts.append(f"```python\n{code}\n```")
        for output in cell.outputs:
            data = output.get("data", {})
            text = "".join(output.get("text") or data.get("text/markdown") or data.get("text/plain") or "")
            if text:
                parts.append(text if "text/markdown" in data else f"```\n{text.rstrip()}\n```")
    text = "\n\n".join(parts) + "\n"
    return text.replace("{git_url}", config.git_url).replace("{user}", config.user).replace("{repo}", config.repo)


def main(arguments: list[str]) -> None:
    if not arguments or arguments[0] in ("-h", "--help"):
        raise SystemExit(__doc__)
    command, *files = arguments
    paths = [Path(name) for name in files]
    if command == "text":
        for path in paths or notebooks():
            print(write_text(path).relative_to(ROOT))
    elif command == "save":
        for path in paths:
            print(save(path).relative_to(ROOT))
    elif command == "run":
        for path in paths:
            run(path)
    elif command == "readme":
        (ROOT / "README.md").write_text(readme_text(), encoding="utf-8")
    elif command == "order":
        print("\n".join(str(path.relative_to(ROOT)) for path in notebooks()))
    else:
        raise SystemExit(f"unknown command {command!r}\n\n{__doc__}")


if __name__ == "__main__":
    main(sys.argv[1:])

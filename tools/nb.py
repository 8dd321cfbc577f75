"""Edit the notebooks from a shell and a text editor. The notebooks stay the source of truth.

    python tools/nb.py text nbs/00_core/01_box.ipynb     # -> .nbtext/00_core/01_box.py, percent text with cell ids
    $EDITOR .nbtext/00_core/01_box.py
    python tools/nb.py save .nbtext/00_core/01_box.py    # -> the notebook; ids kept, outputs kept where unchanged
    nbdev_export                                         # -> deerml/core/box.py
    python tools/nb.py run nbs/00_core/01_box.ipynb      # fresh outputs, then cleaned
    python tools/nb.py readme                            # nbs/index.ipynb -> README.md; owner's name into colab/;
                                                         # and both into the package, for `deerml review --lab`
                                                         # and `deerml train --on local`
    python tools/nb.py order                             # every notebook in reading order

`text` and `save` also take colab/*.ipynb. `text` without a file writes all notebooks.
"""
import os
import posixpath
import re
import secrets
import sys
from configparser import ConfigParser
from pathlib import Path

from execnb.nbio import mk_cell, new_nb, read_nb, write_nb

ROOT = Path(__file__).resolve().parents[1]
TEXT = ROOT / ".nbtext"
MARKER = re.compile(r"^# %%(?P<markdown> \[markdown\])?(?P<tags> tags=\S+)?(?: #(?P<id>[\w-]+))?[ \t]*$", re.M)
LIKE_A_MARKER = re.compile(r"^# ?%%.*$", re.M)
DIRECTIVE = re.compile(r"^#[ \t]*\|[ \t]*([\w-]+)[ \t]*:?[ \t]*(.*)$", re.M)
HIDDEN = {"hide", "export", "exporti", "exports", "default_exp"}
LINK = re.compile(r"(\]\()(?![a-z][a-z+.-]*:|[#/{])([^)\s]+)", re.I)


def directives(source: str) -> dict[str, str]:
    "nbdev directives of a cell: `#| eval: false` gives `{'eval': 'false'}`"
    return {match[1]: match[2].strip() for match in DIRECTIVE.finditer(source)}


def notebooks(root: Path = ROOT) -> list[Path]:
    "The notebooks of `nbs/` in reading order (folder number, notebook number); the index comes last"
    top = root / "nbs"
    found = [path for path in top.rglob("*.ipynb") if not any(part[0] in "._" for part in path.relative_to(top).parts)]
    return sorted(found, key=lambda path: (path.name == "index.ipynb", path.relative_to(top).as_posix()))


def refuse_what_text_cannot_hold(notebook) -> None:
    "Raw cells, and lines that would be read back as the start of a cell"
    for cell in notebook.cells:
        if cell.cell_type not in ("code", "markdown"):
            raise SystemExit(f"cell {cell.id} is of type {cell.cell_type}: only code and markdown are supported")
        lines = re.sub("^", "# ", cell.source, flags=re.M) if cell.cell_type == "markdown" else cell.source
        if found := LIKE_A_MARKER.search(lines):
            raise SystemExit(f"cell {cell.id} holds a line that looks like the start of a cell: {found[0]!r}")


def to_text(notebook) -> str:
    "Percent text in which every marker carries its cell id"
    refuse_what_text_cannot_hold(notebook)
    parts = []
    for cell in notebook.cells:
        prose = cell.cell_type == "markdown"
        lines = cell.source.split("\n")
        body = "\n".join(f"# {line}" if line else "#" for line in lines) if prose else cell.source
        tags = ",".join(cell.get("metadata", {}).get("tags") or [])
        marker = f"# %%{' [markdown]' if prose else ''}{f' tags={tags}' if tags else ''} #{cell.id}"
        parts.append(f"{marker}\n{body}\n")
    return "\n".join(parts)


def from_text(text: str, old=None):
    "The notebook that `text` describes, with ids, metadata and unchanged outputs of `old`"
    before = {cell.id: cell for cell in old.cells} if old else {}
    markers = list(MARKER.finditer(text))
    starts = {marker.start() for marker in markers}
    if strange := [found[0] for found in LIKE_A_MARKER.finditer(text) if found.start() not in starts]:
        raise SystemExit(f"no start of a cell: {strange[0]!r}; write `# %%` or `# %% [markdown]`, ` tags=a,b`, ` #id`")
    cells, used = [], set()
    for marker, following in zip(markers, [*markers[1:], None]):
        source = text[marker.end():following.start() if following else None].strip("\n")
        if marker["markdown"]:
            source = "\n".join(re.sub(r"^# ?", "", line) for line in source.split("\n"))
        cell = mk_cell(source, "markdown" if marker["markdown"] else "code")
        # A cell copied with its marker must not share the id of the first.
        cell.id = marker["id"] if marker["id"] and marker["id"] not in used else secrets.token_hex(4)
        used.add(cell.id)
        past = before.get(cell.id)
        if marker["tags"]:
            cell.metadata["tags"] = marker["tags"].removeprefix(" tags=").split(",")
        if cell.cell_type == "code":
            unchanged = past is not None and past.cell_type == "code" and past.source == source
            cell.execution_count, cell.outputs = None, past.outputs if unchanged else []
        elif past is not None and past.get("attachments"):
            cell.attachments = past.attachments
        cells.append(cell)
    notebook = new_nb(cells)
    kernel = {"display_name": "python3", "language": "python", "name": "python3"}
    notebook.metadata = old.metadata if old else {"kernelspec": kernel}
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
    if old:
        refuse_what_text_cannot_hold(old)
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


def at_the_root(link: str) -> str:
    "A link as written in `nbs/index.ipynb`, as the README at the root must say it"
    return posixpath.normpath(posixpath.join("nbs", link))


def readme_text(root: Path = ROOT) -> str:
    "The README that `nbs/index.ipynb` makes: prose, code and text outputs; pictures stay in the notebook's folder"
    config = ConfigParser(delimiters=["="])
    config.read(root / "settings.ini", encoding="utf-8")
    about = config["DEFAULT"]
    parts = ["<!-- Made from nbs/index.ipynb: edit that, then run `python tools/nb.py readme`. -->"]
    for cell in read_nb(root / "nbs" / "index.ipynb").cells:
        found = directives(cell.source)
        if found.keys() & HIDDEN:
            continue
        if cell.cell_type == "markdown":
            prose = LINK.sub(lambda match: match[1] + at_the_root(match[2]), cell.source)
            for key in ("git_url", "user", "repo"):
                prose = prose.replace(f"{{{key}}}", about[key])
            parts.append(prose)
            continue
        code = "\n".join(line for line in cell.source.splitlines() if not DIRECTIVE.match(line)).strip()
        if code and found.get("echo", "").lower() != "false":
            parts.append(f"```python\n{code}\n```")
        for output in cell.outputs:
            data = output.get("data", {})
            text = "".join(output.get("text") or data.get("text/markdown") or data.get("text/plain") or "")
            if text and not any(kind.startswith("image/") for kind in data):
                parts.append(text if "text/markdown" in data else f"```\n{text.rstrip()}\n```")
    return "\n\n".join(parts) + "\n"


# The notebooks in colab/ are opened at an address that names the repository's owner; settings.ini says who that is.
GITHUB = re.compile(r"(github(?:\.com)?/)[\w.-]+/[\w.-]+?(?=[/)\"\s.]|$)", re.M)


def with_owner(notebook, root: Path = ROOT):
    "The notebook with its links to GitHub pointing at the repository of settings.ini"
    config = ConfigParser(delimiters=["="])
    config.read(root / "settings.ini", encoding="utf-8")
    place = f"{config['DEFAULT']['user']}/{config['DEFAULT']['repo']}"
    for cell in notebook.cells:
        cell.source = GITHUB.sub(lambda match: match[1] + place, cell.source)
    return notebook


# An installed deerml has no colab/, and yet opens the review notebook: the package holds a copy.
COPIES = {"colab/review.ipynb": "deerml/review/static/review.ipynb", "colab/train.ipynb": "deerml/train/static/train.ipynb"}


def write_copies(root: Path = ROOT) -> None:
    for source, copy in COPIES.items():
        if (root / source).is_file():
            (root / copy).parent.mkdir(parents=True, exist_ok=True)
            (root / copy).write_bytes((root / source).read_bytes())


def main(arguments: list[str]) -> None:
    if not arguments or arguments[0] in ("-h", "--help"):
        raise SystemExit(__doc__)
    command, *files = arguments
    paths = [Path(name) for name in files]
    if command == "text":
        for path in paths or notebooks(ROOT):
            print(write_text(path).relative_to(ROOT))
    elif command == "save":
        for path in paths:
            print(save(path).relative_to(ROOT))
    elif command == "run":
        for path in paths:
            run(path)
    elif command == "readme":
        (ROOT / "README.md").write_text(readme_text(ROOT), encoding="utf-8")
        for path in sorted((ROOT / "colab").glob("*.ipynb")):
            write_nb(with_owner(read_nb(path)), path)
        write_copies(ROOT)
    elif command == "order":
        print("\n".join(str(path.relative_to(ROOT)) for path in notebooks(ROOT)))
    else:
        raise SystemExit(f"unknown command {command!r}\n\n{__doc__}")


if __name__ == "__main__":
    main(sys.argv[1:])

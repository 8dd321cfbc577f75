"""What must agree in this project. Every check takes the root of a project and returns its complaints: none is good.

    python tools/checks.py

`tests/test_project.py` runs them all, and proves on small broken projects that each of them can fail.
"""
import ast
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from execnb.nbio import nb2str, read_nb
from IPython.core.inputtransformer2 import TransformerManager

sys.path.insert(0, str(Path(__file__).resolve().parent))
from nb import COPIES, ROOT, clean, directives, notebooks, readme_text, with_owner  # noqa: E402

PACKAGE = "deerml"
EXPORTS = ("default_exp", "export", "exporti", "exports")
UNTIDY = {
    "a home folder": re.compile(r"/home/\w|/root/|/Users/\w|[A-Z]:\\+Users\\"),
    "a temporary folder": re.compile(r"/tmp/\w|/var/folders/\w"),
    "a traceback": re.compile(r"Traceback \(most recent call last\)"),
    "a progress bar": re.compile(r"\r(?!\n)|\d%\||\d ?(?:it/s|s/it)\b|[━╸]{5,}.*\d ?%"),
}


def all_notebooks(root: Path) -> list[Path]:
    "Those of the package, then those that people open on Colab"
    return [*notebooks(root), *sorted((root / "colab").glob("*.ipynb"))]


def code_cells(path: Path) -> Iterator[tuple[int, object]]:
    return ((index, cell) for index, cell in enumerate(read_nb(path).cells) if cell.cell_type == "code")


def modules_of(path: Path) -> set[str]:
    "The modules this notebook exports to: `#| default_exp core.box` and also `#| export core.box`"
    found = (directives(cell.source).get(key) for _, cell in code_cells(path) for key in EXPORTS)
    return {f"{PACKAGE}.{name}" for name in found if name}


def exporters(root: Path) -> dict[str, list[Path]]:
    "The notebooks behind each module, in reading order"
    made = defaultdict(list)
    for path in notebooks(root):
        for module in modules_of(path):
            made[module].append(path)
    return made


def stale_modules(root: Path) -> list[str]:
    "The package is, text for text, what a fresh export makes; other files than Python are data and may lie in it"
    with tempfile.TemporaryDirectory() as folder:
        fresh = Path(folder)
        shutil.copy(root / "settings.ini", fresh)
        shutil.copytree(root / "nbs", fresh / "nbs")
        # With IN_TEST the export would do nothing.
        environ = {name: value for name, value in os.environ.items() if name != "IN_TEST"}
        command = [sys.executable, "-c", "from nbdev.doclinks import nbdev_export; nbdev_export()"]
        export = subprocess.run(command, cwd=fresh, env=environ, capture_output=True, text=True)
        if export.returncode:
            return [f"nbdev_export fails: {export.stderr.strip().splitlines()[-1]}"]
        want, have = ({path.relative_to(top).as_posix(): path.read_text(encoding="utf-8")
                       for path in (top / PACKAGE).rglob("*.py")} for top in (fresh, root))
    return [
        *(f"{name}: no notebook exports it; delete it" for name in sorted(have.keys() - want.keys())),
        *(f"{name}: is missing; run nbdev_export" for name in sorted(want.keys() - have.keys())),
        *(f"{name}: differs from its notebook; run nbdev_export (after a rename, delete {PACKAGE}/_modidx.py first)"
          for name in sorted(want.keys() & have.keys()) if want[name] != have[name]),
    ]


def unclean_notebooks(root: Path) -> list[str]:
    "Every notebook is, byte for byte, what cleaning leaves of it"
    from nbdev.clean import clean_nb

    complaints = []
    for path in all_notebooks(root):
        notebook = read_nb(path)
        ids = [cell.get("id") for cell in notebook.cells]
        clean(notebook, clean_nb)
        if nb2str(notebook) != path.read_bytes().decode():
            complaints.append(f"{path.relative_to(root)}: is not clean; run nbdev_clean (--fname colab there)")
        if len(set(ids)) != len(ids):
            complaints.append(f"{path.relative_to(root)}: two cells share an id")
    return complaints


def stale_readme(root: Path) -> list[str]:
    readme = root / "README.md"
    current = readme.is_file() and readme.read_text(encoding="utf-8") == readme_text(root)
    return [] if current else ["README.md: is not what nbs/index.ipynb makes; run `python tools/nb.py readme`"]


def imports(source: str) -> Iterator[str]:
    "Dotted names that a cell imports, in functions too; `from a import b` gives `a.b`"
    for node in ast.walk(ast.parse(TransformerManager().transform_cell(source))):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{'.' * node.level}{node.module or ''}.{name.name}" for name in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            yield from (found.value for found in node.args[:1] if isinstance(getattr(found, "value", None), str))


def module_in(name: str, known: dict) -> str | None:
    "The known module that a dotted name lies in: `deerml.core.box.Box` lies in `deerml.core.box`"
    parts = name.split(".")
    return next((found for end in range(len(parts), 0, -1) if (found := ".".join(parts[:end])) in known), None)


def backward_imports(root: Path) -> list[str]:
    "A notebook imports only from notebooks before it, by folder number and notebook number; the index comes last"
    order = {path: place for place, path in enumerate(notebooks(root))}
    place_of = {module: min(order[path] for path in paths) for module, paths in exporters(root).items()}
    complaints = []
    for path, place in order.items():
        for index, cell in code_cells(path):
            where = f"{path.relative_to(root)} cell {index}"
            try:
                names = list(imports(cell.source))
            except SyntaxError as error:
                complaints.append(f"{where}: is not Python: {error}")
                continue
            complaints += [f"{where}: relative import {name!r}; write it from {PACKAGE} on"
                           for name in names if name.startswith(".")]
            behind = {module for name in names if (module := module_in(name, place_of)) and place_of[module] > place}
            complaints += [f"{where}: imports {module}, which comes later" for module in sorted(behind)]
    return complaints


def output_texts(cell) -> Iterator[str]:
    "What a cell displayed, less its pictures"
    for output in cell.outputs:
        if output["output_type"] == "error":
            yield "Traceback (most recent call last)"
        shown = {kind: value for kind, value in output.get("data", {}).items() if not kind.startswith("image/")}
        yield from ("".join(map(str, value)) for value in [output.get("text", ""), *shown.values()])


def untidy_outputs(root: Path) -> list[str]:
    "Kept outputs hold nothing that differs from machine to machine or that nobody wants to read"
    return [f"{path.relative_to(root)} cell {index}: its output holds {what}"
            for path in all_notebooks(root) for index, cell in code_cells(path)
            for what, pattern in UNTIDY.items() if any(pattern.search(text) for text in output_texts(cell))]


def misplaced_notebooks(root: Path) -> list[str]:
    "`nbs/00_core/01_box.ipynb` exports to the room `core`; no two notebooks share a number or a module"
    complaints, numbers = [], set()
    for module, paths in exporters(root).items():
        if len(paths) > 1:
            names = " and ".join(str(path.relative_to(root)) for path in paths)
            complaints.append(f"{module}: is exported by {names}")
    for path in notebooks(root):
        name = path.relative_to(root / "nbs").with_suffix("").as_posix()
        match = re.fullmatch(r"(\d\d)_(\w+)/(\d\d[a-z]?)_(\w+)", name)
        if name != "index" and not match:
            complaints.append(f"nbs/{name}.ipynb: a notebook is named like 00_core/01_box.ipynb")
        elif match:
            room = f"{PACKAGE}.{match[2]}."
            strays = [module for module in sorted(modules_of(path)) if not module.startswith(room)]
            complaints += [f"nbs/{name}.ipynb: exports to {module}, outside of its room" for module in strays]
            if (match[1], match[3]) in numbers:
                complaints.append(f"nbs/{name}.ipynb: another notebook has this number")
            numbers.add((match[1], match[3]))
    return complaints


def stale_links(root: Path) -> list[str]:
    "Notebooks of colab/ whose links name another owner than settings.ini"
    found = []
    for path in sorted((root / "colab").glob("*.ipynb")):
        before = [cell.source for cell in read_nb(path).cells]
        if before != [cell.source for cell in with_owner(read_nb(path), root).cells]:
            found.append(f"{path.relative_to(root)}: links to another repository than settings.ini; run `python tools/nb.py readme`")
    return found


def stale_copies(root: Path) -> list[str]:
    "Notebooks in the package that differ from the one in colab/ that they are copies of"
    sources = {source: (root / source).read_bytes() if (root / source).is_file() else None for source in COPIES}
    copies = {source: (root / copy).read_bytes() if (root / copy).is_file() else None for source, copy in COPIES.items()}
    return [f"{COPIES[source]}: is not {source}; run `python tools/nb.py readme`" for source in COPIES if sources[source] != copies[source]]


CHECKS = (stale_modules, unclean_notebooks, stale_readme, stale_links, stale_copies, backward_imports, untidy_outputs, misplaced_notebooks)


def main() -> None:
    complaints = [complaint for check in CHECKS for complaint in check(ROOT)]
    print("\n".join(complaints) or "All is in order.")
    raise SystemExit(bool(complaints))


if __name__ == "__main__":
    main()

"""Every notebook is a pytest item, so that plain `pytest` checks notebooks and tests alike.

An exported cell is not run again: the names it defines are taken from the generated package. So the examples of a
notebook exercise the code that ships, and coverage is measured on it.
"""
import ast
import os
import sys
import traceback
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))
from nb import directives  # noqa: E402

EXPORTING = {"export", "exporti", "exports"}


def pytest_collect_file(file_path, parent):
    if file_path.suffix == ".ipynb" and file_path.name[0] not in "._":
        return NotebookFile.from_parent(parent, path=file_path)


class NotebookFile(pytest.File):
    def collect(self):
        yield NotebookItem.from_parent(self, name="cells")


class CellError(Exception):
    "A cell failed: (index, cell, exception)"


@contextmanager
def left_as_found():
    "IPython takes over `__main__`, and a notebook may change folder, path and environment: the next test wants its own"
    here, path, main, environ = Path.cwd(), sys.path[:], sys.modules["__main__"], dict(os.environ)
    try:
        yield
    finally:
        os.chdir(here)
        sys.path[:] = path
        sys.modules["__main__"] = main
        # pytest keeps a variable of its own up to date while it runs.
        for name in os.environ.keys() - environ.keys() - {"PYTEST_CURRENT_TEST"}:
            del os.environ[name]
        os.environ.update({name: value for name, value in environ.items() if name != "PYTEST_CURRENT_TEST"})


def imported(source: str, module: str) -> str:
    "`source` with each definition replaced by the same name of `module`; import statements stay"
    lines = [f"import {module} as _module"]
    for node in ast.parse(source).body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            if getattr(node, "module", None) != "__future__":
                lines.append(ast.unparse(node))
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            patched = any(ast.unparse(decorator).startswith("patch") for decorator in node.decorator_list)
            if not patched:
                lines.append(f"{node.name} = _module.{node.name}")
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            parts = [part for target in targets for part in ast.walk(target) if isinstance(part, ast.Name)]
            lines += [f"{part.id} = _module.{part.id}" for part in parts if isinstance(part.ctx, ast.Store)]
        elif not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)):
            raise ValueError(f"an exported cell may only import, define and assign, not: {ast.unparse(node)[:80]}")
    return "\n".join(lines)


class NotebookItem(pytest.Item):
    def runtest(self):
        with left_as_found():
            os.environ["IN_TEST"] = "1"
            os.chdir(self.path.parent)
            self.run_cells()

    def run_cells(self):
        from execnb.nbio import read_nb
        from execnb.shell import CaptureShell
        from nbdev.config import get_config

        settings = get_config(path=ROOT)
        wanted = {"slow"} if self.config.getoption("--slow") else set()
        skipped = set(settings.tst_flags.split()) - wanted - set(self.config.getoption("--nbflags").split())
        module, shell = None, CaptureShell(mpl_format="png")
        for index, cell in enumerate(read_nb(self.path).cells):
            if cell.cell_type != "code":
                continue
            found = directives(cell.source)
            if "default_exp" in found:
                module = f"{settings.lib_path.name}.{found['default_exp']}"
            if found.keys() & skipped or found.get("eval", "").lower() == "false" or "nbdev_export(" in cell.source:
                continue
            try:
                shell.run(imported(cell.source, module) if found.keys() & EXPORTING else cell.source)
            except (SyntaxError, ValueError) as error:
                raise CellError(index, cell, error) from None
            if shell.exc:
                raise CellError(index, cell, shell.exc)

    def repr_failure(self, excinfo):
        if not isinstance(excinfo.value, CellError):
            return super().repr_failure(excinfo)
        index, cell, error = excinfo.value.args
        source = "\n".join(f"    {line}" for line in cell.source.splitlines())
        trace = "".join(traceback.format_exception(error)[-6:])
        return f"{self.path.relative_to(ROOT)} cell {index} #{cell.id}\n\n{source}\n\n{trace}"

    def reportinfo(self):
        return self.path, None, str(self.path.relative_to(ROOT))

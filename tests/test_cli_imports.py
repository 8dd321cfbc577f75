"""`deerml --help` shows its help without loading what the commands stand on: that is what makes it quick."""
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ("torch", "ultralytics", "cv2", "numpy", "pydantic", "sqlalchemy", "onnxruntime")
HELP = """
import sys
from deerml.app.cli import main
sys.argv = ["deerml", *{arguments}]
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
"""
REPORT = f"""
import json, sys
print(json.dumps([name for name in {HEAVY} if name in sys.modules]))
"""


def loaded_by(code: str) -> tuple[str, list[str]]:
    "What a fresh Python prints while it runs `code`, and which heavy packages it has loaded afterwards"
    ran = subprocess.run([sys.executable, "-c", code + REPORT], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    *printed, loaded = ran.stdout.splitlines()
    return "\n".join(printed), json.loads(loaded)


CLI = list((ROOT / "nbs/90_app").glob("[0-9][0-9]_cli.ipynb"))


@pytest.mark.skipif(not CLI, reason="no notebook makes deerml.app.cli yet")
@pytest.mark.parametrize(("arguments", "allowed"), [(["--help"], []), (["init", "--help"], ["pydantic"])])
def test_help_loads_nothing_heavy(arguments, allowed):
    "Typer itself loads pydantic to show a command's own parameters; the help of the whole does without"
    printed, loaded = loaded_by(HELP.format(arguments=arguments))
    assert "Usage" in printed and set(loaded) <= set(allowed)


def test_what_is_loaded_is_noticed():
    assert loaded_by("import numpy, pydantic")[1] == ["numpy", "pydantic"]

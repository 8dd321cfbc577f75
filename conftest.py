"""Options of the whole test run."""
import gc
import os
from pathlib import Path

import pytest

# Settings of the person who runs the tests must not change them, and the tests must never reach that person's data.
for name in [name for name in os.environ if name.startswith("DEERML_") and name != "DEERML_SAMPLE_DATA"]:
    del os.environ[name]

DATA = Path(os.environ.get("DEERML_SAMPLE_DATA", Path(__file__).resolve().parent.parent / "shared" / "data"))


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also what takes minutes: full sweeps, trainings")
    parser.addoption("--nbflags", default="", help='flagged notebook cells to run as well, for example "gpu data"')


def pytest_collection_modifyitems(config, items):
    for item in items:
        if item.get_closest_marker("slow") and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="slow: run with --slow"))
        if item.get_closest_marker("data") and not DATA.is_dir():
            item.add_marker(pytest.mark.skip(reason="the sample data folder is absent: set DEERML_SAMPLE_DATA"))


def pytest_runtest_setup(item):
    """Once a file: what is alive then is left out of later garbage collections.

    A training collects garbage several times, and with the modules and notebooks of a whole run in memory each time
    would take longer than the training itself.
    """
    if item.path != getattr(item.session, "file_at_work", None):
        item.session.file_at_work = item.path
        gc.collect()
        gc.freeze()


@pytest.fixture(scope="session")
def sample_data() -> Path:
    return DATA

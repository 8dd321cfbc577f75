"""Each guard that matters is taken out once, in a copy of the package, and the tests of its promise must turn red.

A guard whose loss no test notices is decoration.
"""
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

MUTANTS = {  # name: (file, what stands there, what the mutant has, the test that must fail)
    "export takes unfinished frames": (
        "capture/truth.py", 'COMPLETE = ("boxes_complete", "verified_empty")', 'COMPLETE = ("boxes_complete", "verified_empty", "in_progress")',
        "test_an_unreviewed_frame_never_becomes_a_label"),
    "the split ignores nights": (
        "data/version.py", "truth[frame.id], split[frame.night_key]))", "truth[frame.id], SPLITS[frame.id % 3]))",
        "test_a_night_lies_in_one_split_for_ever"),
    "copies of an image stay in every split": (
        "data/version.py", "home_night[frame.image] == frame.night_key and", "True and",
        "test_no_image_lies_in_two_splits"),
    "the gate swaps the channels": (
        "judge/collect.py", "found = detector.batch(pictures)", "found = detector.batch([pixels[:, :, ::-1].copy() for pixels in pictures])",
        "test_what_is_judged_is_what_serves"),
    "the gate reads the point estimate": (
        "judge/gate.py", "holds = change.lower > -settings.recall_margin", "holds = change.estimate > -settings.recall_margin",
        "test_a_point_estimate_never_promotes"),
    "the gate asks for no proof of a gain": (
        "judge/gate.py", "holds = estimate > 0 and p <= settings.alpha", "holds = estimate > 0",
        "test_a_point_estimate_never_promotes"),
    "the bootstrap resamples frames": (
        "judge/bootstrap.py", "weights = row[sample.frame_unit].astype(float)", "weights = multiplicities(len(sample.frame_unit), 1, draw)[0].astype(float)",
        "test_what_belongs_to_one_visit_is_resampled_together"),
    "the weights are ignored": (
        "judge/evidence.py", "visit_weight=weight if known else", "visit_weight=(weight > 0).astype(float) if known else",
        "test_a_window_that_stands_for_ten_counts_ten_times"),
    "the row is committed before the file is durable": (
        "capture/store.py", "    write_images(store.home.images, frames, headers, hashes)\n    return list(insert_rows(store, frames, headers, hashes).ids)",
        "    ids = list(insert_rows(store, frames, headers, hashes).ids)\n    write_images(store.home.images, frames, headers, hashes)\n    return ids",
        "test_a_row_is_committed_only_after_its_file_is_durable or test_a_crash_at_any_operation"),
    "the folder of an image is not synced": (
        "capture/store.py", "    for folder in touched:\n        fsync_folder(folder)\n", "",
        "test_a_row_is_committed_only_after_its_file_is_durable"),
    "the digest of a bundle is not checked": (
        "model/bundle.py", "if (found := sha256_bytes(data)) != expected:", "if (found := sha256_bytes(data)) == 0:", "test_a_flipped_byte_in_a_bundle"),
    "a training night is counted in replay": (
        "judge/replay.py", "counted = tuple(sorted(there.keys() & may.keys()))", "counted = tuple(sorted(there))", "test_a_replay_counts_no_night"),
    "replay shows the reviewer which model spoke": (
        "review/items.py", "is_blind = (of_strip[0].camera, of_strip[0].window) in blind.windows", "is_blind = False", "test_a_replay_does_not_tell"),
}


SLOW = ("copies of an image stay in every split", "the folder of an image is not synced", "the gate asks for no proof of a gain")  # their guards have a neighbour above


def run_promises(folder: Path, chosen: str, file: str = "", change: Callable[[str], str] = str) -> subprocess.CompletedProcess:
    "Run the promises against a copy of the package, in a folder of its own, so that the checkout cannot be imported"
    shutil.copytree(ROOT / "deerml", folder / "deerml")  # with what is compiled: only the mutant is compiled again
    for name in ("test_promises.py", "yards.py"):
        shutil.copy(ROOT / "tests" / name, folder)
    if file:
        path = folder / "deerml" / file
        path.write_text(change(path.read_text()))
    command = [sys.executable, "-m", "pytest", "test_promises.py", "-k", chosen, "-q", "-p", "no:cacheprovider", "-c", os.devnull, "--rootdir", str(folder)]
    return subprocess.run(command, cwd=folder, env={**os.environ, "PYTHONPATH": str(folder), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in MUTANTS])
def test_the_loss_of_a_guard_is_noticed(name, tmp_path):
    file, before, after, chosen = MUTANTS[name]

    def without_the_guard(text: str) -> str:
        assert text.count(before) == 1, f"the guard of this mutant is not where it was: {before}"
        return text.replace(before, after)

    result = run_promises(tmp_path, chosen, file, without_the_guard)
    assert result.returncode == 1 and " failed" in result.stdout, f"no test noticed it:\n{result.stdout}"


def test_an_unchanged_copy_passes(tmp_path):
    result = run_promises(tmp_path, "flipped_byte or yard_of_these_tests")
    assert result.returncode == 0 and "2 passed" in result.stdout, result.stdout

"""What the gate says on the simulated yards of many seeds: nothing in the demo is chosen.

    python benchmarks/demo_seeds.py [--seeds 20] [--first 0] [--jobs 1]

Runs the demo once for each seed (two to four minutes each) and prints a line as each ends: the verdict, both models'
figures, the time. With --jobs the times are no measure of a demo that has the machine to itself. The last line is one
JSON list of rows.
"""
import argparse
import json
import statistics
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

from deerml.app.demo import run_demo


def run_one(seed: int) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        return run_demo(Path(folder) / "yard", seed).to_dict()


def run_all(seeds: range, jobs: int) -> Iterator[dict]:
    "Outcomes as they come"
    if jobs == 1:
        yield from map(run_one, seeds)
        return
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        for done in as_completed([pool.submit(run_one, seed) for seed in seeds]):
            yield done.result()


def shown(figure: float | None) -> str:
    "A figure, or a dash where there was no such model or no such figure"
    return "-" if figure is None else f"{figure:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20, help="how many")
    parser.add_argument("--first", type=int, default=0, help="the first of them")
    parser.add_argument("--jobs", type=int, default=1, help="demos at the same time")
    asked = parser.parse_args()
    print(f"{'seed':>4} {'verdict':<22}{'visits found':>16}{'false alarms/h':>18}{'AP50':>16}{'seconds':>9}")
    outcomes = []
    for outcome in run_all(range(asked.first, asked.first + asked.seeds), asked.jobs):
        outcomes.append(outcome)
        pairs = [" -> ".join(shown(outcome[model][name]) for model in ("champion", "challenger")) for name in ("visit_recall", "false_alarms_per_camera_hour", "ap50")]
        print(f"{outcome['seed']:>4} {outcome['verdict']:<22}{pairs[0]:>16}{pairs[1]:>18}{pairs[2]:>16}{outcome['seconds']:>9.0f}", flush=True)
    verdicts = Counter(outcome["verdict"] for outcome in outcomes)
    print("\n" + ", ".join(f"{count} {verdict}" for verdict, count in verdicts.most_common()))
    seconds = statistics.median(outcome["seconds"] for outcome in outcomes)
    print(json.dumps([{"name": "whole demo loop", "ours": round(seconds, 1), "peer": None, "peer_name": None, "floor": None, "ratio": None, "target": 180, "ok": seconds < 180, "unit": "s",
                       "note": f"{len(outcomes)} seeds, {asked.jobs} at a time: {dict(verdicts)}"}]))


if __name__ == "__main__":
    main()

"""What the gate says on the simulated yards of many seeds: nothing in the demo is chosen.

    python benchmarks/demo_seeds.py [--seeds 20] [--first 0]

Runs the demo once for each seed, one after the other (two to three minutes each), and prints a line as each ends: the
verdict, both models' figures, the time. The last line is one JSON list of rows.
"""
import argparse
import json
import statistics
import tempfile
from collections import Counter
from pathlib import Path

from deerml.app.demo import run_demo


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20, help="how many")
    parser.add_argument("--first", type=int, default=0, help="the first of them")
    asked = parser.parse_args()
    print(f"{'seed':>4} {'verdict':<22}{'visits found':>16}{'false alarms/h':>18}{'AP50':>16}{'seconds':>9}")
    outcomes = []
    for seed in range(asked.first, asked.first + asked.seeds):
        with tempfile.TemporaryDirectory() as folder:
            outcome = run_demo(Path(folder) / "yard", seed).to_dict()
        outcomes.append(outcome)
        pairs = ["{:.2f} -> {:.2f}".format(*(outcome[model][name] or 0.0 for model in ("champion", "challenger"))) for name in ("visit_recall", "false_alarms_per_camera_hour", "ap50")]
        print(f"{seed:>4} {outcome['verdict']:<22}{pairs[0]:>16}{pairs[1]:>18}{pairs[2]:>16}{outcome['seconds']:>9.0f}", flush=True)
    verdicts = Counter(outcome["verdict"] for outcome in outcomes)
    print("\n" + ", ".join(f"{count} {verdict}" for verdict, count in verdicts.most_common()))
    seconds = statistics.median(outcome["seconds"] for outcome in outcomes)
    print(json.dumps([{"name": "whole demo loop", "ours": round(seconds, 1), "peer": None, "peer_name": None, "floor": None, "ratio": None, "target": 180, "ok": seconds < 180, "unit": "s",
                       "note": f"{len(outcomes)} seeds: {dict(verdicts)}"}]))


if __name__ == "__main__":
    main()

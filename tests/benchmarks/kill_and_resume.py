"""SIGKILL at random moments, again and again, then resume to the end: are the weights those of an undisturbed run?

    python tests/benchmarks/kill_and_resume.py digits tickets
    python tests/benchmarks/kill_and_resume.py --kills 20 sst2:data.folder=FOLDER

For each recipe one run that nothing disturbs, and then `--kills` runs that are killed once each, at a random moment of
the time that the first one took, and resumed. Exit code 1 unless all end with the same bytes; the last line is JSON.
"""

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from models.checkpoint import load_checkpoint


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="+", metavar="RECIPE[:KEY=VALUE…]")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--save-every-steps", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    found = [run_recipe(recipe, options) for recipe in options.recipes]
    print(json.dumps(found))
    sys.exit(not all(result["identical"] == result["kills"] for result in found))


def run_recipe(text: str, options: argparse.Namespace) -> dict[str, object]:
    name, *overrides = text.split(":")
    moments = random.Random(f"{options.seed}/{name}")
    with tempfile.TemporaryDirectory() as folder:
        settings = [
            word
            for override in [*overrides, f"trainer.save_every_steps={options.save_every_steps}"]
            for word in ("-s", override)
        ]

        def command(run: Path) -> list[str]:
            return [sys.executable, "-m", "torchport", "train", name, *settings, "--out", str(run), "--resume"]

        reference = Path(folder) / "undisturbed"
        started = time.monotonic()
        subprocess.run(command(reference), check=True, capture_output=True)
        seconds = time.monotonic() - started
        identical = inside = 0
        for number in range(options.kills):
            run = Path(folder) / f"killed-{number}"
            moment = moments.uniform(0, seconds)
            process = subprocess.Popen(command(run), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            time.sleep(moment)
            process.send_signal(signal.SIGKILL)
            process.wait()
            saved = load_checkpoint(run / "last.pt").training if (run / "last.pt").exists() else None
            step = saved["trainer"]["steps"] if saved else 0
            inside += bool(saved and saved["batches_done"])
            subprocess.run(command(run), check=True, capture_output=True)
            same = (run / "checkpoint.pt").read_bytes() == (reference / "checkpoint.pt").read_bytes()
            identical += same
            outcome = "same" if same else "DIFFERENT"
            print(f"{name} {number}: killed at {moment:.2f} s, resumed after step {step}: {outcome}", flush=True)
        return {
            "recipe": name,
            "kills": options.kills,
            "identical": identical,
            "resumed_inside_an_epoch": inside,
            "undisturbed_seconds": round(seconds, 1),
        }


if __name__ == "__main__":
    main()

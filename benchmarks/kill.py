"""Kill a run with SIGKILL at random moments, go on each time, and compare its file with that of a run left alone.

python benchmarks/kill.py --kills 20 [--shards] [--seed 1] [--runs FOLDER] [options of lilt train]
Both runs are `lilt train` on the demo in processes of their own, by default with dropout, augmentation, a teacher with
a memory bank, LoRA and two data workers, and a state every 4 steps; 5 steps or more for each kill. A moment is a number
of steps after the start and some tenths of a second, or falls into the start itself; where no state is there yet the
run starts again. Ends with status 1 where a hash differs. Appends a JSON line to results/kill.jsonl, or with --output
to that file. POSIX only.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from datetime import date
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results" / "kill.jsonl"
STARTING = 15.0  # seconds in which a run that starts can be killed
OPTIONS = [
    "--policy", "lora(r=4)+layernorm", "--max_images", "240", "--batch_size", "48", "--workers", "2",
    "--eval_every", "0.8", "--log_every", "1", "--teacher", "timm:test_vit?pretrained=false&image_px=32",
    "--distill", "contrastive(bank=144)", "--test_split", "none",
]  # fmt: skip


def command(folder: Path, options: list[str], *more: str) -> list[str]:
    return [sys.executable, "-m", "lilt", "train", "--output", str(folder), *options, *more]


def alone(folder: Path, options: list[str], environment: dict[str, str]) -> float:
    """Train without a break and return the seconds it took."""
    began = time.monotonic()
    subprocess.run(command(folder, options), env=environment, check=True, capture_output=True)
    return time.monotonic() - began


def go_on(folder: Path, options: list[str]) -> list[str]:
    """Return the command that goes on with a run, from its newest state or from the start."""
    if any((folder / "state").glob("step-*")):
        return command(folder, options, "--resume")
    return command(folder, options, "--overwrite")


def killed(folder: Path, options: list[str], environment: dict[str, str], moments: list[tuple[int, float]]) -> int:
    """Train and kill at each moment, then to the end; return how many kills found the run alive."""
    found = 0
    for steps, seconds in moments:
        aim = _logged(folder) + steps
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        with subprocess.Popen(go_on(folder, options), env=environment, start_new_session=True, **quiet) as program:  # type: ignore[call-overload]
            while steps and program.poll() is None and _logged(folder) < aim:
                time.sleep(0.02)
            with suppress(subprocess.TimeoutExpired):
                program.wait(seconds)
            found += program.poll() is None
            with suppress(ProcessLookupError):  # it had ended
                os.killpg(program.pid, signal.SIGKILL)  # its data workers too
    if not _finished(folder):
        subprocess.run(go_on(folder, options), env=environment, check=True, capture_output=True)
    return found


def _lines(folder: Path) -> list[str]:
    file = folder / "metrics.jsonl"
    return file.read_text().splitlines() if file.is_file() else []


def _logged(folder: Path) -> int:
    """Return how many steps a run has logged; what it logged after its state it forgets as it goes on."""
    return sum('"loss"' in line for line in _lines(folder))


def _finished(folder: Path) -> bool:
    return '"seconds"' in "".join(_lines(folder)[-1:])


def digest(folder: Path) -> str:
    return hashlib.sha256((folder / "adapter.safetensors").read_bytes()).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--shards", action="store_true", help="train on tars packed from the demo")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--runs", type=Path, help="default: a temporary folder")
    parser.add_argument("--output", type=Path, default=RESULTS)
    given, more = parser.parse_known_args()
    epochs = max(5, given.kills)  # of 5 steps
    options = [*OPTIONS, "--epochs", str(epochs), *more]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as temporary:
        runs = given.runs or Path(temporary)
        if given.shards:
            pack = [sys.executable, "-m", "lilt", "shards", "--output", str(runs / "shards"), "--per_shard", "100"]
            subprocess.run(pack, env=environment, check=True, capture_output=True)
            at = options.index("--max_images")
            length = ["--max_steps", str(5 * epochs)]
            options[at : at + 2] = [*length, "--val_data", "demo", "--data", str(runs / "shards")]
        seconds = alone(runs / "alone", options, environment)
        chance = random.Random(given.seed)
        # every fourth in the start
        steps = [0 if kill % 4 == 3 else chance.randint(1, 8) for kill in range(given.kills)]
        moments = [(n, chance.uniform(0, 0.4 if n else STARTING)) for n in steps]
        alive = killed(runs / "killed", options, environment, moments)
        same = digest(runs / "alone") == digest(runs / "killed")
    row = {
        "date": date.today().isoformat(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}",
        "data": "shards" if given.shards else "manifest",
        "options": more,
        "kills": alive,
        "moments": [(n, round(moment, 2)) for n, moment in moments],
        "seconds_alone": round(seconds, 2),
        "same": same,
    }
    with given.output.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(row) + "\n")
    print(f"killed {alive} of {given.kills} times in {row['data']}: {'the same bits' if same else 'ANOTHER FILE'}")
    sys.exit(0 if same else 1)


if __name__ == "__main__":
    main()

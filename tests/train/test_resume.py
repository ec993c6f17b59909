"""A run that was stopped and resumed ends in the same bits as one that was not; the state holds no frozen weights."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import get_worker_info

from lilt import checkpoint
from lilt.data import Sample
from lilt.train import Trainer, read_metrics
from lilt.train.state import find_state
from lilt.train.stop import Stop
from tests.train.conftest import Run, interrupt_at

ROOT = Path(__file__).parents[2]
# dropout in both towers, augmentation, a caption drawn anew in each epoch
NOISY: dict[str, Any] = {"policy": "lora(r=2)", "epochs": 4, "batch_size": 5, "augment": "crop(0.4,1)+hflip"}


@pytest.fixture
def noisy(settings: dict[str, Any]) -> dict[str, Any]:
    return NOISY | {"vision": f"{settings['vision']}?proj_drop_rate=0.2"}


@pytest.mark.parametrize(("step", "workers"), [(1, 0), (3, 0), (4, 0), (5, 2)])
def test_stop_and_resume_ends_in_the_same_bits(run: Run, noisy: dict[str, Any], step: int, workers: int) -> None:
    whole = run("whole", **noisy)
    first = run("parts", wish=interrupt_at(step), workers=workers, **noisy)
    assert not first.outcome.finished
    assert first.outcome.place.step == step
    second = run("parts", resume=True, workers=workers, **noisy)
    assert second.outcome.finished
    adapters = [load_file(r.folder / checkpoint.ADAPTER) for r in (whole, second)]
    assert all(torch.equal(adapters[0][name], adapters[1][name]) for name in adapters[0] | adapters[1])
    last = [r.model.trained() for r in (whole, second)]
    assert all(torch.equal(last[0][name], last[1][name]) for name in last[0] | last[1])
    histories = [[(r["step"], r["loss"]) for r in read_metrics(x.folder) if "loss" in r] for x in (whole, second)]
    assert histories[0] == histories[1]


def test_the_comparison_can_see_a_difference(run: Run, noisy: dict[str, Any]) -> None:
    one, other = (run(name, seed=seed, **noisy) for name, seed in (("one", 0), ("other", 1)))
    trained = one.model.trained(), other.model.trained()
    assert not any(torch.equal(trained[0][n], trained[1][n]) for n in trained[0] if "lora" in n and trained[0][n].any())


def test_what_a_killed_run_logged_after_its_state_is_made_again_once(run: Run) -> None:
    done = run(wish=interrupt_at(3), epochs=3)
    with (done.folder / "metrics.jsonl").open("a") as lines:
        lines.write('{"step": 4, "loss": 1.0}\n{"step": 5, "lo')
    again = run(epochs=3, resume=True)
    assert [r["step"] for r in read_metrics(again.folder) if "loss" in r] == [1, 2, 3, 4, 5, 6]


def test_resuming_a_finished_run_trains_no_further(run: Run) -> None:
    done = run(epochs=1)
    again = run(epochs=1, resume=True)
    assert again.outcome.finished
    assert all(torch.equal(p, again.model.trained()[n]) for n, p in done.model.trained().items())


def test_a_resumed_run_lists_a_bad_image_no_second_time(run: Run, pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"no picture")
    files = [*sorted(pictures.glob("*.png")), tmp_path / "bad.png"]
    options: dict[str, Any] = {
        "samples": [Sample(f, ("a boat",), "train") for f in files],
        "epochs": 3,
        "batch_size": 13,
        "max_bad_share": 0.5,
    }
    run(wish=interrupt_at(2), **options)
    assert run(resume=True, **options).outcome.bad_images == 1
    assert len((tmp_path / "run" / "bad_images.jsonl").read_text().splitlines()) == 1


def test_the_state_holds_trained_tensors_alone(run: Run) -> None:
    done = run(epochs=1, policy="layernorm")
    state, _ = find_state(done.folder)
    trained = done.model.trained()
    assert set(load_file(state / "trained.safetensors")) == set(trained)
    values = sum(p.numel() for p in trained.values())
    total = sum(p.numel() for p in done.model.parameters())
    allowed = 4 * values * 3 + 120_000  # the tensors, two moments, and what the files need beside
    size = sum(file.stat().st_size for file in state.rglob("*") if file.is_file())
    assert size < allowed < 4 * total
    moments = torch.load(state / "optimizer.bin", weights_only=True)["state"]
    assert sum(t["exp_avg"].numel() for t in moments.values()) == values


def test_a_run_without_a_state_cannot_be_resumed(run: Run) -> None:
    with pytest.raises(ValueError, match=r"has no state to resume from; expected .*step-…; start it without --resume"):
        run(resume=True)


def test_a_torn_state_is_passed_over(run: Run) -> None:
    done = run(epochs=2, keep_states=2)
    states = sorted((done.folder / "state").iterdir())
    assert [state.name for state in states] == ["step-00000002", "step-00000004"]
    file = states[1] / "optimizer.bin"
    file.write_bytes(file.read_bytes()[:-1])  # the disk was full
    (done.folder / "state" / "step-00000005.tmp").mkdir()
    assert find_state(done.folder) == (states[0], [states[1]])
    again = run(epochs=2, keep_states=2, resume=True)
    assert again.outcome.finished
    assert find_state(done.folder) == (states[1], [])
    assert not list((done.folder / "state").glob("*.tmp"))


def test_without_a_whole_state_it_says_so(run: Run) -> None:
    done = run(epochs=1)
    state, _ = find_state(done.folder)
    (state / "trained.safetensors").unlink()
    with pytest.raises(ValueError, match=r"no state to resume from; 1 are torn \(files missing or changed\)"):
        run(epochs=1, resume=True)


def test_the_newest_states_are_kept(run: Run) -> None:
    done = run(epochs=4, keep_states=3)
    assert [s.name for s in sorted((done.folder / "state").iterdir())] == [f"step-{n:08d}" for n in (4, 6, 8)]


def test_a_torn_state_of_a_later_step_goes_and_not_the_new_one(run: Run) -> None:
    done = run(wish=interrupt_at(3), epochs=2)
    states = done.folder / "state"
    shutil.copytree(states / "step-00000003", states / "step-00000100")
    (states / "step-00000100" / "optimizer.bin").unlink()
    assert run(epochs=2, keep_states=1, resume=True).outcome.finished
    assert [s.name for s in states.iterdir()] == ["step-00000004"]


def test_a_second_interrupt_acts_at_once() -> None:
    before = signal.getsignal(signal.SIGINT)
    with Stop() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.asked
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_data_workers_leave_ctrl_c_to_the_main_process(run: Run) -> None:
    def wish(trainer: Trainer) -> None:
        plain = trainer.dataset.transform

        def transform(picture: Image.Image) -> Tensor:
            assert get_worker_info() is not None
            os.kill(os.getpid(), signal.SIGINT)  # a terminal sends it to every process
            return plain(picture)

        trainer.dataset.transform = transform

    assert run(epochs=1, workers=1, val_split="none", wish=wish).outcome.finished


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL")
def test_after_three_kills_the_file_is_the_same(pictures: Path, tmp_path: Path) -> None:
    kill = [sys.executable, str(ROOT / "benchmarks" / "kill.py"), "--kills", "3", "--output", str(tmp_path / "out")]
    command = [*kill, "--val_data", str(pictures / "manifest.jsonl")]  # with few pictures: a state needs an evaluation
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    (row,) = [json.loads(line) for line in (tmp_path / "out").read_text().splitlines()]
    assert row["same"] and row["kills"] >= 2  # the last may come too late

"""DDP and FSDP2 in two and four processes do what one process does: gradients, whole runs, files, and resume."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from accelerate import Accelerator
from accelerate.parallelism_config import ParallelismConfig
from accelerate.utils import FullyShardedDataParallelPlugin
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor

from lilt.checkpoint import read_contract
from lilt.cli import main
from lilt.config import TrainConfig
from lilt.run import align
from lilt.train import read_metrics
from lilt.train.engine import check_sharding
from tests import engine_run
from tests.launch import environment
from tests.test_distributed import ROOT, torchrun

# what `accelerate launch` puts into the environment
FSDP2 = environment(ROOT / "recipes" / "accelerate" / "8gpu_fsdp2.yaml")
# each half of four processes holds a whole model
HYBRID = environment(ROOT / "recipes" / "accelerate" / "2x8gpu_fsdp2.yaml") | {"PARALLELISM_CONFIG_DP_SHARD_SIZE": "2"}
ENGINES = {"ddp 2": (2, {}), "ddp 4": (4, {}), "fsdp2 2": (2, FSDP2), "fsdp2 2x2": (4, HYBRID)}
FEW = {name: "pieces" for name, (processes, _) in ENGINES.items() if processes == 4}  # these do less
every_engine = pytest.mark.parametrize("engine", [name for name in ENGINES if name not in FEW])
GRADIENTS = [(e, p, m) for e in ENGINES for p in engine_run.POLICIES for m in (None, 1) if e not in FEW or p == "full"]
RUNS = [(e, name) for e in ENGINES for name in engine_run.RUNS if FEW.get(e, name) == name]


@pytest.fixture(scope="module")
def still_text(tiny_text: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tiny BERT without dropout."""
    folder = tmp_path_factory.mktemp("still")
    shutil.copytree(tiny_text.removeprefix("hf:"), folder, dirs_exist_ok=True)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0})
    )
    return f"hf:{folder}"


@pytest.fixture(scope="module")
def results(
    tiny_vision: str, still_text: str, pictures: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """The files of engine_run from one process (this one) and from each engine."""
    folders = {name: tmp_path_factory.mktemp("engine") for name in ("one", *ENGINES)}
    given = (tiny_vision, still_text, str(pictures))
    engine_run.main(*given, str(folders["one"]))
    for processes, few in ((2, ()), (4, set(FEW.values()))):
        engines = {str(folders[name]): said for name, (count, said) in ENGINES.items() if count == processes}
        torchrun(processes, ROOT / "tests" / "engine_run.py", json.dumps(engines), *given, *few)
    return folders


@pytest.mark.parametrize(("engine", "policy", "micro_batch"), GRADIENTS)
def test_every_gradient_is_that_of_one_process(
    results: dict[str, Path], engine: str, policy: str, micro_batch: int | None
) -> None:
    one = load_file(results["one"] / f"{policy}.None")
    many = load_file(results[engine] / f"{policy}.{micro_batch}")
    assert one.keys() == many.keys()
    assert {"bias", "scale.log", "projection.text.weight", "embedding", "mean loss"} <= one.keys()
    for name, expected in one.items():
        torch.testing.assert_close(many[name], expected, rtol=2e-4, atol=1e-5, msg=partial("{}: {}".format, name))
    # attention key biases have no gradient, and A of LoRA has none before B has moved
    assert sum(bool(tensor.abs().max() > 1e-4) for tensor in one.values()) > 0.6 * len(one)


def without_keys(name: str, tensor: Tensor) -> Tensor:
    """Leave out the biases of attention keys: their gradient is the noise of rounding, and AdamW makes steps of it."""
    if name.endswith("key.bias"):
        return tensor[:0]
    return torch.cat([tensor.chunk(3)[0], tensor.chunk(3)[2]]) if name.endswith("qkv.bias") else tensor


@pytest.mark.parametrize(("engine", "name"), RUNS)
def test_a_run_ends_as_that_of_one_process(results: dict[str, Path], engine: str, name: str) -> None:
    folders = [results[where] / f"run {name}" for where in ("one", engine)]
    one, many = (load_file(folder / "adapter.safetensors") for folder in folders)
    assert list(one) == list(many)
    # AdamW divides by the root of the second moment, so that where a gradient is almost nothing its noise counts
    atol = 1e-2 if name == "bf16" else 2e-4
    for tensor, expected in one.items():
        found, expected = (without_keys(tensor, t) for t in (many[tensor], expected))
        torch.testing.assert_close(found, expected, rtol=0, atol=atol, msg=partial("{}: {}".format, tensor))
    assert [f.stat().st_size for f in (folders[0] / "adapter.safetensors", folders[1] / "adapter.safetensors")] == [
        (folders[0] / "adapter.safetensors").stat().st_size
    ] * 2
    contracts = [read_contract(folder) for folder in folders]
    for key in ("tensors", "trained", "total"):
        assert contracts[0][key] == contracts[1][key], key
    losses = [[r["loss"] for r in read_metrics(folder) if "loss" in r] for folder in folders]
    assert len(losses[0]) == 3
    assert losses[1] == pytest.approx(losses[0], rel=2e-2 if name == "bf16" else 1e-3)


@every_engine
def test_a_step_that_is_broken_in_one_process_is_left_out_in_all(results: dict[str, Path], engine: str) -> None:
    folders = [results[where] / "run spoilt" for where in ("one", engine)]
    for folder in folders:
        steps = [r for r in read_metrics(folder) if "loss" in r]
        assert [r["skipped_steps"] for r in steps] == [0, 1, 1]
        assert [r["loss"] is None for r in steps] == [False, True, False]
    one, many = (load_file(folder / "adapter.safetensors") for folder in folders)
    for name, expected in one.items():
        found, expected = (without_keys(name, t) for t in (many[name], expected))
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-4, msg=partial("{}: {}".format, name))


@every_engine
def test_stop_and_resume_ends_in_the_same_bits(results: dict[str, Path], engine: str) -> None:
    whole, parts = (load_file(results[engine] / f"run {name}" / "adapter.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(parts[name], expected) for name, expected in whole.items())
    steps = [r["step"] for r in read_metrics(results[engine] / "run parts") if "loss" in r]
    assert steps == [1, 2, 3, 4]


@every_engine
def test_a_request_to_stop_is_heard_before_the_next_log_step(results: dict[str, Path], engine: str) -> None:
    (state,) = (results[engine] / "run asked" / "state").iterdir()
    assert state.name == "step-00000002"


@every_engine
def test_the_state_is_the_one_of_one_process(results: dict[str, Path], engine: str) -> None:
    """So that a run may go on with another engine, or on another number of devices."""
    found = []
    for where in ("one", engine):
        (state,) = (results[where] / "run full" / "state").iterdir()
        trained = load_file(state / "trained.safetensors")
        moments = torch.load(state / "optimizer.bin", weights_only=True)
        shapes = {number: {k: tuple(v.shape) for k, v in m.items()} for number, m in moments["state"].items()}
        found.append(({k: tuple(v.shape) for k, v in trained.items()}, shapes, moments["param_groups"]))
        assert all(type(t) is torch.Tensor for m in moments["state"].values() for t in m.values())
    assert found[0] == found[1]
    names = {file.name for file in state.iterdir()}
    assert not [name for name in names if "model" in name], "frozen weights are in no state"


@every_engine
def test_a_run_goes_on_with_another_engine(results: dict[str, Path], tmp_path: Path, engine: str) -> None:
    folder = tmp_path / "half"
    shutil.copytree(results[engine] / "run half", folder)
    config = TrainConfig(**yaml.safe_load((folder / "config.yaml").read_text()))
    report = align(replace(config, output=str(folder), resume=True), Console(quiet=True))
    assert report.outcome.finished
    assert [r["step"] for r in read_metrics(folder) if "loss" in r] == [1, 2, 3, 4]
    alone = load_file(results["one"] / "run whole" / "adapter.safetensors")
    for name, tensor in load_file(folder / "adapter.safetensors").items():
        torch.testing.assert_close(tensor, alone[name], rtol=0, atol=2e-4, msg=partial("{}: {}".format, name))


def test_the_first_version_of_fsdp_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FSDP_VERSION", "1")
    accelerator = Accelerator()
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()  # as with several processes
    with pytest.raises(ValueError, match=r"asks for FSDP 1; expected FSDP 2, .*: set fsdp_version: 2"):
        check_sharding(accelerator)


def test_other_kinds_of_parallelism_are_refused() -> None:
    accelerator = Accelerator()
    accelerator.state.parallelism_config = ParallelismConfig(dp_shard_size=2, tp_size=2)
    with pytest.raises(ValueError, match=r"asks for tp_size=2, .*; expected data parallelism alone, .*: set all"):
        check_sharding(accelerator)


def test_deepspeed_trains_as_one_process(tiny_vision: str, still_text: str, pictures: Path, tmp_path: Path) -> None:
    """In one process, for Accelerate brings it to no more of them on CPU."""
    pytest.importorskip("deepspeed", reason="DeepSpeed is installed by those who ask for it")
    options = {
        "vision": tiny_vision, "text": still_text, "policy": "layernorm", "projection": "linear(dim=16)",
        "data": pictures / "manifest.jsonl", "batch_size": 6, "max_steps": 3, "workers": 0, "test_split": "none",
    }  # fmt: skip
    words = [f"--{key}={value}" for key, value in options.items()]
    assert main(["train", *words, f"--output={tmp_path / 'one'}"]) == 0
    variables = environment(ROOT / "recipes" / "accelerate" / "deepspeed_zero2.yaml") | {"ACCELERATE_USE_CPU": "false"}
    variables["PYTHONPATH"] = os.pathsep.join((str(ROOT), os.environ.get("PYTHONPATH", "")))
    torchrun(1, ROOT / "recipes" / "train.py", *words, f"--output={tmp_path / 'deep'}", **variables)
    one, deep = (load_file(tmp_path / name / "adapter.safetensors") for name in ("one", "deep"))
    for name, expected in one.items():
        found, expected = (without_keys(name, t) for t in (deep[name], expected))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4, msg=partial("{}: {}".format, name))
    files = [f.name for f in (tmp_path / "deep" / "state").rglob("*.pt")]
    assert files  # its own format
    sizes = [f.stat().st_size for f in (tmp_path / "deep" / "state").rglob("*model_states.pt")]
    assert sum(sizes) < 100_000, "frozen weights are in no state"

"""The shipped configs of accelerate are valid for the installed one, and ask for what their headers say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.utils import DistributedType

from tests.launch import CONFIGS, environment

every_config = pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)


def test_there_is_one_for_each_size() -> None:
    assert [file.stem for file in CONFIGS] == ["1gpu", "2x8gpu_fsdp2", "8gpu_ddp", "8gpu_fsdp2", "deepspeed_zero2"]


@every_config
def test_accelerate_reads_it(file: Path) -> None:
    config = load_config_from_file(str(file))
    assert isinstance(config, ClusterConfig)
    machines, gpus = {"1gpu": (1, 1), "2x8gpu_fsdp2": (2, 8)}.get(file.stem, (1, 8))
    assert (config.num_machines, config.num_processes) == (machines, machines * gpus)
    expected = {"1gpu": "NO", "8gpu_ddp": "MULTI_GPU", "deepspeed_zero2": "DEEPSPEED"}.get(file.stem, "FSDP")
    assert config.distributed_type == DistributedType(expected)


@every_config
def test_it_opens_with_its_command_and_hardware(file: Path) -> None:
    header = "\n".join(line for line in file.read_text().splitlines() if line.startswith("#"))
    assert f"accelerate launch --config_file recipes/accelerate/{file.name}" in header
    assert re.search(r"recipes/train\.py(\n#  )? --config recipes/", header)
    assert re.search(r"\d GPU|\d x 24 GB", header)


@every_config
def test_every_option_is_one_that_the_launcher_knows(file: Path) -> None:
    """It passes over an unknown key of a section without a word."""
    from accelerate.commands.launch import launch_command_parser

    known = vars(launch_command_parser().parse_args(["train.py"]))
    config = load_config_from_file(str(file))
    for section in (config.fsdp_config, config.parallelism_config, config.deepspeed_config):
        assert not (section or {}).keys() - known.keys()


@pytest.mark.parametrize("file", [file for file in CONFIGS if "fsdp2" in file.stem], ids=lambda file: file.stem)
def test_the_launcher_asks_for_fsdp2(file: Path) -> None:
    told = environment(file)
    assert told["ACCELERATE_USE_FSDP"] == "true"
    assert told["FSDP_VERSION"] == "2"
    sizes = [told.get(f"PARALLELISM_CONFIG_DP_{kind}_SIZE") for kind in ("REPLICATE", "SHARD")]
    assert sizes == (["2", "8"] if "2x8" in file.stem else [None, None])


@pytest.mark.parametrize("name", ["1gpu", "8gpu_ddp"])
def test_the_launcher_asks_for_nothing_else(name: str) -> None:
    told = environment(next(file for file in CONFIGS if file.stem == name))
    assert not [key for key in told if key.startswith(("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"))]


def test_the_launcher_asks_for_the_second_stage_of_deepspeed() -> None:
    told = environment(next(file for file in CONFIGS if "deepspeed" in file.stem))
    assert told["ACCELERATE_USE_DEEPSPEED"] == "true"
    assert told["ACCELERATE_DEEPSPEED_ZERO_STAGE"] == "2"
    assert told["ACCELERATE_GRADIENT_CLIPPING"] == "1.0"

"""The README cannot drift: its commands are marked, its Python runs, its table is the registry's, it stays short."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from lilt.policies import readme_table

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_ci_finds_the_two_lines() -> None:
    out = subprocess.run([sys.executable, str(ROOT / ".ci" / "readme.py")], capture_output=True, text=True, check=True)
    first, second = out.stdout.splitlines()
    assert first == 'pip install -e ".[test]" && accelerate launch recipes/train.py --policy layernorm'
    assert second == 'pip install -e ".[test]" && pytest'


def test_the_python_example_runs_as_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (80, 60), "red").save("photo.jpg")
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    scope: dict[str, object] = {}
    exec(example, scope)
    shown = [line.split("  # ") for line in example.splitlines() if "  # torch.Size" in line]
    assert len(shown) == 1
    for code, comment in shown:
        assert str(eval(code, scope)) == comment.partition("), ")[0] + ")"
    assert (tmp_path / "runs" / "mine" / "adapter.safetensors").is_file()


def test_the_policy_table_is_the_registry() -> None:
    assert readme_table() in README


def test_the_budgets_are_printed_as_they_stand_there() -> None:
    (block,) = re.findall(r"```\n\$ (lilt budgets.*?)```", README, re.DOTALL)
    command, table = block.replace("\\\n", "").split("\n", 1)
    lilt = [sys.executable, "-m", *shlex.split(command)]
    out = subprocess.run(lilt, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    printed = [line.split() for line in out.splitlines()]
    assert table.strip() and all(line.split() in printed for line in table.strip().splitlines())


def test_it_is_a_door_not_a_book() -> None:
    assert len(README.splitlines()) < 150

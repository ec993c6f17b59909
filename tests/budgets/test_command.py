"""`lilt budgets` as scripts of users call it, and the published counts through it."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lilt.cli import main

KEYS = [
    "policy", "trainable", "total", "percent", "adapter_bytes", "optimizer_bytes", "step_flops_ratio", "saved_bytes",
    "step_bytes",
]  # fmt: skip
PUBLISHED = {
    "frozen": 393_729, "layernorm": 470_529, "bitfit": 598_785, "layernorm+bitfit": 637_185, "lora(r=8)": 1_131_009,
    "lora(r=8,targets=q|v)": 983_553, "adapter(reduction=4)": 14_595_585, "adapter(reduction=8,place=input)": 7_513_089,
    "adapter(reduction=16)": 3_971_841, "adapter(reduction=64)": 1_315_905, "lilt": 14_672_385,
    "deep_adapter+layernorm": 14_646_273, "lit": 109_285_377, "full": 195_130_113,
}  # fmt: skip


def rows(capsys: pytest.CaptureFixture[str], *argv: str) -> list[dict[str, Any]]:
    assert main(["budgets", *argv, "--json"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1
    found: list[dict[str, Any]] = json.loads(printed)
    return found


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main(["budgets", *argv]) == 2
    said = capsys.readouterr()
    assert not said.out and "Traceback" not in said.err
    return " ".join(said.err[said.err.rindex("lilt: ") :].split())


def test_the_published_counts(capsys: pytest.CaptureFixture[str]) -> None:
    towers = ["--vision=timm:vit_base_patch16_224?image_px=256", "--text=hf:bert-base-uncased"]
    found = {row["policy"]: row for row in rows(capsys, *towers, f"--policies={','.join(PUBLISHED)}")}
    assert {policy: row["trainable"] for policy, row in found.items()} == PUBLISHED
    assert found["full"]["total"] == 195_130_113 == found["lit"]["total"]
    percent = {policy: round(row["percent"], 2) for policy, row in found.items()}
    assert (percent["lilt"], percent["lit"], percent["full"]) == (7.01, 56.01, 100.0)
    assert found["lilt"]["total"] == 195_130_113 + 14_595_585 - 393_729
    # vision at 256 px is 93 % of a step, and a third of that is its forward
    assert found["lit"]["step_flops_ratio"] < 0.45 < found["layernorm"]["step_flops_ratio"] < 0.72
    assert found["full"]["adapter_bytes"] > 4 * 195_130_113


def test_the_json_is_a_list_of_objects_with_these_keys(capsys: pytest.CaptureFixture[str]) -> None:
    found = rows(capsys, "--policies=layernorm,lora(r=4,targets=q|v)+bitfit", "--batch_size=8")
    assert [list(row) for row in found] == [KEYS, KEYS]
    assert [row["policy"] for row in found] == ["layernorm", "lora(r=4,targets=q|v)+bitfit"]
    kinds = {key: type(value) for key, value in found[0].items()}
    whole = dict.fromkeys(KEYS, int) | {"policy": str, "percent": float, "step_flops_ratio": float}
    assert kinds == whole


def test_rows_are_sorted_by_any_key(capsys: pytest.CaptureFixture[str]) -> None:
    policies = "--policies=full,frozen,last(1),layernorm,adapter"
    assert [row["policy"] for row in rows(capsys, policies)][-1] == "full"
    by_step = [row["step_flops_ratio"] for row in rows(capsys, policies, "--sort=step_flops_ratio")]
    assert by_step == sorted(by_step)
    said = refused(capsys, "--sort=saved_byte")
    assert re.search(r"unknown sort key 'saved_byte'; known: policy, .* Did you mean 'saved_bytes'", said)


def test_options_may_be_written_with_dashes(capsys: pytest.CaptureFixture[str]) -> None:
    dashed = rows(capsys, "--policies=lora,full,frozen", "--max-trainable", "6%", "--batch-size", "8", "--max-step=0.9")
    assert dashed == rows(
        capsys, "--policies=lora,full,frozen", "--max_trainable=6%", "--batch_size=8", "--max_step=.9"
    )
    frozen, lora = dashed
    assert frozen["policy"] == "frozen"
    assert re.fullmatch(r"lora\(r=\d+\)", lora["policy"]) and lora["percent"] <= 6


def test_options_of_the_towers_count(capsys: pytest.CaptureFixture[str]) -> None:
    whole, short = (rows(capsys, "--policies=full", f"--vision=demo{more}")[0] for more in ("", "?layers=2"))
    assert short["total"] < whole["total"] and short["saved_bytes"] < whole["saved_bytes"]
    deit = "--vision=timm:vit_tiny_patch16_224"
    small, large = (rows(capsys, "--policies=full", deit, f"--image_px={px}")[0] for px in (64, 128))
    assert large["saved_bytes"] > 2 * small["saved_bytes"]
    assert large["total"] - small["total"] == (64 - 16) * 192  # positions


def test_the_table_says_what_it_holds_for(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["budgets", "--vision=timm:resnet18", "--policies=layernorm,lora", "--max-memory", "40GiB", "--batch-size=2"]
    assert main(argv) == 0
    text = " ".join(capsys.readouterr().out.split())
    for part in (
        "policy trained % file optimizer step/full saved memory",
        "lora: the vision tower 'timm:resnet18' has no",
    ):
        assert part in text
    assert "timm:resnet18 (11,176,512 values, 224x224 px) and demo" in text
    assert "batch of 2, linear(dim=256); no weights were read" in text


def test_refusals_leave_the_json_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["budgets", "--vision=timm:resnet18", "--policies=lora,frozen", "--batch_size=2", "--json"]) == 0
    said = capsys.readouterr()
    assert [row["policy"] for row in json.loads(said.out)] == ["frozen"]
    assert "lora: the vision tower 'timm:resnet18' has no weights for targets=qkv" in " ".join(said.err.split())
    only = refused(capsys, "--vision=timm:resnet18", "--policies=lora", "--batch_size=2")
    assert "these towers take none of the 1 policies; lora: the vision tower" in only


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--policies=lora,layernrom"], "unknown policy 'layernrom'; known: .* Did you mean 'layernorm'"),
        (["--policies=lora(r=8"], "unbalanced parentheses"),
        (["--max_trainable=lots"], "max_trainable='lots' cannot be read; expected a share such as 1%"),
        (["--max-memory=8Gigs"], "max_memory='8Gigs' cannot be read; expected a size such as 8GiB"),
        (
            ["--policies=full,lit", "--max_step=0.1"],
            r"none of 2 policies .* max_step=0.1 leaves out 2 \(smallest step_flops_ratio: .*, lit\); raise",
        ),
        (["--batch_size=0"], "batch_size=0; expected more than 0"),
        (["--max-trainabel=1%"], "unknown option 'max_trainabel'; .* Did you mean 'max_trainable'"),
        (["--vision=timm:vit_tinny"], "timm could not build 'vit_tinny'"),
        (["--plot=there.gif"], "plot=there.gif: unknown ending; expected one of .png, .pdf, .svg"),
        (["--plot=nowhere/there.png"], "there is no folder nowhere"),
    ],
)
def test_errors_say_what_to_do(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert re.search(message, refused(capsys, *argv))


def test_a_plot_is_drawn_and_not_drawn_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "budgets.png"
    argv = ["--policies=layernorm,full", "--batch_size=4", f"--plot={file}"]
    assert len(rows(capsys, *argv)) == 2
    with Image.open(file) as picture:
        assert picture.format == "PNG" and len(set(picture.convert("L").tobytes())) > 20
    before = file.read_bytes()
    assert "is already there; nothing was changed: replace it with --overwrite" in refused(capsys, *argv)
    assert file.read_bytes() == before
    assert rows(capsys, "--policies=frozen,lilt,full", "--batch_size=4", f"--plot={file}", "--overwrite")
    assert file.read_bytes() != before


def test_a_plot_without_matplotlib_says_what_to_install(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # what an import of something not installed finds
    said = refused(capsys, f"--plot={tmp_path / 'budgets.svg'}")
    assert "plot needs matplotlib, which is not installed; pip install 'lilt[plot]'" in said
    assert not list(tmp_path.iterdir())

"""The commands, as scripts of users call them: status, stdout and the text of each error."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from lilt.cli import main, parse_train
from lilt.train import read_metrics

Lines = list[str]


@pytest.fixture
def words(tiny_vision: str, tiny_text: str, pictures: Path, tmp_path: Path) -> Lines:
    """The options of a run of two steps."""
    options = {
        "vision": tiny_vision, "text": tiny_text, "data": pictures / "manifest.jsonl", "output": tmp_path / "run",
        "batch_size": 6, "max_steps": 2, "workers": 0, "projection": "linear(dim=16)",
    }  # fmt: skip
    return [f"--{key}={value}" for key, value in options.items()]


def refused(capsys: pytest.CaptureFixture[str], argv: Lines) -> str:
    """Run a command that must end with status 2, one message and no traceback; return the message."""
    assert main(argv) == 2
    said = capsys.readouterr()
    assert "Traceback" not in said.err
    # before it there may be the progress bars of the libraries
    return " ".join(said.err[said.err.rindex("lilt: ") :].split())


def test_train_then_evaluate(words: Lines, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *words]) == 0
    table = capsys.readouterr().out
    for part in ("R@1", "mean recall", "before", "after", "trained values", "adapter file", str(tmp_path / "run")[:20]):
        assert part in table
    assert {"adapter.safetensors", "lilt.json", "README.md", "metrics.jsonl", "config.yaml", "state"} <= {
        p.name for p in (tmp_path / "run").iterdir()
    }
    assert main(["evaluate", str(tmp_path / "run"), "--json", "--workers=0"]) == 0
    printed = capsys.readouterr().out
    result = json.loads(printed)
    assert printed.count("\n") == 1
    for side in ("text_to_image", "image_to_text"):
        assert result[side].keys() == {"R@1", "R@5", "R@10", "median_rank"}
        assert all(0 <= result[side][k] <= 100 for k in result[side])
    assert (result["num_images"], result["num_captions"]) == (6, 18)
    recalls = [result[side][k] for side in ("text_to_image", "image_to_text") for k in ("R@1", "R@5", "R@10")]
    assert result["mean_recall"] == pytest.approx(sum(recalls) / 6)
    last = read_metrics(tmp_path / "run")[-1]
    assert last["result"]["mean_recall"] == pytest.approx(result["mean_recall"])
    assert main(["evaluate", str(tmp_path / "run"), "--split=val", "--workers=0"]) == 0
    assert "mean recall" in capsys.readouterr().out


def test_evaluate_takes_other_data(words: Lines, pictures: Path, tmp_path: Path, capsys: Any) -> None:
    assert main(["train", *words, "--test_split=none"]) == 0
    other = tmp_path / "other.csv"
    other.write_text("image,caption,split\nred0.png,a red picture,all\nblue0.png,blue,all\n")
    capsys.readouterr()
    argv = ["evaluate", str(tmp_path / "run"), f"--data={other}", f"--image_root={pictures}", "--split=all", "--json"]
    assert main([*argv, "--workers=0"]) == 0
    assert json.loads(capsys.readouterr().out)["num_images"] == 2


def test_the_programs_stdout_is_one_json_object_and_nothing_else(words: Lines, tmp_path: Path) -> None:
    assert main(["train", *words, "--test_split=none", "--val_split=none"]) == 0
    command = [sys.executable, "-m", "lilt", "evaluate", str(tmp_path / "run"), "--json", "--workers=0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["num_images"] == 6


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--epoch=3"], "unknown option 'epoch'; .* Did you mean 'epochs'?"),
        (["--batch-size=3"], "unknown option 'batch_size'; .* Did you mean 'batch_size'?"),
        (["--policy=layernrom"], "unknown policy 'layernrom'; known: .*lilt.* Did you mean 'layernorm'?"),
        (["--policy=lora(rank=3)"], "lora has no option 'rank'; it takes: r"),
        (["--vision=tim:x"], "unknown vision tower 'tim:x'; expected one of .*timm:.* Did you mean 'timm'?"),
        (["--vision=timm:no_such_net"], "timm could not build 'no_such_net'"),
        (["--text=hf:/nowhere/at/all"], "transformers could not load the text tower '/nowhere/at/all'"),
        (["--data=nowhere.jsonl"], "manifest 'nowhere.jsonl' does not exist; expected a .jsonl"),
        (["--train_split=tain"], "has no split 'tain'; it has: test, train, val. Did you mean 'train'?"),
        (["--train_split=none"], "leaves nothing to train on"),
        (["--projection=linaer"], "unknown projection 'linaer'; known: .* Did you mean 'linear'?"),
        (["--augment=flip"], "unknown augmentation 'flip'; known: .* Did you mean '.flip'?"),
        (["--captions=some"], "captions='some'; expected one of one, all"),
        (["--same=maybe"], "same='maybe'; expected one of positive, ignored, negative"),
        (["--precision=fp8"], "precision='?fp8'?.*expected no, bf16 or fp16|precision.*fp8"),
        (["--scale=200"], r"scale starts at 200.0 outside \[1.0, 100.0\]"),
        (["--epochs=many"], "epochs"),
        (["--micro_batch=0"], "micro_batch=0; expected more than 0"),
        (["--max_bad_steps=-1"], "max_bad_steps=-1; expected more than 0"),
        (["--keep_states=0"], "keep_states=0; expected more than 0"),
        (["--distill_weight=2"], "distill_weight=2.0 came without a teacher; expected an image model"),
        (["--resume"], "holds no run to resume"),
        (["--reuse=disk", "--augment=hflip"], "reuse=disk: .*augment=hflip shows each image anew .*; use --reuse off"),
        (["--vision=timm:$NO_SUCH_VARIABLE/x"], "needs the environment variable NO_SUCH_VARIABLE, which is not set"),
        (["--config=nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_a_users_error_is_explained(words: Lines, capsys: Any, extra: Lines, message: str, tmp_path: Path) -> None:
    said = refused(capsys, ["train", *words, *extra])
    assert re.search(message.replace("?", r"\?") if "Did" in message else message, said), said
    # before anything is evaluated or written
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    assert not (tmp_path / "run" / "adapter.safetensors").exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["trian"], "unknown command 'trian'; known: train, evaluate, policies"),
        (["evaluate", "/nowhere"], "/nowhere holds no lilt checkpoint; expected lilt.json"),
        (["evaluate"], "run"),
        (
            ["evaluate", "x", "--splt=test"],
            "unknown option 'splt'; lilt evaluate --help lists all. Did you mean 'split'",
        ),
        (["policies", "--jsn"], "unknown option 'jsn'; lilt policies --help lists all"),
    ],
)
def test_so_is_one_with_the_other_commands(capsys: Any, argv: Lines, message: str) -> None:
    assert re.search(message, refused(capsys, argv))


def test_a_started_run_is_refused_resumed_or_overwritten(words: Lines, tmp_path: Path, capsys: Any) -> None:
    adapter = tmp_path / "run" / "adapter.safetensors"
    assert main(["train", *words, "--seed=1"]) == 0
    before = adapter.read_bytes()
    said = refused(capsys, ["train", *words])
    assert "already holds a run; nothing was changed: go on with --resume" in said
    assert adapter.read_bytes() == before
    said = refused(capsys, ["train", *words, "--resume", "--seed=2"])
    assert "was started with seed=1, not 2; go on with its own settings: --config" in said
    assert main(["train", "--config", str(tmp_path / "run" / "config.yaml"), "--resume"]) == 0
    assert adapter.read_bytes() == before
    assert main(["train", *words, "--overwrite", "--seed=2"]) == 0
    assert adapter.read_bytes() != before


def write(folder: Path, **settings: Any) -> str:
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(settings))
    return str(file)


def test_options_override_a_recipe(tmp_path: Path) -> None:
    recipe = write(tmp_path, policy="bitfit", epochs=3, lr=None, image_px=64, captions="all")
    config = parse_train(["--config", recipe, "--epochs", "7", "--vision_policy", "frozen"])
    assert (config.policy, config.epochs, config.image_px, config.captions) == ("bitfit", 7, 64, "all")
    assert (config.vision_policy, config.lr, config.resume) == ("frozen", None, False)
    assert parse_train(["--config", recipe]).epochs == 3
    assert parse_train(["--resume", "--overwrite"]).overwrite


def test_an_unknown_key_in_a_recipe_gets_the_nearest_name(tmp_path: Path, capsys: Any) -> None:
    said = refused(capsys, ["train", "--config", write(tmp_path, policy="bitfit", batchsize=3)])
    assert "'batchsize'" in said
    assert "Did you mean 'batch_size'?" in said


def test_every_field_is_an_option_with_help(capsys: Any) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["train", "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    for name in ("config", "vision", "text_policy", "image_root", "max_steps", "image_px", "precision", "resume"):
        assert f"--{name}" in text


def test_policies_are_listed(capsys: Any) -> None:
    assert main(["policies", "--json"]) == 0
    rows = {row["policy"]: row for row in json.loads(capsys.readouterr().out)}
    assert {"layernorm", "lora", "adapter", "deep_adapter", "lit", "lilt", "frozen", "full"} <= rows.keys()
    assert main(["policies"]) == 0
    assert "layernorm" in capsys.readouterr().out
    assert main([]) == 0
    assert "evaluate" in capsys.readouterr().out


@pytest.mark.skipif(sys.platform == "win32", reason="process groups")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_preemption_save_and_say_how_to_go_on(words: Lines, tmp_path: Path, number: signal.Signals) -> None:
    long = [w for w in words if not w.startswith(("--max_steps", "--workers"))]
    long += ["--max_steps=5000", "--workers=2", "--test_split=none", "--val_split=none", "--eval_every=100000"]
    command = [sys.executable, "-m", "lilt", "train", *long, "--log_every=1"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as program:
        deadline = time.monotonic() + 120
        while len(read_metrics(tmp_path / "run")) < 3 and program.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        # a terminal, like a scheduler, sends the signal to the data workers too
        os.killpg(program.pid, number)
        out, err = program.communicate(timeout=60)
    assert program.returncode == 130, err
    assert "Traceback" not in err
    assert f"--config {tmp_path / 'run' / 'config.yaml'} --resume" in out
    assert list((tmp_path / "run" / "state").glob("step-*/trained.safetensors"))

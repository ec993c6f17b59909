"""What weights do not say of a body: the same in every process, another with every setting that changes the output."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import transformers as hf
from torch import nn

from lilt.towers import build_tower
from lilt.towers.base import fingerprint
from lilt.towers.structure import structure
from tests.towers.families import FAMILIES, SMALL, VIT, tiny

CODE = """
import json
from tests.towers.families import FAMILIES
print(json.dumps({name: make().structure for name, make in FAMILIES.items()}))
"""


def test_every_family_has_the_same_in_another_process() -> None:
    root = Path(__file__).parents[2]
    env = {**os.environ, "PYTHONHASHSEED": "12345", "PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, env=env, cwd=root, check=False)
    assert done.returncode == 0, done.stderr
    theirs = json.loads(done.stdout.splitlines()[-1])
    assert theirs == {name: tiny(name).structure for name in FAMILIES}
    assert len(set(theirs.values())) == len(FAMILIES)
    assert all(len(digest) == 64 for digest in theirs.values())


def bert(**options: Any) -> nn.Module:
    return hf.BertModel(hf.BertConfig(**{**SMALL, **options}), add_pooling_layer=False)


def vit(**options: Any) -> nn.Module:
    return timm.create_model("vit_tiny_patch16_224", **{**VIT, **options})


def clip(quick_gelu: bool = False) -> nn.Module:
    vision = {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8}
    text = {"context_length": 16, "vocab_size": 64, "width": 32, "heads": 2, "layers": 2}
    return open_clip.CustomTextCLIP(24, vision, text, quick_gelu=quick_gelu)  # type: ignore[arg-type]


def llama(theta: float) -> nn.Module:
    rope = {"rope_type": "default", "rope_theta": theta}
    return hf.LlamaModel(hf.LlamaConfig(**SMALL, num_key_value_heads=1, rope_parameters=rope))  # type: ignore[arg-type]


OTHERS: dict[str, tuple[Callable[..., nn.Module], dict[str, Any], dict[str, Any]]] = {
    "an activation of transformers": (bert, {}, {"hidden_act": "relu"}),
    "heads of transformers": (bert, {}, {"num_attention_heads": 4}),
    "an epsilon of transformers": (bert, {}, {"layer_norm_eps": 1e-5}),
    "a base of rotary positions": (llama, {"theta": 10_000.0}, {"theta": 20_000.0}),
    "an activation of timm": (vit, {}, {"act_layer": "relu"}),
    "heads of timm": (vit, {}, {"num_heads": 4}),
    "a pooling of timm": (vit, {}, {"global_pool": "avg", "fc_norm": False}),
    "an activation of open_clip": (clip, {}, {"quick_gelu": True}),
    "an own module": (nn.Softmax, {"dim": 1}, {"dim": 2}),
}


@pytest.mark.parametrize("what", OTHERS)
def test_what_the_weights_do_not_say_is_in_it(what: str) -> None:
    make, plain, other = OTHERS[what]
    one, same, changed = make(**plain), make(**plain), make(**other)
    changed.load_state_dict(one.state_dict())
    assert fingerprint(changed) == fingerprint(one)
    assert structure(same) == structure(one) != structure(changed)
    assert structure(copy.deepcopy(one)) == structure(one)


def test_where_a_folder_lies_is_not_in_it(tmp_path: Path, tiny_text: str) -> None:
    body = hf.AutoModel.from_pretrained(tiny_text.removeprefix("hf:"))
    body.save_pretrained(tmp_path / "copy")
    hf.AutoTokenizer.from_pretrained(tiny_text.removeprefix("hf:")).save_pretrained(tmp_path / "copy")
    towers = [build_tower(spec, "text") for spec in (tiny_text, f"hf:{tmp_path / 'copy'}")]
    assert towers[0].structure == towers[1].structure


def test_what_a_forward_leaves_behind_is_not_in_it() -> None:
    for family in ("bert", "modernbert", "llama", "swin", "dinov3", "open_clip_text"):
        tower = tiny(family)
        before = structure(tower.body)
        tower.train()(tower.example())
        assert structure(tower.eval().body) == before, family

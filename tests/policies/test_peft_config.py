"""A configuration of the peft library survives being written down, and what no tower can take is refused by reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest

from lilt.policies import parse_policy
from lilt.policies.peft import ALL_LINEAR, Peft, written_out
from lilt.policies.peft_config import Config

CONFIGS: dict[str, Any] = {
    "LORA": peft.LoraConfig(),
    "LORA(target_modules=query|value)": peft.LoraConfig(target_modules=["value", "query"]),
    "LORA(target_modules=fc1)": peft.LoraConfig(target_modules=["fc1"]),
    "LORA(target_modules=2|4)": peft.LoraConfig(target_modules=["2", "4"]),
    'LORA(target_modules="query")': peft.LoraConfig(target_modules="query"),
    "LORA(target_modules=blocks.*fc[12])": peft.LoraConfig(target_modules="blocks.*fc[12]"),
    "LORA(target_modules=.*.%28query|value%29)": peft.LoraConfig(target_modules=".*.(query|value)"),
    "LORA(r=4,target_modules=all-linear,lora_alpha=32,lora_dropout=0.1,use_rslora=true,use_dora=true)": (
        peft.LoraConfig(
            r=4, lora_alpha=32, target_modules="all-linear", lora_dropout=0.1, use_rslora=True, use_dora=True
        )
    ),
    'LORA(target_modules=q,rank_pattern={"^a.q":2%2C"b q":3})': peft.LoraConfig(
        target_modules=["q"], rank_pattern={"^a.q": 2, "b q": 3}
    ),
    "LORA(target_modules=q,layers_to_transform=0|2)": peft.LoraConfig(target_modules=["q"], layers_to_transform=[0, 2]),
    "LORA(target_modules=q,layers_to_transform=[1])": peft.LoraConfig(target_modules=["q"], layers_to_transform=[1]),
    "LORA(target_modules=q,init_lora_weights=gaussian)": peft.LoraConfig(
        target_modules=["q"], init_lora_weights="gaussian"
    ),
    "IA3(target_modules=k|v,feedforward_modules=v)": peft.IA3Config(
        target_modules=["k", "v"], feedforward_modules=["v"]
    ),
    "OFT(oft_block_size=4,target_modules=q)": peft.OFTConfig(oft_block_size=4, target_modules=["q"]),
    "LN_TUNING(target_modules=norm1)": peft.LNTuningConfig(target_modules=["norm1"]),
}


def settings(config: peft.PeftConfig) -> dict[str, Any]:
    return {k: sorted(v) if isinstance(v, set) else v for k, v in config.to_dict().items()}


@pytest.mark.parametrize("text", CONFIGS)
def test_a_configuration_of_python_is_written_in_one_form_that_reads_back(text: str) -> None:
    written = Config.of(CONFIGS[text])
    assert sorted(written.text) == sorted(text)  # peft's versions order their options differently
    assert Config.parse(written.text) == written
    assert settings(written.build()) == settings(CONFIGS[text])
    assert written.kind == text.partition("(")[0]
    # as a policy, beside others
    (policy, _) = parse_policy(f"peft({written.text})+layernorm", "text")
    assert policy == Peft(written)
    assert isinstance(policy, Peft) and policy.spec == f"peft({written.text})"


def test_every_build_is_a_fresh_object_since_an_injection_changes_the_one_it_is_given() -> None:
    config = Config.parse("LORA(target_modules=all-linear)")
    assert config == ALL_LINEAR == Peft().config
    first: Any = config.build()
    first.target_modules = {"query"}
    second: Any = config.build()
    assert second.target_modules == "all-linear"


def test_case_blanks_and_several_ways_to_write_a_value_mean_the_same() -> None:
    plain = Config.parse("LORA(r=4,target_modules=query|value,use_dora=true)")
    assert Config.parse(' lora( use_dora=True, r=4, target_modules=["value"%2C"query"] )') == plain
    assert Config.parse("LORA(r=8,lora_dropout=0.0,target_modules=none)") == Config("LORA")


@pytest.mark.parametrize("named", ["the file", "its folder"])
def test_a_file_is_read_without_what_peft_notes_about_its_own_use(tmp_path: Path, named: str) -> None:
    # as peft saves a trained adapter: not to be trained, with its model and version
    made = peft.LoraConfig(r=4, target_modules=["qkv"], inference_mode=True, base_model_name_or_path="elsewhere")
    made.save_pretrained(str(tmp_path))
    where = tmp_path / "adapter_config.json" if named == "the file" else tmp_path
    config = Config.parse(str(where))
    assert config == Config.parse("LORA(r=4,target_modules=qkv)")
    assert not config.build().inference_mode
    assert written_out(f"layernorm+peft({where})+bitfit") == f"layernorm+peft({config.text})+bitfit"


def test_writing_out_leaves_other_policies_as_they_are() -> None:
    spec = "lora(r=4,targets=q|v)+layernorm(blocks=last:2)"
    assert written_out(spec) == spec
    assert written_out("lilt") == "lilt"
    assert written_out("peft") == f"peft({ALL_LINEAR.text})"


def test_a_folder_with_a_trained_adapter_is_not_taken_for_its_configuration(tmp_path: Path) -> None:
    peft.LoraConfig(target_modules=["qkv"]).save_pretrained(str(tmp_path))
    (tmp_path / "adapter_model.safetensors").touch()
    with pytest.raises(ValueError, match=r"holds a trained adapter .*; to start anew .* write peft\(.*config\.json\)"):
        Config.parse(str(tmp_path))
    assert Config.parse(str(tmp_path / "adapter_config.json")).kind == "LORA"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is no configuration of the peft library"),
        ("[1]", "is no configuration of the peft library"),
        ('{"r": 4}', r"is no configuration of the peft library \(KeyError\('peft_type'\)\); write it with peft"),
        ('{"peft_type": "LORA", "from_the_future": 3}', "sets 'from_the_future', which this peft does not know; upgr"),
        ('{"peft_type": "LORA", "init_lora_weights": "pissa"}', "init_lora_weights=pissa rewrites the frozen weights"),
    ],
)
def test_a_file_that_cannot_be_followed_is_an_error_that_names_it(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "adapter_config.json"
    file.write_text(content)
    with pytest.raises(ValueError, match=message):
        Config.parse(str(file))


def test_a_later_option_that_is_off_is_no_obstacle(tmp_path: Path) -> None:
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({"peft_type": "LORA", "r": 2, "from_the_future": False}))
    assert Config.parse(str(file)) == Config("LORA(r=2)")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("LORAA(r=2)", r"neither a file nor a type of the peft library; expected .*IA3, .*Did you mean 'LORA'\?"),
        ("no/such/folder", "neither a file nor a type of the peft library"),
        ("LORA(rank=2)", r"peft's LORA has no option 'rank'; it takes: r, .*Did you mean 'rank_pattern'\?"),
        ("LORA(2)", "'2' has no name; expected option=value"),
        ("OFT(r=4,oft_block_size=4,target_modules=q)", "peft does not take this OFT configuration: .*; got .*; corr"),
        ("LORA(init_lora_weights=pissa_niter_4)", "rewrites the frozen weights; expected a start .* write true, gauss"),
        ("LORA(init_lora_weights=eva)", "init_lora_weights=eva needs a pass over data"),
        ("LORA(layer_replication=[[0%2C1]])", "layer_replication makes another tower; leave it out"),
        ("PREFIX_TUNING(num_virtual_tokens=4)", "feeds virtual tokens by peft's own model class, which no tower has"),
        ("CPT", "feeds virtual tokens by peft's own model class"),
        ("ADAPTION_PROMPT", "needs peft's own model class"),
        ("ADALORA(total_step=9)", "changes its ranks by a call after every training step, which is not made here"),
        ("POLY", "wants a task with every call"),
        ("XLORA", "by a classifier outside the tower"),
    ],
)
def test_what_no_tower_can_take_is_refused_when_it_is_read(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config.parse(text)


def test_a_python_configuration_is_refused_for_the_same_reasons() -> None:
    with pytest.raises(ValueError, match="rewrites the frozen weights"):
        Config.of(peft.LoraConfig(init_lora_weights="olora"))
    with pytest.raises(ValueError, match="feeds virtual tokens"):
        Config.of(peft.PromptTuningConfig(num_virtual_tokens=4))
    with pytest.raises(ValueError, match=r"PeftConfig has no type; expected one such as peft\.LoraConfig"):
        Config.of(peft.PeftConfig())

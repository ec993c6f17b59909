"""The list of distillation objectives and how they are written."""

from __future__ import annotations

import pytest

from lilt.train.objectives import objectives, parse_objective


def test_the_registry_lists_what_there_is_with_its_defaults() -> None:
    assert objectives.names() == ["contrastive", "cosine", "kl", "mse", "relational"]
    made = {name: parse_objective(name) for name in objectives.names()}
    assert vars(made["contrastive"]) == {"temperature": 0.07, "learn": False, "bank": 65536}
    assert vars(made["kl"]) == {"temperature": 1.0}
    assert vars(made["relational"]) == {"temperature": 0.1}
    assert {name for name, o in made.items() if o.needs == "logits"} == {"kl"}
    assert {name for name, o in made.items() if o.gathers} == {"relational"}
    assert {o.needs for o in made.values()} == {"features", "logits"}
    assert parse_objective("contrastive(0.1,true,512)") == parse_objective(
        "contrastive(learn=true,bank=512,temperature=0.1)"
    )
    assert parse_objective("contrastive(learn=true)").learns_temperature
    assert not parse_objective("contrastive").learns_temperature


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("contrastiv", r"unknown distillation objective 'contrastiv'; known: .*\. Did you mean 'contrastive'\?"),
        ("mse(temperature=1)", r"mse has no option 'temperature'; it takes: none"),
        ("contrastive(size=9)", r"contrastive has no option 'size'; it takes: temperature, learn, bank"),
        ("contrastive(bank=-1)", r"contrastive: bank=-1; expected 0 or more rows; give bank=0 for none"),
        ("contrastive(temperature=0)", r"temperature=0\.0; expected more than 0; leave it out"),
        ("contrastive(temperature=0.001,learn=true)", r"to be learned; expected a start in \[0.01, 1.0\].*; give 0.07"),
        ("kl(temperature=-2)", r"kl: temperature=-2\.0; expected more than 0; leave it out"),
        ("relational(temperature=nan)", r"relational: temperature=nan; expected more than 0; leave it out"),
    ],
)
def test_a_misspelt_objective_says_what_was_expected(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_objective(spec)

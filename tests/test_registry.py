"""The grammar of component specs and what it says to a misspelt one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from lilt.registry import Call, Registry, coerce, construct, nearest, options_of, parse_call, split_top


@dataclass(frozen=True)
class Depth:
    n: int

    @classmethod
    def parse(cls, text: str) -> Depth:
        return cls(len(text))


@dataclass(frozen=True)
class Tune:
    r: int = 8
    alpha: float = 1.0
    targets: str = "q"
    bias: bool = False
    top: int | None = None
    blocks: Depth = Depth(0)


def build(text: str) -> Tune:
    return construct(Tune, parse_call(text), options_of(Tune))


@pytest.mark.parametrize(
    ("text", "call"),
    [
        ("lora", Call("lora")),
        (" lora() ", Call("lora")),
        ("last(3)", Call("last", ("3",))),
        ("lora(8, alpha=2 ,targets=q|v)", Call("lora", ("8",), {"alpha": "2", "targets": "q|v"})),
        ("both(lora(r=2,alpha=1),mlp)", Call("both", ("lora(r=2,alpha=1)", "mlp"))),
        ("keep(policy=lora(2,3))", Call("keep", (), {"policy": "lora(2,3)"})),
    ],
)
def test_a_call_is_parsed(text: str, call: Call) -> None:
    assert parse_call(text) == call


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("lora(r=8)+layernorm", ["lora(r=8)", "layernorm"]),
        ("a(b(c+d)+e) + f", ["a(b(c+d)+e)", "f"]),
        ("one", ["one"]),
        ("a+", ["a", ""]),
    ],
)
def test_only_separators_outside_brackets_split(text: str, parts: list[str]) -> None:
    assert split_top(text, "+") == parts


@pytest.mark.parametrize("text", ["lora(r=8", "lora(r=8))", "a)b(", "lora((r=8)"])
def test_unbalanced_brackets_are_an_error(text: str) -> None:
    with pytest.raises(ValueError, match=r"unbalanced parentheses in .* close each bracket once"):
        split_top(text, "+")


@pytest.mark.parametrize("text", ["lora(r=8", "lora(r=8)x", "", "(3)", "a)b"])
def test_a_broken_call_is_an_error(text: str) -> None:
    with pytest.raises(ValueError, match="check the brackets"):
        parse_call(text)


def test_a_plain_value_after_a_named_one_is_an_error() -> None:
    with pytest.raises(ValueError, match="plain value '3' follows a key=value; write '3' first"):
        parse_call("lora(r=8,3)")


def test_a_comma_inside_a_value_is_explained() -> None:
    message = "or where the comma belongs to the value before it, give that value in a file, if its option reads one"
    with pytest.raises(ValueError, match=message):
        parse_call("zeroshot(templates=a photo of a {}, a type of pet.)")


def test_values_take_the_annotated_types() -> None:
    built = build("tune(4,targets=q|v,bias=TRUE,alpha=2,top=none,blocks=abc)")
    assert built == Tune(4, 2.0, "q|v", True, None, Depth(3))
    assert isinstance(built.alpha, float)
    assert build("tune(top=5)").top == 5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tune(r=8.5)", "tune: r=8.5 is not of type int; write a int"),
        ("tune(alpha=big)", "tune: alpha=big is not of type float"),
        ("tune(bias=yes)", "tune: bias=yes is not a truth value; write true or false"),
        ("tune(top=many)", "tune: top=many is not of type int"),
        ("tune(8,r=4)", "tune got 'r' twice; give it once"),
        ("tune(1,2,3,true,4,x,6)", r"tune takes 6 values \(r, alpha, targets, bias, top, blocks\), not 7"),
        ("tune(target=q)", "tune has no option 'target'; it takes: r, alpha.* Did you mean 'targets'?"),
        ("tune(zzz=1)", "tune has no option 'zzz'; it takes: .*blocks.$"),
    ],
)
def test_a_wrong_option_is_explained(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(text)


@pytest.mark.parametrize(("text", "kind", "value"), [("None", int | None, None), ("null", float | None, None)])
def test_none_is_a_value_of_an_optional(text: str, kind: Any, value: object) -> None:
    assert coerce(text, kind, "x") is value


def test_none_is_no_value_of_a_number() -> None:
    with pytest.raises(ValueError, match="x: n=none is not of type int"):
        coerce("none", int, "x: n")


def test_an_unknown_name_gets_the_known_and_the_nearest() -> None:
    shapes: Registry[int] = Registry("shape")
    shapes.register("square")(4)
    shapes.register("circle")(0)
    assert shapes["square"] == 4
    assert "circle" in shapes
    with pytest.raises(ValueError, match=r"unknown shape 'sqare'; known: circle, square\. Did you mean 'square'\?"):
        shapes["sqare"]
    assert nearest("qqqqq", shapes.names()) == ""


def test_a_name_is_given_once() -> None:
    shapes: Registry[int] = Registry("shape")
    shapes.register("square")(4)
    with pytest.raises(AssertionError, match="shape 'square' is registered twice"):
        shapes.register("square")(5)

import random
from dataclasses import replace

import pytest

from lilt.demo.lexicon import INVERSE
from lilt.demo.render import render
from lilt.demo.scenes import HELD_OUT, RADIUS_PX, Scene, Thing, distinct, is_nested, mirrored, sample, stream


def test_a_seed_decides_scene_and_pixels() -> None:
    one, same, other = (sample(random.Random(seed)) for seed in (3, 3, 4))
    assert one == same != other
    assert render(one).tobytes() == render(same).tobytes() != render(other).tobytes()


def test_the_same_things_on_another_seed_look_different() -> None:
    scene = sample(random.Random(0))
    assert render(scene).tobytes() != render(replace(scene, seed=scene.seed + 1)).tobytes()


THING = Thing("circle", "red", "small", "solid", 32.0, 32.0)


@pytest.mark.parametrize(
    "other", [replace(THING, shape="cross"), replace(THING, colour="blue"), replace(THING, size="large")]
)
def test_an_attribute_shows(other: Thing) -> None:
    assert render(Scene((THING,), seed=1)).tobytes() != render(Scene((other,), seed=1)).tobytes()


def test_the_colour_of_a_solid_thing_is_in_its_middle() -> None:
    image = render(Scene((Thing("star", "red", "large", "solid", 20.0, 40.0),), seed=1))
    red, green, blue = image.crop((20, 40, 21, 41)).tobytes()
    assert red > 190 and green < 60 and blue < 60


def test_textures_mark_the_body() -> None:
    def colours(texture: str) -> int:
        scene = Scene((Thing("square", "red", "huge", texture, 32.0, 32.0),), seed=1)
        inner = render(scene).crop((24, 24, 40, 40))
        return len(inner.getcolors(256) or [])

    assert colours("solid") == 1 < min(colours("striped"), colours("dotted"))


def test_relations_follow_the_places() -> None:
    for scene, _ in zip(stream(0), range(500), strict=False):
        assert len(scene.relations) == len(scene.things) - 1
        for i, relation, j in scene.relations:
            a, b = scene.things[i], scene.things[j]
            assert {
                "left of": a.x + 18 < b.x,
                "right of": a.x > b.x + 18,
                "above": a.y + 18 < b.y,
                "below": a.y > b.y + 18,
                "inside": RADIUS_PX[a.size] < RADIUS_PX[b.size],
                "around": RADIUS_PX[a.size] > RADIUS_PX[b.size],
            }[relation]


def test_things_of_a_scene_differ_in_shape_and_colour() -> None:
    for scene, _ in zip(stream(1), range(300), strict=False):
        assert (
            len({thing.shape for thing in scene.things}) == len({t.colour for t in scene.things}) == len(scene.things)
        )


def test_held_out_is_obeyed() -> None:
    rng = random.Random(0)
    assert all(sample(rng, held_out=True).looks & HELD_OUT for _ in range(50))
    assert not any(sample(rng, held_out=False).looks & HELD_OUT for _ in range(200))
    assert {sample(rng).held_out for _ in range(50)} == {True, False}


def test_half_of_the_distinct_scenes_differ_from_their_twin_in_one_relation_only() -> None:
    scenes = distinct(random.Random(0), 60, held_out=True)
    twins = [(scenes[k], scenes[k + 1]) for k in range(0, 30, 2)]
    for one, other in twins:
        assert [replace(t, x=0, y=0) for t in one.things] == [replace(t, x=0, y=0) for t in other.things]
        changed = [(a, b) for a, b in zip(one.relations, other.relations, strict=True) if a != b]
        assert len(changed) == 1
        ((i, relation, j), (k, reverse, m)) = changed[0]
        assert (i, j) == (k, m) and reverse == INVERSE[relation]
    assert len({scene.looks for scene in scenes}) == 45


def test_nested_things_have_no_mirrored_twin() -> None:
    nested = next(scene for scene in stream(0) if is_nested(scene))
    with pytest.raises(ValueError, match="needs things side by side"):
        mirrored(nested, random.Random(0))

"""Describe a scene in words: varied orders, synonyms and levels of detail."""

import random

from lilt.demo.lexicon import COLOURS, INVERSE, RELATIONS, SHAPES, SIZES, TEXTURES
from lilt.demo.scenes import Scene, Thing

# what is said of each thing besides shape and colour; the first caption of a scene says everything
DETAILS: tuple[frozenset[str], ...] = (
    frozenset({"size", "texture"}),
    frozenset({"texture"}),
    frozenset({"size"}),
    frozenset(),
)

# s, o: things. so: "s is … o"; os: "o is … s"; its: os said of "it"
PAIRS = (
    "{s} is {so} {o}",
    "{s} {so} {o}",
    "there is {s} {so} {o}",
    "{so} {o} is {s}",
    "{s} with {o} {its}",
    "{s} and {o}, the former {so} the latter",
    "{o} and {s}, the second {so} the first",
)
# c is beside h and above or below v
CORNERS = (
    "{c} is {ch} {h} and {cv} {v}",
    "{c} {cv} {v} and {ch} {h}",
    "{c} with {h} {h_its} and {v} {v_its}",
    "{h} {hc} {c}, which is {cv} {v}",
    "{v} is {vc} {c}, which is {ch} {h}",
    "{c}, {h} and {v}: the first is {ch} the second and {cv} the third",
    "{h}, {c} and {v}: the second is {ch} the first and {cv} the third",
)


def captions(scene: Scene, rng: random.Random, count: int = 5) -> list[str]:
    """Several distinct captions; each names shape and colour of every thing and every relation, the first all else."""
    found: list[str] = []
    while len(found) < count:
        details = DETAILS[0] if not found else rng.choice(DETAILS)
        text = caption(scene, rng, details)
        if text not in found:
            found.append(text)
    return found


def caption(scene: Scene, rng: random.Random, details: frozenset[str] = DETAILS[0]) -> str:
    """One sentence about the scene; it starts with a capital letter and ends with a full stop, sometimes not."""
    said = [phrase(thing, rng, details) for thing in scene.things]
    text = _corner(scene, said, rng) if len(said) == 3 else _pair(scene, said, rng)
    return text if rng.random() < 0.5 else text[0].upper() + text[1:] + "."


def phrase(thing: Thing, rng: random.Random, details: frozenset[str]) -> str:
    """A noun phrase; the article "a" or "an" opens it and occurs nowhere else in a caption."""
    shape, colour = rng.choice(SHAPES[thing.shape]), rng.choice(COLOURS[thing.colour])
    size = [rng.choice(SIZES[thing.size])] if "size" in details else []
    texture = [rng.choice(TEXTURES[thing.texture])] if "texture" in details else []
    order = rng.randrange(4)
    if order == 0 and texture:
        said = [*size, colour, shape, "that is", *texture]
    elif order == 1 and size:
        said = [*texture, colour, shape, "of", *size, "size"]
    elif order == 2:
        said = [*texture, *size, colour, shape]
    else:
        said = [*size, *texture, colour, shape]
    return ("an " if said[0][0] in "aeio" else "a ") + " ".join(said)


def _pair(scene: Scene, said: list[str], rng: random.Random) -> str:
    ((i, relation, j),) = scene.relations
    if rng.random() < 0.5:
        i, relation, j = j, INVERSE[relation], i
    return rng.choice(PAIRS).format(
        s=said[i],
        o=said[j],
        so=_say(relation, rng),
        its=rng.choice(RELATIONS[INVERSE[relation]][1]),
    )


def _corner(scene: Scene, said: list[str], rng: random.Random) -> str:
    """A sentence about three things, told from the one that has a neighbour beside it and one above or below it."""
    beside: dict[int, tuple[str, int]] = {}
    stacked: dict[int, tuple[str, int]] = {}
    for i, relation, j in scene.relations:
        found = beside if relation in ("left of", "right of") else stacked
        found[i], found[j] = (relation, j), (INVERSE[relation], i)
    (corner,) = beside.keys() & stacked.keys()
    (to_h, h), (to_v, v) = beside[corner], stacked[corner]
    return rng.choice(CORNERS).format(
        c=said[corner],
        h=said[h],
        v=said[v],
        ch=_say(to_h, rng),
        hc=_say(INVERSE[to_h], rng),
        cv=_say(to_v, rng),
        vc=_say(INVERSE[to_v], rng),
        h_its=rng.choice(RELATIONS[INVERSE[to_h]][1]),
        v_its=rng.choice(RELATIONS[INVERSE[to_v]][1]),
    )


def _say(relation: str, rng: random.Random) -> str:
    return rng.choice(RELATIONS[relation][0])

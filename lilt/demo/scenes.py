"""Sample scenes of two or three things, and draw them."""

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

from lilt.demo.lexicon import COLOURS, SHAPES, TEXTURES

IMAGE_PX = 64
RADIUS_PX = {"small": 7.5, "large": 12.5, "huge": 26.0}

# one colour per shape is kept from training and validation, and every test scene shows at least one of these
HELD_OUT: frozenset[tuple[str, str]] = frozenset(
    {
        ("circle", "green"),
        ("square", "purple"),
        ("triangle", "red"),
        ("diamond", "white"),
        ("star", "blue"),
        ("cross", "yellow"),
    }
)


@dataclass(frozen=True)
class Thing:
    """One object; x and y are its centre in px from the top left corner."""

    shape: str
    colour: str
    size: str
    texture: str
    x: float
    y: float


@dataclass(frozen=True)
class Scene:
    """Two or three things with distinct shapes and distinct colours; the seed varies what no caption speaks of."""

    things: tuple[Thing, ...]
    seed: int

    @property
    def relations(self) -> tuple[tuple[int, str, int], ...]:
        """What the placement implies, as (i, relation, j) with i < j: things[i] is `relation` things[j]."""
        pairs = [(i, j) for j in range(len(self.things)) for i in range(j)]
        named = ((i, _relation(self.things[i], self.things[j]), j) for i, j in pairs)
        return tuple((i, relation, j) for i, relation, j in named if relation)

    @property
    def looks(self) -> frozenset[tuple[str, str]]:
        """The (shape, colour) combinations."""
        return frozenset((thing.shape, thing.colour) for thing in self.things)

    @property
    def held_out(self) -> bool:
        """Whether a held-out combination occurs."""
        return bool(self.looks & HELD_OUT)


def sample(rng: random.Random, *, held_out: bool | None = None) -> Scene:
    """One scene; held_out=True demands a held-out combination, False forbids all of them, None lets chance decide."""
    while True:
        scene = _sample(rng)
        if held_out is None or scene.held_out == held_out:
            return scene


def distinct(rng: random.Random, count: int, *, held_out: bool, mirrored_share: float = 0.5) -> list[Scene]:
    """Scenes that a reader who follows the grammar can tell apart by shapes, colours and relations alone.

    mirrored_share of them come in neighbouring pairs that differ in one relation only; no other two scenes have
    the same (shape, colour) combinations.
    """
    scenes: list[Scene] = []
    seen: set[frozenset[tuple[str, str]]] = set()
    pairs = round(count * mirrored_share / 2)
    while len(scenes) < count:
        scene = sample(rng, held_out=held_out)
        wants_pair = len(scenes) < 2 * pairs
        if scene.looks in seen or (wants_pair and is_nested(scene)):
            continue
        seen.add(scene.looks)
        scenes += [scene, mirrored(scene, rng)] if wants_pair else [scene]
    return scenes


def stream(seed: int) -> Iterator[Scene]:
    """Scenes without end and without regard to the held-out combinations: the single-modality pools."""
    rng = random.Random(seed)
    while True:
        yield sample(rng)


def is_nested(scene: Scene) -> bool:
    """Whether one thing lies inside another."""
    return any(relation in ("inside", "around") for _, relation, _ in scene.relations)


def mirrored(scene: Scene, rng: random.Random) -> Scene:
    """The same things with one relation reversed, left-right or above-below, on another background.

    Raises ValueError for nested things, which have no mirrored relation.
    """
    axes = {"x" if relation in ("left of", "right of") else "y" for _, relation, _ in scene.relations}
    if is_nested(scene):
        raise ValueError("a scene of nested things came to mirrored(); it needs things side by side: sample another")
    axis = rng.choice(sorted(axes))
    flip_x, flip_y = axis == "x", axis == "y"
    things = tuple(
        replace(
            thing,
            x=(IMAGE_PX - thing.x if flip_x else thing.x) + rng.uniform(-1.5, 1.5),
            y=(IMAGE_PX - thing.y if flip_y else thing.y) + rng.uniform(-1.5, 1.5),
        )
        for thing in scene.things
    )
    return Scene(things, rng.getrandbits(32))


def _sample(rng: random.Random) -> Scene:
    kind = rng.choices(("beside", "stacked", "nested", "corner"), (2, 2, 1, 5))[0]
    count = 3 if kind == "corner" else 2
    shapes, colours = rng.sample(list(SHAPES), count), rng.sample(list(COLOURS), count)
    sizes = ["huge", "small"] if kind == "nested" else [rng.choice(("small", "large")) for _ in range(count)]
    things = tuple(
        Thing(shape, colour, size, rng.choice(list(TEXTURES)), x, y)
        for shape, colour, size, (x, y) in zip(shapes, colours, sizes, _places(kind, rng), strict=True)
    )
    return Scene(things, rng.getrandbits(32))


def _places(kind: str, rng: random.Random) -> list[tuple[float, float]]:
    """Centres in px. In a corner scene the first thing has one neighbour beside it and one above or below it."""
    near, far = rng.sample((17.5, 46.5), 2)
    free = rng.uniform(17.0, 47.0)
    row = rng.choice((17.5, 46.5))
    centres = {
        "beside": [(near, free), (far, free)],
        "stacked": [(free, near), (free, far)],
        "nested": [(32.0, 32.0), (32.0, 32.0)],
        "corner": [(near, row), (far, row), (near, IMAGE_PX - row)],
    }[kind]
    return [(x + rng.uniform(-2.5, 2.5), y + rng.uniform(-2.5, 2.5)) for x, y in centres]


def _relation(a: Thing, b: Thing) -> str | None:
    """The relation of a to b, or None for things that lie diagonally: neither beside nor above each other."""
    dx, dy = b.x - a.x, b.y - a.y
    if max(abs(dx), abs(dy)) < 10:
        return "around" if RADIUS_PX[a.size] > RADIUS_PX[b.size] else "inside"
    if abs(dx) >= 18 and abs(dy) >= 18:
        return None
    if abs(dx) > abs(dy):
        return "left of" if dx > 0 else "right of"
    return "above" if dy > 0 else "below"

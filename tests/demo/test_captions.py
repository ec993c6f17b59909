import random
import re
from collections.abc import Iterable

from lilt.demo.captions import CORNERS, PAIRS, captions
from lilt.demo.lexicon import (
    ATTRIBUTE_OF,
    COLOURS,
    INVERSE,
    RELATION_OF,
    RELATIONS,
    SHAPES,
    SIZES,
    TEXTURES,
    words,
)
from lilt.demo.scenes import Scene, distinct, stream

# what each sentence means, written by hand: R and S are its first and second relation, digits count the phrases
MEANING = {
    "0 is R 1": ["0R1"],
    "0 R 1": ["0R1"],
    "there is 0 R 1": ["0R1"],
    "R 0 is 1": ["1R0"],
    "0 with 1 R": ["1R0"],
    "0 and 1 the former R the latter": ["0R1"],
    "0 and 1 the second R the first": ["1R0"],
    "0 is R 1 and S 2": ["0R1", "0S2"],
    "0 R 1 and S 2": ["0R1", "0S2"],
    "0 with 1 R and 2 S": ["1R0", "2S0"],
    "0 R 1 which is S 2": ["0R1", "1S2"],
    "0 is R 1 which is S 2": ["0R1", "1S2"],
    "0 1 and 2 the first is R the second and S the third": ["0R1", "0S2"],
    "0 1 and 2 the second is R the first and S the third": ["1R0", "1S2"],
}
PHRASES = {phrase: relation for relation, said in RELATIONS.items() for forms in said for phrase in forms}
PHRASE = re.compile("|".join(rf"\b{re.escape(phrase)}\b" for phrase in sorted(PHRASES, key=len, reverse=True)))


def read(caption: str) -> tuple[list[set[str]], set[tuple[int, str, int]]]:
    """The attributes of each thing in order of mention, and the relations between them."""
    relations: list[str] = []

    def note(match: re.Match[str]) -> str:
        relations.append(PHRASES[match[0]])
        return f" {'RS'[len(relations) - 1]} "

    things: list[set[str]] = []
    skeleton: list[str] = []
    for word in re.sub(r"[,.:]", " ", PHRASE.sub(note, caption.lower().replace(",", " , "))).split():
        if word in ("a", "an"):
            things.append(set())
            skeleton.append(str(len(things) - 1))
        elif word in ATTRIBUTE_OF:
            things[-1].add(ATTRIBUTE_OF[word])
        elif word not in ("that", "of", "size") and not (word == "is" and things and skeleton[-1:] == ["that"]):
            skeleton.append(word)
    meaning = MEANING[" ".join(skeleton)]
    return things, {(int(m[0]), relations["RS".index(m[1])], int(m[2])) for m in meaning}


def facts(scene: Scene) -> set[tuple[frozenset[str], str, frozenset[str]]]:
    looks = [frozenset((thing.shape, thing.colour)) for thing in scene.things]
    told = {(looks[i], relation, looks[j]) for i, relation, j in scene.relations}
    return told | {(b, INVERSE[relation], a) for a, relation, b in told}


def test_every_caption_is_true_and_tells_every_relation() -> None:
    for scene, k in zip(stream(0), range(400), strict=False):
        for caption in captions(scene, random.Random(k)):
            things, relations = read(caption.replace(" that is ", " "))
            everything = [{t.shape, t.colour, t.size, t.texture} for t in scene.things]
            looks = [frozenset(thing & (SHAPES.keys() | COLOURS.keys())) for thing in things]
            assert sorted(map(sorted, looks)) == sorted(sorted({t.shape, t.colour}) for t in scene.things)
            assert all(any(thing <= whole for whole in everything) for thing in things), caption
            assert len(relations) == len(scene.relations)
            assert {(looks[i], relation, looks[j]) for i, relation, j in relations} <= facts(scene), caption


def test_the_first_caption_tells_every_attribute() -> None:
    for scene, k in zip(stream(1), range(100), strict=False):
        things, _ = read(captions(scene, random.Random(k))[0].replace(" that is ", " "))
        told = sorted(map(sorted, things))
        assert told == sorted(sorted({t.shape, t.colour, t.size, t.texture}) for t in scene.things)


def test_captions_of_a_scene_differ_and_repeat_with_the_seed() -> None:
    scene = next(stream(0))
    one, same, other = (captions(scene, random.Random(seed), count=8) for seed in (0, 0, 1))
    assert one == same != other
    assert len(set(one)) == 8


def test_all_sentences_and_all_words_occur() -> None:
    pool = [
        text for scene, k in zip(stream(2), range(1500), strict=False) for text in captions(scene, random.Random(k))
    ]
    heard = {word for text in pool for word in words(text)}
    assert heard >= ATTRIBUTE_OF.keys() | RELATION_OF.keys()
    assert len({len(text.split()) for text in pool}) > 15
    assert len(MEANING) == len({*PAIRS, *CORNERS})


def test_no_word_means_two_things() -> None:
    def unique(found: Iterable[str]) -> int:
        return len(set(found))

    said = [word for table in (SHAPES, COLOURS, SIZES, TEXTURES) for group in table.values() for word in group]
    assert unique(said) == len(said)
    assert not set(said) & RELATION_OF.keys()


def test_a_perfect_reader_tells_held_out_scenes_apart() -> None:
    told = [frozenset(facts(scene)) for scene in distinct(random.Random(0), 200, held_out=True)]
    assert len(set(told)) == 200

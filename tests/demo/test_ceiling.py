import pytest

from lilt.demo import bag_of_words_ceiling
from lilt.demo.ceiling import bag


def test_a_bag_resolves_synonyms_and_forgets_order_and_direction() -> None:
    one = bag("A tiny crimson disc to the left of an azure box.")
    same = bag("a red circle is right of a little blue square")
    assert one == same == {"small": 1, "red": 1, "circle": 1, "blue": 1, "square": 1, "beside": 1}


def test_a_bag_counts_attributes_but_not_axes() -> None:
    assert bag("a big circle, a large star; left, right")["large"] == 2
    assert bag("a big circle, a large star; left, right")["beside"] == 1


def test_three_images_by_hand() -> None:
    # the first two differ in direction only, so their captions point at both; the third is alone
    mirrored = [["a red circle left of a blue square"], ["a blue square left of a red circle"]]
    alone = [["a red star above a blue square"]]
    assert bag_of_words_ceiling(mirrored) == {"text_to_image": 50.0, "image_to_text": 50.0}
    both = bag_of_words_ceiling(mirrored + alone)
    assert both["text_to_image"] == both["image_to_text"] == pytest.approx(100 * (1 / 2 + 1 / 2 + 1) / 3)


def test_a_vague_caption_fits_every_image_that_says_more() -> None:
    vague = ["a red circle left of a blue square", "a tiny red circle left of a blue square"]
    other = ["a huge red circle left of a blue square"]
    # the vague caption fits both images, the two precise ones fit their own only
    assert bag_of_words_ceiling([vague, other]) == {
        "text_to_image": pytest.approx(100 * (1 / 2 + 1 + 1) / 3),
        "image_to_text": 100.0,
    }


def test_who_holds_which_colour_is_lost() -> None:
    swapped = [["a red circle left of a blue square"], ["a blue circle left of a red square"]]
    assert bag_of_words_ceiling(swapped)["text_to_image"] == 50.0


def test_foreign_captions_are_refused() -> None:
    with pytest.raises(ValueError, match="no word of the demo's lexicon"):
        bag_of_words_ceiling([["many planes at an airport"]])

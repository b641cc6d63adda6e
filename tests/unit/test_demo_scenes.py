"""Scenes: what is drawn, said and held out."""

import itertools

import numpy as np
import pytest

from vilg.demo.glyphs import article_for, glyph_layer, glyph_picture, load_glyphs
from vilg.demo.scenes import (
    BACKGROUNDS,
    SPLITS,
    Draws,
    SceneConfig,
    caption_for,
    held_out_table,
    make_scene,
    places_for,
    render,
    scenes,
)

SMALL = SceneConfig(num_glyphs=24, num_train=900, num_seen=100, num_held_out=100)
PAIRS = SceneConfig(
    num_glyphs=24, image_size=48, sizes=(16, 20, 24), two_objects=True, num_train=300, num_seen=60, num_held_out=60
)


def glyph_named(en: str) -> int:
    return next(index for index, glyph in enumerate(load_glyphs()) if glyph.en == en)


def test_scene_is_a_function_of_seed_split_and_index():
    alone = make_scene(SMALL, "train", 417)
    assert alone == list(scenes(SMALL, "train"))[417]
    assert np.array_equal(render(SMALL, alone), render(SMALL, make_scene(SMALL, "train", 417)))
    assert alone == make_scene(SMALL.model_copy(update={"num_train": 5}), "train", 417)
    other_seed = SMALL.model_copy(update={"seed": 1})
    assert [make_scene(other_seed, "train", i) for i in range(9)] != [make_scene(SMALL, "train", i) for i in range(9)]


def test_draws_are_the_same_on_every_machine():
    draws = Draws(7, "places", 3)
    assert [draws.below(1000) for _ in range(4)] == [34, 46, 926, 433]  # BLAKE2b("7/places/3", n)
    assert sorted(Draws("any").permutation(50)) == list(range(50))


@pytest.mark.parametrize("config", [SMALL, PAIRS], ids=["one object", "two objects"])
def test_training_never_shows_a_held_out_combination(config):
    table = held_out_table(config)
    for split in SPLITS:
        shown = {(glyph, scene.background) for scene in scenes(config, split) for glyph in scene.glyphs}
        assert {bool(table[pair]) for pair in shown} == {split == "held_out"}


def test_every_glyph_and_background_keeps_most_combinations_in_training():
    for config in (SMALL, SceneConfig(), SceneConfig(num_backgrounds=16, held_out_fraction=0.4, seed=5)):
        table = held_out_table(config)
        assert set(table.sum(axis=1)) == {config.backgrounds_held_out}
        assert np.ptp(table.sum(axis=0)) <= 1
        assert table.mean(axis=0).max() < 0.5
    assert not np.array_equal(held_out_table(SMALL), held_out_table(SMALL.model_copy(update={"seed": 1})))
    assert np.array_equal(held_out_table(SMALL), held_out_table(SceneConfig())[: SMALL.num_glyphs])


def test_one_round_of_training_shows_every_trained_combination_once():
    rounds = int((~held_out_table(SMALL)).sum())
    shown = [(s.glyphs[0], s.background) for s in itertools.islice(scenes(SMALL, "train"), rounds)]
    assert len(set(shown)) == rounds


def test_every_shipped_glyph_renders_and_no_two_look_the_same():
    layers = np.stack([glyph_layer(index, 24) for index in range(len(load_glyphs()))]).astype(np.float32)
    assert layers[..., 3].mean(axis=(1, 2)).min() > 15  # opaque somewhere: at least 6% of the cell
    flat = (layers[..., :3] + (255 - layers[..., 3:]) * 0.5).reshape(len(layers), -1)
    squares = (flat**2).sum(axis=1)
    distance = squares[:, None] + squares - 2 * flat @ flat.T
    np.fill_diagonal(distance, np.inf)
    assert np.sqrt(distance.min() / flat.shape[1]) > 12  # grey levels, root mean square


def test_names_are_short_and_unique_and_animals_and_foods_come_first():
    glyphs = load_glyphs()
    assert len(glyphs) >= 300
    for names in ([glyph.zh for glyph in glyphs], [glyph.en for glyph in glyphs], [glyph.char for glyph in glyphs]):
        assert len(set(names)) == len(names)
    assert max(len(glyph.zh) for glyph in glyphs) <= 4
    assert max(len(glyph.en.split()) for glyph in glyphs) <= 2
    assert {glyph.category for glyph in glyphs[:100]} <= {"animals", "food", "plants"}
    assert all(glyph.core for glyph in glyphs[:100])


@pytest.mark.parametrize(
    "name, article",
    [
        ("horse", "a"),
        ("owl", "an"),
        ("unicorn", "a"),
        ("ewe", "a"),
        ("hourglass", "an"),
        ("umbrella", "an"),
        ("onion", "an"),
        ("grapes", ""),
        ("bread", ""),
        ("french fries", ""),
        ("ice cream", "an"),
    ],
)
def test_article_follows_the_sound_and_spares_plurals_and_masses(name, article):
    assert article_for(name) == article


def test_captions_read_well_in_both_languages():
    horse, cat, grapes = glyph_named("horse"), glyph_named("cat"), glyph_named("grapes")
    white, orange = 0, [background.en for background in BACKGROUNDS].index("orange")
    assert caption_for((horse,), white, "zh") == "白色背景上的马"
    assert caption_for((horse,), white, "en") == "a horse on a white background"
    assert caption_for((grapes,), orange, "en") == "grapes on an orange background"
    assert caption_for((cat, horse), white, "zh") == "左边是猫，右边是马，白色背景"
    assert caption_for((cat, horse), white, "en") == "a cat on the left and a horse on the right on a white background"
    with pytest.raises(ValueError, match="use one of zh, en"):
        caption_for((cat,), white, "fr")


def test_both_languages_are_drawn():
    share = np.mean([scene.language == "zh" for scene in scenes(SMALL, "train")])
    assert 0.4 < share < 0.6


def test_picture_is_background_around_the_glyph_at_its_place():
    config = SceneConfig(sizes=(16,), place_steps=(4,), tint=0)
    scene = make_scene(config, "train", 0)
    image, (x, y) = render(config, scene), scene.places[0]
    inside = np.zeros(image.shape[:2], dtype=bool)
    inside[y : y + 16, x : x + 16] = True
    assert (image[~inside] == scene.color).all()
    assert np.array_equal(image[y : y + 16, x : x + 16], glyph_picture(scene.glyphs[0], 16, scene.color))


def test_two_objects_stay_in_their_halves_and_differ():
    for scene in scenes(PAIRS, "train"):
        assert scene.glyphs[0] != scene.glyphs[1]
        assert all(x + size <= 24 and y + size <= 48 for size, (x, y) in zip(scene.sizes, scene.places))


def test_places_lie_on_the_step_and_step_zero_centres():
    assert all(x % 4 == 0 and y % 4 == 0 and max(x, y) + 20 <= 32 for x, y in places_for(SceneConfig(), 20))
    assert len(places_for(SceneConfig(), 20)) == 16
    assert places_for(SceneConfig(place_steps=(0,)), 20) == [(6, 6)]
    mixed = SceneConfig(sizes=(24, 28), place_steps=(0, 4))
    assert (len(places_for(mixed, 24)), len(places_for(mixed, 28))) == (1, 4)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"sizes": (40,)}, "a glyph is 8 to 32 pixels"),
        ({"sizes": (24,), "two_objects": True}, "a glyph is 8 to 16 pixels"),
        ({"num_glyphs": 9999}, "are shipped"),
        ({"held_out_fraction": 0.01}, "no held-out scenes"),
        ({"image_size": 33}, "32, 48 or 64"),
        ({"glyphs": 3}, "Extra inputs"),
    ],
)
def test_impossible_settings_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        SceneConfig(**values)

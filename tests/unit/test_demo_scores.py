"""The nearest-scene measure is exact on real scenes, and agrees with a search by brute force."""

import itertools

import numpy as np
import pytest

from vilg.demo.scenes import BACKGROUNDS, SPLITS, SceneConfig, held_out_table, make_scene, places_for, render, scenes
from vilg.demo.scores import SceneMatcher, scene_scores
from vilg.evaluate.scenes import CompositeMatcher

DEFAULT = SceneConfig(num_train=600, num_seen=200, num_held_out=192)


@pytest.mark.parametrize(
    "config",
    [
        DEFAULT,
        SceneConfig(tint=16, num_backgrounds=16, num_train=300, num_seen=200, num_held_out=200),
        SceneConfig(
            image_size=48, sizes=(16, 24), two_objects=True, num_glyphs=32, num_train=100, num_seen=60, num_held_out=60
        ),
    ],
    ids=["default", "all backgrounds, strongest tint", "two objects"],
)
def test_real_scenes_of_every_split_score_exactly_one(config):
    matcher = SceneMatcher(config)
    for split in SPLITS:
        wanted = list(scenes(config, split))
        scores = scene_scores(np.stack([render(config, s) for s in wanted]), wanted, config, matcher=matcher)
        assert (scores["glyph_recall"], scores["background_accuracy"], scores["scene_exact"]) == (1.0, 1.0, 1.0)
        assert scores["margin"] > 5
        assert scores["images"] == len(wanted)


def test_the_sample_above_holds_every_combination_of_the_default_recipe():
    table = held_out_table(DEFAULT)
    shown = {(s.glyphs[0], s.background) for split in SPLITS for s in scenes(DEFAULT, split)}
    assert len(shown) >= table.size * 0.98
    assert {glyph for glyph, _ in shown} == set(range(DEFAULT.num_glyphs))


def test_nearest_agrees_with_brute_force_on_noisy_pictures():
    config = SceneConfig(num_glyphs=4, num_backgrounds=3, sizes=(16, 20), place_steps=(8, 8), held_out_fraction=0.34)
    wanted = [make_scene(config, "train", index) for index in range(12)]
    noise = np.random.default_rng(0).normal(0, 90, (12, 32, 32, 3))
    images = np.clip([render(config, s) + n for s, n in zip(wanted, noise)], 0, 255).astype(np.uint8)
    found = SceneMatcher(config).nearest(images)
    for index, image in enumerate(images):
        distances = {}
        for glyph, background, size in itertools.product(range(4), range(3), config.sizes):
            for place in places_for(config, size):
                candidate = wanted[0].__class__(
                    "train", 0, "zh", (glyph,), background, BACKGROUNDS[background].rgb, (size,), (place,)
                )
                gap = render(config, candidate).astype(np.float64) - image
                rms = np.sqrt((gap**2).mean())
                distances[glyph, background] = min(rms, distances.get((glyph, background), np.inf))
        glyph, background = min(distances, key=distances.get)
        assert (found.glyphs[index, 0], found.backgrounds[index]) == (glyph, background)
        others = min(value for (other, _), value in distances.items() if other != glyph)
        assert found.margin[index, 0] == pytest.approx(others - distances[glyph, background], abs=0.05)


def test_wrong_pictures_score_near_chance():
    wanted = list(scenes(DEFAULT, "seen"))[:128]
    images = np.stack([render(DEFAULT, s) for s in wanted])
    shuffled = scene_scores(np.roll(images, 1, axis=0), wanted, DEFAULT)
    assert shuffled["glyph_recall"] < 0.15 and shuffled["background_accuracy"] < 0.35
    noise = np.random.default_rng(0).integers(0, 256, images.shape, dtype=np.uint8)
    assert scene_scores(noise, wanted, DEFAULT)["glyph_recall"] < 0.15


def test_exact_needs_glyph_and_background():
    config = SceneConfig(num_glyphs=4, num_backgrounds=4)
    scene = make_scene(config, "train", 0)
    other = next(s for s in scenes(config, "train") if s.glyphs == scene.glyphs and s.background != scene.background)
    scores = scene_scores(render(config, other)[None], [scene], config)
    assert (scores["glyph_recall"], scores["background_accuracy"], scores["scene_exact"]) == (1.0, 0.0, 0.0)


def test_unfitting_input_is_refused():
    matcher = SceneMatcher(SceneConfig(num_glyphs=3))
    with pytest.raises(ValueError, match=r"expected uint8 \[B, 32, 32, 3\]"):
        matcher.nearest(np.zeros((2, 48, 48, 3), dtype=np.uint8))
    with pytest.raises(ValueError, match="one for each"):
        scene_scores(np.zeros((2, 32, 32, 3), dtype=np.uint8), [], SceneConfig())
    with pytest.raises(ValueError, match="two or more"):
        CompositeMatcher([np.zeros((1, 8, 8, 4), dtype=np.uint8)], np.zeros((1, 3), dtype=np.uint8))

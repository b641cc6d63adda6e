"""What the demo's evaluation compares with what, and the inputs it cannot measure."""

import pytest

from vilg.demo.evaluate import _other_glyph, distinct_scenes, evaluate
from vilg.demo.generate_data import write_raw
from vilg.demo.scenes import SceneConfig, held_out_table, make_scene
from vilg.errors import UserError

CONFIG = SceneConfig(num_glyphs=8, num_backgrounds=4, num_train=40, num_seen=6, num_held_out=6)


@pytest.mark.parametrize("split", ["seen", "held_out"])
def test_measured_scenes_differ_in_their_prompts_and_belong_to_their_split(split):
    scenes = distinct_scenes(CONFIG, split, 128)
    assert len({scene.caption("zh") for scene in scenes}) == len(scenes) <= 6
    held = held_out_table(CONFIG)
    assert all(held[scene.glyphs[0], scene.background] == (split == "held_out") for scene in scenes)


def test_no_training_scene_shows_a_held_out_combination():
    measured = {scene.caption("en") for scene in distinct_scenes(CONFIG, "held_out", 128)}
    trained = {make_scene(CONFIG, "train", index).caption("en") for index in range(500)}
    assert measured and not measured & trained


def test_the_wrong_caption_names_another_object_and_at_least_another_background():
    scenes = distinct_scenes(CONFIG, "seen", 128)
    assert all(scenes[other].glyphs != scene.glyphs for other, scene in zip(_other_glyph(scenes), scenes, strict=True))
    one = scenes[0]
    same_glyph = [make_scene(CONFIG, "seen", index) for index in range(60)]
    backgrounds = {scene.background: scene for scene in same_glyph if scene.glyphs == one.glyphs}
    chosen = list(backgrounds.values())
    assert len(chosen) >= 2
    assert all(other != index for index, other in enumerate(_other_glyph(chosen)))


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (CONFIG, {"num_scenes": 1}, "--num-scenes 1"),
        (CONFIG, {"num_candidates": 0}, "--num-candidates 0"),
        (CONFIG.model_copy(update={"num_held_out": 0}), {}, "num_held_out=0"),
    ],
)
def test_what_cannot_be_measured_is_named_before_the_model_is_opened(tmp_path, config, options, message):
    write_raw(config, tmp_path / "raw", progress=False)
    with pytest.raises(UserError, match=message):
        given = {"num_scenes": 4, "num_candidates": 2, "seed": 0, **options}
        evaluate(tmp_path / "no-model", tmp_path / "raw", **given)

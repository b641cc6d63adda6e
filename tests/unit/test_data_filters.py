"""Filters one by one: what captions, images and hashes they keep, and how they work together in an ingest."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

from tests.unit.data_support import make_raw, picture
from vilg.config import IngestRecipe, load_ingest_recipe
from vilg.data.filters import captions as rules
from vilg.data.filters.duplicates import HashIndex, perceptual_hash
from vilg.data.ingest import ingest
from vilg.errors import UserError
from vilg.tokens.vqgan.images import decode_image


def recipe(**sections: dict) -> IngestRecipe:
    return IngestRecipe.model_validate(sections)


def scene(number: int, side: int = 96) -> Image.Image:
    """A smooth picture, as photographs are; another number is another picture."""
    coarse = np.random.default_rng(number).integers(0, 256, (6, 6, 3), np.uint8)
    return Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, format: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def with_captions(folder: Path, captions: list[str]) -> Path:
    return make_raw(folder, [len(captions)], lambda n, f: f | {"txt": captions[n].encode()})


def with_images(folder: Path, images: list[bytes]) -> Path:
    return make_raw(folder, [len(images)], lambda n, f: f | {"png": images[n], "txt": b"a horse"})


@pytest.mark.parametrize(
    ("caption", "language", "words", "noun"),
    [
        ("一匹红色的马在蓝色背景上奔跑", "zh", 9, True),
        ("奔跑", "zh", 1, False),
        ("iPhone 手机壳", "zh", 3, True),
        ("a woman's well-known T-shirt, red", "en", 5, True),
        ("click here now!", "en", 3, False),
        ("it is very nice", "en", 4, False),
        ("犬がいる", "ja", None, None),
        ("한국 사람", "ko", 2, None),
        ("Привет мир", "other", 2, True),
        ("1234 -- 56", "other", 2, False),
    ],
)
def test_language_words_and_nouns(caption, language, words, noun):
    assert rules.language(caption) == language
    assert words is None or rules.count_words(caption) == words
    assert noun is None or rules.has_noun(caption) == noun


def test_special_characters_are_what_is_neither_letter_nor_plain_punctuation():
    allowed = recipe(characters={}).characters.allowed
    for plain in ("一匹马，在跑。", "A cat's nap (2020), 50% & more", "naïve café", "मुंबई"):
        assert rules.special_characters(plain, allowed) == ""
    assert rules.special_characters("马★ <b>#1</b>#", allowed) == "★<>#"
    assert rules.special_characters("a\u200bb\x07", allowed) == "\u200b\x07"
    assert rules.special_characters("🐎", allowed) == "🐎"


def test_jieba_neither_writes_nor_reads_a_cache_in_the_shared_temporary_folder(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / "jieba.cache").write_bytes(b"not what it seems")
    assert rules.chinese.__wrapped__().cut("一匹马") == ["一匹", "马"]
    assert [path.name for path in tmp_path.iterdir()] == ["jieba.cache"]
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("distance", range(8))
def test_hashes_within_the_distance_are_found_and_no_others(distance):
    generator = np.random.default_rng(distance)
    values = generator.integers(0, 1 << 64, 50, dtype=np.uint64).tolist()
    index = HashIndex(distance)
    for value in values:
        index.add(value)
    for value in values:
        bits = generator.permutation(64).tolist()
        near = value ^ sum(1 << bit for bit in bits[:distance])
        assert near in index and value in index
        assert near ^ (1 << bits[distance]) not in index


def test_perceptual_hash_bears_scaling_recompression_and_brightness_but_not_another_picture():
    def bits(one: bytes, other: bytes) -> int:
        return (perceptual_hash(decode_image(one, 64)) ^ perceptual_hash(decode_image(other, 64))).bit_count()

    for number in range(10):
        image = scene(number, 200)
        original = encoded(image)
        assert bits(original, encoded(image, "JPEG", quality=40)) <= 3
        assert bits(original, encoded(image.resize((90, 90)))) <= 3
        assert bits(original, encoded(image.point(lambda level: level * 0.8))) <= 3
        assert bits(original, encoded(image.filter(ImageFilter.GaussianBlur(1)))) <= 3
        assert bits(original, encoded(scene(number + 100, 200))) > 12
        assert bits(original, encoded(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT))) > 12


def test_each_caption_filter_counts_what_it_drops(tmp_path):
    captions = ["一匹马", "a cat ★", "very nice", "one two three four", "犬がいる", "a dog runs", "x y z w v u"]
    raw = with_captions(tmp_path / "raw", captions)
    settings = recipe(language={}, characters={}, words={"below": 5, "at_least": 2}, noun={})
    report = ingest([raw], tmp_path / "out", recipe=settings)
    assert report["dropped"] == {"no noun": 2, "language": 1, "special characters": 1, "too many words": 1}
    assert report["kept"] == 2
    off = {name: {"enabled": False} for name in ("language", "characters", "words", "noun")}
    assert ingest([raw], tmp_path / "all", recipe=recipe(**off))["kept"] == 7


def test_of_several_captions_the_good_ones_stay(tmp_path):
    several = [["★", "a horse", "very nice"], ["★", "★★"], ["马"]]

    def edit(number, fields):
        return {"png": fields["png"], "json": json.dumps({"captions": several[number]}).encode()}

    raw = make_raw(tmp_path / "raw", [3], edit)
    report = ingest([raw], tmp_path / "out", recipe=recipe(characters={}, noun={}))
    assert report["dropped"] == {"special characters": 1}
    assert report["captions_dropped_of_kept_pairs"] == {"special characters": 1, "no noun": 1}
    first = read(tmp_path / "out")[0]
    assert json.loads(first["json"])["captions"] == ["a horse"] and first["txt"] == b"a horse"


def read(out: Path) -> list[dict[str, bytes]]:
    from vilg.data.shards import RAW_FIELDS, ShardReader, index_shard

    with ShardReader(out / "00000.tar", index_shard(out / "00000.tar", RAW_FIELDS)) as reader:
        return [reader.read(number) for number in range(len(reader))]


def test_small_and_long_images_and_bombs_are_counted(tmp_path):
    images = [encoded(scene(n).resize(size)) for n, size in enumerate([(64, 64), (31, 64), (40, 90), (100, 100)])]
    raw = with_images(tmp_path / "raw", images)
    report = ingest(
        [raw], tmp_path / "out", recipe=recipe(side={"at_least": 32}, aspect={"at_most": 2}, max_pixels=9000)
    )
    assert report["dropped"] == {"too small": 1, "too long a shape": 1, "bad image": 1}
    assert "100 x 100 pixels are more than max_pixels=9000" in report["examples"]["bad image"][0]["detail"]


def test_a_bomb_is_refused_by_its_header_without_being_decoded(tmp_path, monkeypatch):
    bomb = encoded(Image.new("1", (30_000, 30_000)), compress_level=9)
    raw = with_images(tmp_path / "raw", [bomb])
    monkeypatch.setattr(Image.Image, "load", lambda *_: pytest.fail("decoded"))
    with pytest.raises(UserError, match="none of 1 samples can be used: 1 x bad image"):
        ingest([raw], tmp_path / "out")
    assert not (tmp_path / "out" / "report.json").exists() and (tmp_path / "out" / "report.html").exists()


def test_of_duplicates_the_first_kept_one_stays(tmp_path):
    one, other = encoded(scene(1)), encoded(scene(2))
    images = [one, one, other, encoded(scene(1), "JPEG", quality=80), one]
    captions = ["★", "a horse", "a cat", "a mare", "a cat"]
    raw = make_raw(tmp_path / "raw", [5], lambda n, f: f | {"png": images[n], "txt": captions[n].encode()})
    report = ingest([raw], tmp_path / "exact", recipe=recipe(characters={}, exact_duplicates={}))
    assert report["dropped"] == {"special characters": 1, "exact duplicate": 1}  # the dropped ★ is nobody's original
    report = ingest([raw], tmp_path / "pairs", recipe=recipe(characters={}, exact_duplicates={"of": "pair"}))
    assert report["dropped"] == {"special characters": 1}
    report = ingest([raw], tmp_path / "near", recipe=recipe(characters={}, near_duplicates={}, exact_duplicates={}))
    assert report["dropped"] == {"special characters": 1, "exact duplicate": 1, "near duplicate": 1}
    assert [sample["txt"] for sample in read(tmp_path / "near")] == [b"a horse", b"a cat"]


class Brightness:
    """A scorer: the share of light, whatever the caption; "never" scores -1."""

    image_size = 4

    def __init__(self):
        self.batches: list[int] = []

    def score(self, images, captions):
        self.batches.append(len(captions))
        return np.where([c == "never" for c in captions], -1, images.reshape(len(images), -1).mean(1) / 255)


def test_pairs_up_to_the_threshold_are_dropped_by_a_scorer_that_sees_no_duplicate_twice(tmp_path):
    levels = [255, 0, 200, 255, 127, 130, 255]
    images = [encoded(Image.new("RGB", (8, 8 + n % 2), (level,) * 3)) for n, level in enumerate(levels)]
    several = {2: ["never", "light"], 5: ["never", "never"]}

    def edit(number, fields):
        return fields | {"png": images[number], "json": json.dumps(
            {"captions": several[number]} if number in several else {}).encode()}

    raw, scorer = make_raw(tmp_path / "raw", [7], edit), Brightness()
    settings = recipe(similarity={"above": 0.5, "batch_size": 3}, exact_duplicates={})
    report = ingest([raw], tmp_path / "out", recipe=settings, scorer=scorer)
    # 0 and 6 are equal files; 6 is found before it costs a score.
    assert report["dropped"] == {"not similar": 3, "exact duplicate": 1}
    assert report["captions_dropped_of_kept_pairs"] == {"not similar": 1}
    assert scorer.batches == [3, 1, 3]  # equal captions of a pair are one
    assert report["histograms"]["similarity"]["thresholds"] == [0.5]
    with pytest.raises(UserError, match="the recipe's similarity filter is off"):
        ingest([raw], tmp_path / "no", scorer=scorer)


def test_any_number_of_processes_gives_the_same_bytes(tmp_path):
    raw = make_raw(tmp_path / "raw", [40, 30], lambda n, f: f | ({"png": b"broken"} if n % 7 == 0 else {}))
    settings = recipe(noun={}, near_duplicates={}, samples_per_shard=20)
    for workers in (0, 2):
        ingest([raw], tmp_path / str(workers), recipe=settings, workers=workers)
    one, other = ({p.name: p.read_bytes() for p in (tmp_path / w).iterdir()} for w in ("0", "2"))
    assert one == other and len(one) > 3


def test_report_counts_bins_and_shows_pictures(tmp_path):
    def edit(number, fields):
        caption = f"horse {number} <b>" if number % 3 else "very nice"
        return fields | {"txt": caption.encode(), "png": picture(number, size=(8 + number, 20))}

    raw = make_raw(tmp_path / "raw", [60], edit)
    settings = recipe(noun={}, words={"below": 4}, side={"at_least": 20})
    report = ingest([raw], tmp_path / "out", recipe=settings)
    side = report["histograms"]["side"]
    assert sum(side["kept"]) == report["kept"] and sum(side["dropped_here"]) == report["dropped"]["too small"]
    assert side["thresholds"] == [20] and len(side["edges"]) == len(side["kept"]) + 1
    words = report["histograms"]["words"]
    assert sum(map(sum, (words[k] for k in ("kept", "dropped_here", "dropped_elsewhere")))) == 60
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == len(report["histograms"]) == 3
    assert page.count("data:image/jpeg;base64,") > 20 and "&lt;b&gt;" in page and "<b>" not in page
    assert "http" not in page.replace("https://example.org", "")
    assert len(report["examples"]["too small"]) <= 24


def test_mistakes_in_the_recipe_are_named_with_their_place(tmp_path):
    path = tmp_path / "ingest.yaml"
    path.write_text("words:\n  belw: 3\nside: {at_least: 0}\nsimilarity: {above: 0.3}\n", encoding="utf-8")
    with pytest.raises(UserError) as error:
        load_ingest_recipe(path, ["near_duplicates.distance=9"])
    assert f"{path}:2:3: words.belw: unknown key; did you mean 'below'?" in str(error.value)
    assert "--near_duplicates.distance=9: near_duplicates.distance: should be less than or" in str(error.value)
    assert f"{path}:3:8: side.at_least: should be greater than 0" in str(error.value)
    path.write_text("words: {below: 3, at_least: 3}\nsimilarity: {above: 0.3}\n", encoding="utf-8")
    with pytest.raises(UserError) as error:
        load_ingest_recipe(path)
    assert f"{path}:1:19: words.at_least=3 leaves no caption" in str(error.value)
    assert f"{path}:2:1: similarity.model is missing" in str(error.value)


def test_shipped_recipe_has_the_papers_settings():
    shipped = load_ingest_recipe(Path(__file__).parents[2] / "launch" / "recipes" / "ingest.yaml")
    assert shipped.active("words").below == 15 and shipped.active("noun") and shipped.active("characters")
    assert shipped.similarity.above == 0.5 and shipped.active("similarity") is None
    # A section that is switched on alone has the same thresholds.
    assert shipped.near_duplicates.distance == recipe(near_duplicates={}).near_duplicates.distance
    assert shipped.characters.allowed == recipe(characters={}).characters.allowed

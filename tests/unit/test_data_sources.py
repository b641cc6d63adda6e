"""Sources of pairs: tars, folders, tables, COCO; what they promise and do not hold is said, nothing outside is read."""

import json
from pathlib import Path

import pytest

from tests.unit.data_support import make_raw, picture
from vilg.data.sources import Found, Table, Totals, open_source
from vilg.errors import UserError


def found(source: Path, table: Table = Table()) -> list[Found]:
    return list(open_source(source, table, Totals()))


def captions(pair: Found) -> list[str]:
    return json.loads(pair.fields["json"])["captions"] if "json" in pair.fields else [pair.fields["txt"].decode()]


@pytest.fixture
def images(tmp_path) -> Path:
    for number in range(3):
        (tmp_path / "images").mkdir(exist_ok=True)
        (tmp_path / "images" / f"{number}.png").write_bytes(picture(number))
    return tmp_path / "images"


TABLE_FILES = {
    "a.csv": "file_name,caption\n0.png,一匹马\n1.png,\"a cat, asleep\"\n1.png,another\n",
    "a.tsv": "id\tcaption\timage\n7\t一匹马\t0.png\n8\ta cat, asleep\t1.png\n9\tanother\t1.png\n",
    "a.jsonl": '{"image": "0.png", "text": "一匹马"}\n\n{"image": "1.png", "text": ["a cat, asleep", "another"]}\n',
    "challenger.json": '[{"image_id": "0.png", "caption": ["一匹马"]}, {"image_id": "1.png", "caption": '
    '["a cat, asleep", "another"]}]',
    "coco.json": json.dumps({
        "images": [{"id": 5, "file_name": "0.png"}, {"id": 6, "file_name": "1.png"}],
        "annotations": [
            {"image_id": 6, "caption": "a cat, asleep"},
            {"image_id": 5, "caption": "一匹马"},
            {"image_id": 6, "caption": "another"},
        ],
    }),
    "karpathy.json": json.dumps({
        "images": [
            {"filepath": "", "filename": "0.png", "sentences": [{"raw": "一匹马"}]},
            {"filepath": "", "filename": "1.png", "sentences": [{"raw": "a cat, asleep"}, {"raw": "another"}]},
        ]
    }),
}


@pytest.mark.parametrize("name", TABLE_FILES)
def test_tables_in_all_forms_give_the_same_pairs(images, name):
    table = images.parent / name
    table.write_text(TABLE_FILES[name], encoding="utf-8")
    pairs = found(table, Table(images))
    assert [pair.key for pair in pairs] == ["0.png", "1.png"]
    assert [captions(pair) for pair in pairs] == [["一匹马"], ["a cat, asleep", "another"]]
    assert [pair.fields["png"] for pair in pairs] == [picture(0), picture(1)]


def test_images_lie_beside_the_table_and_columns_can_be_named(images):
    (images / "t.csv").write_text("what,where\na horse,0.png\n", encoding="utf-8")
    pairs = found(images / "t.csv", Table(image_column="where", caption_column="what"))
    assert captions(pairs[0]) == ["a horse"]
    with pytest.raises(UserError, match=r"none of its columns \['what', 'where'\] is known; name one with --image-col"):
        found(images / "t.csv")
    with pytest.raises(UserError, match="has no --image-column 'wher'; did you mean 'where'"):
        found(images / "t.csv", Table(image_column="wher"))


@pytest.mark.parametrize(
    ("name", "reason"),
    [("../secret.png", "outside the images"), ("/etc/hostname", "outside the images"), ("none.png", "no image"),
     ("0.exe", "no image"), ("a\0b.png", "no image")],
)
def test_a_table_reads_nothing_outside_and_names_what_is_missing(images, name, reason):
    (images.parent / "secret.png").write_bytes(picture(9))
    (images / "t.jsonl").write_text(json.dumps({"image": name, "caption": "x"}), encoding="utf-8")
    (pair,) = found(images / "t.jsonl")
    assert pair.fault[0] == reason and not pair.fields


def test_a_link_out_of_the_folder_is_not_followed(images):
    (images.parent / "secret.png").write_bytes(picture(9))
    (images / "link.png").symlink_to(images.parent / "secret.png")
    (images / "t.jsonl").write_text('{"image": "link.png", "caption": "x"}', encoding="utf-8")
    assert found(images / "t.jsonl")[0].fault[0] == "outside the images"


def test_bytes_that_are_no_utf8_arrive_as_they_were(images):
    (images / "t.csv").write_bytes("image,caption\n0.png,".encode() + "马".encode("gbk") + b"\n")
    assert found(images / "t.csv")[0].fields["txt"] == "马".encode("gbk")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("t.jsonl", '{"image": "0.png", "caption": "x"}\n{broken', r"t.jsonl:2: no JSON"),
        ("t.jsonl", "[1]", r"t.jsonl:1: expected an object"),
        ("t.jsonl", '{"image": 3, "caption": "x"}', r"t.jsonl:1: image should be text.*found 3"),
        ("t.json", '{"images": [{"id": 1}], "annotations": []}', "is neither COCO's captions .* KeyError"),
        ("t.json", "[3]", "entry 1 is no object"),
        ("t.json", "3", "is neither COCO's captions"),
        ("t.csv", "caption\nx\n", "name one with --image-column"),
    ],
)
def test_a_broken_table_is_a_clear_error(images, name, text, message):
    (images / name).write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        found(images / name)


def test_what_img2dataset_counted_is_compared_with_what_there_is(tmp_path):
    raw = make_raw(tmp_path / "raw", [3, 2])
    (raw / "00000_stats.json").write_text('{"count": 9, "successes": 3}', encoding="utf-8")
    (raw / "00001_stats.json").write_text('{"count": 9, "successes": 4}', encoding="utf-8")
    totals = Totals()
    assert len(list(open_source(raw, Table(), totals))) == 5
    assert totals.expected == 7
    assert totals.notes == [f"{raw / '00001.tar'} holds 2 pairs, but 00001_stats.json says 4"]
    (raw / "00001_stats.json").write_text("{}", encoding="utf-8")
    with pytest.raises(UserError, match="00001_stats.json: is no statistics file of img2dataset"):
        open_source(raw, Table(), Totals())


QUESTION_FILES = {
    "q.jsonl": '{"image": "0.png", "question": "左边是什么？", "answer": "猫"}\n'
    '{"image": "1.png", "question": "what colour?", "answers": ["blue", "dark blue"]}\n'
    '{"image": "1.png", "question": "what is it?", "answer": "a cat"}\n',
    "q.tsv": "question\timage\tanswer\n左边是什么？\t0.png\t猫\nwhat colour?\t1.png\tblue\nwhat colour?\t1.png\tdark blue\n"
    "what is it?\t1.png\ta cat\n",
}


@pytest.mark.parametrize("name", QUESTION_FILES)
def test_tables_of_questions_give_pairs_with_questions_that_count_as_captions(images, name):
    table = images.parent / name
    table.write_text(QUESTION_FILES[name], encoding="utf-8")
    pairs = found(table, Table(images))
    assert [pair.fields["txt"].decode() for pair in pairs] == ["左边是什么？ 猫", "what colour? blue"]
    questions = [json.loads(pair.fields["json"])["questions"] for pair in pairs]
    assert questions[0] == [{"question": "左边是什么？", "answer": "猫"}]
    assert [each["answer"] for each in questions[1]] == ["blue", "dark blue", "a cat"]
    assert captions(pairs[1]) == ["what colour? blue", "what colour? dark blue", "what is it? a cat"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"image": "1.png", "caption": "a cat"}', "q.jsonl:2: expected image, question and answer"),
        ('{"image": "1.png", "question": "what?", "answer": 3}', "q.jsonl:2: image, question and answer should be text"),
    ],
)
def test_a_row_that_is_no_question_among_questions_is_named(images, line, message):
    table = images.parent / "q.jsonl"
    table.write_text('{"image": "0.png", "question": "a", "answer": "b"}\n' + line + "\n")
    with pytest.raises(UserError, match=message):
        found(table, Table(images))

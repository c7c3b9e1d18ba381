"""Which pictures there are, and their ids."""

import errno
import json
import os

import pytest
from annotate_cases import write_picture

from mgllava.objects.pictures import Picture, check_box_file, check_drawings, find_pictures


def _ids(pictures):
    return [picture.id for picture in pictures]


def _records(folder, records, name="records.json"):
    path = folder / name
    path.write_text(json.dumps(records))
    return path


def test_a_folder_is_searched_in_order_and_below(tmp_path):
    for name in ("b.png", "a.JPG", "sub/c.png", ".hidden.png", ".cache/d.png"):
        write_picture(tmp_path / name, 0)
    (tmp_path / "notes.txt").write_text("no picture")
    found = find_pictures([tmp_path])
    assert found == [
        Picture("a", str(tmp_path / "a.JPG")),
        Picture("b", str(tmp_path / "b.png")),
        Picture("c", str(tmp_path / "sub" / "c.png")),
    ]


def test_files_keep_their_order_and_count_once(tmp_path, monkeypatch):
    b, a = write_picture(tmp_path / "b.png", 0), write_picture(tmp_path / "a.png", 0)
    monkeypatch.chdir(tmp_path)
    assert _ids(find_pictures([b, a, "b.png", tmp_path])) == ["b", "a"]


def test_equal_stems_are_told_apart_by_their_paths(tmp_path):
    for name in ("train/1.jpg", "test/1.jpg", "test/1.png", "test/2.jpg"):
        write_picture(tmp_path / name, 0)
    found = find_pictures([tmp_path / "train", tmp_path / "test"])
    assert _ids(found) == ["train/1.jpg", "test/1.jpg", "test/1.png", "2"]


def test_a_stem_that_is_another_pictures_path(tmp_path):
    for name in ("1.jpg", "1.png", "1.jpg.png"):
        write_picture(tmp_path / name, 0)
    ids = _ids(find_pictures([tmp_path]))
    assert len(set(ids)) == 3
    assert "1.png" in ids


def test_links_to_folders_are_followed_and_never_in_a_circle(tmp_path):
    write_picture(tmp_path / "real" / "a.png", 0)
    folder = tmp_path / "folder"
    write_picture(folder / "b.png", 0)
    (folder / "link").symlink_to(tmp_path / "real")
    (folder / "circle").symlink_to(folder)
    assert _ids(find_pictures([folder])) == ["b", "a"]


def test_an_unknown_suffix_is_taken_where_it_is_named(tmp_path):
    write_picture(tmp_path / "a.png", 0).rename(tmp_path / "a")
    assert _ids(find_pictures([tmp_path / "a"])) == ["a"]


def test_ids_of_records_keep_their_type(tmp_path):
    records = [
        {"id": 7, "image": "a.png"},
        {"id": "x", "image": ["sub/a.png"]},
        {"id": "text"},
        {"id": "two", "image": ["a.png", "b.png"]},
        {"id": 7, "image": "a.png", "conversations": "another talk about it"},
    ]
    expected = [Picture(7, str(tmp_path / "a.png")), Picture("x", str(tmp_path / "sub" / "a.png"))]
    assert find_pictures([_records(tmp_path, records)], tmp_path) == expected
    lines = tmp_path / "records.jsonl"
    lines.write_text("\n".join(json.dumps(record) for record in records) + "\n\n")
    assert find_pictures([lines], tmp_path) == expected


def test_records_of_questions_have_another_id(tmp_path):
    records = [
        {"question_id": 3, "image": "a.png", "text": "What?"},
        {"id": 4, "question_id": 9, "image": "b.png"},
    ]
    assert _ids(find_pictures([_records(tmp_path, records)], tmp_path)) == [3, 4]


def test_one_id_for_two_files_of_the_same_bytes(tmp_path):
    first = write_picture(tmp_path / "gqa" / "1.png", 5)
    second = write_picture(tmp_path / "vg" / "1.png", 5)
    records = _records(tmp_path, [{"id": 1, "image": "gqa/1.png"}, {"id": 1, "image": "vg/1.png"}] * 2)
    assert find_pictures([records], tmp_path) == [Picture(1, str(first))]
    write_picture(second, 6)
    with pytest.raises(ValueError, match="the id 1 stands for .*gqa/1.png and for .*vg/1.png, which differ"):
        find_pictures([records], tmp_path)


def test_what_records_ask_is_read_where_it_is_wanted(tmp_path):
    talk = [
        {"from": "human", "value": "<image>\nWhere is the dog?"},
        {"from": "gpt", "value": "On the mat."},
        {"from": "human", "value": "Why?"},
    ]
    records = _records(
        tmp_path,
        [
            {"id": 1, "image": "a.png", "conversations": talk},
            {"id": 1, "image": "a.png", "text": "Is there a cat?"},
            {"id": 2, "image": "b.png", "conversations": "no turns"},
        ],
    )
    assert [picture.question for picture in find_pictures([records], tmp_path)] == ["", ""]
    found = find_pictures([records], tmp_path, questions=True)
    assert [picture.question for picture in found] == ["Where is the dog?\nWhy?\nIs there a cat?", ""]


def test_drawings_must_not_lie_where_pictures_are_looked_for(tmp_path):
    folder = tmp_path / "pictures"
    write_picture(folder / "sub" / "a.png", 0)
    (tmp_path / "link").symlink_to(folder)
    found = find_pictures([folder])
    for place in (folder, folder / "drawn", tmp_path / "link" / "drawn"):
        with pytest.raises(
            ValueError, match="would be taken for pictures of .*name a folder that is not below"
        ):
            check_drawings(place, [folder], found)
    with pytest.raises(
        ValueError, match="there are pictures in .*sub, of which a drawing could take the place"
    ):
        check_drawings(folder / "sub", [folder / "sub" / "a.png"], found)
    check_drawings(tmp_path / "drawn", [folder], found)
    check_drawings(folder / "sub" / "drawn", [folder / "sub" / "a.png"], found)


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([{"image": "a.png"}], "record 0 has the id None, expected text or a number"),
        ([{"id": True, "image": "a.png"}], "record 0 has the id True"),
        ([{"id": 1}, 5], "record 1 is a int, expected an object"),
        ({"id": 1}, "expected a list of records, got a dict"),
        ([{"id": 1, "image": 5}], "record 0 has the image 5, expected a path"),
        (
            [{"id": 1, "image": "a.png"}, {"id": "1", "image": "b.png"}],
            "the id 1 stands for .*a.png and for .*b.png",
        ),
        ([{"id": 1}], 'no picture in .*records with an "image"'),
    ],
)
def test_records_of_another_form(tmp_path, records, message):
    with pytest.raises(ValueError, match=message):
        find_pictures([_records(tmp_path, records)], tmp_path)


def test_records_that_are_no_json(tmp_path):
    (tmp_path / "records.json").write_text("{")
    with pytest.raises(ValueError, match=r"records.json is not a JSON file"):
        find_pictures([tmp_path / "records.json"], tmp_path)


def test_records_need_the_folder_of_their_pictures(tmp_path):
    records = _records(tmp_path, [{"id": 1, "image": "a.png"}])
    with pytest.raises(ValueError, match=r"record 0 has the picture 'a.png'; give the folder of pictures"):
        find_pictures([records])
    with pytest.raises(ValueError, match="there is no folder .*nowhere"):
        find_pictures([records], tmp_path / "nowhere")
    write_picture(tmp_path / "b.png", 0)
    with pytest.raises(ValueError, match=r"but no records \(.json, .jsonl\) are given"):
        find_pictures([tmp_path / "b.png"], tmp_path)


def test_an_empty_folder(tmp_path):
    with pytest.raises(ValueError, match=r"there is no picture in .*; looked for .jpg .jpeg .png"):
        find_pictures([tmp_path])


def test_a_source_that_does_not_exist(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no file or folder .*nowhere"):
        find_pictures([tmp_path / "nowhere"])


def test_a_folder_that_cannot_be_read_is_not_passed_over(tmp_path, monkeypatch):
    write_picture(tmp_path / "closed" / "a.png", 0)
    write_picture(tmp_path / "b.png", 0)
    scan = os.scandir

    def refuse(path):
        if str(path).endswith("closed"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PermissionError, match="Permission denied: .*closed"):
        find_pictures([tmp_path])


def test_a_damaged_line_of_records_is_named(tmp_path):
    lines = tmp_path / "records.jsonl"
    lines.write_text('{"id": 1, "image": "a.png"}\n\n{"id": 2')
    with pytest.raises(ValueError, match="records.jsonl: line 3 is not JSON: .* at character 8"):
        find_pictures([lines], tmp_path)


@pytest.mark.parametrize("text", ['[{"id": 1, "image": "a.png"}]', '{"id": 1, "image": "a.png"}'])
def test_a_mark_of_the_encoding_is_no_part_of_records(tmp_path, text):
    path = tmp_path / ("records.json" if text.startswith("[") else "records.jsonl")
    path.write_text(text, encoding="utf-8-sig")
    assert _ids(find_pictures([path], tmp_path)) == [1]


def test_a_box_file_must_not_take_the_place_of_what_is_read(tmp_path):
    picture = write_picture(tmp_path / "a.png", 0)
    records = _records(tmp_path, [{"id": 1, "image": "a.png"}])
    found = find_pictures([records], tmp_path)
    for place in (records, picture, tmp_path / "sub" / ".." / "a.png"):
        with pytest.raises(ValueError, match="is one of the files to read; name another"):
            check_box_file(place, [records], found)
    check_box_file(tmp_path / "boxes.json", [records], found)


def test_drawings_do_not_go_to_a_file(tmp_path):
    (tmp_path / "drawn").touch()
    with pytest.raises(ValueError, match="drawings go to a folder, but .*drawn is a file"):
        check_drawings(tmp_path / "drawn", [], [])

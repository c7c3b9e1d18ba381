"""Records and the look at them before training."""

import json

import pytest
from miniature import tiny_processor, write_data
from PIL import Image

from mgllava.training import samples as samples_module
from mgllava.training.encode import Encoder
from mgllava.training.errors import BadRecord, DataError
from mgllava.training.packed_list import PackedList
from mgllava.training.records import LlavaRecords, PythonRecords, Record
from mgllava.training.samples import TrainingSamples


@pytest.fixture
def data(tmp_path):
    return write_data(tmp_path)


def change(path, edit):
    content = read(path)
    edit(content)
    with open(path, "w") as file:
        json.dump(content, file)


def read(path):
    with open(path) as file:
        return json.load(file)


def samples_of(data, **options):
    return TrainingSamples([LlavaRecords(**data)], Encoder(tiny_processor(), 1000), **options)


def test_a_packed_list_gives_back_what_it_was_given():
    values = [{"a": "é\n"}, [1, None, 2.5], "", {}, "half of a character: \ud83d"]
    packed = PackedList(iter(values))
    assert len(packed) == 5
    assert [packed[index] for index in range(5)] == values
    assert len(PackedList([])) == 0


def test_records_in_llavas_form(data):
    records = LlavaRecords(**data)
    assert len(records) == 16
    assert records[2].turns[0][0].startswith("<image>\n")
    assert records[2].image.is_file()
    assert len(records[2].turns) == 3
    assert records[15].image is None
    # Ids are numbers in one file and text in the other.
    assert [len(records[index].detections["boxes"]) for index in range(4)] == [1, 2, 1, 2]


@pytest.mark.parametrize("form", ["jsonl", "datasets", "boxes by id"])
def test_other_forms_hold_the_same_records(data, tmp_path, form):
    expected = [LlavaRecords(**data)[index] for index in range(16)]
    content = read(data["records"])
    if form == "jsonl":
        data["records"] = str(tmp_path / "records.jsonl")
        with open(data["records"], "w") as file:
            file.writelines(json.dumps(record) + "\n\n" for record in content)
    elif form == "datasets":
        datasets = pytest.importorskip("datasets")
        for record in content:
            record["id"] = str(record["id"])
        data["records"] = str(tmp_path / "saved")
        datasets.Dataset.from_list(content).save_to_disk(data["records"])
    else:
        boxes = read(data["boxes"])
        with open(data["boxes"], "w") as file:
            json.dump({str(entry["id"]): entry for entry in boxes}, file)
    records = LlavaRecords(**data)
    assert [records[index] for index in range(16)] == expected


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (
            {"id": 0, "video": "a.mp4", "conversations": []},
            "it is a video, which is not supported: id 0, a.mp4",
        ),
        (
            {"id": 0, "image": ["a", "b"], "conversations": "ok"},
            "it has several pictures, one is supported: id 0 has 2",
        ),
        ({"id": 99, "image": "0.png", "conversations": "ok"}, "there are no boxes for its id: id 99"),
        ({"image": "0.png", "conversations": "ok"}, "it has no id to find its boxes by: record 0"),
        ({"id": 0, "image": 5, "conversations": "ok"}, "its picture cannot be read: id 0, image is 5"),
        ({"id": 0, "image": "0.png"}, "its conversation is malformed: id 0, conversations is None"),
        (
            {"id": 0, "conversations": [{"from": "user", "value": "a"}]},
            "its conversation is malformed: id 0, a message",
        ),
        ({"id": 0, "conversations": [{"from": "gpt", "value": 1}]}, "its conversation is malformed"),
        ({"id": 0, "conversations": [{"from": "human", "value": "a"}]}, "id 0 has no answer"),
        (["a"], "record 0 is a list, expected an object"),
    ],
)
def test_bad_records_say_why(data, record, message):
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}]
    if isinstance(record, dict) and record.get("conversations") == "ok":
        record = {**record, "conversations": turns}
    change(data["records"], lambda content: content.__setitem__(0, record))
    with pytest.raises(BadRecord, match=message):
        LlavaRecords(**data)[0]


def test_boxes_of_frames_are_those_of_a_video(data):
    change(data["boxes"], lambda content: content[0].update(frames=[]))
    with pytest.raises(BadRecord, match="it is a video"):
        LlavaRecords(**data)[0]


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("records", "{", "records.json is not a JSON file"),
        ("records", "{}", "records.json: expected a list of records, got a dict"),
        ("records", "[]", "records.json holds no records"),
        ("boxes", "[1]", 'boxes.json: expected a list of {"id", "boxes", "scores", "labels"}'),
        ("boxes", '[{"boxes": []}]', "boxes.json: entry 0 has no id"),
    ],
)
def test_damaged_files_are_named(data, file, text, message):
    with open(data[file], "w") as opened:
        opened.write(text)
    with pytest.raises(DataError, match=message):
        LlavaRecords(**data)


def test_missing_files_are_named(data, tmp_path):
    for name in ("records", "boxes"):
        with pytest.raises(DataError, match="there is no file .*nowhere.json"):
            LlavaRecords(**{**data, name: str(tmp_path / "nowhere.json")})
    with pytest.raises(DataError, match="pictures: there is no folder"):
        LlavaRecords(**{**data, "pictures": str(tmp_path / "nowhere")})
    (tmp_path / "lines.jsonl").write_text('{"id": 1}\n{"id"\n')
    with pytest.raises(DataError, match=r"lines\.jsonl, line 2 is not JSON"):
        LlavaRecords(tmp_path / "lines.jsonl")


def test_the_look_finds_lengths_and_modalities(data):
    samples = samples_of(data)
    assert len(samples) == 16
    for length, sample in zip(samples.lengths, samples, strict=False):
        objects = sample["boxes"].shape[1] if "boxes" in sample else 0
        assert abs(length) == len(sample["input_ids"]) - objects
        assert (length > 0) == bool(objects)
    assert samples.report.lines() == ["16 records, 16 to train on"]


def damage(data, tmp_path):
    """Five records that cannot be used, for four reasons."""
    (tmp_path / "pictures" / "1.png").unlink()
    (tmp_path / "pictures" / "2.png").unlink()
    (tmp_path / "pictures" / "3.png").write_bytes(b"no picture")
    change(data["boxes"], lambda content: content.pop(4))
    change(data["boxes"], lambda content: content[5].update(boxes=[[1, 2, 3]]))


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_records_are_counted_and_left_out_up_to_the_share(data, tmp_path, workers):
    damage(data, tmp_path)
    samples = samples_of(data, max_bad_share=0.35, workers=workers)
    assert len(samples) == 11
    assert dict(samples.report.bad) == {
        "its picture does not exist": 2,
        "its picture cannot be read": 1,
        "there are no boxes for its id": 1,
        "its boxes are malformed": 1,
    }
    lines = samples.report.lines()
    assert lines[0] == "16 records, 11 to train on"
    assert lines[1].startswith("2 left out: its picture does not exist (")
    assert "1.png" in lines[1]
    assert all("boxes" not in sample or sample["boxes"].shape[1] for sample in samples)


def test_more_bad_records_than_the_share_are_an_error(data, tmp_path):
    damage(data, tmp_path)
    with pytest.raises(
        DataError, match=r"5 of 16 records cannot be used, more than the 4 .*0\.3 allows"
    ) as error:
        samples_of(data, max_bad_share=0.3)
    assert "2 left out: its picture does not exist" in str(error.value)
    assert "id 4" in str(error.value)


def test_records_without_labels_are_dropped_and_counted(data):
    encoder = Encoder(tiny_processor(), 14)
    samples = TrainingSamples([LlavaRecords(**data)], encoder)
    assert 0 < samples.report.unlabelled < 16
    assert len(samples) == 16 - samples.report.unlabelled
    assert all(any(label != -100 for label in sample["labels"]) for sample in samples)
    assert "no token of an answer is left" in samples.report.lines()[1]
    with pytest.raises(DataError, match="no record is left to train on"):
        TrainingSamples([LlavaRecords(**data)], Encoder(tiny_processor(), 5))


def test_a_picture_damaged_behind_its_header_is_replaced_and_counted(data, tmp_path):
    path = tmp_path / "pictures" / "3.png"
    path.write_bytes(path.read_bytes()[:-60])
    samples = samples_of(data, max_bad_share=0.1)
    assert len(samples) == 16
    assert samples[3]["input_ids"] == samples[4]["input_ids"]
    assert samples[3]["labels"] == samples[4]["labels"]
    assert samples.replaced.sum() == 1
    path = tmp_path / "pictures" / "5.png"
    path.write_bytes(path.read_bytes()[:-60])
    with pytest.raises(
        DataError, match="2 of 16 records cannot be used, more than the 1 that max_bad_share allows"
    ):
        samples[5]


def test_what_was_found_is_kept_for_the_same_data_only(data, tmp_path, monkeypatch):
    cache = tmp_path / "cache.safetensors"
    (tmp_path / "pictures" / "1.png").unlink()
    first = samples_of(data, max_bad_share=0.1, cache=cache)
    monkeypatch.setattr(samples_module, "check_record", lambda record: pytest.fail("looked again"))
    again = samples_of(data, max_bad_share=0.1, cache=cache)
    assert again.lengths.tolist() == first.lengths.tolist()
    assert again.report == first.report
    with pytest.raises(DataError):
        samples_of(data, max_bad_share=0.0, cache=cache)
    for other in (Encoder(tiny_processor(), 999), Encoder(tiny_processor("yi-like"), 1000)):
        with pytest.raises(pytest.fail.Exception, match="looked again"):
            TrainingSamples([LlavaRecords(**data)], other, max_bad_share=0.1, cache=cache)
    change(data["boxes"], lambda content: content.append({"id": "new", "boxes": []}))
    with pytest.raises(pytest.fail.Exception, match="looked again"):
        samples_of(data, max_bad_share=0.1, cache=cache)
    cache.write_bytes(b"damaged")
    with pytest.raises(pytest.fail.Exception, match="looked again"):
        samples_of(data, max_bad_share=0.1, cache=cache)


def test_records_too_bad_to_train_on_are_looked_at_again_once_mended(data, tmp_path):
    path = tmp_path / "pictures" / "1.png"
    picture = path.read_bytes()
    path.unlink()
    cache = tmp_path / "cache.safetensors"
    with pytest.raises(DataError, match="1 of 16 records cannot be used"):
        samples_of(data, cache=cache)
    path.write_bytes(picture)
    assert len(samples_of(data, cache=cache)) == 16


def test_a_run_does_not_go_on_with_other_records(data, tmp_path):
    cache = tmp_path / "cache.safetensors"
    samples_of(data, cache=cache)
    samples_of(data, cache=cache, begun=True)
    change(data["boxes"], lambda content: content.append({"id": "new", "boxes": []}))
    samples_of(data, cache=cache, begun=True)  # boxes do not decide the order
    change(data["records"], lambda content: content.pop())
    with pytest.raises(DataError, match="began on other records, 16 then and 15 now"):
        samples_of(data, cache=cache, begun=True)
    assert len(samples_of(data, cache=cache)) == 15


class Turn:
    question, answer = "What is this?", "A cat."


class InMemory:
    """A map-style dataset of pictures made by code."""

    def __len__(self):
        return 3

    def __getitem__(self, index):
        picture = (
            {"image": Image.new("RGB", (30, 20)), "detections": {"boxes": [[1, 2, 3, 4]]}} if index else {}
        )
        return {"turns": [Turn(), ("Why?", "No.")], **picture}


def test_a_dataset_in_memory_stands_beside_files(data):
    source = PythonRecords(InMemory(), "in memory")
    assert source[0] == Record("0", (("What is this?", "A cat."), ("Why?", "No.")))
    assert source[1].turns[0][0] == "<image>\nWhat is this?"
    samples = TrainingSamples([LlavaRecords(**data), source], Encoder(tiny_processor(), 1000))
    assert len(samples) == 19
    assert samples[17]["boxes"].shape == (1, 1, 4)
    assert "boxes" not in samples[16]

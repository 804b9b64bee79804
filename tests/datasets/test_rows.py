"""Reading rows: every accepted form, and every bad row by name."""

import io
import json
import os
import pickle

import datasets
import numpy as np
import pytest
import soundfile
from PIL import Image

from phi_mm.datasets import load_rows
from phi_mm.datasets.faults import BadRows, Fault, Kind
from phi_mm.datasets.rows import read_rows


def write(path, rows):
    if path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows))
    else:
        path.write_text(json.dumps(rows))
    return path


def turns(*values):
    return [{"from": who, "value": v} for who, v in zip(["human", "gpt"] * 9, values, strict=False)]


def text(words):
    return {"type": "text", "text": words}


def image(path):
    return {"type": "image", "image": str(path)}


def audio(path):
    return {"type": "audio", "audio": str(path)}


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_llava_rows_become_parts_where_the_markers_stand(tmp_path, name):
    rows = [
        {"id": "a", "image": "x.png", "conversations": turns("<image>\nwhat is it?", "a cat")},
        {
            "id": 7,
            "image": ["x.png", "/far/y.png"],
            "audio": "s.wav",
            "conversations": turns("compare\n<image>\nwith <image>", "same", "\n<audio>", "no"),
            "task": "mixed",
        },
        {"id": "c", "conversations": turns("two and two?", "four")},
    ]
    read = load_rows(write(tmp_path / name, rows))
    assert read["id"][:] == ["a", "7", "c"]
    assert read["task"][:] == [None, "mixed", None]
    assert read[0]["messages"] == [
        {"role": "user", "content": [image(tmp_path / "x.png"), text("what is it?")]},
        {"role": "assistant", "content": [text("a cat")]},
    ]
    assert [message["content"] for message in read[1]["messages"]] == [
        [text("compare"), image(tmp_path / "x.png"), text("with"), image("/far/y.png")],
        [text("same")],
        [audio(tmp_path / "s.wav")],
        [text("no")],
    ]
    assert read[2]["messages"][0] == {"role": "user", "content": [text("two and two?")]}


def test_messages_rows_with_parts_or_markers_and_a_system_turn(tmp_path):
    answer = {"role": "assistant", "content": "yes"}
    rows = [
        {
            "messages": [
                {"role": "system", "content": "be brief"},
                {"role": "user", "content": "<audio>is it so?"},
                answer,
            ],
            "audios": ["s.flac"],
        },
        {
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "text", "text": "the tag <image> is a word here"},
                        {"type": "image"},
                        {"type": "image", "image": "given.png"},
                        {"type": "image"},
                    ],
                },
                answer,
            ],
            "images": ["first.png", "second.png"],
        },
    ]
    read = load_rows(write(tmp_path / "rows.json", rows), media_root="/media")
    assert read["id"][:] == ["0", "1"]
    assert read[0]["messages"][:2] == [
        {"role": "system", "content": [text("be brief")]},
        {"role": "user", "content": [audio("/media/s.flac"), text("is it so?")]},
    ]
    assert read[1]["messages"][0]["content"] == [
        text("the tag <image> is a word here"),
        image("/media/first.png"),
        image("/media/given.png"),
        image("/media/second.png"),
    ]


def test_an_answer_may_speak_of_the_marker(tmp_path):
    rows = [{"conversations": turns("which tag shows a picture?", "the <image> tag\n")}]
    read = load_rows(write(tmp_path / "rows.json", rows))
    assert read[0]["messages"][1]["content"] == [text("the <image> tag\n")]


def test_text_rows_of_a_mix_of_pictures(tmp_path):
    """The 665K mix: `image` is absent, or empty; ids repeat."""
    said = turns("two and two?", "four")
    rows = [
        {"id": "a", "image": "x.png", "conversations": turns("<image>\nwhat?", "a cat")},
        {"id": "b", "conversations": said, "model": "gpt"},
        {"id": "b", "image": "", "conversations": said},
        {"id": "c", "image": None, "conversations": said},
        {"id": "c", "image": [], "images": [], "conversations": said},
    ]
    read = load_rows(write(tmp_path / "mix.json", rows))
    assert read["id"][:] == ["a", "b", "b", "c", "c"]
    assert [row["messages"][0]["content"] for row in read][1:] == [[text("two and two?")]] * 4


def test_the_system_column_of_llama_factory(tmp_path):
    own = [{"from": "system", "value": "own"}, *turns("hello", "hi")]
    rows = [
        {"conversations": turns("<image>who?", "me"), "images": ["x.png"], "system": "be brief"},
        {"conversations": own, "system": "be brief"},
        {"conversations": turns("hello", "hi"), "system": " "},
    ]
    read = load_rows(write(tmp_path / "rows.json", rows))
    assert [message["role"] for message in read[0]["messages"]] == ["system", "user", "assistant"]
    assert read[0]["messages"][0]["content"] == [text("be brief")]
    assert read[1]["messages"][0]["content"] == [text("own")]
    assert read[2]["messages"][0]["role"] == "user"


QUESTION = {"role": "user", "content": "hello"}
ANSWER = {"role": "assistant", "content": "hi"}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"conversations": turns("<image> <image>", "a"), "image": "x.png"},
         "got 2 <image> markers and 1 image files"),
        ({"conversations": turns("hear", "a"), "audio": ["x.wav", "y.wav"]},
         "got 0 <audio> markers and 2 audio files"),
        ({"conversations": turns("alone")}, "got the turns user; expected user and assistant"),
        ({"messages": [ANSWER, QUESTION]}, "got the turns assistant, user"),
        ({"messages": [QUESTION, QUESTION, ANSWER]}, "got the turns user, user, assistant"),
        ({"messages": [QUESTION, {"role": "assistant", "content": " "}]},
         "got an empty turn (number 2, assistant)"),
        ({"messages": [QUESTION, {"role": "tool", "content": "a"}]}, "got a turn by 'tool'"),
        ({"messages": [QUESTION, {"role": "assistant", "content": None}]}, "got content None"),
        ({"messages": [QUESTION, ANSWER], "videos": ["v.mp4"]}, "got a row with 'videos'"),
        ({"messages": [QUESTION, ANSWER], "tools": "[{}]"}, "got a row with 'tools'"),
        ({"messages": [QUESTION, {"role": "assistant",
                                  "content": [{"type": "image", "image": "x.png"}]}]},
         "got media in the assistant's turn"),
        ({"text": "no turns"}, "got no turns"),
        ({"conversations": turns("<image>", "a"), "image": {"url": "x"}}, "got media {'url': 'x'}"),
    ],
)  # fmt: skip
def test_a_bad_row_is_named(tmp_path, row, reason):
    path = write(tmp_path / "rows.json", [{"messages": [QUESTION, ANSWER]}, {**row, "id": "odd"}])
    with pytest.raises(ValueError) as caught:
        load_rows(path)
    assert f"got 1 bad rows of 2 in {path}" in str(caught.value)
    assert f"\n  {path}, row odd: {reason}" in str(caught.value)


def test_skipped_rows_are_counted_also_when_read_from_the_cache(tmp_path, caplog):
    rows = [{"messages": [QUESTION, ANSWER]}, {"messages": [ANSWER]}, {"messages": [QUESTION]}]
    path = write(tmp_path / "rows.json", rows)
    for _ in range(2):
        caplog.clear()
        with caplog.at_level("WARNING"):
            assert load_rows(path, on_bad_row="skip", skip_at_most=2)["id"][:] == ["0"]
        assert f"skipped 2 bad rows of 3 in {path}: 2 rows that cannot be read" in caplog.text
    assert read_rows(path)["fault"][:] == [None, Kind.FORM, Kind.FORM]
    with pytest.raises(ValueError, match="on_bad_row='ignore'"):
        load_rows(path, on_bad_row="ignore")


def test_a_rewritten_file_is_read_anew(tmp_path):
    path = write(tmp_path / "rows.json", [{"messages": [QUESTION, ANSWER]}])
    assert len(load_rows(path)) == 1
    before = os.stat(path)
    write(path, [{"messages": [QUESTION, ANSWER], "id": "new"}] * 2)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert load_rows(path)["id"][:] == ["new", "new"]


def test_fields_of_mixed_type_survive(tmp_path):
    rows = [
        {"messages": [QUESTION, ANSWER], "label": 1, "tags": ["a"]},
        {"messages": [QUESTION, ANSWER], "label": "1", "tags": None},
    ]
    read = load_rows(write(tmp_path / "rows.json", rows))
    assert read["label"][:] == [1, "1"]
    assert read["tags"][:] == [["a"], None]


def test_length_counts_characters_and_media_and_needs_no_media_file(tmp_path):
    rows = [
        {"conversations": turns("x" * 30, "y" * 10)},
        {"conversations": turns("<image>", "y" * 4), "image": "nowhere.png"},
        {"conversations": turns("<audio>", "y" * 4), "audio": "nowhere.wav"},
    ]
    assert load_rows(write(tmp_path / "rows.json", rows))["length"][:] == [10, 145, 51]


def test_rows_keep_their_form_through_shuffle_map_filter_and_pickle(tmp_path):
    rows = [
        {"id": str(i), "conversations": turns("<image>", f"{i}"), "image": "x.png"}
        for i in range(5)
    ]
    read = load_rows(write(tmp_path / "rows.json", rows))
    moved = pickle.loads(pickle.dumps(read.shuffle(seed=1).select([0, 3])))
    for row in moved:
        assert row["messages"][0]["content"] == [image(tmp_path / "x.png")]
        assert row["messages"][1]["content"] == [text(row["id"])]
    assert read.filter(lambda row: row["messages"][1]["content"] == [text("3")])["id"][:] == ["3"]
    mapped = read.map(lambda row: {"turns": len(row["messages"])})
    assert mapped["turns"][:] == [2] * 5
    assert mapped[2]["messages"] == read["messages"][2] == read[2]["messages"]


def test_limit_reads_the_first_rows_only(tmp_path):
    rows = [{"messages": [QUESTION, ANSWER]}, {"messages": [QUESTION]}]
    path = write(tmp_path / "rows.json", rows)
    assert len(load_rows(path, limit=1)) == 1
    with pytest.raises(ValueError):  # the second row is bad; what was cached has another key
        load_rows(path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [("{", "expected valid json"), ("[]", "expected a list of rows"), ('{"a": 1}', "a list of")],
)
def test_a_file_without_rows_is_refused(tmp_path, content, reason):
    path = tmp_path / "rows.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=reason):
        load_rows(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"got .*none\.json, expected an existing file"):
        load_rows(tmp_path / "none.json")


@pytest.fixture
def embedded():
    """Rows in TRL's form, with their media inside, and what the media hold."""
    picture, sound = io.BytesIO(), io.BytesIO()
    Image.new("RGB", (3, 2), (255, 0, 9)).save(picture, "PNG")
    soundfile.write(sound, np.zeros((16, 2)), 8000, format="WAV")
    parts = [{"type": "image", "text": None}, {"type": "text", "text": "what is it?"}]
    rows = {
        "messages": [
            [{"role": "user", "content": parts},
             {"role": "assistant", "content": [{"type": "text", "text": "pink"}]}],
            [{"role": "user", "content": [{"type": "audio", "text": None}]},
             {"role": "assistant", "content": [{"type": "text", "text": "noise"}]}],
        ],
        "images": [[{"bytes": picture.getvalue(), "path": None}], []],
        "audio": [None, {"bytes": sound.getvalue(), "path": "s.wav"}],
        "source": ["a", "b"],
    }  # fmt: skip
    data = datasets.Dataset.from_dict(rows)
    features = datasets.Features({**data.features, "images": datasets.List(datasets.Image()),
                                  "audio": datasets.Audio()})  # fmt: skip
    return data.cast(features), picture.getvalue(), sound.getvalue()


@pytest.mark.parametrize("form", ["file", "folder", "saved", "splits"])
def test_a_data_set_with_embedded_media(tmp_path, embedded, form):
    """As the Hub has it (a folder of parquet files), and as it is kept on a disk."""
    data, picture, sound = embedded
    path = tmp_path / "set"
    if form in ("file", "folder"):
        path.mkdir()
        data.to_parquet(path / "train.parquet")
        path = path / "train.parquet" if form == "file" else path
    else:
        saved = data if form == "saved" else datasets.DatasetDict({"train": data})
        saved.save_to_disk(path)
    read = load_rows(path)
    assert read["source"][:] == ["a", "b"]
    content = read[0]["messages"][0]["content"]
    assert content[1] == text("what is it?")
    with open(content[0]["image"], "rb") as file:
        assert file.read() == picture
    heard = read[1]["messages"][0]["content"][0]["audio"]
    assert os.path.isabs(heard) and heard.endswith(".wav")
    with open(heard, "rb") as file:
        assert file.read() == sound
    assert len(load_rows(path, limit=1)) == 1


def test_a_split_that_a_saved_data_set_lacks_is_named(tmp_path, embedded):
    datasets.DatasetDict({"train": embedded[0]}).save_to_disk(tmp_path / "set")
    with pytest.raises(ValueError, match="got split='test', expected one of train"):
        load_rows(tmp_path / "set", split="test")


def test_a_column_of_plain_bytes(tmp_path, embedded):
    _, picture, _ = embedded
    said = [[{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "pink"}]]
    plain = datasets.Dataset.from_dict({"image": [picture], "conversations": said})
    plain.to_parquet(tmp_path / "rows.parquet")
    path = load_rows(tmp_path / "rows.parquet")[0]["messages"][0]["content"][0]["image"]
    with open(path, "rb") as file:
        assert file.read() == picture


def test_relative_media_of_a_parquet_file_start_beside_it(tmp_path):
    said = [[{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "pink"}]]
    rows = datasets.Dataset.from_dict({"image": ["x.png"], "conversations": said})
    rows.to_parquet(tmp_path / "rows.parquet")
    read = load_rows(tmp_path / "rows.parquet")
    assert read[0]["messages"][0]["content"] == [image(tmp_path / "x.png")]


FAULT = Fault(Kind.FORM, "row 0: odd")


@pytest.mark.parametrize(
    ("limit", "bad", "passes"),
    [(None, 1, True), (None, 2, False), (0.02, 2, True), (0.02, 3, False), (3, 3, True),
     (3, 4, False), (0, 1, False), (1.0, 100, True)],
)  # fmt: skip
def test_skip_has_a_limit(limit, bad, passes):
    rows = datasets.Dataset.from_dict({"id": [str(n) for n in range(100)]})
    faults = [FAULT] * bad + [None] * (100 - bad)
    policy = BadRows("skip", limit)
    if passes:
        assert policy.leave_out(rows, faults, "x")["id"][:] == [str(n) for n in range(bad, 100)]
        return
    with pytest.raises(ValueError) as caught:
        policy.leave_out(rows, faults, "x")
    assert str(caught.value).startswith(
        f"got {bad} bad rows of 100 in x: {bad} rows that cannot be read\n  row 0: odd"
    )
    assert f"expected at most {policy.allowed(100)}: see skip_at_most" in str(caught.value)


@pytest.mark.parametrize(
    ("given", "reason"),
    [(("drop",), "got on_bad_row='drop'"), (("error", 3), "skip_at_most without"),
     (("skip", -1), "got skip_at_most=-1"), (("skip", 1.5), "got skip_at_most=1.5"),
     (("skip", True), "got skip_at_most=True"), (("skip", "1 %"), "got skip_at_most='1 %'")],
)  # fmt: skip
def test_a_policy_that_is_none_is_refused(given, reason):
    with pytest.raises(ValueError, match=reason):
        BadRows(*given)


def test_real_messages_rows(samples):
    folder = samples / "llamafactory_demo"
    read = load_rows(folder / "mllm_demo.json")
    assert len(read) == 6
    first = [message["content"] for message in read[0]["messages"]]
    picture = image(folder / "mllm_demo_data/1.jpg")
    assert first == [
        [picture, text("Who are they?")],
        [text("They're Kane and Gretzka from Bayern Munich.")],
        [text("What are they doing?"), picture],
        [text("They are celebrating on the soccer field.")],
    ]
    spoken = load_rows(folder / "mllm_audio_demo.json")
    assert spoken[2]["messages"][0]["content"] == [
        audio(folder / "mllm_demo_data/3.flac"),
        text("What does the person say?"),
    ]
    with pytest.raises(
        ValueError, match=r"got 3 bad rows of 3 (.|\n)*row 0: got a row with 'videos'"
    ):
        load_rows(folder / "mllm_video_audio_demo.json")


def test_real_llava_rows(samples, tmp_path):
    (tmp_path / "demo").symlink_to(samples / "qwen_vl_demo")  # the rows say demo/images/...
    read = load_rows(samples / "qwen_vl_demo/single_images.json", media_root=tmp_path)
    assert len(read) == 3
    content = read[2]["messages"][0]["content"]
    assert content[0] == text("In which year the value was 51?")
    assert content[1] == image(tmp_path / "demo/images/10149.png")
    assert os.path.exists(content[1]["image"])


def test_weights_of_answers(tmp_path):
    asked = {"role": "user", "content": "why?"}
    answers = [{"role": "assistant", "content": "so", "weight": weight} for weight in (0, 1, None)]
    rows = [{"messages": [asked, answer]} for answer in answers]
    read = load_rows(write(tmp_path / "rows.jsonl", rows))
    assert [row["messages"][1].get("weight") for row in read] == [0, None, None]
    rows = [{"messages": [asked, answers[0] | {"weight": 0.5}]}]
    rows += [{"messages": [asked | {"weight": 0}, answers[1]]}]
    problems = read_rows(write(tmp_path / "bad.jsonl", rows))["problem"][:]
    assert problems[0].endswith(
        "got the weight 0.5 in the assistant's turn, expected 0 or 1 in an assistant's"
    )
    assert "got the weight 0 in the user's turn" in problems[1]

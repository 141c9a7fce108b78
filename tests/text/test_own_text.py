"""The user's own text: folders, `datasets` objects, texts in memory."""

import warnings

import pytest
from tiny_text import long_text, speech, write

from dmr.text.load import (
    check_stream,
    from_datasets,
    from_folder,
    from_texts,
    load_stream,
)


def test_folder_of_anything(tmp_path, cache):
    files = {
        "notes.txt": long_text(1),
        "notes.md": long_text(2),
        "latin.txt": long_text(3).encode() + b" caf\xe9",
        ".hidden": "x",
        "deep/.git/config": "y",
        "deep/a/b/c.txt": long_text(4),
        "deep/z.txt": long_text(5),
    }
    stream = from_folder(write(tmp_path / "mine", files))
    assert stream.name == "mine" and stream.names == [
        "deep",
        "latin",
        "notes.md",
        "notes.txt",
    ]
    whole = bytes(stream["deep"].train.numpy()) + bytes(
        stream["deep"].test.numpy()
    )
    assert (
        b"y" not in whole.split()
        and b"Speech 4000" in whole
        and b"Speech 5000" in whole
    )
    assert b"caf\xe9" in bytes(stream["latin"].train.numpy()) + bytes(
        stream["latin"].test.numpy()
    )
    check_stream(stream, context=64)
    assert load_stream(tmp_path / "mine", domains=["latin", "deep"]).names == [
        "latin",
        "deep",
    ]


@pytest.mark.parametrize(
    "files, words",
    [
        (
            {},
            (
                "is empty; a stream is a folder with one sub-folder or text"
                " file per domain"
            ),
        ),
        ({".hidden": "x"}, "is empty"),
        ({"a.txt": "x" * 5000}, "only one domain, 'a'"),
        ({"a.txt": long_text(1), "b.txt": ""}, "domain 'b' of .* is empty"),
        (
            {"a.txt": long_text(1), "b.txt": "short"},
            "domain 'b' of .* is too short",
        ),
        (
            {"a.txt": long_text(1), "b.bin": b"\x7fELF\0\0"},
            r"b\.bin is not text: it holds zero bytes",
        ),
        (
            {"a.txt": long_text(1), "b/c.dat": bytes(range(1, 256)) * 9},
            r"c\.dat is not text: it holds control characters",
        ),
        (
            {"a.txt": long_text(1), "b.txt": "wide".encode("utf-16")},
            "UTF-16 counts as binary",
        ),
    ],
)
def test_folder_refused(tmp_path, cache, files, words):
    (tmp_path / "mine").mkdir()
    with pytest.raises(ValueError, match=words):
        load_stream(write(tmp_path / "mine", files))
    if len(files) < 2:
        assert not cache.exists()


def test_empty_sub_folder(tmp_path, cache):
    folder = write(tmp_path / "mine", {"a.txt": long_text(1)})
    (folder / "b").mkdir()
    with pytest.raises(ValueError, match="domain 'b' of .* is empty"):
        load_stream(folder)


def test_colour_codes_and_form_feeds_are_text(tmp_path, cache):
    write(
        tmp_path / "mine",
        {
            "a.txt": long_text(1) + "\f\x1b[31mred\x1b[0m\t\r\n",
            "b.txt": long_text(2),
        },
    )
    assert len(load_stream(tmp_path / "mine")) == 2


def test_own_text_full_of_copies_says_so(cache):
    copies = [speech(1) + f" {i}" for i in range(40)]
    with pytest.warns(
        UserWarning, match="12-grams are in its training text too"
    ):
        stream = from_texts({"a": copies, "b": [speech(i) for i in range(40)]})
    assert stream["a"].meta["flagged"] and not stream["b"].meta["flagged"]
    assert "FLAGGED" in repr(stream["a"]) and "FLAGGED" not in repr(stream["b"])


def test_datasets_objects(cache):
    class Label:
        names = ["news", "code"]

    class Table(list):  # iterates over rows and has features, as a Dataset does
        features = {"label": Label(), "text": None}

    rows = Table({"label": i % 2, "text": speech(i)} for i in range(80))
    stream = from_datasets(rows, domain="label")
    assert stream.names == ["news", "code"]
    halves = {"train": Table(rows[:50]), "test": Table(rows[50:])}
    assert from_datasets(halves, domain="label").hash == stream.hash
    assert from_datasets(halves).names == ["train", "test"]
    assert (
        from_texts(
            {
                "news": [speech(i) for i in range(0, 80, 2)],
                "code": [speech(i) for i in range(1, 80, 2)],
            }
        ).hash
        == stream.hash
    )
    with pytest.raises(
        ValueError,
        match=(
            "Table is one table; name the column that holds each row's domain"
        ),
    ):
        from_datasets(rows)
    with pytest.raises(KeyError, match="no column 'body'"):
        from_datasets(rows, text="body", domain="label")


def test_warnings_are_rare(cache, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        from_texts({"a": long_text(1), "b": long_text(2)})
        load_stream("synthetic:rho=1,domains=2,states=10", cap=1000)


def test_exact_copies_are_counted_once_with_the_way_out(tmp_path, cache):
    same = {f"b/{i}.txt": long_text(1) for i in range(3)}
    folder = write(tmp_path / "mine", {"a.txt": long_text(2), **same})
    with pytest.warns(UserWarning, match="exact copies") as said:
        load_stream(folder)
    (line,) = [str(w.message) for w in said if "exact" in str(w.message)]
    assert "(2 in 'b')" in line and "remove the copies" in line
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        from_texts({"a": [speech(i) for i in range(40)], "b": long_text(3)})

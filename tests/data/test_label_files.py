"""Files of labels are read block by block, and give what a plain reading of the whole file gives."""

import csv
import io
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from masked_diffusion.data import label_files, path_table, text_blocks
from masked_diffusion.data.label_files import OtherJSONError, read_label_file, read_labels
from masked_diffusion.data.path_table import PathTable, places_in
from masked_diffusion.data.text_blocks import JSONText, lines, texts

NAMES = st.text(alphabet='ab/,"\n\r]["{}: \\é\u2028\x85\U0001f600', max_size=8)
WORDS = st.text(alphabet='ab,"]\n é', min_size=1, max_size=4)
LABELS = st.integers(0, 9) | WORDS | st.integers(0, 3).map(lambda one: [int(one == k) for k in range(4)])
ROWS = st.lists(st.tuples(NAMES, LABELS), min_size=1, max_size=12)
SPACE = st.sampled_from(["", " ", "\n", " \r\n\t"])


def in_blocks(content, size):
    """A file of these bytes, read so many at a time."""
    return lambda: (content[start : start + size] for start in range(0, len(content), size))


def plain(rows):
    """What a table of these rows should be: the last row of each name."""
    return {name: label.index(1) if isinstance(label, list) else label for name, label in rows}


def assert_is(table, expected):
    assert set(table.files) == set(expected) and len(table.files) == len(table.labels)
    assert {name: table.labels[index] for index, name in enumerate(table.files)} == expected
    names = sorted(expected)[1:]
    if names:
        found, notes = table.classes_and_notes(PathTable(names))
        wanted = label_files.classes_of([expected[name] for name in names], "x")
        assert found.names == wanted.names and found.labels.tolist() == wanted.labels.tolist()
        assert notes == ["left out: 1 labels of x without an image"]


@given(ROWS, SPACE, st.integers(1, 60), st.booleans(), st.booleans())
def test_edm2s_list_is_that_of_json(rows, space, size, ascii_only, names_first):
    pairs = f"{space},{space}".join(json.dumps(row, ensure_ascii=ascii_only) for row in rows)
    members = [
        f'"labels"{space}:{space}[{pairs}{space}]',
        f'"class_names": ["x"]{space}',
        '"more": {"a": [1, 2]}, "x": 2.5',
    ]
    text = space + "{" + ",".join(members[::-1] if names_first else members) + space + "}" + space
    assert json.loads(text)["labels"] == [list(row) for row in rows]
    table = read_labels(in_blocks(text.encode(), size), "x")
    assert table.class_names == ["x"]
    table = read_labels(in_blocks(text.replace("class_names", "other").encode(), size), "x")
    assert_is(table, plain(rows))


@given(ROWS, st.integers(1, 60), st.booleans(), st.sampled_from(["\n", "\r\n", "\n\n \n"]))
def test_json_lines_are_those_of_json(rows, size, ascii_only, end):
    text = end.join(json.dumps({"id": 1, "file": f, "label": a}, ensure_ascii=ascii_only) for f, a in rows)
    assert_is(read_labels(in_blocks(text.encode(), size), "x"), plain(rows))


@given(st.lists(st.tuples(NAMES, WORDS), min_size=1, max_size=12), st.integers(1, 60), st.booleans())
def test_a_csv_is_that_of_the_csv_module(rows, size, with_mark):
    file = io.StringIO(newline="")
    csv.writer(file).writerows([("label", "x", "file"), *((label, "y", name) for name, label in rows)])
    content = file.getvalue().encode("utf-8-sig" if with_mark else "utf-8")
    read = list(csv.DictReader(io.StringIO(file.getvalue(), newline=""), skipinitialspace=True))
    expected = {row["file"]: row["label"] for row in read}
    if any(row["label"] == "" for row in read):  # it was blanks alone
        with pytest.raises(ValueError, match="'' is no label"):
            read_labels(in_blocks(content, size), "x")
    else:
        assert_is(read_labels(in_blocks(content, size), "x"), expected)


@given(st.lists(NAMES, max_size=12), st.lists(NAMES, unique=True, max_size=8), st.booleans())
def test_rows_of_files_are_found_as_in_a_dict_whatever_names_have_the_same_hash(rows, files, alike):
    def few_hashes(self, salt):
        return plain_hashes(self, salt) if salt else plain_hashes(self, salt) % 2

    plain_hashes = PathTable.hashes
    row_of = {name: number for number, name in enumerate(rows)}
    with pytest.MonkeyPatch.context() as patch:
        if alike:
            patch.setattr(PathTable, "hashes", few_hashes)
        places, different = places_in(PathTable(rows), PathTable(files))
    assert places.tolist() == [row_of.get(name, -1) for name in files] and different == len(row_of)


def test_more_names_than_are_hashed_at_once_are_found(monkeypatch):
    monkeypatch.setattr(path_table, "_AT_ONCE", 7)
    names = [f"{number}é" for number in range(100)]
    places, different = places_in(PathTable(names), PathTable(names[::-1]))
    assert places.tolist() == [*range(99, -1, -1)] and different == 100


@given(st.text(alphabet="ab\r\n\u2028é", max_size=30), st.integers(1, 5))
def test_lines_and_their_ends_do_not_depend_on_the_blocks(text, size):
    assert list(lines(texts(in_blocks(text.encode(), size)()))) == list(io.StringIO(text, newline=""))


def test_a_line_without_end_is_not_kept_in_memory(monkeypatch):
    monkeypatch.setattr(text_blocks, "LONGEST_LINE", 50)
    with pytest.raises(ValueError, match="a line has more than 50 characters"):
        read_labels(in_blocks(b"file,label" + 100 * b"x", 8), "x")
    rows = json.dumps({"labels": [[f"{number}.png", 1.5] for number in range(20)]}).encode()
    with pytest.raises(ValueError, match="not a list of labels .Expecting"):  # the JSON is what is wrong
        read_labels(in_blocks(rows[:-5], 8), "x")


def test_no_more_of_a_json_text_is_kept_than_a_value_and_a_block():
    many = 10_000
    parts = ['{"b": [', *(many * ["1,"]), '2], "c": [[1],[2', ']], "a": "', *(many * ["0123456789"]), '"}']
    text = JSONText(parts)
    found = {}
    for key in text.members():
        value = [v for some in text.elements() for v in some] if text.peek() == "[" else text.value()
        found[key] = value
        assert len(text._text) < (300_000 if key == "a" else 100)
    text.finish()
    assert found == {"a": many * "0123456789", "b": [*(many * [1]), 2], "c": [[1], [2]]}


@pytest.mark.parametrize("size", [3, 1000])
@pytest.mark.parametrize(
    "content, sentence",
    [
        ('{"labels": [["a", 1.5], ["b"]]}', r"not enough values to unpack \(expected 2, got 1\)"),
        ('{"labels": [["a", 1.5], ["b", ""]]}', "1.5 is no label"),
        ('{"labels": [["a", true]]}', "True is no label"),
        ('{"labels": [["a", [1, 1]]]}', r"\[1, 1\] is not one-hot"),
        ('{"labels": [["a", 0] ["b", 1]]}', r"Expecting ',' delimiter: line 1 column 22 \(char 21\)"),
        ('{"labels": [["a", 0], ["b", 1]', r"Expecting ',' delimiter: line 1 column 31 \(char 30\)"),
        ('{"file": "a", "label": 1}\n{"file": "a"}\n{"file": "b", "label": 2.5}', "'label'"),
        ('{"file": "a", "label": 1.5}\n{"file": "a", ', "Expecting property name enclosed in double quotes"),
        ('{"file": "a", "label": 1}\n[2]', "list indices must be integers or slices, not str"),
        ("label,name\n1,2\n", "its first line is 'label,name'"),
        ("file,label\na,1\nb\n", "None is no label"),
        (b"file,label\na,\xe9\n", "'utf-8' codec can't decode byte 0xe9 in position 13: invalid continuation byte"),
        (b"\xef\xbb\xbffile,label\na,\xe2\x82", r"'utf-8' codec can't decode bytes in position 13-14: unexpected end"),
    ],
)
def test_what_is_wrong_is_said_as_of_the_whole_file(content, sentence, size):
    content = content if isinstance(content, bytes) else content.encode()
    with pytest.raises(ValueError, match=rf"x: not a list of labels \({sentence}.*\); give a CSV") as caught:
        read_labels(in_blocks(content, size), "x")
    assert not isinstance(caught.value, OtherJSONError)


@pytest.mark.parametrize("size", [3, 1000])
@pytest.mark.parametrize(
    "content",
    [
        '{"images": [{"id": 1}, {"id": 2}], "labels": [1, 2]}',
        '[{"file": "a", "label": 1}, [[2], [3]]]',
        '{"a": 1}\n{"labels": 2}',
        " 3 ",
        "",
    ],
)
def test_json_of_another_kind_is_told_from_damage(content, size):
    with pytest.raises(OtherJSONError, match="not a list of labels"):
        read_labels(in_blocks(content.encode(), size), "x")


def test_the_last_of_members_with_the_same_key_counts():
    table = read_labels(in_blocks(b'{"labels": [["a", 0]], "labels": [["b", 1]]}', 5), "x")
    assert list(table.files) == ["b"]
    table = read_labels(in_blocks(b'{"labels": [["a", 0]], "labels": null}', 5), "x")
    assert table.classes_and_notes(PathTable(["a"])) == (None, [])


def test_names_that_no_file_can_have_are_labels_without_an_image():
    table = read_labels(in_blocks(rb'{"labels": [["\ud800", 0], ["a", 1], ["\ud800", 2], ["\udc80", 3]]}', 9), "x")
    classes, notes = table.classes_and_notes(PathTable(["a", "\udc80"]))
    assert classes.labels.tolist() == [1, 3] and notes == ["left out: 1 labels of x without an image"]


def test_json_that_is_nested_too_deeply_is_refused_as_any_other_damage(tmp_path):
    path = tmp_path / "labels.json"
    path.write_text('{"labels": ' + "[" * 100_000)
    with pytest.raises(ValueError, match="not a list of labels"):
        read_label_file(str(path))

"""Lists of paths in arrays: they are the lists, and sort as Python does."""

from hypothesis import given
from hypothesis import strategies as st

from masked_diffusion.data.label_files import LabelColumn, classes_of
from masked_diffusion.data.path_table import PathList, PathTable, last_of_each

# Few characters, so that names share beginnings; two of bytes that are no text, one that is longer in UTF-8, and NUL.
NAMES = st.lists(st.text(alphabet="ab/é\U0001f600\udc80\udcff", max_size=20), max_size=12)
WITH_NUL = st.lists(st.text(alphabet="a\0b\udc80", max_size=10), max_size=8)


@given(NAMES | WITH_NUL)
def test_paths_sort_as_python_sorts_them_and_equal_ones_stay_in_their_order(names):
    table = PathTable(names)
    order, is_last = table.order()
    expected = sorted(range(len(names)), key=names.__getitem__)
    assert order.tolist() == expected
    assert list(table.take(order)) == [names[index] for index in expected]
    after = [*[names[index] for index in expected[1:]], None]
    last = [index for index, name in zip(expected, after, strict=False) if names[index] != name]
    assert order[is_last].tolist() == last_of_each(table).tolist() == last


@given(NAMES)
def test_tables_are_packed_and_joined_as_lists_are(names):
    table = PathTable(names)
    assert table.packed() == "\0".join(names).encode("utf-8", "surrogateescape")
    assert not names or list(PathTable.unpacked(bytes(table.packed()))) == names
    assert list(PathTable.joined([table, PathTable(), table])) == names + names


def test_more_paths_than_are_moved_at_once_keep_their_places():
    names = [f"{index % 7}/{index:06d}" for index in range(150_000)]
    table, order = PathTable(names), sorted(range(len(names)), key=names.__getitem__)
    assert table.order()[0].tolist() == order
    taken = table.take(table.order()[0])
    assert list(taken) == [names[index] for index in order] and taken.packed() == "\0".join(taken).encode()


def test_a_list_that_grew_is_the_table_of_its_paths():
    grown = PathList(["a"])
    grown.append("caf\udce9")
    assert len(grown) == 2 and grown.table() == PathTable(["a", "caf\udce9"])


@given(st.lists(st.integers(0, 5), min_size=1) | st.lists(st.sampled_from(["a", "b", "10", "9"]), min_size=1))
def test_a_column_of_labels_has_the_classes_of_the_list(labels):
    column = LabelColumn()
    column.extend(labels[: len(labels) // 2])
    column.extend(labels[len(labels) // 2 :])
    found, expected = column.classes(lambda label: label, "x"), classes_of(labels, "x")
    assert found.names == expected.names and found.labels.tolist() == expected.labels.tolist()
    assert [column[index] for index in range(len(column))] == labels and column.count(labels[0]) == labels.count(
        labels[0]
    )
    some = column.take(expected.labels.argsort(kind="stable")[:2])
    assert len(some) == min(2, len(labels)) and len(some.different) <= 2

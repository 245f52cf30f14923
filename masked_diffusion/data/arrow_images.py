"""Images in a folder that ``datasets.save_to_disk`` wrote: Arrow streams, mapped into memory."""

import json
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from masked_diffusion.data.archive_files import is_outside
from masked_diffusion.data.image_files import is_remote
from masked_diffusion.data.table_images import Table, choose_split, values_of

_STATE, _INFO, _SPLITS = "state.json", "dataset_info.json", "dataset_dict.json"
# Files that a process maps: a mapping of each has a list of all its groups of rows.
_OPEN = 64


class Arrow(Table):
    """The images of a saved ``Dataset``, or of one split of a saved ``DatasetDict``, of several ``train``."""

    kind = "arrow"

    @classmethod
    def claims(cls, data_dir: str) -> bool:
        folder = Path(data_dir)
        return not is_remote(data_dir) and (
            (folder / _SPLITS).is_file() or ((folder / _STATE).is_file() and (folder / _INFO).is_file())
        )

    @classmethod
    def _files_of(cls, path: Path) -> tuple[list[str], list[str]]:
        notes: list[str] = []
        folder = path
        try:
            if (path / _SPLITS).is_file():
                splits = json.loads((path / _SPLITS).read_bytes())["splits"]
                [split], notes = choose_split({str(name): str(name) for name in splits}, path, cls.kind)
                folder = _below(path, split)
            state = json.loads((folder / _STATE).read_bytes())
            files = [str(_below(folder, str(entry["filename"]))) for entry in state["_data_files"]]
            if state.get("_indices_data_files"):
                raise _StateError("its rows are those of a list of indices; save it again after flatten_indices()")
        except (_StateError, OSError, LookupError, TypeError, AttributeError, json.JSONDecodeError) as error:
            raise ValueError(
                f"--data_dir {path}: not, or not wholly, what datasets.save_to_disk writes ({error}); save it again"
            ) from error
        return files, notes

    def _start(self) -> None:
        self._opened: OrderedDict[int, Any] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_opened": OrderedDict()}

    def _table(self, number: int) -> Any:
        import pyarrow

        if number not in self._opened:
            while len(self._opened) >= _OPEN:
                self._opened.popitem(last=False)
            with pyarrow.ipc.open_stream(pyarrow.memory_map(self._paths[number])) as stream:
                self._opened[number] = stream.read_all()  # the places of the rows; they stay in the file
        return self._opened[number]

    def _schema(self, number: int) -> Any:
        return self._table(number).schema

    def _rows_of_groups(self, number: int) -> Iterable[int]:
        return [len(chunk) for chunk in self._table(number)[self._column].chunks]

    def _small_columns(self, number: int, columns: Sequence[str]) -> dict[str, Iterator[Any]]:
        import pyarrow.compute

        table = self._table(number)
        found = {}
        for column in columns:
            name, _, part = column.partition(".") if column not in table.column_names else (column, "", "")
            values = pyarrow.compute.struct_field(table[name], part) if part else table[name]
            found[column] = values_of(values)
        return found

    def _rows(self, number: int, group: int, index: int) -> Any:
        return self._table(number)[self._column].chunk(group)


class _StateError(Exception):
    """Something in the description of a saved data set is not as datasets writes it; part of a message."""


def _below(folder: Path, name: str) -> Path:
    if is_outside(name):
        raise _StateError(f"it names {name}, which is outside")
    return folder / name

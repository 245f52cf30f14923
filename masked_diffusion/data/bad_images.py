"""Count unreadable images over all processes, list them in ``bad_files.txt``, and end a run that has too many.

``image_datasets.py`` decides which image takes the place of one that cannot be read.
"""

import contextlib
import json
from bisect import bisect_left
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from masked_diffusion.data.data_stream import Item, candidates
from masked_diffusion.data.dataset import ImageDataset
from masked_diffusion.data.image_files import UnreadableImageError
from masked_diffusion.dist_util import Ranks
from masked_diffusion.files import atomic_write, move_aside
from masked_diffusion.processes.reading_thread import read_watched

LIST_NAME = "bad_files.txt"
SHOWN = 10  # in one message; the list has them all


def list_entry(name: str, reason: str) -> str:
    """One line: a file's name, a tab, the reason. A name with a line break, tab or leading quote is written in JSON."""
    if name.startswith('"') or len(name.splitlines()) > 1 or any(mark in name for mark in "\t\n\r"):
        name = json.dumps(name)
    return f"{name}\t{' '.join(reason.split())}"


def write_list(path: Path, reasons: Mapping[str, str]) -> None:
    """One :func:`list_entry` per file."""
    lines = "".join(f"{list_entry(name, reason)}\n" for name, reason in reasons.items())
    with atomic_write(path) as file:
        file.write(lines.encode("utf-8", "surrogateescape"))


def read_list(path: Path) -> list[str]:
    """The names that :func:`write_list` wrote, none where there is no such file."""
    if not path.is_file():
        return []
    lines = path.read_bytes().decode("utf-8", "surrogateescape").split("\n")
    names = [line.partition("\t")[0] for line in lines if line]
    return [_from_json(name) if name.startswith('"') else name for name in names]


def _from_json(text: str) -> str:
    with contextlib.suppress(ValueError):  # a damaged line is the name of no file
        text = str(json.loads(text))
    return text


class BadImages:
    """The unreadable images of a run. All ranks know the same ones after each :meth:`gather`.

    dataset, seed: those of the stream. max_bad_share: of the data set's images, in [0, 1]; one image is always let
    pass, unless the share is 0. path: of the list, which rank 0 writes.
    """

    def __init__(self, dataset: ImageDataset, *, seed: int, max_bad_share: float, ranks: Ranks, path: Path) -> None:
        self.dataset = dataset
        self.seed = seed
        self.max_bad_share = max_bad_share
        self.ranks = ranks
        self.path = path
        self.allowed = max(1, int(max_bad_share * len(dataset))) if max_bad_share else 0
        self.found: dict[int, str] = {}  # index -> reason, which rank 0 knows
        self._new: set[int] = set()  # found by this rank, not yet told to the others

    def check(self, items: Iterable[Item]) -> None:
        """Load the images that a run will start with, so that a folder of bad ones stops it before the work starts.

        items: of the stream, such as its first batch; repeated images are loaded once.
        Raises ValueError, naming one of them, when half of them or more than the allowed number cannot be read,
        LoaderError, naming the file, when the storage hangs.
        """
        indices = list(dict.fromkeys(index for _, index in items))
        errors = {index: error for index in indices if (error := self._error(index)) is not None}
        if 2 * len(errors) >= len(indices) or len(errors) > self.allowed:
            example = next(iter(errors.values()))
            raise ValueError(f"--data_dir: {len(errors)} of the first {len(indices)} images are bad, such as {example}")
        self._new |= set(errors)

    def take_up(self, resumed: bool) -> list[str]:
        """Continue the list of a resumed run, or move another run's list aside. Returns messages for the log.

        Takes images off the list that are gone from the data set or can be read now. Adds what :meth:`check` found.
        Raises ValueError when this is too many.
        """
        if not resumed:
            self.ranks.from_main(lambda: move_aside(self.path))
        listed, self.found = self.ranks.from_main(self._listed)
        gone = listed - len(self.found)
        messages = [f"{gone} files are no longer listed in {self.path}: they can be read, or are gone"] if gone else []
        messages += self.gather()
        if problem := self.problem():
            raise ValueError(problem)
        return messages

    def _listed(self) -> tuple[int, dict[int, str]]:
        """Length of the list as it was, and its images that cannot be read now, either."""
        found = {}
        names = read_list(self.path)
        for name in names:
            index = bisect_left(range(len(self.dataset)), name, key=self.dataset.name_of)  # files are sorted
            is_ours = index < len(self.dataset) and self.dataset.name_of(index) == name
            if is_ours and (error := self._error(index)) is not None:
                found[index] = error.reason
        if len(found) < len(names):
            self._write(found)
        return len(names), found

    def note(self, batch: Mapping[str, Tensor]) -> None:
        """Note which images of this rank's batch were replaced: all candidates before the one that was used."""
        replaced = batch["used"] != batch["index"]
        columns = (batch[name][replaced].tolist() for name in ("epoch", "index", "used"))
        for epoch, index, used in zip(*columns, strict=True):
            for candidate in candidates((epoch, index), len(self.dataset), self.seed):
                if candidate == used:
                    break
                self._new.add(candidate)
        self._new -= self.found.keys()

    def gather(self) -> list[str]:
        """Share what each rank found since the last call, and list it. Collective: every rank must call it.

        Returns messages for the log.
        """
        mine, self._new = sorted(self._new), set()
        total = int(self.ranks.sum_(torch.tensor(len(mine), device=self.ranks.device)))
        if not total:
            return []
        padded = torch.full((total,), -1)
        padded[: len(mine)] = torch.tensor(mine, dtype=torch.int64)
        everyones = self.ranks.concat(padded.to(self.ranks.device)).tolist()
        new = sorted(set(everyones) - {-1} - self.found.keys())
        self.found |= {index: self._reason(index) if self.ranks.is_main else "" for index in new}
        if not new or not self.ranks.is_main:
            return []
        entries = [list_entry(self.dataset.name_of(i), self.found[i]).partition("\t") for i in new[:SHOWN]]
        messages = [f"{name} is replaced by another image: {reason}" for name, _, reason in entries]
        if len(new) > SHOWN:
            messages.append(f"so are {len(new) - SHOWN} others")
        try:
            self._write(self.found)
        except OSError as error:  # no reason to stop; the next time all are written again
            messages.append(f"could not write {self.path} ({error})")
        return messages

    def problem(self) -> str | None:
        """Describe the problem when more images are bad than allowed, equal on all ranks; else None."""
        if len(self.found) <= self.allowed:
            return None
        return (
            f"{len(self.found)} of {len(self.dataset)} images cannot be read, more than --max_bad_share "
            f"{self.max_bad_share} allows; {self.path} lists them: replace them, or allow more"
        )

    def _write(self, found: Mapping[int, str]) -> None:
        write_list(self.path, {self.dataset.name_of(index): reason for index, reason in found.items()})

    def _error(self, index: int) -> UnreadableImageError | None:
        try:
            read_watched(partial(self.dataset.load, index), self.dataset.name_of(index))
        except UnreadableImageError as error:
            return error
        return None

    def _reason(self, index: int) -> str:
        """Why an image that some rank could not read is bad."""
        try:
            error = self._error(index)
        except OSError as failure:
            return str(failure)
        return "another process could not read it, rank 0 can" if error is None else error.reason

"""Images in tar archives in a bucket: fetched in blocks of neighbours, which the order of a training follows.

A request for each image would cost more than the image. An archive is read once from end to end for its list, which is
kept; later, blocks of it are fetched, kept as files while they are needed, and shared by all processes of a machine.
"""

import hashlib
import json
import os
import time
from collections import deque
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from masked_diffusion.data.image_files import UnreadableImageError, is_remote, open_remote, patiently, remote_state
from masked_diffusion.data.source import USUAL, Blocks, SourceOptions
from masked_diffusion.data.tar_images import Shard, Tar, keep_shard, kept_at, kept_shard, list_shard, no_archive
from masked_diffusion.files import atomic_write, cache_folder, lock

BLOCK_BYTES = 1 << 24
_READ_AT_ONCE = 1 << 23  # bytes of a request while an archive is listed
_SHOW_AFTER = 5  # seconds, from when on a bar tells of the listing
_POLL_SECONDS = 0.2
_LOCKS = 64  # files by which processes agree on who fetches what
# Windows whose blocks are kept: the one that is read, and the one that loader processes have begun.
_KEPT_WINDOWS = 2


class RemoteTar(Tar):
    """The images of tar archives in a bucket: ``gs://bucket/shard-{000..123}.tar``, or a ``.txt`` there with a list.

    Raises what ``Tar`` does, and ValueError where there is no folder to keep lists and blocks in.
    """

    def __init__(self, data_dir: str, options: SourceOptions = USUAL) -> None:
        cache = cache_folder()
        if cache is None:
            raise ValueError(
                f"--data_dir {data_dir}: remote archives need a local folder for their blocks; set XDG_CACHE_HOME"
            )
        self._states: list[list[Any]] = []
        super().__init__(data_dir, options)
        self._make_blocks(options.shuffle_window)
        identity = json.dumps([self._paths, self._states, BLOCK_BYTES, options.max_image_bytes])
        self._folder = cache / "blocks" / hashlib.sha256(identity.encode("utf-8", "replace")).hexdigest()[:32]

    @classmethod
    def claims(cls, data_dir: str) -> bool:
        return is_remote(data_dir) and data_dir.endswith((".tar", ".txt"))

    def _read_shards(self) -> list[Shard]:
        try:
            self._states = [remote_state(path) for path in self._paths]
        except FileNotFoundError as error:
            raise no_archive(self.data_dir, str(error)) from error
        places = [kept_at(path) for path in self._paths]
        found: dict[int, Shard] = {}
        # Processes of a machine share the work: each begins with another archive, and passes over those being listed.
        first = os.getpid() % len(places)
        todo = deque([*range(first, len(places)), *range(first)])
        with tqdm(total=len(todo), unit="archive", desc="listing", delay=_SHOW_AFTER) as bar:
            passed_over = 0
            while todo:
                number = todo.popleft()
                place = places[number]
                assert place is not None
                shard = kept_shard(place, self._states[number]) or self._list(number, place)
                if shard is None:
                    todo.append(number)
                    passed_over += 1
                    if passed_over >= len(todo):
                        time.sleep(_POLL_SECONDS)
                    continue
                found[number], passed_over = shard, 0
                bar.update()
        return [found[number] for number in range(len(places))]

    def _list(self, number: int, place: Path) -> Shard | None:
        """List an archive and keep the list. None while another process does."""
        place.parent.mkdir(parents=True, exist_ok=True)
        path, state = self._paths[number], self._states[number]
        with place.with_name(f".{place.name}.lock").open("a") as held:
            if not lock(held):
                return None
            if (kept := kept_shard(place, state)) is not None:
                return kept

            def read() -> Shard:
                with open_remote(path, _READ_AT_ONCE) as file:
                    return list_shard(path, file)

            shard = patiently(path, read)
            keep_shard(place, shard, state)
            return shard

    def _make_blocks(self, window: int) -> None:
        """Cut each archive, in the order of its bytes, into runs of images that lie in BLOCK_BYTES or are alone."""
        by_place = np.lexsort((self._offsets, self._shards))
        blocks = np.empty(len(self), dtype=np.int64)
        starts: list[int] = []
        ends: list[int] = []
        shard_of: list[int] = []
        for index in by_place.tolist():
            shard, offset = int(self._shards[index]), int(self._offsets[index])
            end = offset + int(self._sizes[index])
            if not starts or shard_of[-1] != shard or end - starts[-1] > BLOCK_BYTES:
                starts.append(offset)
                ends.append(end)
                shard_of.append(shard)
            ends[-1] = max(ends[-1], end)
            blocks[index] = len(starts) - 1
        self._starts, self._ends = np.array(starts, dtype=np.int64), np.array(ends, dtype=np.int64)
        self._shard_of_block = shard_of
        self._blocks = Blocks(blocks, self._offsets, window, BLOCK_BYTES)
        images_of_a_block = len(self) / len(starts)
        self._kept_blocks = 4 + int(_KEPT_WINDOWS * min(window, len(self)) / images_of_a_block)

    def blocks(self) -> Blocks:
        return self._blocks

    def read(self, index: int) -> bytes:
        size = int(self._sizes[index])
        if size > self.largest:
            raise UnreadableImageError(self.name_of(index), f"{size} bytes are more than {self.largest}")
        block = int(self._blocks.of[index])
        at = int(self._offsets[index] - self._starts[block])
        content = self._read_block(block, at, size)
        if len(content) < size:
            where = f"{self._paths[self._shards[index]]} is cut off before byte {int(self._offsets[index]) + size}"
            raise UnreadableImageError(self.name_of(index), where)
        return content

    def _read_block(self, block: int, at: int, size: int) -> bytes:
        path = self._folder / f"{block:08d}"
        while True:
            with suppress(FileNotFoundError), path.open("rb") as file:
                file.seek(at)
                return file.read(size)
            self._fetch(block, path)

    def _fetch(self, block: int, path: Path) -> None:
        """Fetch a block into its file, or wait for the process that does."""
        self._folder.mkdir(parents=True, exist_ok=True)
        with (self._folder / f".lock{block % _LOCKS:02d}").open("a") as held:
            while not lock(held):
                time.sleep(_POLL_SECONDS)
            if path.exists():
                return
            start, end = int(self._starts[block]), int(self._ends[block])
            archive = self._paths[self._shard_of_block[block]]
            content = patiently(archive, partial(_read_range, archive, start, end - start))
            with atomic_write(path) as file:
                file.write(content)
        self._remove_oldest()

    def _remove_oldest(self) -> None:
        """Keep as many blocks as the windows being read may need. One that is missed is fetched again."""
        ages = []
        for path in self._folder.glob("[0-9]*"):
            with suppress(FileNotFoundError):
                ages.append((path.stat().st_mtime_ns, path))
        for _, path in sorted(ages)[: -self._kept_blocks]:
            path.unlink(missing_ok=True)


def _read_range(path: str, start: int, length: int) -> bytes:
    with open_remote(path, min(length, _READ_AT_ONCE)) as file:
        file.seek(start)
        return file.read(length)

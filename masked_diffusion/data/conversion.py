"""Write a data set in another form: which names its images get, what of them is written, and how it goes on."""

import dataclasses
import hashlib
import io
import itertools
import json
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from PIL import Image
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from masked_diffusion.data.image_files import FORMATS, UnreadableImageError, as_png, is_remote
from masked_diffusion.data.image_writers import FolderTarget, Target, Written
from masked_diffusion.data.path_table import PathTable
from masked_diffusion.files import lock, write_json
from masked_diffusion.image_datasets import SourceDataset, center_crop_arr, resize_short_side
from masked_diffusion.processes.loader_processes import iterate

# What a kind of file is called where its name does not say it.
_EXTENSION_OF = {**{kind: f".{kind.lower()}" for kind in FORMATS}, "JPEG": ".jpg"}


@dataclass(frozen=True)
class Plan:
    """What becomes of each image. image_size: its side, or None for the file as it is. crop: to the square in its
    middle; False resizes the short side alone."""

    image_size: int | None = None
    crop: bool = True

    def __post_init__(self) -> None:
        if self.image_size is not None and self.image_size < 1:
            raise ValueError(f"--image_size {self.image_size}: must be at least 1 pixel")


class Conversion:
    """The images of a data set on their way to a target. notes: what a user should know of them, a line each.

    Raises ValueError where the target is there already, lies in the folder of the images, is being written by another
    process, or was begun from other images or settings.
    """

    def __init__(self, dataset: SourceDataset, target: Target, plan: Plan, stack: ExitStack) -> None:
        self.dataset, self.target, self.plan = dataset, target, plan
        self.class_names = dataset.class_names or None
        self.names, self.numbered = target_names(dataset.source.names, target, plan.image_size is not None)
        self.notes = [*dataset.notes]
        if self.numbered:
            self.notes.append("images are numbered: their names would not be the same, or in order, in this form")
        self._record = target.path.with_name(f".{target.path.name}.record")
        self._is_complete = False
        stack.callback(target.close)
        self._claim(stack)

    def _claim(self, stack: ExitStack) -> None:
        """Be the only process that writes this target, and the one that began it."""
        target = self.target.path
        there = [path for path in self.target.finals if path.exists() and not _is_empty_folder(path)]
        if there and not self._record.exists():
            raise ValueError(f"DEST {target}: {there[0]} is there already; remove it, or give another DEST")
        source = self.dataset.source.data_dir
        is_inside = not is_remote(source) and Path(source).resolve() in target.resolve().parents
        if is_inside and isinstance(self.target, FolderTarget):
            raise ValueError(f"DEST {target}: lies in SOURCE {source}; give a folder outside of it")
        self._record.parent.mkdir(parents=True, exist_ok=True)
        held = stack.enter_context(self._record.with_name(f"{self._record.name}.lock").open("a+"))
        if not lock(held):
            raise ValueError(f"DEST {target}: another process is writing it; wait for its end, or give another DEST")
        ours = {**dataclasses.asdict(self.plan), "images": self._fingerprint()}
        if self._record.exists() and json.loads(self._record.read_bytes()) != ours:
            raise ValueError(
                f"DEST {target}: was begun from other images or with other settings; give those again to go on, or "
                f"remove {self._record} and what is unfinished beside it"
            )
        write_json(self._record, ours)
        self._is_complete = len(there) == len(self.target.finals)

    def _fingerprint(self) -> str:
        source = self.dataset.source
        digest = hashlib.sha256(self.dataset.fingerprint(source.data_dir).encode())
        digest.update(source.sizes().tobytes())
        return digest.hexdigest()

    def run(self, num_workers: int) -> dict[str, str]:
        """Write what is missing. Returns the images that cannot be read, which are left out, with the reasons."""
        bad: dict[str, str] = {}
        if not self._is_complete:
            written = self._take_up()
            todo = [index for index in range(len(self.names)) if index not in written]
            contents = iterate(
                _Contents(self.dataset, self.plan, self.numbered),
                num_workers,
                name_of=self.dataset.name_of,
                sampler=todo,
                batch_size=16,
                collate_fn=list,
            )
            with tqdm(total=len(self.names), initial=len(written), unit="image") as bar:
                for batch in contents:
                    for index, content, extension, reason in batch:
                        if reason:
                            bad[self.dataset.name_of(index)] = reason
                        else:
                            written[index] = self.names[index] + extension
                            self.target.add(index, Written(written[index], content, self._label(index)))
                    bar.update(len(batch))
            labels = self.dataset.labels
            known = {} if self.class_names is None else {written[i]: int(labels[i]) for i in sorted(written)}
            self.target.finish(known)
        for path in (self._record, self._record.with_name(f"{self._record.name}.lock")):
            path.unlink(missing_ok=True)
        return bad

    def _take_up(self) -> dict[int, str]:
        """The images that an interrupted process has written: index -> name."""
        found = {self._key(name): name for name in self.target.open(len(self.names), self.class_names)}
        return {index: found[name] for index, name in enumerate(self.names) if name in found} if found else {}

    def _key(self, name: str) -> str:
        return name.rpartition(".")[0] if self.numbered else name

    def _label(self, index: int) -> int | None:
        return None if self.class_names is None else int(self.dataset.labels[index])


class _Contents(Dataset[tuple[int, bytes, str, str]]):
    """Index -> index, what is written of the image, what is put behind its name, and why it cannot be read, which is
    empty when it can."""

    def __init__(self, dataset: SourceDataset, plan: Plan, numbered: bool) -> None:
        self.dataset, self.plan, self.numbered = dataset, plan, numbered

    def __getitem__(self, index: int) -> tuple[int, bytes, str, str]:
        try:
            content = self._content(index)
            return index, content, _extension_of(content) if self.numbered else "", ""
        except UnreadableImageError as error:
            return index, b"", "", error.reason
        except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
            return index, b"", "", error.strerror or str(error)

    def _content(self, index: int) -> bytes:
        side = self.plan.image_size
        if side is None:
            return self.dataset.source.read(index)
        picture = self.dataset.picture(index)
        pixels = center_crop_arr(picture, side) if self.plan.crop else resize_short_side(picture, side)
        return as_png(Image.fromarray(pixels))


def target_names(names: PathTable, target: Target, as_png: bool) -> tuple[PathTable, bool]:
    """What images are called in a target, in their order, and whether they are numbers without an extension.

    An image is known by its place in the sorted names, so that they keep their order. as_png: all become PNG files.
    """
    kept = PathTable(str(PurePosixPath(name).with_suffix(".png")) for name in names) if as_png else names
    if all(before < after for before, after in itertools.pairwise(kept)) and target.holds(kept):
        return kept, False
    return PathTable(f"{index:08d}" for index in range(len(names))), True


def _extension_of(content: bytes) -> str:
    try:
        return _EXTENSION_OF[str(Image.open(io.BytesIO(content), formats=FORMATS).format)]
    except Exception as error:  # damaged files raise almost anything
        raise UnreadableImageError("", str(error) or type(error).__name__) from error


def _is_empty_folder(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())

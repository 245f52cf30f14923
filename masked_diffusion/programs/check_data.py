"""Read every image, or all latents, of a data folder as a training would, and name all that cannot be read."""

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from torch.utils.data import Dataset
from tqdm.auto import tqdm

from masked_diffusion.data.bad_images import list_entry, write_list
from masked_diffusion.data.data_config import READING
from masked_diffusion.data.image_files import UnreadableImageError
from masked_diffusion.files import move_aside
from masked_diffusion.image_datasets import LatentDataset, SourceDataset, center_crop_arr, open_dataset
from masked_diffusion.processes.loader_processes import iterate
from masked_diffusion.script_util import args_to_dict, choose_num_workers

AFTER_IMAGES = (
    "replace them, or remove them before a training starts: one that has started needs the same list of files"
)
AFTER_LATENTS = (
    "a training replaces images that were left out; repair them and encode all into another folder to have them"
)

SECONDS_FOR_A_FILE = 600  # of latents, which may have gigabytes

# Of one image: its index, its size in pixels, and why it cannot be read, which is empty when it can.
Finding = tuple[int, tuple[int, int], str]


class _Findings(Dataset[Finding]):
    def __init__(self, dataset: SourceDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Finding:
        try:
            image = self.dataset.picture(index)
            center_crop_arr(image, self.dataset.image_size)
        except UnreadableImageError as error:
            return index, (0, 0), error.reason
        except OSError as error:  # of a failing disk, all the files it concerns are wanted
            return index, (0, 0), str(error)
        return index, image.size, ""


class _Shards(Dataset[dict[str, str]]):
    """Number of a file of latents -> what no training can use of it, and why."""

    def __init__(self, dataset: LatentDataset) -> None:
        self.cache = dataset.cache

    def __len__(self) -> int:
        return self.cache.num_shards

    def __getitem__(self, number: int) -> dict[str, str]:
        return self.cache.problems(number)


def prepare(args: argparse.Namespace) -> Callable[[], int]:
    """Raises ValueError or FileNotFoundError for what cannot be checked."""
    dataset = open_dataset(
        args.data_dir,
        image_size=args.image_size,
        **args_to_dict(args, READING[1:]),
        random_flip=False,  # latents need not have mirror images
    )
    if not isinstance(dataset, SourceDataset | LatentDataset):
        raise ValueError(f"--data_dir {args.data_dir}: comes with the code, there is nothing to check; give a folder")
    out = Path(args.out).expanduser() if args.out else None
    if out is not None and not out.parent.is_dir():
        raise FileNotFoundError(f"--out {args.out}: the folder {out.parent} does not exist; make it first")
    num_workers = choose_num_workers(args.num_workers)
    if isinstance(dataset, LatentDataset):
        return lambda: check_latents(dataset, num_workers, out)
    return lambda: check(dataset, num_workers, out)


def check_latents(dataset: LatentDataset, num_workers: int, out: Path | None) -> int:
    """Read all latents and report. Returns the exit status."""
    shards = _Shards(dataset)
    bad: dict[str, str] = {}
    seconds = SECONDS_FOR_A_FILE
    files = iterate(shards, num_workers, silence_seconds=seconds, name_of="file {} of it".format, batch_size=None)
    for problems in tqdm(files, total=len(shards), unit="file"):
        bad |= problems
    return tell([str(dataset), *report_bad(bad, len(dataset), AFTER_LATENTS)], bad, out)


def check(dataset: SourceDataset, num_workers: int, out: Path | None) -> int:
    """Read all images and report. Returns the exit status."""
    good, bad = [], {}
    with tqdm(total=len(dataset), unit="image") as bar:
        for findings in iterate(
            _Findings(dataset), num_workers, name_of=dataset.name_of, batch_size=16, collate_fn=list
        ):
            for index, size, reason in findings:
                if reason:
                    bad[dataset.name_of(index)] = reason
                else:
                    good.append(size)
            bar.set_postfix(bad=len(bad))
            bar.update(len(findings))
    return tell(report(dataset, good, bad), bad, out)


def tell(lines: Iterable[str], bad: dict[str, str], out: Path | None) -> int:
    """Print and write what was found. Returns the exit status."""
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    if out is not None:
        move_aside(out)
        write_list(out, bad)
    return 1 if bad else 0


def report(dataset: SourceDataset, sizes: Sequence[tuple[int, int]], bad: dict[str, str]) -> Iterable[str]:
    """Lines for people. sizes: (width, height) of the readable images. bad: file -> reason."""
    yield str(dataset)
    yield from dataset.notes
    if sizes:
        (least, most) = (f"{w} x {h}" for w, h in (find(sizes, key=lambda s: s[0] * s[1]) for find in (min, max)))
        enlarged = sum(min(size) < dataset.image_size for size in sizes)
        yield f"smallest {least}, largest {most} pixels; {enlarged} are enlarged for --image_size {dataset.image_size}"
    yield from report_bad(bad, len(dataset), AFTER_IMAGES)


def report_bad(bad: dict[str, str], number: int, remedy: str) -> Iterable[str]:
    """Lines for people. number: of all images."""
    if not bad:
        yield "all can be read"
        return
    yield f"{len(bad)} of {number} cannot be read:"
    yield from (list_entry(name, reason) for name, reason in bad.items())
    yield remedy

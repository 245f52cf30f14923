"""Data with unreadable images, in real processes."""

import pytest
from support import (
    REPO,
    TINY_DIGITS,
    assert_same_weights,
    make_colour_folder,
    names_in_order,
    rows,
    run,
    truncate,
    weights,
)

from masked_diffusion.data.bad_images import LIST_NAME, read_list

pytestmark = pytest.mark.e2e

TRAIN = "scripts/image_train.py"


@pytest.fixture
def colours(tmp_path):
    return make_colour_folder(tmp_path / "colours", size=12)


def flags(colours, *further):
    return [*TINY_DIGITS, "--data_dir", colours, "--num_workers", 1, "--max_bad_share", 0.2, *further]


def test_two_processes_list_the_bad_files_of_both_and_train_as_one_does(tmp_path, colours):
    bad = truncate(colours, "blue/0.png", "green/5.png", "red/2.png", "red/6.png")
    run(TRAIN, tmp_path / "two", *flags(colours, "--batch_size", 2, "--max_steps", 7), processes=2)
    run(TRAIN, tmp_path / "one", *flags(colours, "--batch_size", 4, "--max_steps", 7))
    assert_same_weights(weights(tmp_path / "two", 7), weights(tmp_path / "one", 7), atol=1e-3)
    for folder in (tmp_path / "two", tmp_path / "one"):
        assert sorted(read_list(folder / LIST_NAME)) == bad
        assert rows(folder)[-1]["bad_images"] == 4
    for two, one in zip(rows(tmp_path / "two"), rows(tmp_path / "one"), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-3)


def test_a_rank_whose_data_are_gone_lets_rank_0_save_first(tmp_path, colours):
    """Without the agreement, rank 0 would wait for rank 1 until the launcher ends it."""
    program = tmp_path / "train.py"
    program.write_text(
        "import os, sys\n"
        "from masked_diffusion.image_datasets import SourceDataset\n"
        "load, calls = SourceDataset.load, []\n"
        "def failing(self, index, rng=None):\n"
        "    calls.extend([] if rng is None else [index])\n"
        "    if len(calls) > 10 and os.environ['RANK'] == '1': raise OSError('the storage failed')\n"
        "    return load(self, index, rng)\n"
        "SourceDataset.load = failing\n"
        f"sys.path.insert(0, {str(REPO / 'scripts')!r})\nimport image_train\nsys.exit(image_train.main())\n"
    )
    arguments = flags(colours, "--num_workers", 0, "--batch_size", 2, "--max_steps", 50)
    done = run(program, tmp_path / "run", *arguments, processes=2, check=False)
    assert done.returncode != 0 and "OSError: the storage failed" in done.stderr, done.stderr
    assert "another process could not read its data" in done.stdout, done.stdout
    # Five batches were read; the fetch of the sixth fails in step 4, and all stop together one step later.
    assert (tmp_path / "run" / "checkpoint000005.json").exists()


def test_too_many_bad_files_stop_all_processes_with_one_sentence(tmp_path, colours):
    truncate(colours, *names_in_order(colours)[16:])  # none of them among the first
    done = run(TRAIN, tmp_path / "run", *flags(colours, "--batch_size", 1, "--max_steps", 50), processes=2, check=False)
    sentence = f"images cannot be read, more than --max_bad_share 0.2 allows; {tmp_path / 'run' / LIST_NAME} lists them"
    assert done.returncode != 0 and sentence in done.stderr, done.stderr
    last = rows(tmp_path / "run")[-1]
    assert last["bad_images"] == len(read_list(tmp_path / "run" / LIST_NAME)) > 4
    assert (tmp_path / "run" / f"checkpoint{int(last['step']):06d}.json").exists()

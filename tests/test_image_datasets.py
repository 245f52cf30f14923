"""Crops, class maps, data sets and the stream of batches."""

import gc
import multiprocessing
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from masked_diffusion.image_datasets import center_crop_arr, class_table, load_data, open_dataset, random_crop_arr
from masked_diffusion.randomness import DrawSpec, numpy_generator, training_draws

CROPS = np.load(Path(__file__).parent / "goldens" / "center_crop.npz")
DAMAGED = {1, 4, 5, 8}  # numbers of the truncated images in the folder of that name
SPEC = DrawSpec(latent_shape=(4, 2, 2), num_tokens=4, posterior=True)


def random_image(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8))


@pytest.fixture(scope="module")
def folder(module_folder) -> str:
    """Seven images of 20x16 and of different content in the classes 2, 10 and 9."""
    root = module_folder("images")
    for number, name in enumerate(["2/a", "2/b", "2/c", "10/a", "10/b", "9/a", "9/b"]):
        path = root / f"{name}.png"
        path.parent.mkdir(exist_ok=True)
        random_image(20, 16, number).save(path)
    return str(root)


def batches(number: int, data_dir: str, batch_size: int = 4, image_size: int = 8, **settings):
    stream = load_data(data_dir=data_dir, batch_size=batch_size, image_size=image_size, **settings)
    try:
        return list(islice(stream, number))
    finally:
        stream.close()


def assert_same(ours, theirs):
    assert len(ours) == len(theirs)
    for (images, extra), (other_images, other_extra) in zip(ours, theirs, strict=True):
        assert torch.equal(images, other_images) and extra.keys() == other_extra.keys()
        for name in extra:
            assert torch.equal(extra[name], other_extra[name]), name


def side_by_side(number, data_dir, world_size, batch_size, **settings):
    """The batches of all ranks, each turn put together."""
    shares = [
        batches(number, data_dir, batch_size=batch_size // world_size, rank=rank, world_size=world_size, **settings)
        for rank in range(world_size)
    ]
    return [
        (
            torch.cat([images for images, _ in turn]),
            {name: torch.cat([extra[name] for _, extra in turn]) for name in turn[0][1]},
        )
        for turn in zip(*shares, strict=True)
    ]


# Crops


@pytest.mark.parametrize("case", range(5))
def test_center_crop_matches_golden(case):
    crop = center_crop_arr(Image.fromarray(CROPS[f"in_{case}"]), int(CROPS[f"size_{case}"]))
    assert crop.dtype == np.uint8
    assert np.array_equal(crop, CROPS[f"crop_{case}"])


def test_image_of_exactly_twice_the_size_is_halved_by_a_box():
    image = random_image(32, 32)
    assert np.array_equal(center_crop_arr(image, 16), np.asarray(image.resize((16, 16), Image.Resampling.BOX)))


def test_long_side_is_rounded():
    tall = random_image(20, 31)  # 31 * 32 / 20 = 49.6
    resized = np.asarray(tall.resize((32, 50), Image.Resampling.BICUBIC))
    assert np.array_equal(center_crop_arr(tall, 32), resized[9:41])


def test_crops_of_grey_images_are_rgb():
    grey = random_image(20, 16).convert("L")
    assert center_crop_arr(grey, 8).shape == random_crop_arr(grey, 8).shape == (8, 8, 3)


class Extreme:
    """Stands for a generator: every integer is the smallest, or the largest, that may be drawn."""

    def __init__(self, largest: bool) -> None:
        self.largest = largest

    def integers(self, low, high, endpoint):
        assert endpoint
        return high if self.largest else low


@pytest.mark.parametrize("size", [1, 8, 256])
@pytest.mark.parametrize("side", [(300, 211), (20, 20)])
def test_widest_random_crop_spans_the_short_side_and_starts_in_the_corner(size, side):
    image = random_image(*side)
    scale = size / min(side)
    whole = image
    while min(whole.size) >= 2 * size:
        whole = whole.resize((whole.width // 2, whole.height // 2), Image.Resampling.BOX)
    whole = whole.resize((round(whole.width * size / min(whole.size)), size), Image.Resampling.BICUBIC)
    assert abs(whole.width - side[0] * scale) <= 1 + scale
    assert np.array_equal(random_crop_arr(image, size, rng=Extreme(False)), np.asarray(whole)[:size, :size])


@pytest.mark.parametrize("size, longest", [(8, 10), (256, 320), (32, 40), (7, 9)])
def test_narrowest_random_crop_is_cut_from_size_over_fraction(size, longest):
    image = random_image(longest + 3, longest)  # resized to itself
    corner = np.asarray(image)[-size:, -size:]
    assert np.array_equal(random_crop_arr(image, size, rng=Extreme(True)), corner)


def test_random_crop_repeats_with_its_generator_and_differs_without():
    image = random_image(40, 30)
    crops = [random_crop_arr(image, 16, rng=numpy_generator(0, "augment", 0, 3)) for _ in range(2)]
    assert np.array_equal(*crops)
    assert len({random_crop_arr(image, 16).tobytes() for _ in range(8)}) > 1


@pytest.mark.parametrize("fractions", [(0.0, 1.0), (0.9, 0.8), (0.8, 1.1)])
def test_impossible_crop_fractions_are_refused(fractions):
    with pytest.raises(ValueError, match="0 < min <= max <= 1"):
        random_crop_arr(random_image(9, 9), 4, *fractions)


# Classes


@pytest.mark.parametrize("fast", [False, True])
def test_colour_images_are_read_as_grey_where_that_is_asked_for(colour_folder, fast):
    colour, grey = (
        open_dataset(str(colour_folder), image_size=16, fast_decode=fast, grey=grey) for grey in (False, True)
    )
    pixels = ((colour.load(3) + 1) * 127.5).round().astype(np.uint8).transpose(1, 2, 0)
    expected = np.asarray(Image.fromarray(pixels).convert("L"), dtype=np.float32)[None] / 127.5 - 1
    assert (colour.channels, grey.channels) == (3, 1) and np.allclose(grey.load(3), expected, atol=1e-6)


def test_numeric_classes_are_sorted_by_value():
    names, labels = class_table([f"{number}_x.png" for number in (10, 9, 0, 11, 2, 9)])
    assert names == ["0", "2", "9", "10", "11"]
    assert labels.tolist() == [3, 2, 0, 4, 1, 2] and labels.dtype == np.int64


def test_one_name_that_is_no_number_makes_the_order_that_of_strings():
    assert class_table(["10_a.png", "9_a.png", "x_a.png"])[0] == ["10", "9", "x"]
    assert class_table(["1_0/a.png", "2/a.png"])[0] == ["1_0", "2"]


def test_equal_numbers_written_differently_are_two_classes():
    assert class_table(["1/a.png", "01/a.png", "-2/a.png"])[0] == ["-2", "01", "1"]


@pytest.mark.parametrize(
    "paths, class_from, names, labels",
    [
        (["dog/img_1.png", "cat/img_1.png"], "auto", ["cat", "dog"], [1, 0]),
        (["dog/img_1.png", "cat/img_1.png"], "filename", ["img"], [0, 0]),
        (["all/b_1.png", "all/a_1.png"], "auto", ["a", "b"], [1, 0]),
        (["all/b_1.png", "all/a_1.png"], "folder", ["all"], [0, 0]),
        (["n01440764_2708.JPEG", "n01_7_8.JPEG"], "auto", ["n01", "n01440764"], [1, 0]),
        (["x/a/1.png", "y/a/1.png", "x/1.png"], "auto", ["x", "x/a", "y/a"], [1, 2, 0]),
    ],
)
def test_class_comes_from_folder_or_file_name(paths, class_from, names, labels):
    assert class_table(paths, class_from)[0] == names
    assert class_table(paths, class_from)[1].tolist() == labels


@pytest.mark.parametrize(
    "paths, class_from, culprit",
    [
        (["a_1.png", "b.png"], "auto", "b.png"),
        (["x/a.png"], "auto", "x/a.png"),
        (["x/_a.png"], "filename", "x/_a.png"),
        (["x_y/a.png"], "filename", "x_y/a.png"),
        (["a_1.png"], "folder", "a_1.png"),
        (["x/a.png", "stray.png"], "auto", "stray.png"),
    ],
)
def test_missing_class_is_an_error_with_the_remedies(paths, class_from, culprit):
    remedies = "--class_from folder.*--class_from filename.*--class_cond False"
    with pytest.raises(ValueError, match=f"image {culprit} of --data_dir.*{remedies}"):
        class_table(paths, class_from)


def test_unknown_class_source_lists_the_known_ones():
    with pytest.raises(ValueError, match="--class_from label: unknown; choose one of auto, folder, filename"):
        class_table(["a_1.png"], "label")


# Data sets


def test_folder_dataset_knows_its_classes(folder):
    dataset = open_dataset(folder, image_size=8)
    assert dataset.class_names == ["2", "9", "10"] and dataset.num_classes == 3 and dataset.channels == 3
    assert dataset.labels.tolist() == [2, 2, 0, 0, 0, 1, 1] and len(dataset) == 7  # files in the order of strings


@pytest.mark.parametrize("data_dir", ["folder", "builtin:digits"])
def test_without_classes_every_label_is_the_null_label_of_one_class(folder, data_dir):
    dataset = open_dataset(folder if data_dir == "folder" else data_dir, image_size=8, class_cond=False)
    assert dataset.class_names == [] and dataset.num_classes == 1
    assert set(dataset.labels.tolist()) == {1} and dataset.labels.dtype == np.int64


def test_images_without_a_class_can_be_trained_without_classes(tmp_path):
    random_image(8, 8).save(tmp_path / "a.png")
    assert len(open_dataset(str(tmp_path), image_size=8, class_cond=False)) == 1
    with pytest.raises(ValueError, match="--class_cond False"):
        open_dataset(str(tmp_path), image_size=8)


def test_home_folder_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    random_image(8, 8).save(tmp_path / "a_1.png")
    assert open_dataset("~", image_size=8).load(0).shape == (3, 8, 8)


def test_pixels_are_scaled_to_minus_one_and_one(tmp_path):
    Image.fromarray(np.array([[[0, 255, 51]]], dtype=np.uint8)).save(tmp_path / "a_1.png")
    image = open_dataset(str(tmp_path), image_size=1).load(0)
    assert image.dtype == np.float32 and image.shape == (3, 1, 1)
    assert np.allclose(image.ravel(), [-1, 1, -0.6], atol=1e-6) and image.max() == 1 and image.min() == -1


def test_load_is_the_centre_crop_of_the_file(folder):
    dataset = open_dataset(folder, image_size=8)
    crop = center_crop_arr(Image.open(f"{folder}/9/b.png"), 8)
    assert np.array_equal(dataset.load(6), (crop.transpose(2, 0, 1) / np.float32(127.5) - 1).astype(np.float32))


@pytest.mark.parametrize("random_crop", [False, True])
def test_flip_follows_its_key_whatever_the_crop(folder, random_crop):
    flipped = open_dataset(folder, image_size=8, random_crop=random_crop)
    straight = open_dataset(folder, image_size=8, random_crop=random_crop, random_flip=False)
    decisions = set()
    for epoch in range(12):
        key = (0, "augment", epoch, 3)
        image, plain = flipped.load(3, numpy_generator(*key)), straight.load(3, numpy_generator(*key))
        flip = numpy_generator(*key).random() < 0.5
        assert np.array_equal(image, plain[:, :, ::-1] if flip else plain)
        decisions.add(flip)
    assert decisions == {True, False}


def test_random_crop_changes_the_images(folder):
    dataset = open_dataset(folder, image_size=8, random_crop=True, random_flip=False)
    views = {dataset.load(0, numpy_generator(0, "augment", epoch, 0)).tobytes() for epoch in range(8)}
    assert len(views) > 3


def test_digits_are_split_into_fixed_parts_of_all_classes():
    train, test = (open_dataset(f"builtin:{name}", image_size=8) for name in ("digits", "digits-test"))
    assert len(train) + len(test) == 1797 and (len(train), len(test)) == (1442, 355)
    for part in (train, test):
        assert part.class_names == [str(digit) for digit in range(10)] and part.channels == 1
        counts = np.bincount(part.labels)
        assert len(counts) == 10 and counts.max() - counts.min() <= 0.05 * len(part)
    images = {part.load(index).tobytes() for part in (train, test) for index in range(len(part))}
    assert len(images) == 1797  # all different: no digit is in both parts


def test_digits_keep_their_values_at_their_own_size():
    from sklearn.datasets import load_digits

    raw = load_digits().images[0]  # the first of its digit: in the training part
    image = open_dataset("builtin:digits", image_size=8).load(0)
    assert image.shape == (1, 8, 8) and np.array_equal(np.rint((image[0] + 1) * 127.5), np.rint(raw * 255 / 16))


def test_digits_are_resized_and_never_augmented():
    dataset = open_dataset("builtin:digits", image_size=32)
    views = {dataset.load(5, numpy_generator(0, "augment", epoch, 5)).tobytes() for epoch in range(8)}
    assert views == {dataset.load(5).tobytes()}
    image = dataset.load(5)
    assert image.shape == (1, 32, 32) and image.dtype == np.float32 and image.min() >= -1 and image.max() <= 1


def test_digits_without_scikit_learn_say_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ValueError, match="scikit-learn: pip install scikit-learn"):
        open_dataset("builtin:digits", image_size=8)


def test_unknown_builtin_lists_the_known_ones():
    with pytest.raises(ValueError, match="--data_dir builtin:mnist: .*builtin:digits, builtin:digits-test"):
        open_dataset("builtin:mnist", image_size=8)


def test_impossible_settings_are_refused(folder):
    with pytest.raises(ValueError, match="--data_dir"):
        open_dataset("", image_size=8)
    with pytest.raises(ValueError, match="--image_size 0"):
        open_dataset(folder, image_size=0)
    with pytest.raises(FileNotFoundError, match="--data_dir"):
        open_dataset(f"{folder}/nothing", image_size=8)


@pytest.mark.parametrize(
    "data_dir, settings, message",
    [
        ("builtin:digits", {"random_crop": True}, "--random_crop"),
        ("builtin:digits", {"class_from": "folder"}, "--class_from"),
        ("folder", {"class_from": "folder", "class_cond": False}, "--class_from folder is ignored"),
    ],
)
def test_ignored_settings_warn(folder, data_dir, settings, message):
    with pytest.warns(UserWarning, match=message):
        open_dataset(folder if data_dir == "folder" else data_dir, image_size=8, **settings)


# Stream


def test_batches_are_images_labels_and_identities(folder):
    dataset = open_dataset(folder, image_size=8)
    for images, extra in batches(3, folder, class_cond=True):
        assert images.shape == (4, 3, 8, 8) and images.dtype == torch.float32 and images.is_contiguous()
        assert extra.keys() == {"y", "index", "used", "epoch"}
        assert all(value.shape == (4,) and value.dtype == torch.int64 for value in extra.values())
        assert extra["y"].tolist() == dataset.labels[extra["index"].numpy()].tolist()
        for image, index, epoch in zip(images, extra["index"].tolist(), extra["epoch"].tolist(), strict=True):
            want = dataset.load(index, numpy_generator(0, "augment", epoch, index))
            assert np.array_equal(image.numpy(), want)


def test_default_is_without_classes_and_every_label_null(folder):
    assert batches(1, folder)[0][1]["y"].tolist() == [1, 1, 1, 1]


def test_draws_are_those_of_the_images(folder):
    for _, extra in batches(2, folder, draws=SPEC, seed=3):
        for row, (epoch, index) in enumerate(zip(extra["epoch"].tolist(), extra["index"].tolist(), strict=True)):
            for name, value in training_draws(SPEC, 3, epoch, index).items():
                assert np.array_equal(extra[name][row].numpy(), value) and extra[name].numpy().dtype == value.dtype
    assert extra.keys() == {"y", "index", "used", "epoch", *training_draws(SPEC, 0, 0, 0)}


def test_number_of_workers_changes_nothing(folder):
    settings = {"class_cond": True, "random_crop": True, "draws": SPEC, "position": 5}
    assert_same(batches(5, folder, num_workers=2, **settings), batches(5, folder, **settings))


def test_ranks_side_by_side_are_one_process_with_the_bigger_batch(folder):
    fixed = {"class_cond": True, "random_crop": True, "draws": SPEC, "position": 2}
    assert_same(side_by_side(3, folder, 3, 6, **fixed), batches(3, folder, batch_size=6, **fixed))


def test_resuming_at_a_position_continues(folder):
    whole = batches(5, folder, random_crop=True, draws=SPEC)
    assert_same(batches(3, folder, random_crop=True, draws=SPEC, position=8), whole[2:])


def test_seed_changes_order_and_flips(folder):
    (_, ours), (_, theirs) = (batches(1, folder, batch_size=7, seed=seed)[0] for seed in (0, 1))
    assert ours["index"].tolist() != theirs["index"].tolist()
    same_order = [batches(1, folder, batch_size=7, seed=seed, deterministic=True)[0] for seed in (0, 1)]
    assert same_order[0][1]["index"].tolist() == same_order[1][1]["index"].tolist() == list(range(7))
    assert not torch.equal(same_order[0][0], same_order[1][0])


def test_flip_can_be_switched_off(folder):
    (images, extra), (later, _) = batches(2, folder, batch_size=7, random_flip=False, deterministic=True)
    assert torch.equal(images, later)
    (images, _), (later, _) = batches(2, folder, batch_size=7, deterministic=True)
    assert not torch.equal(images, later)


def test_folder_smaller_than_a_batch_wraps(folder):
    ((images, extra),) = batches(1, folder, batch_size=20)
    assert images.shape[0] == 20 and extra["epoch"].tolist() == [0] * 7 + [1] * 7 + [2] * 6


def test_one_image_and_batch_of_one(tmp_path):
    random_image(9, 5).save(tmp_path / "a_1.png")
    taken = batches(3, str(tmp_path), batch_size=1, image_size=1, class_cond=True)
    assert [(extra["y"].tolist(), extra["epoch"].tolist()) for _, extra in taken] == [
        ([0], [0]),
        ([0], [1]),
        ([0], [2]),
    ]


def test_given_dataset_stands_for_the_folder():
    dataset = open_dataset("builtin:digits-test", image_size=8)
    ((images, extra),) = batches(1, "elsewhere", dataset=dataset)
    assert images.shape == (4, 1, 8, 8) and extra["y"].tolist() == dataset.labels[extra["index"].numpy()].tolist()
    with pytest.raises(ValueError, match="--image_size 16: .* 8"):
        batches(1, "elsewhere", image_size=16, dataset=dataset)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_nothing_is_drawn_from_the_global_generators(folder, num_workers):
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    batches(2, folder, num_workers=num_workers, random_crop=True, draws=SPEC)
    assert torch.equal(torch.get_rng_state(), torch_state) and np.array_equal(np.random.get_state()[1], numpy_state)


def running(pids: list[int]) -> list[int]:
    return [pid for pid in pids if Path(f"/proc/{pid}").exists()]


@pytest.mark.parametrize("ending", ["closed", "collected"])
def test_workers_end_with_the_iterator(folder, ending):
    before = set(multiprocessing.active_children())
    stream = load_data(data_dir=folder, batch_size=2, image_size=8, num_workers=2)
    next(stream)
    workers = [process.pid for process in set(multiprocessing.active_children()) - before]
    assert len(running(workers)) == 2
    if ending == "closed":
        stream.close()
    else:
        del stream
        gc.collect()
    multiprocessing.active_children()  # reaps
    assert running(workers) == []


@pytest.mark.parametrize("num_workers", [0, 1])
def test_when_no_image_at_all_can_be_read_one_is_named(tmp_path, num_workers):
    (tmp_path / "a_1.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    with pytest.raises(ValueError, match="101 images in a row cannot be read.*/a_1.png: cannot be read"):
        batches(1, str(tmp_path), num_workers=num_workers)


@pytest.fixture(scope="module")
def damaged(module_folder) -> str:
    """Eleven images of two classes, four of them truncated."""
    root = module_folder("damaged")
    for number in range(11):
        path = root / f"{'ab'[number % 2]}_{number:02d}.png"
        random_image(20, 16, number).save(path)
        if number in DAMAGED:
            path.write_bytes(path.read_bytes()[:60])
    return str(root)


def test_an_unreadable_image_is_replaced_by_another_with_its_label_and_the_items_draws(damaged):
    dataset = open_dataset(damaged, image_size=8)
    bad = {index for index in range(11) if int(dataset.name_of(index)[-6:-4]) in DAMAGED}
    seen = set()
    cropping = open_dataset(damaged, image_size=8, random_crop=True)
    for images, extra in batches(9, damaged, class_cond=True, random_crop=True, draws=SPEC):
        columns = (extra[name].tolist() for name in ("epoch", "index", "used"))
        for row, (epoch, index, used) in enumerate(zip(*columns, strict=True)):
            assert (used != index) == (index in bad) and used not in bad
            assert extra["y"][row] == dataset.labels[used]
            want = cropping.load(used, numpy_generator(0, "augment", epoch, index))
            assert np.array_equal(images[row].numpy(), want)
            for name, value in training_draws(SPEC, 0, epoch, index).items():
                assert np.array_equal(extra[name][row].numpy(), value)
            seen.add(index)
    assert len(seen) == 11  # every item has had its turn


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**40),
    position=st.integers(0, 200),
    world_size=st.sampled_from([1, 2, 4]),
    per_rank=st.integers(1, 4),
)
def test_replacements_do_not_depend_on_ranks_or_restarts(damaged, seed, position, world_size, per_rank):
    batch_size = per_rank * world_size
    fixed = {"class_cond": True, "random_crop": True, "draws": SPEC, "seed": seed}
    whole = batches(3, damaged, batch_size=batch_size, position=position, **fixed)
    assert_same(side_by_side(3, damaged, world_size, batch_size, position=position, **fixed), whole)
    assert_same(batches(2, damaged, batch_size=batch_size, position=position + batch_size, **fixed), whole[1:])


@pytest.mark.parametrize("num_workers", [1, 3])
def test_replacements_do_not_depend_on_workers(damaged, num_workers):
    fixed = {"class_cond": True, "random_crop": True, "draws": SPEC, "position": 5}
    assert_same(batches(5, damaged, num_workers=num_workers, **fixed), batches(5, damaged, **fixed))


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"batch_size": 0}, "--batch_size 0"),
        ({"num_workers": -1}, "--num_workers -1"),
        ({"rank": 1}, "rank 1 of 1"),
        ({"position": -1}, "position -1"),
        ({"data_dir": "builtin:x"}, "--data_dir builtin:x"),
        ({"class_cond": True, "class_from": "filename"}, "no class to be had for image 10/a.png"),
    ],
)
def test_impossible_settings_are_refused_at_the_call(folder, wrong, message):
    with pytest.raises(ValueError, match=message):
        load_data(**{"data_dir": folder, "batch_size": 1, "image_size": 8, **wrong})


def test_rank_is_never_guessed_from_the_environment(monkeypatch, folder):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    one = batches(1, folder)
    monkeypatch.delenv("RANK")
    assert_same(one, batches(1, folder))

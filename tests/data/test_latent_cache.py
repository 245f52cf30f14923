"""Latents that are encoded once, and trainings that read them in place of the images."""

import dataclasses
import json
import pickle
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support import TIMES, assert_same_weights, call, one_of, rows, script, weights

from masked_diffusion.data import image_files, latent_cache, sources
from masked_diffusion.data.image_files import UnreadableImageError
from masked_diffusion.data.latent_cache import LatentCache, ShardFiles, read_record
from masked_diffusion.data.latent_encoding import encode_shards
from masked_diffusion.data.sources import LatentFolder
from masked_diffusion.first_stage import Autoencoder, load_first_stage
from masked_diffusion.image_datasets import SourceDataset, open_dataset
from masked_diffusion.randomness import numpy_generator

SIDE = 32
ENCODE, TRAIN = "scripts/encode_latents.py", "scripts/image_train.py"
# 24 images in 5 files; batches of 2 that do not divide a file of 5.
SMALL = ["--image_size", SIDE, "--shard_size", 5, "--batch_size", 2, "--num_workers", 0, "--device", "cpu"]


def encode(data_dir, vae, out, *flags):
    arguments = ["--data_dir", data_dir, "--vae_path", vae, "--out", out, *SMALL, *flags]
    return script(ENCODE).main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def cache(colour_folder, tiny_vae, module_folder):
    """Complete latents of 24 images; not to be changed."""
    out = module_folder("latents") / "fp32"
    assert encode(colour_folder, tiny_vae, out) == 0
    return out


@pytest.fixture
def own_cache(cache, tmp_path):
    return shutil.copytree(cache, tmp_path / "cache")


@pytest.fixture
def own_images(colour_folder, tmp_path):
    return shutil.copytree(colour_folder, tmp_path / "images")


@pytest.fixture(scope="module")
def autoencoder(tiny_vae):
    return load_first_stage(str(tiny_vae), "cpu")


@pytest.fixture(scope="module")
def images(colour_folder):
    return SourceDataset(str(colour_folder), image_size=SIDE)


def train(monkeypatch, folder, data_dir, vae, *flags):
    tiny = "--model MDT_Ti_2 --mask_ratio 0.3 --decode_layer 2 --batch_size 4 --max_steps 5 --log_interval 1 "
    tiny += f"--image_size {SIDE} --preview_samples 2 --preview_steps 2 --num_workers 0 --device cpu --vae_path"
    return call(monkeypatch, TRAIN, folder, "--data_dir", data_dir, *tiny.split(), vae, *flags)


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# Equality with the images


@pytest.mark.parametrize("flags", [[], ["--random_flip", "False"], ["--class_cond", "False"], ["--microbatch", "2"]])
def test_training_from_fp32_latents_and_from_the_images_gives_equal_losses(
    cache, colour_folder, tiny_vae, tmp_path, monkeypatch, flags
):
    for name, data_dir in (("images", colour_folder), ("latents", cache)):
        assert train(monkeypatch, tmp_path / name, data_dir, tiny_vae, *flags) == 0
    ours, theirs = rows(tmp_path / "latents"), rows(tmp_path / "images")
    assert len(ours) == 5
    for mine, other in zip(ours, theirs, strict=True):
        for name in mine.keys() - TIMES.keys():
            # Batches of another size may round otherwise in the last bit.
            assert mine[name] == other[name] or mine[name] == pytest.approx(other[name], rel=1e-5), name
    assert_same_weights(weights(tmp_path / "latents", 5), weights(tmp_path / "images", 5), atol=1e-5)
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("latents", "images")]
    assert all(configs[0][key] == configs[1][key] for key in ("model", "first_stage", "class_names"))
    assert (tmp_path / "latents" / "preview_000005.png").is_file()


def test_the_moments_of_an_image_and_of_its_mirror_image_are_kept(cache, images, autoencoder):
    kept = LatentCache(str(cache))
    assert len(kept.labels) == 24 and np.array_equal(kept.labels, images.labels)
    for index in (0, 4, 5, 23):
        image = torch.from_numpy(images.load(index))[None]
        torch.testing.assert_close(kept.moments(index, False), autoencoder.moments(image)[0].numpy(), check_dtype=True)
        mirrored = autoencoder.moments(image.flip(-1))[0].numpy()
        torch.testing.assert_close(kept.moments(index, True), mirrored)
        assert not np.allclose(mirrored, kept.moments(index, False)[..., ::-1], atol=1e-3)
        assert kept.name_of(index) == images.name_of(index)


def test_the_draws_that_mirror_an_image_choose_its_mirrored_latents(cache, images, autoencoder):
    latents = open_dataset(str(cache), image_size=SIDE)
    flips = 0
    for index in range(8):
        image = images.load(index, numpy_generator(0, "augment", 3, index))
        moments = latents.load(index, numpy_generator(0, "augment", 3, index))
        torch.testing.assert_close(moments, autoencoder.moments(torch.from_numpy(image)[None])[0].numpy())
        flips += not np.array_equal(image, images.load(index))
    assert 0 < flips < 8
    assert latents.class_names == images.class_names == ["blue", "green", "red"]


@pytest.mark.parametrize("dtype, bound", [("fp16", 2.0**-11), ("bf16", 2.0**-8)])
def test_storage_in_half_precision_errs_by_half_a_unit_in_the_last_place(
    cache, colour_folder, tiny_vae, tmp_path, capsys, dtype, bound
):
    assert encode(colour_folder, tiny_vae, tmp_path / dtype, "--dtype", dtype) == 0
    exact, stored = LatentCache(str(cache)), LatentCache(str(tmp_path / dtype))
    moments = [
        np.stack([kept.moments(i, flip) for i in range(24) for flip in (False, True)]) for kept in (exact, stored)
    ]
    error = np.abs(moments[1] - moments[0])
    assert moments[1].dtype == np.float32 and error.max() > 0 and np.all(error <= bound * np.abs(moments[0]) + 1e-7)
    largest = float(capsys.readouterr().err.strip().rpartition(" ")[2])
    assert largest == pytest.approx(error.max(), rel=0.05)
    ours, full = ((tmp_path / dtype / "00000.safetensors").stat().st_size, (cache / "00000.safetensors").stat().st_size)
    assert ours < 0.55 * full


def test_loader_workers_read_the_same(cache):
    kept = LatentCache(str(cache))
    before = kept.moments(7, False)
    assert np.array_equal(pickle.loads(pickle.dumps(kept)).moments(7, False), before)


def test_a_cache_in_a_bucket_is_fetched_file_by_file(cache, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    expected = LatentCache(str(cache)).moments(7, True)
    for module in (image_files, latent_cache, sources):  # blobfile reads local paths, too
        monkeypatch.setattr(module, "is_remote", lambda path: True)
    kept = LatentFolder.claims(str(cache)) and LatentFolder(str(cache))
    assert np.array_equal(kept.cache.moments(7, True), expected)
    fetched = {path.name for path in tmp_path.rglob("*.safetensors")}
    assert fetched == {"index.safetensors", "00001.safetensors"}
    kept.check_source()  # asks nothing of a bucket


def test_a_file_that_a_bucket_does_not_have_is_named(cache, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    copy = shutil.copytree(cache, tmp_path / "bucket")
    (copy / "00001.safetensors").unlink()
    for module in (image_files, latent_cache):
        monkeypatch.setattr(module, "is_remote", lambda path: True)
    kept = LatentCache(str(copy))
    assert kept.problems(0) == {}
    [(name, reason)] = kept.problems(1).items()
    assert name == f"{copy}/00001.safetensors" and "encode_latents.py" in reason


# Encoding


def interrupted(monkeypatch, batches):
    """Encoding ends after so many batches, as by a signal."""
    original, done = Autoencoder.moments, []

    def moments(self, images):
        if len(done) == batches:
            raise KeyboardInterrupt
        done.append(1)
        return original(self, images)

    monkeypatch.setattr(Autoencoder, "moments", moments)


def test_the_same_command_goes_on_where_it_was(cache, colour_folder, tiny_vae, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        interrupted(patch, 15)  # of 6 for each file
        with pytest.raises(KeyboardInterrupt):
            encode(colour_folder, tiny_vae, out)
    assert {"00000.safetensors", "00001.safetensors"} == {path.name for path in out.glob("0*")}
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("0*")}
    with pytest.raises(ValueError, match=r"unfinished; run the same scripts/encode_latents.py command again"):
        open_dataset(str(out), image_size=SIDE)
    assert encode(colour_folder, tiny_vae, out) == 0
    assert files_of(out) == files_of(cache)
    assert {name: (out / name).stat().st_mtime_ns for name in before} == before
    assert encode(colour_folder, tiny_vae, out) == 0
    assert "already complete" in capsys.readouterr().err


@pytest.mark.parametrize("state", ["complete", "unfinished"])
def test_latents_of_an_earlier_version_are_of_the_kinds_of_images_that_it_read(
    cache, own_cache, own_images, tiny_vae, state
):
    record = json.loads((own_cache / "latents.json").read_text())
    assert record.pop("extensions") == list(image_files.EXTENSIONS)
    record["data_dir"] = str(own_images)
    (own_cache / "latents.json").write_text(json.dumps(record))
    shutil.copy(own_images / "red" / "0.png", own_images / "red" / "1a.tif")
    LatentFolder(str(own_cache)).check_source()  # the new image is none that it looked for
    if state == "unfinished":
        (own_cache / "latents.json").rename(own_cache / "latents_unfinished.json")
        (own_cache / "00002.safetensors").unlink()
    assert encode(own_images, tiny_vae, own_cache) == 0
    made = {path.name: load_file(path) for path in own_cache.glob("*.safetensors")}
    for name, tensors in made.items():
        assert all(torch.equal(tensors[key], value) for key, value in load_file(cache / name).items())
    kinds = json.loads((own_cache / "latents.json").read_text()).get("extensions")
    assert kinds == (None if state == "complete" else list(image_files.EXTENSIONS_OF_0_1_0))
    LatentFolder(str(own_cache)).check_source()


def test_latents_of_an_earlier_version_that_read_the_later_kinds_are_of_these(own_images, tiny_vae, tmp_path):
    (own_images / "red" / "0.png").rename(own_images / "red" / "0.tif")
    assert encode(own_images, tiny_vae, tmp_path / "cache") == 0
    record = json.loads((tmp_path / "cache" / "latents.json").read_text())
    del record["extensions"]
    (tmp_path / "cache" / "latents.json").write_text(json.dumps(record))
    LatentFolder(str(tmp_path / "cache")).check_source()
    assert list(LatentCache(str(tmp_path / "cache")).extensions) == list(image_files.EXTENSIONS)


def test_a_file_that_is_lost_or_cut_off_is_made_again(cache, own_cache, colour_folder, tiny_vae):
    (own_cache / "00001.safetensors").unlink()
    path = own_cache / "00003.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"00001.safetensors is missing or damaged \(so are 2 of 5 files\)"):
        open_dataset(str(own_cache), image_size=SIDE)
    assert encode(colour_folder, tiny_vae, own_cache) == 0
    assert files_of(own_cache) == files_of(cache)


def test_any_number_of_ranks_makes_the_same_files(cache, images, autoencoder, tmp_path):
    shards = ShardFiles(tmp_path, read_record(str(cache)))
    for rank in (1, 2, 0):
        encode_shards(images, autoencoder, shards, one_of(rank, 3), batch_size=2, num_workers=0)
        assert all(shards.has_part(shard) for shard in range(rank, 5, 3))
        assert rank == 0 or not shards.has_part(0)
    assert files_of(tmp_path) == {name: value for name, value in files_of(cache).items() if name.startswith("0")}


def test_an_image_that_cannot_be_read_is_left_out_and_replaced_as_it_would_be_elsewhere(
    own_images, tiny_vae, tmp_path, monkeypatch, capsys
):
    (own_images / "green" / "1.png").write_bytes(b"no image")
    assert encode(own_images, tiny_vae, tmp_path / "cache") == 0
    assert capsys.readouterr().err.count("left out: ") == 1
    latents = open_dataset(str(tmp_path / "cache"), image_size=SIDE)
    with pytest.raises(UnreadableImageError, match=r"green/1.png: cannot be read as an image"):
        latents.load(9)
    assert all(np.isfinite(latents.load(index)).all() for index in range(24) if index != 9)
    for name, data_dir in (("a", own_images), ("b", tmp_path / "cache")):
        assert train(monkeypatch, tmp_path / name, data_dir, tiny_vae, "--max_steps", 6) == 0  # an epoch
        assert "green/1.png" in (tmp_path / name / "bad_files.txt").read_text()
    losses = [[row["loss"] for row in rows(tmp_path / name)] for name in ("a", "b")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_mirror_images_can_be_left_out(colour_folder, tiny_vae, tmp_path):
    assert encode(colour_folder, tiny_vae, tmp_path, "--random_flip", "False") == 0
    with pytest.raises(
        ValueError, match=r"--random_flip True: .* no latents of mirror images; use --random_flip False"
    ):
        open_dataset(str(tmp_path), image_size=SIDE)
    open_dataset(str(tmp_path), image_size=SIDE, random_flip=False).load(3, numpy_generator(0, "augment", 0, 3))


# What is refused


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (["--dtype", "fp8"], "--dtype fp8: choose one of fp32, fp16, bf16"),
        (["--out", ""], "--out : give a local folder"),
        (["--out", "gs://bucket/latents"], "give a local folder"),
        (["--shard_size", "0"], "--shard_size 0: must be at least 1"),
        (["--batch_size", "0"], "--batch_size 0: must be at least 1"),
        (["--image_size", "36"], "--image_size 36: must be a multiple of 8"),
        (["--vae_path", "none"], "nothing to encode in pixel space"),
        (["--data_dir", "builtin:digits"], "give a folder of images"),
        (["--data_dir", "no/such/folder"], "no/such/folder"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_encoding_refuses(colour_folder, tiny_vae, tmp_path, capsys, flags, sentence):
    assert encode(colour_folder, tiny_vae, tmp_path / "out", *flags) == 2
    assert sentence in capsys.readouterr().err.strip().splitlines()[-1]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "flags, difference",
    [
        (["--image_size", "48"], "image_size 32 instead of 48"),
        (["--dtype", "bf16"], "dtype fp32 instead of bf16"),
        (["--shard_size", "6"], "shard_size 5 instead of 6"),
        (["--random_flip", "False"], "mirrored True instead of False"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_latents_that_differ_are_never_overwritten(cache, colour_folder, tiny_vae, capsys, flags, difference):
    before = files_of(cache)
    assert encode(colour_folder, tiny_vae, cache, *flags) == 2
    assert f"it holds latents with {difference}; give another folder" in capsys.readouterr().err
    assert files_of(cache) == before


def refusal(monkeypatch, capsys, tmp_path, data_dir, vae, *flags):
    assert train(monkeypatch, tmp_path / "out", data_dir, vae, *flags) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert not (tmp_path / "out").exists()
    return line.partition("error: ")[2]


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (["--image_size", "64"], "--image_size 64: {cache} holds latents of 32 pixels"),
        (["--random_crop", "True"], "--random_crop True: {cache} holds latents of centre crops"),
        (["--vae_path", "none"], "--vae_path none: the latents in --data_dir are of another autoencoder"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_training_refuses_what_the_latents_cannot_serve(
    cache, tiny_vae, tmp_path, monkeypatch, capsys, flags, sentence
):
    expected = sentence.format(cache=cache)
    assert refusal(monkeypatch, capsys, tmp_path, cache, tiny_vae, *flags).startswith(expected)


def test_latents_of_another_autoencoder_are_refused_whatever_its_name(cache, tiny_vae, tmp_path, monkeypatch, capsys):
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(tiny_vae)
    with torch.no_grad():
        vae.encoder.conv_in.weight[0, 0, 0, 0] += 1e-3
    vae.save_pretrained(tmp_path / "other")
    sentence = refusal(monkeypatch, capsys, tmp_path, cache, tmp_path / "other")
    assert "are of another autoencoder" in sentence and str(tiny_vae) in sentence
    # The same weights elsewhere are the same autoencoder.
    shutil.copytree(tiny_vae, tmp_path / "copy")
    assert train(monkeypatch, tmp_path / "out", cache, tmp_path / "copy", "--max_steps", "1") == 0


def add(folder):
    shutil.copy(folder / "red" / "0.png", folder / "red" / "new.png")


def remove(folder):
    (folder / "red" / "0.png").unlink()


def grow(folder):
    with (folder / "red" / "0.png").open("ab") as file:
        file.write(b"\0")


@pytest.mark.parametrize("change, words", [(add, "1 new"), (remove, "1 gone"), (grow, "1 of another size")])
def test_latents_of_images_that_have_changed_are_refused(
    own_images, tiny_vae, tmp_path, monkeypatch, capsys, change, words
):
    assert encode(own_images, tiny_vae, tmp_path / "cache") == 0
    change(own_images)
    sentence = refusal(monkeypatch, capsys, tmp_path, tmp_path / "cache", tiny_vae)
    assert f"its images in {own_images} have changed since they were encoded ({words}, such as red/" in sentence
    assert encode(own_images, tiny_vae, tmp_path / "cache") == 2  # nor may they be mixed with new ones


def test_the_images_need_not_be_there(own_images, tiny_vae, tmp_path):
    assert encode(own_images, tiny_vae, tmp_path / "cache") == 0
    kept = LatentFolder(str(tmp_path / "cache"))
    kept.check_source()
    shutil.rmtree(own_images)
    kept.check_source()
    own_images.mkdir()  # a disk that is not mounted
    kept.check_source()


def test_latents_without_classes_train_without_classes(colour_folder, tiny_vae, tmp_path):
    assert encode(colour_folder, tiny_vae, tmp_path, "--class_cond", "False") == 0
    with pytest.raises(ValueError, match="was encoded without classes; use --class_cond False"):
        open_dataset(str(tmp_path), image_size=SIDE)
    latents = open_dataset(str(tmp_path), image_size=SIDE, class_cond=False)
    assert latents.class_names == [] and set(latents.labels) == {1}


def test_class_from_is_said_to_be_ignored(cache):
    with pytest.warns(UserWarning, match="--class_from is ignored"):
        open_dataset(str(cache), image_size=SIDE, class_from="filename")


def test_a_record_of_another_format_is_refused(own_cache):
    record = json.loads((own_cache / "latents.json").read_text())
    (own_cache / "latents.json").write_text(json.dumps(record | {"colour": "blue"}))
    with pytest.raises(ValueError, match=r"latents.json: not a record of latents that this version reads"):
        open_dataset(str(own_cache), image_size=SIDE)


@pytest.mark.parametrize("change", [{"preprocessing": "stretched"}, {"format": 2}])
def test_latents_of_another_preprocessing_or_format_are_refused(
    own_cache, tiny_vae, tmp_path, monkeypatch, capsys, change
):
    record = json.loads((own_cache / "latents.json").read_text())
    (own_cache / "latents.json").write_text(json.dumps(record | change))
    sentence = refusal(monkeypatch, capsys, tmp_path, own_cache, tiny_vae)
    [value] = change.values()
    assert "its latents have preprocessing" in sentence and f" {value}" in sentence
    assert "encode the images again into another folder" in sentence


def test_every_setting_of_a_record_makes_other_latents_but_where_things_lay(cache):
    record = read_record(str(cache))
    for name in record.__dataclass_fields__:
        other = dataclasses.replace(record, **{name: "changed"})
        silent = ("vae_path", "data_dir", "extensions", "channel_mean", "channel_std", "features_path")
        assert (record.difference(other) is None) == (name in silent)


def test_what_a_killed_process_left_half_written_goes(own_cache, colour_folder, tiny_vae):
    (own_cache / "00001.safetensors").unlink()
    (own_cache / ".00001.safetensors.123.tmp").write_bytes(b"half")
    assert encode(colour_folder, tiny_vae, own_cache) == 0
    assert not list(own_cache.glob(".*"))


def test_a_rank_left_behind_by_its_torchrun_ends_after_the_batch_it_is_at(
    colour_folder, tiny_vae, tmp_path, monkeypatch
):
    encoded, moments = [], Autoencoder.moments
    monkeypatch.setattr(Autoencoder, "moments", lambda self, images: encoded.append(images) or moments(self, images))
    monkeypatch.setattr("masked_diffusion.processes.resumable_parts.Launcher.has_ended", lambda self: bool(encoded))
    with pytest.raises(RuntimeError, match="torchrun has ended; start the same command again"):
        encode(colour_folder, tiny_vae, tmp_path)
    assert len(encoded) == 2  # a batch and its mirror images, of the three batches of a file
    assert not list(tmp_path.glob("0*.safetensors"))


# Checking them


def check_data(folder, *flags):
    arguments = ["--data_dir", folder, "--image_size", SIDE, "--num_workers", 0, *flags]
    return script("scripts/check_data.py").main([str(argument) for argument in arguments])


def change_moments(cache, number, change):
    """Write a file of latents again, with other numbers."""
    path = cache / f"{number:05d}.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    return path


@pytest.mark.parametrize("flip", ["True", "False"])
def test_checking_sound_latents_finds_nothing(colour_folder, tiny_vae, tmp_path, capsys, flip):
    assert encode(colour_folder, tiny_vae, tmp_path, "--random_flip", flip, "--dtype", "bf16") == 0
    capsys.readouterr()
    assert check_data(tmp_path) == 0
    printed, progress = capsys.readouterr()
    assert printed == "24 images, 3 classes (blue, green, red)\nall can be read\n" and "5/5" in progress


@pytest.mark.parametrize("num_workers", [0, 2])
def test_checking_latents_names_images_that_are_not_finite_or_were_left_out(
    own_images, tiny_vae, tmp_path, capsys, num_workers
):
    (own_images / "blue" / "1.png").write_bytes(b"no image")
    assert encode(own_images, tiny_vae, tmp_path / "cache") == 0
    path = change_moments(tmp_path / "cache", 4, lambda tensors: tensors["mirrored"][3, 7, 1, 2].fill_(torch.inf))
    out = tmp_path / "bad.txt"
    capsys.readouterr()
    assert check_data(tmp_path / "cache", "--num_workers", num_workers, "--out", out) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "2 of 24 cannot be read:" and "encode all into another folder" in lines[-1]
    left_out, infinite = (line.split("\t") for line in lines[2:4])
    assert left_out[0] == f"{own_images}/blue/1.png" and "when the latents in" in left_out[1]
    assert infinite[0] == f"{own_images}/red/7.png"
    assert infinite[1].startswith(f"mirrored in {path} are not all finite; remove that file and run the same")
    assert out.read_text().splitlines() == lines[2:4]


def test_checking_latents_refuses_files_that_are_missing_or_of_another_shape(own_cache, capsys):
    change_moments(own_cache, 2, lambda tensors: tensors.update(moments=torch.zeros(5, 8, 4, 3)))
    (own_cache / "00003.safetensors").unlink()
    assert check_data(own_cache) == 2
    assert "00002.safetensors is missing or damaged (so are 2 of 5 files)" in capsys.readouterr().err


def test_a_file_of_latents_that_fails_while_it_is_read_is_named(own_cache):
    kept = LatentCache(str(own_cache))
    (own_cache / "00001.safetensors").write_bytes(b"")
    assert list(kept.problems(1)) == [str(own_cache / "00001.safetensors")]
    assert kept.problems(0) == {}


def test_a_list_of_images_that_has_changed_is_refused(own_cache):
    """A wrong label would train in silence."""
    path = own_cache / "index.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="index.safetensors is damaged"):
        LatentCache(str(own_cache))

"""Features of a network of one's own, kept beside the latents: ``encode_latents.py --features``."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support import one_of, script

from masked_diffusion.data.exported_features import ExportedFeatures
from masked_diffusion.data.latent_cache import LatentCache, ShardFiles, read_record
from masked_diffusion.data.latent_encoding import encode_shards
from masked_diffusion.first_stage import load_first_stage
from masked_diffusion.image_datasets import SourceDataset, load_data, open_dataset

SIDE = 32
FILES = ["index.safetensors", *(f"{number:05d}.safetensors" for number in range(5))]


class Patches(torch.nn.Module):
    """Means of 4 x 4 patches and of their squares, without the channels: (n, 2, 16)."""

    def __init__(self, factor=3.0):
        super().__init__()
        self.factor = torch.nn.Parameter(torch.tensor(factor))

    def forward(self, images):
        pooled = torch.nn.functional.adaptive_avg_pool2d(images.mean(dim=1), 4).flatten(1)
        return torch.stack([pooled * self.factor, pooled.square()], dim=1)


class Rows(torch.nn.Module):
    def forward(self, images):
        return images.mean(dim=(0, 2, 3))


def export(path, network, side=SIDE, channels=3):
    batch = torch.export.Dim("batch", min=1, max=4096)
    program = torch.export.export(network, (torch.zeros(2, channels, side, side),), dynamic_shapes=({0: batch},))
    torch.export.save(program, path)
    return path


@pytest.fixture(scope="module")
def network(module_folder):
    return export(module_folder("networks") / "patches.pt2", Patches())


def encode(data_dir, vae, out, *flags):
    arguments = ["--data_dir", data_dir, "--vae_path", vae, "--out", out, "--image_size", SIDE, "--shard_size", 5]
    arguments += ["--batch_size", 2, "--num_workers", 0, "--device", "cpu", *flags]
    return script("scripts/encode_latents.py").main([str(argument) for argument in arguments])


def encode_with(network, data_dir, vae, out, *flags):
    return encode(data_dir, vae, out, "--features", network, "--trust_features", "True", *flags)


@pytest.fixture(scope="module")
def cache(colour_folder, tiny_vae, network, module_folder):
    """Complete latents of 24 images in 5 files, with features; not to be changed."""
    out = module_folder("featured") / "cache"
    assert encode_with(network, colour_folder, tiny_vae, out) == 0
    return out


@pytest.fixture
def own_cache(cache, tmp_path):
    return shutil.copytree(cache, tmp_path / "cache")


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_features_of_an_image_and_of_its_mirror_image_are_kept_in_half_precision(cache, colour_folder):
    kept = LatentCache(str(cache))
    images, patches = SourceDataset(str(colour_folder), image_size=SIDE), Patches()
    for index in (0, 7, 23):
        image = torch.from_numpy(images.load(index))[None]
        for mirrored, view in ((False, image), (True, image.flip(-1))):
            expected = patches(view)[0].detach().half().numpy()
            found = kept.features(index, mirrored)
            assert found.dtype == np.float16 and found.shape == (2, 16)
            np.testing.assert_allclose(found, expected, rtol=2e-3, atol=1e-4)
    assert not np.array_equal(kept.features(7, False), kept.features(7, True))


def test_latents_are_the_same_bytes_with_features_beside_them(cache, colour_folder, tiny_vae, tmp_path):
    assert encode(colour_folder, tiny_vae, tmp_path / "plain") == 0
    for name in FILES:
        plain, featured = load_file(tmp_path / "plain" / name), load_file(cache / name)
        assert all(torch.equal(featured[key], value) for key, value in plain.items())
        extra = set() if name.startswith("index") else {"features", "mirrored_features"}
        assert featured.keys() - plain.keys() == extra
    assert LatentCache(str(tmp_path / "plain")).record.features_sha256 is None
    with pytest.raises(ValueError, match="its latents have no features; encode the images again into another folder"):
        open_dataset(str(tmp_path / "plain"), image_size=SIDE, features=True)
    # To add features to finished latents is to make other ones.
    before = files_of(cache)
    assert encode(colour_folder, tiny_vae, cache) == 2
    assert files_of(cache) == before


@pytest.mark.parametrize("num_workers", [0, 2])
def test_items_of_the_stream_have_features_that_follow_the_flip_where_they_are_asked_for(cache, num_workers):
    def stream(**asked):
        dataset = open_dataset(str(cache), image_size=SIDE, **asked)
        batches = load_data(
            data_dir="", batch_size=8, image_size=SIDE, seed=3, num_workers=num_workers, dataset=dataset
        )
        found = [next(batches) for _ in range(3)]
        batches.close()
        return found

    kept, flips = LatentCache(str(cache)), 0
    for (moments, extra), (plain, plain_extra) in zip(stream(features=True), stream(), strict=True):
        assert torch.equal(moments, plain) and extra.keys() - plain_extra.keys() == {"features"}
        assert extra["features"].dtype == torch.float16 and extra["features"].shape == (8, 2, 16)
        for index, moment, features in zip(extra["index"].tolist(), moments, extra["features"], strict=True):
            mirrored = np.array_equal(moment.numpy(), kept.moments(index, True))
            assert np.array_equal(features.numpy(), kept.features(index, mirrored))
            flips += mirrored
    assert 0 < flips < 24


def test_any_number_of_processes_makes_the_same_files_and_goes_on_where_one_was_lost(
    cache, own_cache, colour_folder, tiny_vae, network, tmp_path
):
    images, autoencoder = SourceDataset(str(colour_folder), image_size=SIDE), load_first_stage(str(tiny_vae), "cpu")
    features = ExportedFeatures(network, torch.device("cpu"), SIDE, {1, 2})
    shards = ShardFiles(tmp_path / "two", read_record(str(cache)))
    shards.parts_folder.mkdir()
    for rank in (1, 0):
        encode_shards(images, autoencoder, shards, one_of(rank, 2), batch_size=2, num_workers=0, features=features)
    assert files_of(shards.parts_folder) == {name: files_of(cache)[name] for name in FILES[1:]}
    (own_cache / FILES[2]).unlink()
    tensors = load_file(own_cache / FILES[4])
    del tensors["mirrored_features"]  # of another version, or damaged
    save_file(tensors, own_cache / FILES[4])
    with pytest.raises(ValueError, match=r"00001.safetensors is missing or damaged \(so are 2 of 5 files\)"):
        open_dataset(str(own_cache), image_size=SIDE)
    assert encode_with(network, colour_folder, tiny_vae, own_cache) == 0
    assert files_of(own_cache) == files_of(cache)


def test_features_of_another_network_are_never_mixed_with_these(
    cache, colour_folder, tiny_vae, network, tmp_path, capsys
):
    before = files_of(cache)
    other = export(tmp_path / "other.pt2", Patches(2.0))
    assert encode_with(other, colour_folder, tiny_vae, cache) == 2
    assert "it holds latents with features_sha256 " in capsys.readouterr().err
    # The same file elsewhere is the same network.
    assert encode_with(shutil.copy(network, tmp_path / "copy.pt2"), colour_folder, tiny_vae, cache) == 0
    assert "already complete" in capsys.readouterr().err
    assert files_of(cache) == before


def test_features_of_another_input_are_refused(own_cache, colour_folder, tiny_vae, network, capsys):
    record = json.loads((own_cache / "latents.json").read_text())
    record["features_input"] = "BGR in [0, 255]"
    (own_cache / "latents.json").write_text(json.dumps(record))
    assert encode_with(network, colour_folder, tiny_vae, own_cache) == 2
    assert "features_input BGR in [0, 255] instead of RGB in [-1, 1], centre crop" in capsys.readouterr().err


def test_features_that_half_precision_does_not_hold_are_refused_and_those_of_unreadable_images_are_not(tmp_path):
    path = export(tmp_path / "large.pt2", Patches(7e4))
    features = ExportedFeatures(path, torch.device("cpu"), SIDE, {2})
    images = torch.full((2, 3, SIDE, SIDE), 0.5)
    assert features(images).isfinite().all()
    images[0] = torch.nan
    assert features(images).isnan().any(dim=2).tolist() == [[True, True], [False, False]]
    with pytest.raises(ValueError, match=r"large.pt2: returns numbers up to 7e\+04, and float16 holds 65504 at most;"):
        features(torch.ones(2, 3, SIDE, SIDE))


def test_features_that_are_not_finite_are_found_by_the_check(own_cache, capsys):
    path = own_cache / FILES[1]
    tensors = load_file(path)
    tensors["features"][2, 1, 3] = torch.inf
    save_file(tensors, path)
    assert list(LatentCache(str(own_cache)).problems(0).values()) == [
        f"features in {path} are not all finite; remove that file and run the same scripts/encode_latents.py command "
        "again"
    ]


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (["--features", "none.pt2", "--trust_features", "True"], "--features none.pt2: no such file"),
        (["--features", "NETWORK"], "can run any code while it is loaded; add --trust_features True if you trust who"),
        (["--features", "net.pt", "--trust_features", "True"], "net.pt: expected a file of torch.export, which ends"),
        (["--trust_features", "True"], "--trust_features True: has no effect without --features"),
        (["--features", "DAMAGED", "--trust_features", "True"], "not a program that torch.export.save wrote ("),
        (["--features", "GREY", "--trust_features", "True"], "grey.pt2: cannot take float32 images (1, 3, 32, 32) ("),
        (["--features", "ROWS", "--trust_features", "True"], "returns torch.float32 (3,) for 1 images; expected one"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_networks_that_cannot_serve_are_refused(colour_folder, tiny_vae, network, tmp_path, capsys, flags, sentence):
    makers = {
        "NETWORK": lambda: network,
        "DAMAGED": lambda: shutil.copy(colour_folder / "red" / "0.png", tmp_path / "damaged.pt2"),
        "GREY": lambda: export(tmp_path / "grey.pt2", Patches(), channels=1),
        "ROWS": lambda: export(tmp_path / "rows.pt2", Rows()),
    }
    flags = [makers[flag]() if flag in makers else flag for flag in flags]
    assert encode(colour_folder, tiny_vae, tmp_path / "out", *flags) == 2
    assert sentence in capsys.readouterr().err.strip().splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_features_of_images_are_refused(colour_folder):
    with pytest.raises(ValueError, match="has no features of its images; give latents that scripts/encode_latents.py"):
        open_dataset(str(colour_folder), image_size=SIDE, features=True)

"""The whole latent path at a tiny size: an autoencoder of one's own, its latents, a training, samples, scores."""

import importlib
import json

import numpy as np
import pytest
import torch
from PIL import Image
from support import REPO, call, script

from masked_diffusion.data.shapes import CLASSES, draw_shape, label_of
from masked_diffusion.programs import read_digits

pytestmark = pytest.mark.e2e

SIDE = "32"
ON_CPU = ["--num_workers", "0", "--device", "cpu"]


@pytest.fixture(scope="module")
def images(module_folder):
    """Forty shapes as a folder of images."""
    root = module_folder("shapes")
    for index in range(40):
        folder = root / list(CLASSES)[label_of(index)]
        folder.mkdir(exist_ok=True)
        draw_shape(0, index).save(folder / f"{index}.png")
    return root


@pytest.fixture(scope="module")
def run(module_folder, images):
    """Everything that the path leaves on disk."""
    root = module_folder("run")
    autoencoder, latents = root / "autoencoder", root / "latents"
    size = ["--image_size", SIDE]
    with pytest.MonkeyPatch.context() as patch:

        def start(path, *flags):
            assert call(patch, path, root, *flags) == 0

        flags = ["--steps", "20", "--batch_size", "4"]
        start("scripts/train_autoencoder.py", "--data_dir", images, "--out", autoencoder, *size, *flags, *ON_CPU)
        flags = ["--vae_path", autoencoder, "--out", latents]
        start("scripts/encode_latents.py", "--data_dir", images, *flags, *size, *ON_CPU)
        flags = "--model MDT_Ti_4 --mask_ratio 0.30 --decode_layer 2 --objective flow --batch_size 4 --grad_clip 1 "
        flags += "--policy mdt_one_view --finale 0.2 "
        flags += "--lr 2e-3 --lr_anneal_steps 4 --ema_rate 0.995 --log_interval 1 --preview_samples 4 --preview_steps 2"
        data = ["--data_dir", latents, "--vae_path", autoencoder]
        start("scripts/image_train.py", *data, *size, *flags.split(), *ON_CPU)
        flags = (
            "--cfg_cond True --guidance constant --cfg_scale 4 --num_sampling_steps 2 --few_steps True --num_samples 20"
        )
        flags += " --labels balanced --device cpu"
        start("scripts/image_sample.py", "--model_path", root / "ema_0.995_000004.pt", *flags.split())
    return root


@pytest.fixture
def few_shapes(monkeypatch):
    """read_digits.py where a data set is sixty shapes."""

    def embedded_images(name):
        seed = int(name.endswith("-test"))
        pixels = np.stack([np.asarray(draw_shape(seed, index)) for index in range(60)])
        return torch.from_numpy(pixels), torch.arange(60) % len(CLASSES)

    monkeypatch.setattr(read_digits, "embedded_images", embedded_images)
    return script("scripts/read_digits.py").main


def test_the_model_is_one_of_the_autoencoders_latents(run):
    config = json.loads((run / "config.json").read_text())
    assert (config["model"]["downsample"], config["model"]["in_channels"], config["model"]["num_classes"]) == (2, 4, 10)
    assert config["first_stage"]["vae_path"] == str(run / "autoencoder")
    assert config["class_names"] == list(CLASSES)
    assert (run / "preview_000004.png").is_file()
    with np.load(run / "samples_20x32x32x3.npz") as file:
        assert file["arr_0"].shape == (20, 32, 32, 3) and file["arr_1"].tolist() == 2 * list(range(10))


def test_samples_are_read_and_scored_with_the_classifiers_features(tf, run, few_shapes, tmp_path, monkeypatch, capsys):
    samples, graph, reference = run / "samples_20x32x32x3.npz", tmp_path / "shapes.pb", tmp_path / "shapes_test.npz"
    flags = ["--embedded", "shapes", "--graph", graph, "--reference", reference]
    assert few_shapes([str(samples), *map(str, flags)]) == 0
    out = capsys.readouterr().out
    assert "of 60 held-back real shapes read right" in out and "of 20 read as the shape asked for (0: " in out
    monkeypatch.syspath_prepend(REPO / "evaluations")  # where its program finds its parts
    assert importlib.import_module("evaluator").main([str(reference), str(samples), "--graph", str(graph)]) == 0
    out = capsys.readouterr().out
    assert all(f"{name}: " in out for name in ("Inception Score", "FID", "sFID", "Precision", "Recall"))


@pytest.mark.parametrize("name", ["digits", "shapes"])
def test_the_exported_graph_computes_what_the_classifier_computes(tf, tmp_path, name):
    data = read_digits.EMBEDDED[name]
    classifier = read_digits.Classifier(data).eval()
    read_digits.export_graph(classifier, tmp_path / "graph.pb")
    pixels = torch.randint(0, 256, (3, data.side, data.side, 3), dtype=torch.uint8)
    graph = tf.compat.v1.GraphDef.FromString((tmp_path / "graph.pb").read_bytes())
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        tf.import_graph_def(graph, name="")
        logits = [
            session.run("softmax/logits/MatMul:0", {"ExpandDims:0": pixels[i : i + 1].numpy().astype(np.float32)})
            for i in range(3)
        ]
    torch.testing.assert_close(torch.from_numpy(np.concatenate(logits)), classifier(pixels), rtol=1e-3, atol=1e-4)


def test_samples_of_another_size_are_refused(run, few_shapes, capsys):
    assert few_shapes([str(run / "samples_20x32x32x3.npz")]) == 2
    assert "expected labelled digits of 8 x 8 pixels, found (20, 32, 32, 3)" in capsys.readouterr().err


def test_a_part_of_a_picture_is_filled_and_the_rest_is_untouched(run, monkeypatch, tmp_path):
    photo = draw_shape(1, 3)
    photo.save(tmp_path / "photo.png")
    mask = np.zeros((32, 32), dtype=np.uint8)
    mask[16:] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    out = tmp_path / "filled.png"
    flags = ["--image", tmp_path / "photo.png", "--mask", tmp_path / "mask.png", "--labels", "cat,cat", "--out", out]
    path = run / "ema_0.995_000004.pt"
    assert call(monkeypatch, "infer_mdt.py", tmp_path, "--model_path", path, *flags, "--num_sampling_steps", "2") == 0
    assert out.is_file()


def test_the_hidden_half_of_a_picture_is_filled_once_for_each_label(run, images, tmp_path, monkeypatch):
    photo = Image.open(images / "car" / "2.png")
    mask = np.zeros((32, 32), np.uint8)
    mask[16:] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    flags = ["--model_path", run / "ema_0.995_000004.pt", "--image", images / "car" / "2.png", "--mask"]
    flags += [
        tmp_path / "mask.png",
        "--labels",
        "car,boat",
        "--guidance",
        "constant",
        "--cfg_scale",
        3,
        "--device",
        "cpu",
    ]
    flags += ["--num_sampling_steps", 2, "--out", tmp_path / "filled.png"]
    assert call(monkeypatch, "infer_mdt.py", tmp_path, *flags) == 0
    drawn = np.asarray(Image.open(tmp_path / "filled.png").convert("RGB"))
    enlarged = photo.convert("RGB").resize((64, 64), Image.Resampling.BICUBIC)  # as small pictures are
    known = np.asarray(enlarged)[:24]  # further down the hidden half shows
    windows = np.lib.stride_tricks.sliding_window_view(drawn, known.shape).squeeze(2)
    assert (windows == known).all(axis=(2, 3, 4)).sum() == 2, (
        "each picture has the photo's own pixels where they are known"
    )

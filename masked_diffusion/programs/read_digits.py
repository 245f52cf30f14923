"""Judge samples of an embedded data set by a small classifier that is trained on the spot."""

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from masked_diffusion.files import atomic_write
from masked_diffusion.image_datasets import open_dataset
from masked_diffusion.randomness import global_generator

BATCH_SIZE = 128
HIDDEN = 64


@dataclass(frozen=True)
class Embedded:
    """A data set that comes with the code, and the classifier that reads it.

    thing: what one image shows. side, grey: of the images. widths: of the classifier's convolutions. halvings: after
    which of them the side is halved. epochs: of its training.
    """

    thing: str
    side: int
    grey: bool
    widths: tuple[int, ...]
    halvings: tuple[bool, ...]
    epochs: int


EMBEDDED = {
    "digits": Embedded("digit", 8, True, widths=(16, 32), halvings=(False, True), epochs=60),
    "shapes": Embedded("shape", 32, False, widths=(16, 32, 64), halvings=(True, True, True), epochs=12),
}


class Classifier(nn.Module):
    """A small convolutional network over (N, S, S, 3) pixels in [0, 255]; of grey images it reads the first channel."""

    def __init__(self, data: Embedded) -> None:
        super().__init__()
        self.channels, self.halvings = 1 if data.grey else 3, data.halvings
        widths = (self.channels, *data.widths)
        self.convolutions = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in pairwise(widths))
        self.side = data.side // 2 ** sum(data.halvings)
        self.hidden = nn.Linear(widths[-1] * self.side**2, HIDDEN)
        self.logits = nn.Linear(HIDDEN, 10, bias=False)

    def features(self, pixels: Tensor) -> Tensor:
        """(N, S, S, 3) -> (N, 64)."""
        x = pixels[..., : self.channels].permute(0, 3, 1, 2).float() / 127.5 - 1
        for convolution, halved in zip(self.convolutions, self.halvings, strict=True):
            x = F.relu(convolution(x))
            x = F.avg_pool2d(x, 2) if halved else x
        x = x.permute(0, 2, 3, 1).flatten(1)  # in H, W, C order, as TensorFlow flattens
        return F.relu(self.hidden(x))

    def forward(self, pixels: Tensor) -> Tensor:
        return self.logits(self.features(pixels))


def embedded_images(name: str) -> tuple[Tensor, Tensor]:
    """Pixels (N, S, S, 3) uint8 and labels (N,) of a part of an embedded data set, such as ``digits-test``."""
    data = EMBEDDED[name.partition("-")[0]]
    dataset = open_dataset(f"builtin:{name}", image_size=data.side)
    images = (torch.from_numpy(dataset.load(i)) for i in range(len(dataset)))
    pixels = torch.stack([((image + 1) * 127.5).round().to(torch.uint8) for image in images])  # exactly the data set's
    return pixels.permute(0, 2, 3, 1).expand(-1, -1, -1, 3).contiguous(), torch.from_numpy(dataset.labels)


def train_classifier(name: str) -> Classifier:
    """A classifier of an embedded data set, trained on all but its held-back part."""
    data, (pixels, labels) = EMBEDDED[name], embedded_images(name)
    with global_generator(f"{data.thing} classifier"):
        classifier = Classifier(data)
        optimizer = torch.optim.AdamW(classifier.parameters(), lr=2e-3)
        for _ in range(data.epochs):
            for batch in torch.randperm(len(pixels)).split(BATCH_SIZE):
                optimizer.zero_grad()
                F.cross_entropy(classifier(pixels[batch]), labels[batch]).backward()
                optimizer.step()
    return classifier.eval()


@torch.no_grad()
def predict(classifier: Classifier, pixels: Tensor) -> Tensor:
    return classifier(pixels).argmax(dim=1)


def read_samples(path: Path, data: Embedded) -> tuple[Tensor, Tensor]:
    """Pixels and labels of a sample file. Raises ValueError when it holds no labelled images of the data set's size."""
    try:
        with np.load(path, allow_pickle=False) as file:
            pixels, labels = file["arr_0"], file["arr_1"]
    except (KeyError, ValueError, OSError) as error:
        raise ValueError(f"{path}: not a file of class-conditional samples ({error})") from None
    if pixels.shape[1:] != (data.side, data.side, 3) or labels.shape != pixels.shape[:1]:
        raise ValueError(
            f"{path}: expected labelled {data.thing}s of {data.side} x {data.side} pixels, found {pixels.shape}"
        )
    return torch.from_numpy(pixels), torch.from_numpy(labels)


@contextlib.contextmanager
def quiet_stderr() -> Iterator[None]:
    """TensorFlow's libraries greet with several lines about the processor, past Python's stderr."""
    sys.stderr.flush()
    saved = os.dup(2)
    with open(os.devnull, "w") as nothing:
        os.dup2(nothing.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)


def export_graph(classifier: Classifier, path: Path) -> None:
    """Write the classifier as a frozen graph that the ADM evaluator can read its features from.

    ``ExpandDims:0`` takes (N, S, S, 3) pixels in [0, 255]; ``mixed_6/conv:0`` are the last convolution's maps,
    ``pool_3:0`` the 64 hidden features, ``softmax/logits/MatMul`` the last layer.
    """
    with quiet_stderr():
        import tensorflow as tf

    def constant(tensor: Any) -> Any:
        return tf.constant(tensor.detach().numpy())

    def convolve(x: Any, layer: Any, name: str) -> Any:
        kernel = constant(layer.weight.permute(2, 3, 1, 0))  # OIHW -> HWIO
        return tf.nn.relu(tf.nn.conv2d(x, kernel, strides=1, padding="SAME") + constant(layer.bias), name=name)

    layers = list(zip(classifier.convolutions, classifier.halvings, strict=True))
    names = ["mixed/conv", *(f"mixed_{number}/conv" for number in range(1, len(layers) - 1)), "mixed_6/conv"]
    graph = tf.Graph()
    with graph.as_default():
        image = tf.compat.v1.placeholder(tf.float32, [None, None, 3], name="DecodeJpeg")
        x = tf.expand_dims(image, 0, name="ExpandDims")[..., : classifier.channels] / 127.5 - 1.0
        for name, (layer, halved) in zip(names, layers, strict=True):
            x = convolve(x, layer, name)
            x = tf.nn.avg_pool2d(x, 2, 2, "VALID") if halved else x
        x = tf.reshape(x, [-1, classifier.hidden.in_features])
        x = tf.nn.relu(tf.matmul(x, constant(classifier.hidden.weight.T)) + constant(classifier.hidden.bias))
        x = tf.reshape(x, [-1, 1, 1, HIDDEN], name="pool_3")
        tf.matmul(tf.reshape(x, [-1, HIDDEN]), constant(classifier.logits.weight.T), name="softmax/logits/MatMul")
    with atomic_write(path) as file:
        file.write(graph.as_graph_def().SerializeToString())


def prepare(args: argparse.Namespace) -> Callable[[], None]:
    """Raises ValueError for what holds no samples of the data set."""
    samples = None if args.samples is None else read_samples(args.samples, EMBEDDED[args.embedded])
    return lambda: judge(args.embedded, samples, args.graph, args.reference)


def judge(name: str, samples: tuple[Tensor, Tensor] | None, graph: Path | None, reference: Path | None) -> None:
    thing, classifier = EMBEDDED[name].thing, train_classifier(name)
    test_pixels, test_labels = embedded_images(f"{name}-test")
    accuracy = (predict(classifier, test_pixels) == test_labels).float().mean()
    sys.stdout.write(f"{thing} classifier: {accuracy:.1%} of {len(test_labels)} held-back real {thing}s read right\n")
    if samples is not None:
        pixels, labels = samples
        right = predict(classifier, pixels) == labels
        by_class = [f"{label}: {right[labels == label].float().mean():.0%}" for label in labels.unique().tolist()]
        share = f"{right.float().mean():.1%} of {len(right)}"
        sys.stdout.write(f"samples: {share} read as the {thing} asked for ({', '.join(by_class)})\n")
    if graph is not None:
        export_graph(classifier, graph)
    if reference is not None:
        with atomic_write(reference) as file:
            np.savez(file, arr_0=test_pixels.numpy(), arr_1=test_labels.numpy())

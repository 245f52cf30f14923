"""Judge sampled digits: train a small classifier on the spot, and count how many samples it reads as asked for.

    python scripts/read_digits.py output_digits/samples_355x8x8x3.npz --graph output_digits/digits.pb \
        --reference output_digits/digits_test.npz

``--graph`` also writes the classifier as a TensorFlow graph with the node names of the ADM evaluator's, and
``--reference`` the held-back digits as a reference batch, so that the evaluator itself scores the samples. Both can be
had without samples, for a training that is to be evaluated.
"""

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from masked_diffusion.files import atomic_write
from masked_diffusion.image_datasets import open_dataset
from masked_diffusion.randomness import global_generator
from masked_diffusion.script_util import run_script

EPOCHS = 60
BATCH_SIZE = 128


class DigitClassifier(nn.Module):
    """A small convolutional network over (N, 8, 8, 3) pixels in [0, 255], of which it reads the first channel."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1)
        self.hidden = nn.Linear(32 * 4 * 4, 64)
        self.logits = nn.Linear(64, 10, bias=False)

    def forward(self, pixels: Tensor) -> Tensor:
        x = pixels[..., :1].permute(0, 3, 1, 2).float() / 127.5 - 1
        x = F.relu(self.conv2(F.relu(self.conv1(x))))
        x = F.avg_pool2d(x, 2).permute(0, 2, 3, 1).flatten(1)  # in H, W, C order, as TensorFlow flattens
        return self.logits(F.relu(self.hidden(x)))


def digits(name: str) -> tuple[Tensor, Tensor]:
    """Pixels (N, 8, 8, 3) uint8 and labels (N,) of a part of the embedded data set."""
    dataset = open_dataset(f"builtin:{name}", image_size=8)
    images = torch.stack([torch.from_numpy(dataset.load(i)) for i in range(len(dataset))])
    pixels = ((images + 1) * 127.5).round().to(torch.uint8)  # (N, 1, 8, 8), exactly the data set's
    return pixels.permute(0, 2, 3, 1).expand(-1, -1, -1, 3).contiguous(), torch.from_numpy(dataset.labels)


def train_classifier(pixels: Tensor, labels: Tensor) -> DigitClassifier:
    with global_generator("digit classifier"):
        classifier = DigitClassifier()
        optimizer = torch.optim.AdamW(classifier.parameters(), lr=2e-3)
        for _ in range(EPOCHS):
            for batch in torch.randperm(len(pixels)).split(BATCH_SIZE):
                optimizer.zero_grad()
                F.cross_entropy(classifier(pixels[batch]), labels[batch]).backward()
                optimizer.step()
    return classifier.eval()


@torch.no_grad()
def predict(classifier: DigitClassifier, pixels: Tensor) -> Tensor:
    return classifier(pixels).argmax(dim=1)


def read_samples(path: Path) -> tuple[Tensor, Tensor]:
    """Pixels and labels of a sample file. Raises ValueError when it holds no labelled 8 x 8 digits."""
    try:
        with np.load(path, allow_pickle=False) as file:
            pixels, labels = file["arr_0"], file["arr_1"]
    except (KeyError, ValueError, OSError) as error:
        raise ValueError(f"{path}: not a file of class-conditional samples ({error})") from None
    if pixels.shape[1:] != (8, 8, 3) or labels.shape != pixels.shape[:1]:
        raise ValueError(f"{path}: expected labelled digits of 8 x 8 pixels, found {pixels.shape}")
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


def export_graph(classifier: DigitClassifier, path: Path) -> None:
    """Write the classifier as a frozen graph that the ADM evaluator can read its features from.

    ``ExpandDims:0`` takes (N, 8, 8, 3) pixels in [0, 255]; ``mixed_6/conv:0`` are the second convolution's maps,
    ``pool_3:0`` the 64 hidden features, ``softmax/logits/MatMul`` the last layer.
    """
    with quiet_stderr():
        import tensorflow as tf

    def constant(tensor: Any) -> Any:
        return tf.constant(tensor.detach().numpy())

    def convolve(x: Any, layer: nn.Conv2d, name: str) -> Any:
        kernel = constant(layer.weight.permute(2, 3, 1, 0))  # OIHW -> HWIO
        return tf.nn.relu(tf.nn.conv2d(x, kernel, strides=1, padding="SAME") + constant(layer.bias), name=name)

    graph = tf.Graph()
    with graph.as_default():
        image = tf.compat.v1.placeholder(tf.float32, [None, None, 3], name="DecodeJpeg")
        x = tf.expand_dims(image, 0, name="ExpandDims")[..., :1] / 127.5 - 1.0
        x = convolve(convolve(x, classifier.conv1, "mixed/conv"), classifier.conv2, "mixed_6/conv")
        x = tf.reshape(tf.nn.avg_pool2d(x, 2, 2, "VALID"), [-1, 32 * 4 * 4])
        x = tf.nn.relu(tf.matmul(x, constant(classifier.hidden.weight.T)) + constant(classifier.hidden.bias))
        x = tf.reshape(x, [-1, 1, 1, 64], name="pool_3")
        tf.matmul(tf.reshape(x, [-1, 64]), constant(classifier.logits.weight.T), name="softmax/logits/MatMul")
    with atomic_write(path) as file:
        file.write(graph.as_graph_def().SerializeToString())


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Count how many sampled digits are read as asked for.")
    parser.add_argument("samples", type=Path, nargs="?", help="samples_Nx8x8x3.npz, class-conditional")
    parser.add_argument("--graph", type=Path, help="write the classifier as a TensorFlow graph for the evaluator")
    parser.add_argument("--reference", type=Path, help="write the held-back digits as a reference batch (.npz)")
    args = parser.parse_args(argv)
    return run_script(lambda stack: prepare(args))


def prepare(args: argparse.Namespace) -> Callable[[], None]:
    if args.samples is None and args.graph is None and args.reference is None:
        raise ValueError("nothing to do: give samples to read, or --graph and --reference to write")
    samples = None if args.samples is None else read_samples(args.samples)
    return lambda: judge(samples, args.graph, args.reference)


def judge(samples: tuple[Tensor, Tensor] | None, graph: Path | None, reference: Path | None) -> None:
    classifier = train_classifier(*digits("digits"))
    test_pixels, test_labels = digits("digits-test")
    accuracy = (predict(classifier, test_pixels) == test_labels).float().mean()
    sys.stdout.write(f"digit classifier: {accuracy:.1%} of {len(test_labels)} held-back real digits read right\n")
    if samples is not None:
        pixels, labels = samples
        right = predict(classifier, pixels) == labels
        by_digit = [f"{digit}: {right[labels == digit].float().mean():.0%}" for digit in labels.unique().tolist()]
        share = f"{right.float().mean():.1%} of {len(right)}"
        sys.stdout.write(f"samples: {share} read as the digit asked for ({', '.join(by_digit)})\n")
    if graph is not None:
        export_graph(classifier, graph)
    if reference is not None:
        with atomic_write(reference) as file:
            np.savez(file, arr_0=test_pixels.numpy(), arr_1=test_labels.numpy())


if __name__ == "__main__":
    sys.exit(main())

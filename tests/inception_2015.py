"""A frozen TensorFlow graph of the 2015 Inception classifier's architecture and node names, with random weights."""

from pathlib import Path

import numpy as np


class _Writer:
    """Adds the layers of the network to the current TensorFlow graph, each with its own random weights."""

    def __init__(self, tf, rng):
        self.tf, self.rng = tf, rng

    def constant(self, name, value):
        return self.tf.constant(np.asarray(value, np.float32), name=name)

    def conv(self, x, scope, shape, stride=1, padding="SAME"):
        """Convolution, batch norm and ReLU whose output is called `scope`. shape: (kernel height, width, channels)."""
        tf, rng, channels = self.tf, self.rng, shape[-1]
        depth = x.shape[-1]
        fan_in = shape[0] * shape[1] * depth
        kernel = rng.standard_normal((*shape[:2], depth, channels), np.float32) * np.sqrt(2 / fan_in)
        x = tf.nn.conv2d(x, self.constant(f"{scope}/conv2d_params", kernel), stride, padding, name=f"{scope}/Conv2D")
        self.constant(f"{scope}/batchnorm/beta", rng.normal(0, 0.3, channels))
        self.constant(f"{scope}/batchnorm/gamma", rng.uniform(0.5, 1.5, channels))
        self.constant(f"{scope}/batchnorm/moving_mean", rng.normal(0, 0.1, channels))
        self.constant(f"{scope}/batchnorm/moving_variance", rng.uniform(0.5, 1.5, channels))
        return tf.nn.relu(tf.identity(x, name=f"{scope}/batchnorm"), name=scope)

    def chain(self, x, scope, *layers):
        for index, layer in enumerate(layers):
            x = self.conv(x, f"{scope}/conv_{index}" if index else f"{scope}/conv", *layer)
        return x

    def join(self, name, *branches):
        return self.tf.concat(branches, axis=3, name=f"{name}/join")

    def average(self, x):
        return self.tf.nn.avg_pool2d(x, 3, 1, "SAME")

    def strided_max(self, x, name):
        return self.tf.nn.max_pool2d(x, 3, 2, "VALID", name=name)

    def block_35(self, x, name, pooled):
        return self.join(
            name,
            self.conv(x, f"{name}/conv", (1, 1, 64)),
            self.chain(x, f"{name}/tower", [(1, 1, 48)], [(5, 5, 64)]),
            self.chain(x, f"{name}/tower_1", [(1, 1, 64)], [(3, 3, 96)], [(3, 3, 96)]),
            self.conv(self.average(x), f"{name}/tower_2/conv", (1, 1, pooled)),
        )

    def block_17(self, x, name, width):
        across, down = (1, 7, width), (7, 1, width)
        return self.join(
            name,
            self.conv(x, f"{name}/conv", (1, 1, 192)),
            self.chain(x, f"{name}/tower", [(1, 1, width)], [across], [(7, 1, 192)]),
            self.chain(x, f"{name}/tower_1", [(1, 1, width)], [down], [across], [down], [(1, 7, 192)]),
            self.conv(self.average(x), f"{name}/tower_2/conv", (1, 1, 192)),
        )

    def block_8(self, x, name, pool):
        def split(x, scope):
            return [self.conv(x, f"{scope}/conv", (1, 3, 384)), self.conv(x, f"{scope}/conv_1", (3, 1, 384))]

        return self.join(
            name,
            self.conv(x, f"{name}/conv", (1, 1, 320)),
            *split(self.chain(x, f"{name}/tower", [(1, 1, 384)]), f"{name}/tower/mixed"),
            *split(self.chain(x, f"{name}/tower_1", [(1, 1, 448)], [(3, 3, 384)]), f"{name}/tower_1/mixed"),
            self.conv(pool(x), f"{name}/tower_2/conv", (1, 1, 192)),
        )

    def network(self, image):
        tf = self.tf
        x = tf.expand_dims(image, 0, name="ExpandDims")
        x = (tf.compat.v1.image.resize_bilinear(x, [299, 299], name="ResizeBilinear") - 128.0) * (1 / 128)
        x = self.conv(x, "conv", (3, 3, 32), 2, "VALID")
        x = self.conv(x, "conv_1", (3, 3, 32), 1, "VALID")
        x = self.strided_max(self.conv(x, "conv_2", (3, 3, 64)), "pool")
        x = self.conv(x, "conv_3", (1, 1, 80), 1, "VALID")
        x = self.strided_max(self.conv(x, "conv_4", (3, 3, 192), 1, "VALID"), "pool_1")
        for name, pooled in (("mixed", 32), ("mixed_1", 64), ("mixed_2", 64)):
            x = self.block_35(x, name, pooled)
        x = self.join(
            "mixed_3",
            self.conv(x, "mixed_3/conv", (3, 3, 384), 2, "VALID"),
            self.chain(x, "mixed_3/tower", [(1, 1, 64)], [(3, 3, 96)], [(3, 3, 96), 2, "VALID"]),
            self.strided_max(x, "mixed_3/pool"),
        )
        for name, width in (("mixed_4", 128), ("mixed_5", 160), ("mixed_6", 160), ("mixed_7", 192)):
            x = self.block_17(x, name, width)
        x = self.join(
            "mixed_8",
            self.chain(x, "mixed_8/tower", [(1, 1, 192)], [(3, 3, 320), 2, "VALID"]),
            self.chain(x, "mixed_8/tower_1", [(1, 1, 192)], [(1, 7, 192)], [(7, 1, 192)], [(3, 3, 192), 2, "VALID"]),
            self.strided_max(x, "mixed_8/pool"),
        )
        x = self.block_8(x, "mixed_9", self.average)
        x = self.block_8(x, "mixed_10", lambda x: tf.nn.max_pool2d(x, 3, 1, "SAME"))
        x = tf.reshape(tf.nn.avg_pool2d(x, 8, 1, "VALID", name="pool_3"), [-1, 2048])
        weights = self.constant("softmax/weights", self.rng.standard_normal((2048, 1008), np.float32) * 0.05)
        self.constant("softmax/biases", self.rng.normal(0, 0.1, 1008))
        return tf.matmul(x, weights, name="softmax/logits/MatMul")


def write_inception_2015(tf, path: Path, scale_after_normalization: bool = True) -> Path:
    """Write the graph. TensorFlow runs its batch norm only in graphs of version 8 and older."""
    tf1 = tf.compat.v1
    with tf1.Graph().as_default() as graph:
        _Writer(tf, np.random.default_rng(0)).network(tf1.placeholder(tf.float32, [None, None, 3], name="DecodeJpeg"))
    definition = graph.as_graph_def()
    for node in definition.node:
        if node.name.endswith("/batchnorm"):
            scope = node.name
            node.op = "BatchNormWithGlobalNormalization"
            parts = ("moving_mean", "moving_variance", "beta", "gamma")
            node.input[:] = [node.input[0], *(f"{scope}/{part}" for part in parts)]
            node.attr["variance_epsilon"].f = 0.001
            node.attr["scale_after_normalization"].b = scale_after_normalization
    definition.versions.producer = 8
    path.write_bytes(definition.SerializeToString())
    return path

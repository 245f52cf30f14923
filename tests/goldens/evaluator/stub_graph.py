"""Write a small frozen TensorFlow graph with the node names the ADM evaluator reads.

usage: stub_graph.py OUT.pb [SEED [SCALE]]

SCALE multiplies the pool features: 20 by default; with 1 they fit float16 distances.
A stand-in for classify_image_graph_def.pb (the real 2015 Inception-v3 graph, about 100 MB, is not
shipped): same node names, same shapes (pool_3:0 [N,1,1,2048], mixed_6/conv:0 [N,17,17,192],
softmax/logits/MatMul weight [2048,1008]), random weights. Good for checking the plumbing and the
metric arithmetic, meaningless as a measure of image quality.
"""

import sys

import numpy as np
import tensorflow as tf

tf1 = tf.compat.v1
out, seed = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 0
scale = float(sys.argv[3]) if len(sys.argv) > 3 else 20.0
rng = np.random.Generator(np.random.PCG64(seed))


def weight(*shape):
    fan_in = int(np.prod(shape[:-1]))
    return tf.constant((rng.standard_normal(shape) * np.sqrt(2.0 / fan_in)).astype(np.float32))


graph = tf1.Graph()
with graph.as_default():
    image = tf1.placeholder(tf.float32, [None, None, 3], name="DecodeJpeg")
    x = tf.expand_dims(image, 0, name="ExpandDims")
    x = tf1.image.resize_bilinear(x, [34, 34]) / 128.0 - 1.0
    x = tf.nn.relu(tf.nn.conv2d(x, weight(5, 5, 3, 32), strides=2, padding="SAME"))
    x = tf.nn.relu(tf.nn.conv2d(x, weight(1, 1, 32, 192), strides=1, padding="SAME"), name="mixed_6/conv")
    x = tf.nn.avg_pool2d(x, 17, 1, "VALID")
    x = tf.nn.conv2d(x, scale * weight(1, 1, 192, 2048), strides=1, padding="VALID") - scale / 20.0
    x = tf.nn.relu(x, name="pool_3")
    w = 0.5 * weight(2048, 1008)
    tf.matmul(tf.reshape(x, [-1, 2048]), w, name="softmax/logits/MatMul")
with open(out, "wb") as f:
    f.write(graph.as_graph_def().SerializeToString())

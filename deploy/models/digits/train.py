#!/usr/bin/env python3
"""Trains the `digits` sample model and writes everything beside this file.

A small convolutional network on scikit-learn's digits: 1,797 hand-written
digits, 8x8 pixels of 0 to 16. The network and its training are plain numpy
(convolution as a matrix product over patches, Adam), so that no deep learning
framework is needed; a run takes about ten seconds on one core.

    python3 -m venv venv
    venv/bin/pip install numpy scikit-learn onnx onnxruntime
    venv/bin/python train.py

Written: model.onnx (takes raw pixels 0 to 16), sample.json (an Open Inference
Protocol request), expected.json (the right answers to it, as ONNX Runtime
computes them). The seed is fixed: the same package versions on the same kind of
processor give the same files.
"""

import json
import pathlib

import numpy as np
import onnx
import onnxruntime
import sklearn
from onnx import TensorProto, helper, numpy_helper
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

SEED = 11
EPOCHS = 60
BATCH = 64
HERE = pathlib.Path(__file__).resolve().parent


def patches(x):
    """All 3x3 neighbourhoods of x [N,C,H,W], zero-padded: [N,H,W,C*9]."""
    n, c, h, w = x.shape
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))
    return windows.transpose(0, 2, 3, 1, 4, 5).reshape(n, h, w, c * 9)


def unpatch(grad, c):
    """Gradient of patches: sums each pixel's share of the neighbourhoods it is in."""
    n, h, w, _ = grad.shape
    grad = grad.reshape(n, h, w, c, 3, 3)
    padded = np.zeros((n, c, h + 2, w + 2), grad.dtype)
    for dy in range(3):
        for dx in range(3):
            padded[:, :, dy : dy + h, dx : dx + w] += grad[..., dy, dx].transpose(0, 3, 1, 2)
    return padded[:, :, 1:-1, 1:-1]


def conv(x, w, b):
    cols = patches(x)
    out = cols @ w.reshape(w.shape[0], -1).T + b
    return out.transpose(0, 3, 1, 2), cols


def conv_grad(grad, cols, w, need_input):
    grad = grad.transpose(0, 2, 3, 1)
    flat = grad.reshape(-1, grad.shape[-1])
    dw = (flat.T @ cols.reshape(-1, cols.shape[-1])).reshape(w.shape)
    dx = unpatch(grad @ w.reshape(w.shape[0], -1), w.shape[1]) if need_input else None
    return dw, flat.sum(0), dx


def pool(x):
    """2x2 maximum with stride 2, and which pixels won."""
    n, c, h, w = x.shape
    blocks = x.reshape(n, c, h // 2, 2, w // 2, 2)
    top = blocks.max((3, 5))
    won = blocks == top[:, :, :, None, :, None]
    return top, won / won.sum((3, 5), keepdims=True)


def pool_grad(grad, won):
    n, c, h, _, w, _ = won.shape
    return (grad[:, :, :, None, :, None] * won).reshape(n, c, h * 2, w * 2)


class Network:
    """conv3x3(16) relu pool, conv3x3(32) relu pool, dense(10) softmax."""

    def __init__(self, rng):
        def he(*shape):
            fan_in = int(np.prod(shape[1:]))
            return rng.normal(0, np.sqrt(2 / fan_in), shape).astype(np.float32)

        self.p = {
            "w1": he(16, 1, 3, 3), "b1": np.zeros(16, np.float32),
            "w2": he(32, 16, 3, 3), "b2": np.zeros(32, np.float32),
            "w3": he(10, 128), "b3": np.zeros(10, np.float32),
        }
        self.mean = {k: np.zeros_like(v) for k, v in self.p.items()}
        self.square = {k: np.zeros_like(v) for k, v in self.p.items()}
        self.step = 0

    def train_batch(self, x, y, rate, decay=1e-3):
        p = self.p
        a1, cols1 = conv(x, p["w1"], p["b1"])
        r1, won1 = pool(np.maximum(a1, 0))
        a2, cols2 = conv(r1, p["w2"], p["b2"])
        r2, won2 = pool(np.maximum(a2, 0))
        flat = r2.reshape(len(x), -1)
        logits = flat @ p["w3"].T + p["b3"]
        exp = np.exp(logits - logits.max(1, keepdims=True))
        probabilities = exp / exp.sum(1, keepdims=True)

        g = probabilities
        g[np.arange(len(y)), y] -= 1
        g /= len(y)
        grads = {"w3": g.T @ flat, "b3": g.sum(0)}
        g = pool_grad((g @ p["w3"]).reshape(r2.shape), won2) * (a2 > 0)
        grads["w2"], grads["b2"], g = conv_grad(g, cols2, p["w2"], True)
        g = pool_grad(g, won1) * (a1 > 0)
        grads["w1"], grads["b1"], _ = conv_grad(g, cols1, p["w1"], False)

        # Adam with decoupled weight decay.
        self.step += 1
        for k, grad in grads.items():
            self.mean[k] += 0.1 * (grad - self.mean[k])
            self.square[k] += 0.001 * (grad**2 - self.square[k])
            mean = self.mean[k] / (1 - 0.9**self.step)
            square = self.square[k] / (1 - 0.999**self.step)
            if k.startswith("w"):
                p[k] -= rate * decay * p[k]
            p[k] -= (rate * mean / (np.sqrt(square) + 1e-8)).astype(np.float32)


def shifted(x, rng):
    """Each picture moved by up to one pixel in each direction: more pictures for free."""
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    out = np.empty_like(x)
    for i, (dy, dx) in enumerate(rng.integers(0, 3, (len(x), 2))):
        out[i] = padded[i, :, dy : dy + 8, dx : dx + 8]
    return out


def train(images, labels):
    rng = np.random.default_rng(SEED)
    network = Network(rng)
    for epoch in range(EPOCHS):
        rate = 3e-3 * 0.5 * (1 + np.cos(np.pi * epoch / EPOCHS))
        order = rng.permutation(len(images))
        for start in range(0, len(order), BATCH):
            batch = order[start : start + BATCH]
            network.train_batch(shifted(images[batch], rng), labels[batch], rate)
    return network.p


def to_onnx(p):
    """Writes the network as standard ONNX operators; 1/16 is folded into the first weights."""
    weights = dict(p, w1=p["w1"] / 16)
    same = {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}
    half = {"kernel_shape": [2, 2], "strides": [2, 2]}
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["image", "w1", "b1"], ["a1"], name="conv1", **same),
            helper.make_node("Relu", ["a1"], ["r1"], name="relu1"),
            helper.make_node("MaxPool", ["r1"], ["p1"], name="pool1", **half),
            helper.make_node("Conv", ["p1", "w2", "b2"], ["a2"], name="conv2", **same),
            helper.make_node("Relu", ["a2"], ["r2"], name="relu2"),
            helper.make_node("MaxPool", ["r2"], ["p2"], name="pool2", **half),
            helper.make_node("Flatten", ["p2"], ["flat"], name="flatten", axis=1),
            helper.make_node("Gemm", ["flat", "w3", "b3"], ["logits"], name="dense", transB=1),
            helper.make_node("Softmax", ["logits"], ["probabilities"], name="softmax", axis=-1),
        ],
        "digits",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["N", 1, 8, 8])],
        [helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["N", 10])],
        [numpy_helper.from_array(np.ascontiguousarray(v, np.float32), k) for k, v in weights.items()],
        doc_string="Hand-written digits: 8x8 grey pixels of 0 to 16 to the probability of each digit",
    )
    model = helper.make_model(
        graph, producer_name="berth-samples", opset_imports=[helper.make_opsetid("", 17)]
    )
    model.ir_version = 8
    helper.set_model_props(model, {"labels": ",".join(str(d) for d in range(10))})
    onnx.checker.check_model(model, full_check=True)
    return model


def main():
    data = load_digits()
    images = (data.images[:, None] / 16).astype(np.float32)
    labels = data.target
    x_fit, x_test, y_fit, y_test = train_test_split(
        images, labels, test_size=0.25, stratify=labels, random_state=SEED
    )
    onnx.save(to_onnx(train(x_fit, y_fit)), HERE / "model.onnx")

    session = onnxruntime.InferenceSession(HERE / "model.onnx", providers=["CPUExecutionProvider"])
    pixels = np.round(x_test * 16).astype(np.float32)
    answers = session.run(None, {"image": pixels})[0]
    accuracy = float((answers.argmax(1) == y_test).mean())
    wrong = int((answers.argmax(1) != y_test).sum())
    print(f"held-out accuracy of model.onnx: {accuracy:.4f} ({len(y_test)} pictures, {wrong} wrong)")

    # One picture of each of five digits, none of them seen in training.
    picked = [int(np.flatnonzero(y_test == digit)[0]) for digit in (0, 3, 5, 8, 9)]
    rows = pixels[picked]
    probabilities = session.run(None, {"image": rows})[0]
    request = {
        "id": "digits-sample",
        "inputs": [
            {
                "name": "image",
                "datatype": "FP32",
                "shape": list(rows.shape),
                "data": [int(v) for v in rows.ravel()],
            }
        ],
    }
    expected = {
        "computed_by": f"onnxruntime {onnxruntime.__version__}",
        "trained_with": f"numpy {np.__version__}; data of scikit-learn {sklearn.__version__}",
        "tolerance": 1e-5,
        "outputs": [
            {
                "name": "probabilities",
                "datatype": "FP32",
                "shape": list(probabilities.shape),
                "data": [float(v) for v in probabilities.ravel()],
            }
        ],
        "labels": [str(i) for i in probabilities.argmax(1)],
        "true_labels": [str(y_test[i]) for i in picked],
        "held_out": {"count": len(y_test), "accuracy": round(accuracy, 4)},
    }
    (HERE / "sample.json").write_text(json.dumps(request) + "\n")
    (HERE / "expected.json").write_text(json.dumps(expected, indent=2) + "\n")
    for name in ["model.onnx", "sample.json", "expected.json"]:
        print(f"{name}: {(HERE / name).stat().st_size} bytes")


if __name__ == "__main__":
    main()

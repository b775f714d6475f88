#!/usr/bin/env python3
"""Trains the `iris` sample model and writes everything beside this file.

A small multi-layer perceptron (4 -> 16 -> 3, ReLU, softmax) on Fisher's iris
flowers: 150 flowers, 4 measurements in centimetres, 3 species. The data set
comes with scikit-learn, so nothing is downloaded.

    python3 -m venv venv
    venv/bin/pip install numpy scikit-learn onnx onnxruntime
    venv/bin/python train.py

Written: model.onnx (the model, scaling of the inputs included), sample.json (an
Open Inference Protocol request), expected.json (the right answers to it, as
ONNX Runtime computes them). The seed is fixed: the same package versions give
the same files.
"""

import json
import pathlib

import numpy as np
import onnx
import onnxruntime
import sklearn
from onnx import TensorProto, helper, numpy_helper
from sklearn.datasets import load_iris
from sklearn.metrics import confusion_matrix
from sklearn.model_selection import StratifiedKFold, train_test_split
from sklearn.neural_network import MLPClassifier
from sklearn.preprocessing import StandardScaler

SEED = 7
HERE = pathlib.Path(__file__).resolve().parent


def train(features, labels):
    """Fits the scaler and the network; both are deterministic in SEED."""
    scaler = StandardScaler().fit(features)
    network = MLPClassifier(
        hidden_layer_sizes=(16,),
        activation="relu",
        solver="lbfgs",
        alpha=0.1,
        max_iter=2000,
        random_state=SEED,
    )
    network.fit(scaler.transform(features), labels)
    return scaler, network


def to_onnx(scaler, network):
    """Writes the network by hand as standard ONNX operators.

    The scaling is folded into the first layer, so that callers send plain
    centimetres: relu((x - mean) / std @ W + b) = relu(x @ (W / std) + b - mean / std @ W).
    """
    w1, w2 = (w.astype(np.float64) for w in network.coefs_)
    b1, b2 = (b.astype(np.float64) for b in network.intercepts_)
    weights = {
        "w1": w1 / scaler.scale_[:, None],
        "b1": b1 - (scaler.mean_ / scaler.scale_) @ w1,
        "w2": w2,
        "b2": b2,
    }
    graph = helper.make_graph(
        [
            helper.make_node("Gemm", ["features", "w1", "b1"], ["hidden"], name="hidden"),
            helper.make_node("Relu", ["hidden"], ["active"], name="relu"),
            helper.make_node("Gemm", ["active", "w2", "b2"], ["logits"], name="logits"),
            helper.make_node("Softmax", ["logits"], ["probabilities"], name="softmax", axis=-1),
        ],
        "iris",
        [helper.make_tensor_value_info("features", TensorProto.FLOAT, ["N", 4])],
        [helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["N", 3])],
        [numpy_helper.from_array(v.astype(np.float32), k) for k, v in weights.items()],
        doc_string="Iris species from sepal length, sepal width, petal length, petal width (cm)",
    )
    model = helper.make_model(
        graph, producer_name="berth-samples", opset_imports=[helper.make_opsetid("", 17)]
    )
    model.ir_version = 8
    helper.set_model_props(model, {"labels": "setosa,versicolor,virginica"})
    onnx.checker.check_model(model, full_check=True)
    return model


def main():
    data = load_iris()
    features, labels = data.data.astype(np.float32), data.target
    names = [str(n) for n in data.target_names]

    # How good is the recipe: every flower is predicted once by a model that never saw it.
    right = 0
    for fit, held_out in StratifiedKFold(5, shuffle=True, random_state=SEED).split(features, labels):
        scaler, network = train(features[fit], labels[fit])
        right += int((network.predict(scaler.transform(features[held_out])) == labels[held_out]).sum())
    print(f"5-fold cross-validation: {right} of {len(labels)} = {right / len(labels):.3f}")

    # The model that is shipped: trained on 70 %, measured on the other 30 %.
    x_fit, x_test, y_fit, y_test = train_test_split(
        features, labels, test_size=0.3, stratify=labels, random_state=SEED
    )
    scaler, network = train(x_fit, y_fit)
    onnx.save(to_onnx(scaler, network), HERE / "model.onnx")

    session = onnxruntime.InferenceSession(HERE / "model.onnx", providers=["CPUExecutionProvider"])
    answers = session.run(None, {"features": x_test})[0]
    accuracy = float((answers.argmax(1) == y_test).mean())
    print(f"held-out accuracy of model.onnx: {accuracy:.4f} ({len(y_test)} flowers)")
    print("confusion (rows: true, columns: predicted):")
    print(confusion_matrix(y_test, answers.argmax(1)))

    # Two flowers of each species that the model has not seen.
    picked = [i for species in range(3) for i in np.flatnonzero(y_test == species)[:2]]
    rows = x_test[picked]
    probabilities = session.run(None, {"features": rows})[0]
    request = {
        "id": "iris-sample",
        "inputs": [
            {
                "name": "features",
                "datatype": "FP32",
                "shape": list(rows.shape),
                # Tenths of a centimetre in the data set: shorter than the float32 nearest to them.
                "data": [[round(float(v), 1) for v in row] for row in rows],
            }
        ],
    }
    expected = {
        "computed_by": f"onnxruntime {onnxruntime.__version__}",
        "trained_with": f"scikit-learn {sklearn.__version__}, numpy {np.__version__}",
        "tolerance": 1e-5,
        "outputs": [
            {
                "name": "probabilities",
                "datatype": "FP32",
                "shape": list(probabilities.shape),
                "data": [float(v) for v in probabilities.ravel()],
            }
        ],
        "labels": [names[i] for i in probabilities.argmax(1)],
        "true_labels": [names[y_test[i]] for i in picked],
        "held_out": {"count": len(y_test), "accuracy": round(accuracy, 4)},
    }
    (HERE / "sample.json").write_text(json.dumps(request, indent=2) + "\n")
    (HERE / "expected.json").write_text(json.dumps(expected, indent=2) + "\n")
    for name in ["model.onnx", "sample.json", "expected.json"]:
        print(f"{name}: {(HERE / name).stat().st_size} bytes")


if __name__ == "__main__":
    main()

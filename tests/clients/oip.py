"""An Open Inference Protocol client that nobody of Berth wrote: NVIDIA's tritonclient.

Usage: oip.py ask  GATEWAY ROOTS TOKEN MODELS_FOLDER NAME...
       oip.py load GATEWAY ROOTS TOKEN MODELS_FOLDER NAME http|grpc

`ask` talks to the deployments NAME over HTTP and over gRPC, each of which serves the sample model of
the same name (behind a namespace's `<namespace>.`), and compares every answer with the known right
one. Prints one line per step that held; any other outcome ends it with an exception.

`load` asks for the sample's prediction again and again, one request at a time, until its standard
input ends, and checks each answer. Prints a line after the first, and at the end how many were asked,
how many not answered rightly, and what became of the first of those, as one JSON object.
"""

import json
import pathlib
import sys
import threading

import numpy as np
import tritonclient.grpc as over_grpc
import tritonclient.http as over_http
from tritonclient.utils import InferenceServerException

DEADLINE = 60  # seconds for one call

WHAT, GATEWAY, ROOTS, TOKEN, MODELS = sys.argv[1:6]


class Sample:
    """A sample model: what to ask and what is right."""

    def __init__(self, name: str):
        self.name = name
        folder = pathlib.Path(MODELS) / name.split(".")[-1]
        request = json.loads((folder / "sample.json").read_text())["inputs"][0]
        answer = json.loads((folder / "expected.json").read_text())
        right = answer["outputs"][0]
        self.input, self.output = request["name"], right["name"]
        self.array = np.array(request["data"], dtype=np.float32).reshape(request["shape"])
        self.right = np.array(right["data"], dtype=np.float32).reshape(right["shape"])
        self.tolerance = answer["tolerance"]

    def check(self, got: np.ndarray) -> None:
        assert got.shape == self.right.shape and got.dtype == np.float32, (got.shape, got.dtype)
        np.testing.assert_allclose(got, self.right, rtol=0, atol=self.tolerance)


class Http:
    name = "http"

    def __init__(self, token: str | None = TOKEN):
        self.client = over_http.InferenceServerClient(
            GATEWAY,
            ssl=True,
            ssl_options={"ca_certs": ROOTS},
            connection_timeout=DEADLINE,
            network_timeout=DEADLINE,
        )
        self.token = token

    @property
    def more(self) -> dict:
        # New at each call: this client adds headers of its own to what it is given.
        return {"headers": {"Authorization": f"Bearer {self.token}"} if self.token else {}}

    def metadata(self, name: str, version: str) -> tuple[dict, dict]:
        server = self.client.get_server_metadata(**self.more)
        return server, self.client.get_model_metadata(name, version, **self.more)

    # How tensors travel: as bytes behind the JSON, or as JSON.
    forms = (True, False)

    def infer(self, sample: Sample, binary: bool, **more) -> np.ndarray:
        given = over_http.InferInput(sample.input, list(sample.array.shape), "FP32")
        given.set_data_from_numpy(sample.array, binary_data=binary)
        wanted = [over_http.InferRequestedOutput(sample.output, binary_data=binary)]
        answer = self.client.infer(
            sample.name, [given], outputs=wanted, request_id="7", **more, **self.more
        )
        assert answer.get_response()["id"] == "7", answer.get_response()
        return answer.as_numpy(sample.output)


class Grpc:
    name = "grpc"

    def __init__(self, token: str | None = TOKEN):
        self.client = over_grpc.InferenceServerClient(GATEWAY, ssl=True, root_certificates=ROOTS)
        self.more = {
            "headers": {"authorization": f"Bearer {token}"} if token else {},
            "client_timeout": DEADLINE,
        }

    def metadata(self, name: str, version: str) -> tuple[dict, dict]:
        server = self.client.get_server_metadata(as_json=True, **self.more)
        return server, self.client.get_model_metadata(name, version, as_json=True, **self.more)

    # This client sends raw contents only.
    forms = (True,)

    def infer(self, sample: Sample, _binary: bool, **more) -> np.ndarray:
        given = over_grpc.InferInput(sample.input, list(sample.array.shape), "FP32")
        given.set_data_from_numpy(sample.array)
        wanted = [over_grpc.InferRequestedOutput(sample.output)]
        answer = self.client.infer(
            sample.name, [given], outputs=wanted, request_id="7", **more, **self.more
        )
        assert answer.get_response().id == "7", answer.get_response()
        return answer.as_numpy(sample.output)


def refused(call, words: str, statuses: tuple) -> None:
    try:
        call()
    except InferenceServerException as error:
        assert words in str(error.message()), error
        assert error.status() in statuses, (error.status(), statuses)
    else:
        raise AssertionError(f"nothing was refused with {words!r}")


def ask(names: list[str]) -> None:
    for over in (Http(), Grpc()):
        client, more = over.client, over.more
        assert client.is_server_live(**more) and client.is_server_ready(**more)
        for sample in map(Sample, names):
            assert client.is_model_ready(sample.name, **more)
            assert client.is_model_ready(sample.name, "1", **more)
            server, model = over.metadata(sample.name, "")
            assert server["name"] == "berth", server
            assert model["versions"] == ["1"], model
            tensor = model["inputs"][0]
            assert (tensor["name"], tensor["datatype"]) == (sample.input, "FP32"), model
            assert [int(n) for n in tensor["shape"]][1:] == list(sample.array.shape[1:]), model
            for form in over.forms:
                sample.check(over.infer(sample, form))
                sample.check(over.infer(sample, form, model_version="1"))
            print(f"{over.name}: {sample.name} answers rightly", flush=True)
        sample = Sample(names[0])
        not_found, invalid = ("404", "StatusCode.NOT_FOUND"), ("400", "StatusCode.INVALID_ARGUMENT")
        refused(
            lambda: over.infer(sample, True, model_version="9"), 'in version "9"', not_found
        )
        wrong = Sample(names[0])
        wrong.array = wrong.array[:, :1]
        refused(lambda: over.infer(wrong, True), "instead of", invalid)
        wrong.input = "nothing"
        refused(lambda: over.infer(wrong, True), "`nothing`", invalid)
        wrong.name = "nothing"
        refused(lambda: over.infer(wrong, True), 'serves a model "nothing"', not_found)
        anonymous = type(over)(None)
        unknown = ("401", "StatusCode.UNAUTHENTICATED")
        refused(lambda: anonymous.infer(sample, True), "token", unknown)
        print(f"{over.name}: what is wrong is refused in the protocol's form", flush=True)


def load(name: str, protocol: str) -> None:
    over, sample = (Http if protocol == "http" else Grpc)(), Sample(name)
    ended = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), ended.set()), daemon=True).start()
    asked, failed = 0, []
    while not ended.is_set():
        asked += 1
        try:
            sample.check(over.infer(sample, True))
        except Exception as error:  # whatever it is, it counts
            failed.append(f"{type(error).__name__}: {error}")
        if asked == 1:
            print("asking", flush=True)
    print(json.dumps({"asked": asked, "failed": len(failed), "first": failed[:5]}), flush=True)


if WHAT == "ask":
    ask(sys.argv[6:])
else:
    load(*sys.argv[6:8])

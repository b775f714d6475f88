"""A gRPC client that nobody of Berth wrote: grpcio, with code made from the protos.

Usage: deployments.py ADMIN_TOML PROTO_FOLDER WORK_FOLDER

Creates, lists, watches and deletes a deployment, and looks at what an error carries. The image is
pushed by plain HTTP, so that no engine is needed. Prints one line per step that held; any other
outcome ends it with an exception.
"""

import hashlib
import json
import pathlib
import ssl
import subprocess
import sys
import tomllib
import urllib.request
import uuid

import grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)
from grpc_status import rpc_status
from google.protobuf.descriptor_pool import DescriptorPool
from google.rpc import error_details_pb2

DEADLINE = 30  # seconds for one call


def generate(protos: pathlib.Path, out: pathlib.Path) -> None:
    files = [str(p.relative_to(protos)) for p in sorted((protos / "berth" / "v1").glob("*.proto"))]
    command = [sys.executable, "-m", "grpc_tools.protoc", "-I", str(protos)]
    command += [f"--python_out={out}", f"--grpc_python_out={out}", *files]
    subprocess.run(command, check=True)
    sys.path.insert(0, str(out))


def push_image(registry: str, context: ssl.SSLContext, repository: str) -> str:
    """Pushes an image of one empty layer; answers with its reference."""

    def put(method: str, url: str, body: bytes, kind: str) -> None:
        request = urllib.request.Request(url, data=body, method=method)
        request.add_header("Content-Type", kind)
        with urllib.request.urlopen(request, context=context, timeout=DEADLINE) as answer:
            assert answer.status == 201, (url, answer.status)

    def blob(body: bytes) -> dict:
        digest = "sha256:" + hashlib.sha256(body).hexdigest()
        url = f"https://{registry}/v2/{repository}/blobs/uploads/?digest={digest}"
        put("POST", url, body, "application/octet-stream")
        return {"digest": digest, "size": len(body)}

    layer = bytes(1024)  # the end of an empty tar archive
    config = {
        "architecture": "amd64",
        "os": "linux",
        "config": {},
        "rootfs": {"type": "layers", "diff_ids": ["sha256:" + hashlib.sha256(layer).hexdigest()]},
    }
    oci = "application/vnd.oci.image"
    manifest = {
        "schemaVersion": 2,
        "mediaType": f"{oci}.manifest.v1+json",
        "config": {"mediaType": f"{oci}.config.v1+json", **blob(json.dumps(config).encode())},
        "layers": [{"mediaType": f"{oci}.layer.v1.tar", **blob(layer)}],
    }
    url = f"https://{registry}/v2/{repository}/manifests/1"
    put("PUT", url, json.dumps(manifest).encode(), manifest["mediaType"])
    return f"{registry}/{repository}:1"


def details(error: grpc.RpcError) -> dict:
    """What the error carries, by the names of its messages."""
    found = {}
    for any_message in rpc_status.from_call(error).details:
        name = any_message.type_url.rsplit(".", 1)[-1]
        message = getattr(error_details_pb2, name)()
        any_message.Unpack(message)
        found[name] = message
    return found


def main() -> None:
    admin, protos, work = (pathlib.Path(argument) for argument in sys.argv[1:4])
    context = tomllib.loads(admin.read_text())["contexts"]["default"]
    generate(protos, work)
    from berth.v1 import common_pb2, deployment_pb2, deployment_service_pb2 as messages
    from berth.v1 import deployment_service_pb2_grpc as services

    credentials = grpc.ssl_channel_credentials(
        context["roots"].encode(), context["key"].encode(), context["certificate"].encode()
    )
    channel = grpc.secure_channel(context["endpoints"][0], credentials)
    deployments = services.DeploymentServiceStub(channel)

    files = {}
    for name in ("roots", "key", "certificate"):
        files[name] = work / f"{name}.pem"
        files[name].write_text(context[name])
    tls = ssl.create_default_context(cafile=str(files["roots"]))
    tls.load_cert_chain(files["certificate"], files["key"])
    image = push_image(context["registry"], tls, "clients/empty")
    print("pushed an image")

    def wanted(name: str, **spec) -> messages.DeploymentInput:
        return messages.DeploymentInput(
            meta=common_pb2.ObjectMeta(name=name, labels={"team": "vision"}),
            spec=deployment_pb2.DeploymentSpec(image=image, replicas=1, **spec),
        )

    request = messages.ApplyRequest(
        write=common_pb2.WriteOptions(request_id=str(uuid.uuid4())),
        deployments=[wanted(f"client-{n}") for n in range(3)],
    )
    first = deployments.Apply(request, timeout=DEADLINE)
    again = deployments.Apply(request, timeout=DEADLINE)
    assert [r.action for r in first.results] == [messages.APPLY_ACTION_CREATED] * 3, first
    meta = [r.deployment.meta for r in first.results]
    assert [r.deployment.meta for r in again.results] == meta, "the repetition answers the same"
    assert all(m.revision for m in meta)
    print("created three deployments, and repeated the request")

    seen, token = [], ""
    while True:
        page = common_pb2.Page(page_size=2, page_token=token, filter="labels.team = vision")
        answer = deployments.ListDeployments(
            messages.ListDeploymentsRequest(page=page), timeout=DEADLINE
        )
        seen += [d.meta.name for d in answer.deployments]
        token = answer.next_page_token
        if not token:
            break
    assert seen == ["client-0", "client-1", "client-2"], seen
    print("listed them by pages and filter")

    try:
        page = common_pb2.Page(filter="nam = x")
        deployments.ListDeployments(messages.ListDeploymentsRequest(page=page), timeout=DEADLINE)
        raise AssertionError("a bad filter was taken")
    except grpc.RpcError as error:
        assert error.code() == grpc.StatusCode.INVALID_ARGUMENT, error
        found = details(error)
        assert found["ErrorInfo"].domain == "berth" and found["ErrorInfo"].reason == "INVALID"
        assert found["BadRequest"].field_violations[0].field == "page.filter"
    try:
        expected = common_pb2.WriteOptions(expected_revision=1)
        scale = messages.ScaleRequest(write=expected, name="client-0", replicas=2)
        deployments.Scale(scale, timeout=DEADLINE)
        raise AssertionError("an old revision was taken")
    except grpc.RpcError as error:
        assert error.code() == grpc.StatusCode.ABORTED, error
        assert details(error)["ErrorInfo"].reason == "REVISION_MISMATCH"
    print("read what errors carry")

    watch = deployments.WatchDeployment(
        messages.WatchDeploymentRequest(name="client-0"), timeout=DEADLINE
    )
    assert next(watch).deployment.meta.name == "client-0"
    deployments.Delete(messages.DeleteRequest(name="client-0"), timeout=DEADLINE)
    last = None
    for last in watch:
        pass
    assert last is not None and last.deleted, "the watch ends with the deployment"
    print("watched one until it was deleted")

    for n in (0, 1, 2):
        gone = messages.DeleteRequest(name=f"client-{n}", allow_missing=True)
        deployments.Delete(gone, timeout=DEADLINE)
    print("deleted the rest")

    pool = DescriptorPool(ProtoReflectionDescriptorDatabase(channel))
    service = pool.FindServiceByName("berth.v1.DeploymentService")
    assert "Apply" in service.methods_by_name
    print("found the service by reflection v1alpha")


main()

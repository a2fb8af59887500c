"""What deploy/ holds: valid for every Kubernetes with native sidecars, and what its containers are told does work."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from kubernetes_validate.utils import all_versions

from streamload.cli import _parser, main
from tests.stage.models import STAGED, names, source_of

_DEPLOY = Path(__file__).parent.parent.parent / "deploy"
_BASES = ("init", "sidecar", "daemonset")
# Native sidecars are on by default from this version on.
_SINCE = (1, 29)
_VERSIONS = [version for version in all_versions() if tuple(map(int, version.split(".")[:2])) >= _SINCE]

_LOCKED_DOWN = {
    "runAsUser": 1000,
    "runAsGroup": 1000,
    "runAsNonRoot": True,
    "readOnlyRootFilesystem": True,
    "allowPrivilegeEscalation": False,
    "capabilities": {"drop": ["ALL"]},
}
_PROBES = {"startupProbe", "livenessProbe", "readinessProbe"}


def _read(path: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(path.read_text(encoding="utf-8")))


def _rendered(folder: Path) -> Iterator[dict[str, Any]]:
    """What kustomize makes of a folder that names nothing but resources; no package index has kustomize itself."""
    (kustomization,) = _read(folder / "kustomization.yaml")
    assert set(kustomization) == {"apiVersion", "kind", "resources"}
    assert kustomization["apiVersion"] == "kustomize.config.k8s.io/v1beta1"
    for name in kustomization["resources"]:
        path = folder / name
        yield from _rendered(path) if path.is_dir() else _read(path)


def _objects(base: str) -> list[dict[str, Any]]:
    return list(_rendered(_DEPLOY / base))


def _pods(base: str) -> list[dict[str, Any]]:
    return [each["spec"]["template"]["spec"] for each in _objects(base) if each["kind"] in ("DaemonSet", "Deployment")]


def _containers(pod: dict[str, Any]) -> list[dict[str, Any]]:
    return [*pod["initContainers"], *pod["containers"]]


def _storage_container() -> dict[str, Any]:
    (found,) = _objects("kserve")
    assert found["kind"] == "ClusterStorageContainer"
    container: dict[str, Any] = found["spec"]["container"]
    return container


@pytest.mark.parametrize("version", _VERSIONS)
@pytest.mark.parametrize("base", _BASES)
def test_valid(base: str, version: str) -> None:
    for each in _objects(base):
        kubernetes_validate.validate(each, version, strict=True)


def test_kserves_container_is_valid() -> None:
    """The rest of it is KServe's own kind, of which Kubernetes knows nothing."""
    spec = {"containers": [_storage_container()]}
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, "spec": spec}
    kubernetes_validate.validate(pod, _VERSIONS[-1], strict=True)


@pytest.mark.parametrize("base", ["sidecar", "kserve"])
def test_the_documented_overlay_reaches_every_image(base: str) -> None:
    """What the documentation's kustomizations change, worked out as kustomize does; there is none to run."""
    text = (_DEPLOY.parent / "docs" / "kubernetes.md").read_text(encoding="utf-8")
    overlays = [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)]
    (overlay,) = (each for each in overlays if f"//deploy/{base}?" in each["resources"][0])
    objects = {(each["apiVersion"], each["kind"], each["metadata"]["name"]): each for each in _objects(base)}
    for text in (patch["patch"] for patch in overlay["patches"]):
        patch = yaml.safe_load(text)
        _merge(objects[patch["apiVersion"], patch["kind"], patch["metadata"]["name"]], patch)
    if base == "kserve":
        assert "namespace" not in overlay  # it has none
        (container,) = (each["spec"]["container"] for each in objects.values())
        # An image in a container that is no pod's is none that `images` would find.
        assert container["image"].startswith("registry.example.com/streamload:")
        assert container["name"] == "storage-initializer"
    else:
        named = {each["name"] for each in overlay["images"]}
        ours = {each["image"].partition(":")[0] for pod in _pods(base) for each in _containers(pod)}
        assert named == ours


def _merge(object: dict[str, Any], patch: dict[str, Any]) -> None:
    """A merge of mappings; of lists it would be another matter."""
    for key, value in patch.items():
        assert not isinstance(value, list)
        if isinstance(value, dict):
            _merge(object[key], value)
        else:
            assert key in object
            object[key] = value


def test_the_validation_bites() -> None:
    (deployment,) = _read(_DEPLOY / "sidecar" / "deployment.yaml")
    sidecar = deployment["spec"]["template"]["spec"]["initContainers"][0]
    for broken in ({"restartpolicy": "Always"}, {"startupProbe": {"httpGet": {"path": "/startupz"}}}):
        before = dict(sidecar)
        sidecar.update(broken)
        with pytest.raises(kubernetes_validate.ValidationError):
            kubernetes_validate.validate(deployment, _VERSIONS[0], strict=True)
        sidecar.clear()
        sidecar.update(before)


def test_nothing_lies_about() -> None:
    named = {path for base in (*_BASES, "kserve") for path in _named(_DEPLOY / base)}
    assert named == set(_DEPLOY.rglob("*.yaml"))


def _named(folder: Path) -> Iterator[Path]:
    (kustomization,) = _read(folder / "kustomization.yaml")
    yield folder / "kustomization.yaml"
    for name in kustomization["resources"]:
        path = (folder / name).resolve()
        yield from _named(path) if path.is_dir() else [path]


@pytest.mark.parametrize("base", _BASES)
def test_what_is_referred_to_is_there(base: str) -> None:
    objects = _objects(base)
    by_kind = {(each["kind"], each["metadata"]["name"]): each for each in objects}
    assert len(by_kind) == len(objects)
    for pod in _pods(base):
        assert ("ServiceAccount", pod["serviceAccountName"]) in by_kind
        volumes = {volume["name"] for volume in pod["volumes"]}
        mounted = {mount["name"] for each in _containers(pod) for mount in each["volumeMounts"]}
        assert mounted == volumes
        for each in _containers(pod):
            known = set()
            for variable in each.get("env", []):
                known.add(variable["name"])
                if "valueFrom" in variable:
                    reference = variable["valueFrom"]["configMapKeyRef"]
                    assert reference["key"] in by_kind["ConfigMap", reference["name"]]["data"]
            assert set(re.findall(r"\$\((\w+)\)", json.dumps(each))) <= known
            ports = {port["name"] for port in each.get("ports", [])}
            assert {each[probe]["httpGet"]["port"] for probe in _PROBES & set(each)} <= ports
    (service,) = (each for each in objects if each["kind"] == "Service")
    (deployment,) = (each for each in objects if each["kind"] == "Deployment")
    template = deployment["spec"]["template"]
    assert (
        service["spec"]["selector"] == template["metadata"]["labels"] == deployment["spec"]["selector"]["matchLabels"]
    )
    (engine,) = template["spec"]["containers"]
    assert service["spec"]["ports"][0]["targetPort"] in {port["name"] for port in engine["ports"]}


def test_only_what_keeps_running_is_probed() -> None:
    """The schemas let it pass, and the API server does not."""
    for pod in chain.from_iterable(map(_pods, _BASES)):
        for each in pod["initContainers"]:
            assert each.get("restartPolicy") == "Always" or not _PROBES & set(each)
    (sidecar,) = _pods("sidecar")
    first = sidecar["initContainers"][0]
    assert (first["restartPolicy"], first["startupProbe"]["httpGet"]["path"]) == ("Always", "/startupz")


def test_ours_have_nothing_that_they_do_not_need() -> None:
    ours = [
        each
        for pod in chain.from_iterable(map(_pods, _BASES))
        for each in _containers(pod)
        if each["image"].startswith("streamload:")
    ]
    storage = _storage_container()
    for each in [*ours, storage]:
        assert "memory" in each["resources"]["limits"]
        if each["name"] == "prepare":  # gives a folder of root's away
            assert each["securityContext"]["capabilities"] == {"drop": ["ALL"], "add": ["CHOWN"]}
            assert "envFrom" not in each
        else:
            # A pod of ours has it for all its containers; KServe's is KServe's.
            own = {"seccompProfile": {"type": "RuntimeDefault"}} if each is storage else {}
            assert each["securityContext"] == _LOCKED_DOWN | own
            assert each["terminationMessagePolicy"] == "FallbackToLogsOnError"


@pytest.mark.parametrize("base", _BASES)
def test_pods_are_told_of_no_services(base: str) -> None:
    """A service called vllm would be VLLM_PORT in the engine, which wants a number there and ends."""
    for pod in _pods(base):
        assert pod["enableServiceLinks"] is False
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}


@pytest.mark.parametrize("base", _BASES)
def test_a_rollout_needs_no_second_gpu_and_has_time(base: str) -> None:
    (deployment,) = (each["spec"] for each in _objects(base) if each["kind"] == "Deployment")
    assert deployment["strategy"]["rollingUpdate"] == {"maxSurge": 0, "maxUnavailable": 1}
    (engine,) = deployment["template"]["spec"]["containers"]
    probe = engine["startupProbe"]
    assert deployment["progressDeadlineSeconds"] > 2 * probe["periodSeconds"] * probe["failureThreshold"]


@pytest.mark.parametrize("base", _BASES)
def test_an_engine_only_reads(base: str) -> None:
    (engine,) = (each for pod in _pods(base) for each in pod["containers"] if each["name"] == "vllm")
    assert engine["command"] == ["vllm", "serve"]
    assert engine["securityContext"]["allowPrivilegeEscalation"] is False
    assert all(mount.get("readOnly", mount["mountPath"] == "/dev/shm") for mount in engine["volumeMounts"])


@pytest.mark.parametrize("base", _BASES)
def test_what_is_told_works(base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command lines, with a folder for a bucket, and folders for the volumes."""
    source = source_of(tmp_path / "source", pieces=2)
    monkeypatch.chdir(tmp_path)
    (pod,) = (pod for pod in _pods(base) if any(each["name"] == "vllm" for each in pod["containers"]))

    def local(argument: str) -> str:
        argument = argument.replace("$(MODEL_URI)", str(source))
        return re.sub(r"(^|=|sidecar://)/(?=models|config|cache)", rf"\1{tmp_path}/", argument)

    for each in pod["initContainers"]:
        command = [*each.get("command", ["streamload", "stage"])[1:], *map(local, each["args"])]
        if command[0] == "stage":
            for mount in each["volumeMounts"]:
                Path(local(mount["mountPath"])).mkdir(exist_ok=True)
            assert main([*command, "--quiet"]) == 0
    (engine,) = pod["containers"]
    model = Path(local(engine["args"][0]))
    # Where a sidecar has the weights, the engine's folder has all else.
    weights = {name for name in STAGED if ".safetensors" in name} if base == "sidecar" else set()
    assert names(model) == STAGED - weights | {"READY"}
    assert all((model / name).read_bytes() == (source / name).read_bytes() for name in STAGED - weights)


def test_arguments_have_a_meaning() -> None:
    for pod in chain.from_iterable(map(_pods, _BASES)):
        for each in _containers(pod):
            command = [*each.get("command", ["streamload", "stage"]), *each.get("args", [])]
            if command[0] == "streamload":
                assert command[1] in {"stage", "serve"}
                _parser().parse_args(command[1:])


def test_the_engine_asks_the_sidecar() -> None:
    (pod,) = _pods("sidecar")
    sidecar, (engine,) = pod["initContainers"][0], pod["containers"]
    told = dict(each.removeprefix("--").split("=", 1) for each in engine["args"] if each.startswith("--"))
    assert told["load-format"] == "streamload"
    (socket,) = (each.removeprefix("--socket=") for each in sidecar["args"] if each.startswith("--socket="))
    assert json.loads(told["model-loader-extra-config"]) == {"uri": f"sidecar://{socket}"}
    folder = str(Path(socket).parent)
    for each in (sidecar, engine):
        assert ("models", folder) in {(mount["name"], mount["mountPath"]) for mount in each["volumeMounts"]}

"""The manifest of `launch kubernetes`: read by a strict loader, and its command run as the operator would run it."""

import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from pydantic import BaseModel, ConfigDict, Field

from commands.launch_kubernetes import KubernetesOptions, render_kubernetes
from flexbert_core.schema import ConfigError
from tests.helpers.ports import free_port
from tests.helpers.ranks import Ranks
from tests.helpers.runs import ROOT, environment
from tests.helpers.tiny import check_same, write_config


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


# Kubeflow's training operator, kubeflow.org/v1 (pytorch_types.go, common_types.go), and Kubernetes' core/v1: the fields
# by their names and types, of what we write.
class FieldRef(Strict):
    fieldPath: Literal["status.podIP"]


class ValueFrom(Strict):
    fieldRef: FieldRef


class Env(Strict):
    name: str = Field(pattern=r"^[A-Z_]+$")
    valueFrom: ValueFrom


class Resources(Strict):
    requests: dict[str, str]
    limits: dict[str, str]


class Mount(Strict):
    name: str
    mountPath: str = Field(pattern="^/")


class Container(Strict):
    name: Literal["pytorch"]  # the operator's default container name
    image: str
    workingDir: str
    command: list[str]
    env: list[Env]
    resources: Resources
    volumeMounts: list[Mount]


class EmptyDir(Strict):
    medium: Literal["Memory"]
    sizeLimit: str


class Claim(Strict):
    claimName: str


class Volume(Strict):
    name: str = Field(pattern=r"^[a-z0-9-]{1,63}$")
    emptyDir: EmptyDir | None = None
    persistentVolumeClaim: Claim | None = None


class Pod(Strict):
    terminationGracePeriodSeconds: int
    containers: list[Container] = Field(min_length=1)
    volumes: list[Volume]


class Template(Strict):
    spec: Pod


class Replica(Strict):
    replicas: int = Field(ge=1)
    restartPolicy: Literal["OnFailure"]
    template: Template


class Replicas(Strict):
    Master: Replica
    Worker: Replica | None = None


class RunPolicy(Strict):
    backoffLimit: int = Field(ge=0)
    cleanPodPolicy: Literal["Running", "All", "None"]


class Spec(Strict):
    nprocPerNode: str = Field(pattern=r"^\d+$")  # a string in the operator's API
    runPolicy: RunPolicy
    pytorchReplicaSpecs: Replicas


class Metadata(Strict):
    name: str = Field(pattern=r"^[a-z]([-a-z0-9]*[a-z0-9])?$", max_length=63)  # DNS-1035, as services are named by it
    namespace: str | None = None


class PyTorchJob(Strict):
    apiVersion: Literal["kubeflow.org/v1"]
    kind: Literal["PyTorchJob"]
    metadata: Metadata
    spec: Spec


def manifest(file: Path, *overrides: str, **options: Any) -> PyTorchJob:
    given: dict[str, Any] = {"image": "registry/flexbert:1", "claims": ["data:/data"], "gpus_per_node": 2}
    text = render_kubernetes(file, overrides, KubernetesOptions(**(given | options)))
    return PyTorchJob.model_validate(yaml.safe_load(text))


def test_the_manifest_is_a_pytorchjob(tiny_data: Path, tmp_path: Path) -> None:
    file = write_config(tmp_path, tiny_data, 2)
    job = manifest(file, "name=My_run.2", nodes=4, claims=["data:/data", "runs:/runs"], namespace="nlp", max_restarts=3)
    assert (job.metadata.name, job.metadata.namespace) == ("my-run-2", "nlp")
    assert job.spec.runPolicy.backoffLimit == 3 * 4
    specs = job.spec.pytorchReplicaSpecs
    assert specs.Worker is not None
    assert (specs.Master.replicas, specs.Worker.replicas) == (1, 3)
    assert specs.Master.template == specs.Worker.template
    (container,) = specs.Master.template.spec.containers
    assert container.resources.limits == {"nvidia.com/gpu": "2"}
    assert container.resources.requests == {"cpu": "8"}
    mounted = {mount.name for mount in container.volumeMounts}
    assert mounted == {volume.name for volume in specs.Master.template.spec.volumes}
    claims = [volume.persistentVolumeClaim for volume in specs.Master.template.spec.volumes]
    assert [claim.claimName for claim in claims if claim is not None] == ["data", "runs"]
    assert container.command[-3:] == ["train", str(file), "name=My_run.2"]
    assert manifest(file).spec.pytorchReplicaSpecs.Worker is None
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "label"), [("2b-base", "run-2b-base"), ("x" * 60, "x" * 50), ("9" + "x" * 59, "run-9" + "x" * 45)]
)
def test_a_run_has_a_name_that_services_may_have(tiny_data: Path, tmp_path: Path, name: str, label: str) -> None:
    assert manifest(write_config(tmp_path, tiny_data, 2), f"name={name}").metadata.name == label


def test_what_pods_would_refuse_is_refused_here(tiny_data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.yaml: checkpoint\.keep_best: without evaluation\.interval"):
        manifest(write_config(tmp_path, tiny_data, 2), "checkpoint.keep_best=1")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image": ""}, "--image: '': give an image that holds FlexBERT and what it needs"),
        ({"claims": []}, "--claim: none is given: runs and data must outlive the pods: give NAME:/path"),
        ({"claims": ["data"]}, "--claim: 'data': expected NAME:/path, such as data:/data"),
        ({"shared_memory": "16 GB"}, "--shared-memory: '16 GB': expected a size such as 16Gi"),
        ({"namespace": "N_1"}, "--namespace: 'N_1': expected lower case letters, digits and -"),
        (
            {"nodes": 3},
            "phases: batches of 8 rows cannot be divided among 6 ranks (3 nodes x 2 GPUs): change one of them",
        ),
    ],
    ids=str,
)
def test_bad_options_are_refused(tiny_data: Path, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        manifest(write_config(tmp_path, tiny_data, 2), **options)
    assert str(error.value) == message


def test_it_is_printed(ranks: Ranks, tiny_data: Path, tmp_path: Path) -> None:
    file = write_config(tmp_path, tiny_data, 2)
    arguments = ["launch", "kubernetes", str(file), "--gpus-per-node", "2", "--claim", "data:/data"]
    codes, text = ranks.run(1, *arguments, "--image", "registry/flexbert:1")
    assert codes == [0], text
    assert yaml.safe_load(text) == yaml.safe_load(manifest(file).model_dump_json(exclude_none=True))
    codes, text = ranks.run(1, *arguments)
    assert (codes, text.count("\n")) == ([2], 1)


@pytest.mark.slow
def test_its_pods_train(ranks: Ranks, tiny_data: Path, tmp_path: Path) -> None:
    """Two pods of one process on this machine, with what the operator sets: the run of one process."""
    options: dict[str, Any] = {"folder": str(ROOT), "python": sys.executable, "gpus_per_node": 1, "nodes": 2}
    file = write_config(tmp_path / "pods", tiny_data, 6)
    job = manifest(file, **options)
    (container,) = job.spec.pytorchReplicaSpecs.Master.template.spec.containers
    variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "POD_IP": "127.0.0.1"}
    operator = {"WORLD_SIZE": "2", "PET_NNODES": "2", "PET_NPROC_PER_NODE": job.spec.nprocPerNode}
    command = container.command
    for name, value in variables.items():
        command = [each.replace(f"$({name})", value) for each in command]
    pods = [
        subprocess.Popen(
            command, cwd=container.workingDir, env=environment() | variables | operator | {"PET_NODE_RANK": str(number)},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for number in range(2)
    ]  # fmt: skip
    outputs = [pod.communicate(timeout=300)[0] for pod in pods]
    assert [pod.returncode for pod in pods] == [0, 0], outputs
    ranks.train(1, str(write_config(tmp_path / "one", tiny_data, 6)))
    check_same(tmp_path / "pods", tmp_path / "one")

"""`main.py launch kubernetes`: a run as a PyTorchJob of Kubeflow's training operator, whose pods start it again after a
crash or an eviction."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from commands.launch import CPUS_PER_GPU, LEAD, check_rows
from flexbert_core.schema import ConfigError
from recipe.config import load_run_config
from training.effects import check_effects

_MOUNTS = re.compile(r"(?P<claim>[a-z0-9]([-a-z0-9.]*[a-z0-9])?):(?P<path>/\S+)")
_SIZE = re.compile(r"[1-9]\d*(Mi|Gi|Ti|M|G|T)")


@dataclass(frozen=True)
class KubernetesOptions:
    """Of the job. claims: persistent volume claims and where pods see them, `NAME:/path`. folder: of the checkout in
    the image. max_restarts: of the whole job."""

    image: str
    claims: Sequence[str]
    nodes: int = 1
    gpus_per_node: int = 8
    cpus_per_node: int | None = None
    folder: str = "/workspace/flexbert"
    python: str = "python"
    namespace: str | None = None
    shared_memory: str = "16Gi"
    max_restarts: int = 10


def render_kubernetes(config_file: Path, overrides: Sequence[str], options: KubernetesOptions) -> str:
    """The manifest, for `kubectl apply -f -`. Raises ConfigError when the run or the options are wrong."""
    config = load_run_config(config_file, overrides)
    check_effects(config, config_file)
    if not options.image.strip() or any(letter.isspace() for letter in options.image):
        raise ConfigError(f"--image: {options.image!r}: give an image that holds FlexBERT and what it needs")
    if not options.claims:
        raise ConfigError("--claim: none is given: runs and data must outlive the pods: give NAME:/path")
    if not _SIZE.fullmatch(options.shared_memory):
        raise ConfigError(f"--shared-memory: {options.shared_memory!r}: expected a size such as 16Gi")
    if options.namespace is not None and _letters(options.namespace) != options.namespace:
        raise ConfigError(f"--namespace: {options.namespace!r}: expected lower case letters, digits and -")
    check_rows(config, options.nodes, options.gpus_per_node)
    name = _label(config.name)
    pod = _pod(name, [str(config_file), *overrides], options)
    replicas = {"Master": 1, "Worker": options.nodes - 1}
    job = {
        "apiVersion": "kubeflow.org/v1",
        "kind": "PyTorchJob",
        "metadata": {"name": name} | ({"namespace": options.namespace} if options.namespace else {}),
        "spec": {
            "nprocPerNode": str(options.gpus_per_node),
            # The operator adds up the restarts of all pods, and all start again when one has failed.
            "runPolicy": {"backoffLimit": options.max_restarts * options.nodes, "cleanPodPolicy": "Running"},
            "pytorchReplicaSpecs": {
                kind: {"replicas": count, "restartPolicy": "OnFailure", "template": {"spec": pod}}
                for kind, count in replicas.items()
                if count
            },
        },
    }
    # Through JSON, that nothing is shared: YAML would write an anchor for the pod that both kinds have.
    return yaml.safe_dump(json.loads(json.dumps(job)), sort_keys=False, width=120)


def _pod(name: str, arguments: list[str], options: KubernetesOptions) -> dict[str, Any]:
    mounts, volumes = [{"name": "shm", "mountPath": "/dev/shm"}], list[dict[str, Any]]()
    # NCCL moves data between the GPUs of a machine through it; a container has 64 MB.
    volumes.append({"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": options.shared_memory}})
    for number, given in enumerate(options.claims):
        match = _MOUNTS.fullmatch(given)
        if match is None:
            raise ConfigError(f"--claim: {given!r}: expected NAME:/path, such as data:/data")
        mounts.append({"name": f"claim-{number}", "mountPath": match["path"]})
        volumes.append({"name": f"claim-{number}", "persistentVolumeClaim": {"claimName": match["claim"]}})
    # The operator sets MASTER_ADDR and MASTER_PORT of all pods; $(NAME) is filled in by Kubernetes.
    torchrun = [f"--nnodes={options.nodes}", f"--nproc-per-node={options.gpus_per_node}", "--rdzv-backend=c10d"]
    torchrun += [f"--rdzv-id={name}", "--rdzv-endpoint=$(MASTER_ADDR):$(MASTER_PORT)"]
    command = [options.python, "-m", "training.node", *torchrun, "main.py", "train"]
    cpus = str(options.cpus_per_node or CPUS_PER_GPU * options.gpus_per_node)
    return {
        "terminationGracePeriodSeconds": LEAD,  # after SIGTERM: a step and a checkpoint
        "containers": [
            {
                "name": "pytorch",  # the operator looks for this one
                "image": options.image,
                "workingDir": options.folder,
                "command": command + [each.replace("$", "$$") for each in arguments],
                "env": [{"name": "POD_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}}],
                "resources": {
                    "requests": {"cpu": cpus},
                    "limits": {"nvidia.com/gpu": str(options.gpus_per_node)},
                },
                "volumeMounts": mounts,
            }
        ],
        "volumes": volumes,
    }


def _label(name: str) -> str:
    """What Kubernetes may call a job and its services: a letter first, at most 50 in all, so that pods' names have
    room."""
    letters = _letters(name)
    return letters if letters[:1].isalpha() else _letters(f"run-{letters}")


def _letters(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower())[:50].strip("-")

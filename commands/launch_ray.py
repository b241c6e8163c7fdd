"""`main.py launch ray`: a run on the nodes of a Ray cluster, one launcher (training/node.py) on each.

Ray places the launchers and tells them of one another; the ranks are processes of torchrun, as everywhere else. (Ray
Train's TorchTrainer runs a function in a thread of its workers. There Python delivers no signals, so a run could not
save when it is asked to stop, and the process group would be Ray's, without our time-outs.)
"""

import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from commands.dry_run import dry_run
from commands.launch import check_rows
from flexbert_core.children import ends_with_parent
from flexbert_core.schema import ConfigError, RunError, plain_console
from jobs.base import note_end
from jobs.ray import connect, reason
from recipe.config import load_run_config
from training.effects import check_effects
from training.signals import EXIT_PREEMPTED

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class RayOptions:
    """Of the job. address: of a running cluster; None: Ray is started on this machine, and stopped. gpus_per_node:
    processes of a node, each with a GPU; 0: one process without."""

    address: str | None = None
    nodes: int = 1
    gpus_per_node: int = 8
    cpus_per_node: int = 1
    max_restarts: int = 0


def launch_ray(config_file: Path, overrides: Sequence[str], options: RayOptions) -> str:
    """Run it to its end; returns a line that says so.

    Raises ConfigError when the run or the options are wrong, RunError when a node failed or the cluster has too
    little, SystemExit(EXIT_PREEMPTED) when the run was asked to stop and has saved.
    """
    config = load_run_config(config_file, overrides)
    check_effects(config, config_file)
    processes = max(options.gpus_per_node, 1)
    check_rows(config, options.nodes, processes)
    dry_run(config, plain_console(quiet=True), options.nodes * processes)
    if find_spec("ray") is None:
        raise ConfigError("launch ray: the package ray is not installed: pip install -r requirements-data.txt")
    folder = config.folder.resolve() / "ray"
    command = [str(ROOT / "main.py"), "train", str(config_file.absolute()), *overrides]
    connect(options.address, "launch ray")
    import ray  # pyright: ignore[reportMissingImports] (of the data extra)

    try:
        for restart in range(options.max_restarts + 1):
            codes = _run_nodes(options, processes, command, folder)
            if not any(codes):
                return f"{config.folder}: done on {options.nodes} nodes, logs in {folder}"
            if EXIT_PREEMPTED in codes:
                raise SystemExit(EXIT_PREEMPTED)
            if 2 in codes or restart == options.max_restarts:
                break
            sys.stderr.write(f"launch ray: exit codes {codes}, restart {restart + 1} of {options.max_restarts}\n")
    finally:
        ray.shutdown()
    failed = next(number for number, code in enumerate(codes) if code)
    log = folder / f"node-{failed}.log"
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()] if log.exists() else []
    raise RunError(f"node {failed}: exit code {codes[failed]}: {lines[-1] if lines else 'it printed nothing'} ({log})")


def _run_nodes(options: RayOptions, processes: int, command: list[str], folder: Path) -> list[int]:
    """Exit code of each node's launcher, in order."""
    import ray  # pyright: ignore[reportMissingImports]
    from ray.exceptions import RayError  # pyright: ignore[reportMissingImports]
    from ray.util import placement_group, remove_placement_group  # pyright: ignore[reportMissingImports]
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy  # pyright: ignore

    share: dict[str, float] = {"CPU": float(options.cpus_per_node)}
    if options.gpus_per_node:
        share["GPU"] = float(options.gpus_per_node)
    total = ray.cluster_resources()
    for name, each in share.items():
        if total.get(name, 0) < options.nodes * each:
            raise RunError(
                f"launch ray: the cluster has {total.get(name, 0):g} {name}s, {options.nodes} nodes with {each:g} each "
                "were asked for: ask for less"
            )
    group = placement_group([share] * options.nodes, strategy="STRICT_SPREAD")
    try:
        if not group.wait(60):
            raise RunError(f"launch ray: no {options.nodes} nodes with {share} are free: ask for less, or wait")

        def on(number: int, **more: Any) -> dict[str, Any]:
            place = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=number)
            return {"scheduling_strategy": place, "max_retries": 0, **more}

        endpoint = ray.get(ray.remote(meeting_place).options(num_cpus=0, **on(0)).remote())
        torchrun = [f"--nnodes={options.nodes}", f"--nproc-per-node={processes}", "--rdzv-backend=c10d"]
        torchrun += ["--rdzv-id=ray", f"--rdzv-endpoint={endpoint}"]
        node = ray.remote(serve_node)
        waiting = [
            node.options(num_cpus=share["CPU"], num_gpus=options.gpus_per_node, **on(number)).remote(
                # The first holds the store: by its address alone a machine may not know itself.
                [*torchrun, f"--rdzv-conf=is_host={number == 0}", *command],
                str(folder / f"node-{number}.log"),
                str(Path.cwd()),
            )
            for number in range(options.nodes)
        ]
        codes = []
        for number, each in enumerate(waiting):
            try:
                codes.append(ray.get(each))
            except RayError as error:  # its node died
                note_end(folder / f"node-{number}.log", f"ray: {reason(error)}")
                codes.append(1)
        return codes
    finally:
        remove_placement_group(group)


def meeting_place() -> str:
    """Address and a free port of the node that this runs on."""
    import ray  # pyright: ignore[reportMissingImports]

    with socket.socket() as free:
        free.bind(("", 0))
        return f"{ray.util.get_node_ip_address()}:{free.getsockname()[1]}"


def serve_node(arguments: list[str], log: str, folder: str) -> int:
    """Life of a launcher on its node; its exit code. It is asked to stop when Ray's process ends. folder: to run in,
    which relative paths mean."""
    import ray  # pyright: ignore[reportMissingImports]

    address = ray.util.get_node_ip_address()
    Path(log).parent.mkdir(parents=True, exist_ok=True)
    with Path(log).open("ab") as output:
        return subprocess.run(
            [sys.executable, "-m", "training.node", f"--local-addr={address}", *arguments],
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            check=False,
            preexec_fn=ends_with_parent(signal.SIGTERM),
        ).returncode

"""`main.py launch ...`: its command line."""

from typing import Annotated

import typer

from commands.arguments import Config, Overrides
from commands.one_line import plain_errors

launch_app = typer.Typer(help="Start a run on a cluster.", no_args_is_help=True)


@launch_app.command()
def slurm(
    config: Config,
    overrides: Overrides = None,
    nodes: Annotated[int, typer.Option(min=1, help="machines")] = 1,
    gpus_per_node: Annotated[int, typer.Option(min=1, help="and processes, on each")] = 8,
    partition: Annotated[str | None, typer.Option(help="as for sbatch")] = None,
    time: Annotated[str | None, typer.Option(help="limit, as for sbatch: minutes, HH:MM:SS or D-HH:MM:SS")] = None,
    account: Annotated[str | None, typer.Option(help="as for sbatch")] = None,
    cpus_per_node: Annotated[int | None, typer.Option(min=1, help="for the loader's processes, too [4 a GPU]")] = None,
    max_restarts: Annotated[
        int, typer.Option(min=0, help="requeues after a crash, from the newest checkpoint; others are not counted")
    ] = 0,
    setup: Annotated[str, typer.Option(help="shell commands at the job's start, such as `module load cuda`")] = "",
    sbatch: Annotated[
        list[str] | None, typer.Option(help="another option of sbatch: qos=high, or exclusive; may be repeated")
    ] = None,
    print_only: Annotated[bool, typer.Option("--print", help="print the job script, submit nothing")] = False,
) -> None:
    """Submit a run as a Slurm job. It requeues itself when preempted or at its time limit, until the run is done."""
    with plain_errors():
        from commands.launch import SlurmOptions, launch_slurm, parse_sbatch

        more = parse_sbatch(sbatch or [])
        options = SlurmOptions(nodes, gpus_per_node, partition, time, account, cpus_per_node, max_restarts, setup, more)
        print(launch_slurm(config, overrides or [], options, print_only))


@launch_app.command()
def kubernetes(
    config: Config,
    overrides: Overrides = None,
    image: Annotated[str, typer.Option(help="that holds FlexBERT and what it needs")] = "",
    claim: Annotated[
        list[str] | None,
        typer.Option(help="persistent volume claim and its place in the pods: NAME:/path; may be repeated"),
    ] = None,
    nodes: Annotated[int, typer.Option(min=1, help="pods")] = 1,
    gpus_per_node: Annotated[int, typer.Option(min=1, help="and processes, of each")] = 8,
    cpus_per_node: Annotated[int | None, typer.Option(min=1, help="that a pod asks for [4 a GPU]")] = None,
    folder: Annotated[str, typer.Option(help="of the checkout in the image")] = "/workspace/flexbert",
    python: Annotated[str, typer.Option(help="of the image")] = "python",
    namespace: Annotated[str | None, typer.Option(help="of the job")] = None,
    shared_memory: Annotated[str, typer.Option(help="/dev/shm of a pod, for NCCL")] = "16Gi",
    max_restarts: Annotated[int, typer.Option(min=0, help="of the whole job, after crashes and evictions")] = 10,
) -> None:
    """Print a PyTorchJob for Kubeflow's training operator: `... | kubectl apply -f -`. CONFIG and its data lie in the
    image or in a claim, under the paths that are given here; its runs in a claim."""
    with plain_errors():
        from commands.launch_kubernetes import KubernetesOptions, render_kubernetes

        options = KubernetesOptions(
            image, claim or [], nodes, gpus_per_node, cpus_per_node, folder, python, namespace, shared_memory,
            max_restarts,
        )  # fmt: skip
        print(render_kubernetes(config, overrides or [], options), end="")


@launch_app.command()
def ray(
    config: Config,
    overrides: Overrides = None,
    address: Annotated[
        str | None, typer.Option(help="of a running cluster, such as auto; default: start Ray on this machine")
    ] = None,
    nodes: Annotated[int, typer.Option(min=1, help="machines, which see the same files")] = 1,
    gpus_per_node: Annotated[int, typer.Option(min=0, help="and processes, on each; 0: one process without")] = 8,
    cpus_per_node: Annotated[int, typer.Option(min=1, help="that Ray sets aside on each")] = 1,
    max_restarts: Annotated[int, typer.Option(min=0, help="after a crash, from the newest checkpoint")] = 0,
) -> None:
    """Run on the nodes of a Ray cluster, and wait for it."""
    with plain_errors():
        from commands.launch_ray import RayOptions, launch_ray

        print(
            launch_ray(config, overrides or [], RayOptions(address, nodes, gpus_per_node, cpus_per_node, max_restarts))
        )

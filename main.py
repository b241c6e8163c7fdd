"""FlexBERT's front door: `python main.py COMMAND ...`.

Exit codes: 0 done, 1 failed while running, 2 wrong usage or config, 85 (training.signals) asked to stop and saved.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

# OpenMP threads that wait by spinning take the cores from the loader and from other jobs: on two busy cores a demo step
# took 2.6 times as long (2026-11-23). Read once, when torch loads OpenMP.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


class OneLineUsage(TyperGroup):
    """Says what is wrong with the command line in one line on stderr, like everything else that is wrong: typer's box
    of six lines hides it from scripts and logs."""

    def main(self, *args: Any, **options: Any) -> Any:
        try:
            code = super().main(*args, **options, standalone_mode=False)
        except typer.TyperException as error:
            # What a command without arguments prints is its help; the message holds nothing then.
            if message := " ".join(error.format_message().split()):
                print(f"error: {message}", file=sys.stderr, flush=True)
            sys.exit(error.exit_code)
        except typer.Abort:
            sys.exit(1)
        sys.exit(code)


app = typer.Typer(
    cls=OneLineUsage,
    help="Pretrain BERT-family encoders from YAML.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

launch_app = typer.Typer(help="Start a run on a cluster.", no_args_is_help=True)
app.add_typer(launch_app, name="launch")


def _place(path: str) -> str:
    """A folder, file or URL with a leading ~ expanded, also where no shell has seen it (--output=~/x)."""
    from flexbert_core.schema import expand_user

    try:
        return expand_user(path)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def _path(path: str) -> Path:
    return Path(_place(path))


Config = Annotated[Path, typer.Argument(parser=_path, help="the run file, such as configs/demo.yaml", metavar="CONFIG")]
DataConfig = Annotated[
    Path, typer.Argument(parser=_path, help="what to prepare, such as configs/data/demo.yaml", metavar="CONFIG")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="values to set: key.path=value; of one key the last counts", metavar="[KEY=VALUE]..."),
]


@contextmanager
def plain_errors() -> Iterator[None]:
    """Errors that the user can act on become one line each on stderr and an exit code; bugs keep their traceback."""
    from flexbert_core.schema import ConfigError, RunError

    try:
        yield
    except (ConfigError, RunError) as error:
        sys.stdout.flush()
        print(f"error: {error}".replace("\n", "\nerror: "), file=sys.stderr, flush=True)
        raise typer.Exit(2 if isinstance(error, ConfigError) else 1) from None
    except (KeyboardInterrupt, SystemExit) as stop:
        # Composer turns SIGINT and SIGTERM into SystemExit(128 + number); 85: training.signals.EXIT_PREEMPTED.
        code = stop.code if isinstance(stop, SystemExit) else 130
        if code in (85, 130, 143):
            print("interrupted: the same command goes on from the newest checkpoint", file=sys.stderr)
        raise typer.Exit(code if isinstance(code, int) else 1) from None


@app.command()
def prepare(config: DataConfig, overrides: Overrides = None) -> None:
    """Turn documents into token shards, as configs/data/NAME.yaml says. Resumes where it was interrupted."""
    with plain_errors():
        from data.preparation.dataset import load_prepare_config
        from data.preparation.dataset import prepare as run

        run(load_prepare_config(config, overrides or []))


@app.command()
def inspect(
    folder: Annotated[
        str,
        typer.Argument(
            parser=_place,
            help="a prepared dataset or one of its streams (folder or URL); with --step, a run",
            metavar="DIR",
        ),
    ],
    samples: Annotated[int | None, typer.Option(min=0, help="documents to print of each stream; default: 3")] = None,
    step: Annotated[int | None, typer.Option(help="of a run: the global batch that it trained on in this step")] = None,
    rows: Annotated[int | None, typer.Option(min=0, help="with --step: rows to print; 0: all; default: 4")] = None,
    json: Annotated[bool, typer.Option("--json", help="with --step: one JSON line for each piece of a row")] = False,
) -> None:
    """Show what a prepared dataset holds, or replay a step of a run: its documents, decoded, with masks shown."""
    with plain_errors():
        from flexbert_core.schema import ConfigError

        for option, given in (("--rows", rows is not None), ("--json", json)):
            if given and step is None:
                raise ConfigError(f"{option}: only says something with --step")
        if step is None:
            from data.inspect import inspect as run

            run(folder, 3 if samples is None else samples)
            return
        if samples is not None:
            raise ConfigError("--samples: says nothing with --step: give --rows")
        from commands.inspect_step import inspect_step
        from flexbert_core.schema import plain_console

        inspect_step(Path(folder), step, 4 if rows is None else rows, json, plain_console())


@app.command()
def train(
    config: Config,
    overrides: Overrides = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="check everything, print the plan, start nothing")] = False,
    tokens_per_second: Annotated[
        float | None, typer.Option(min=1e-3, help="with --dry-run: of all processes together; gives hours")
    ] = None,
    price_per_hour: Annotated[
        float | None, typer.Option(min=0, help="with --tokens-per-second: of all machines together; gives the cost")
    ] = None,
) -> None:
    """Pretrain an encoder, or continue where the same command was interrupted.

    SIGTERM, SIGUSR1, SIGUSR2 or Ctrl-C: it finishes the step, saves and exits with code 85. Ctrl-C twice: at once.
    """
    from training import signals

    with plain_errors(), signals.from_start_up():
        from flexbert_core.schema import ConfigError, plain_console

        if tokens_per_second is not None and not dry_run:
            raise ConfigError("--tokens-per-second: only says something with --dry-run")
        if price_per_hour is not None and tokens_per_second is None:
            raise ConfigError("--price-per-hour: needs --tokens-per-second")
        from recipe.config import load_run_config
        from training.effects import check_effects, check_launch, ranks

        run = load_run_config(config, overrides or [])
        check_effects(run, config)
        # Rank 0 speaks; the launchers set RANK.
        console = plain_console(quiet=os.environ.get("RANK", "0") != "0")
        if dry_run:
            from commands.dry_run import dry_run as show

            show(run, console, ranks(), tokens_per_second, price_per_hour)
            return
        check_launch()
        from training import report
        from training.trainer import train as start

        was_finished = (run.folder / "summary.json").exists()
        summary = start(run, console)
        report.closing_table(run, summary, console)
        evaluated = any(entry.name == "eval" for entry in run.evaluations)
        if was_finished and evaluated and os.environ.get("RANK", "0") == "0":  # else it has waited for them
            from commands.follow import catch_up

            catch_up(run.folder, console)


@launch_app.command()
def slurm(
    config: Config,
    overrides: Overrides = None,
    nodes: Annotated[int, typer.Option(min=1, help="machines")] = 1,
    gpus_per_node: Annotated[int, typer.Option(min=1, help="and processes, on each")] = 8,
    partition: Annotated[str | None, typer.Option(help="as for sbatch")] = None,
    time: Annotated[str | None, typer.Option(help="limit, as for sbatch: minutes, HH:MM:SS or D-HH:MM:SS")] = None,
    account: Annotated[str | None, typer.Option(help="as for sbatch")] = None,
    cpus_per_node: Annotated[int | None, typer.Option(min=1, help="for the loader's processes, too")] = None,
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
        options = SlurmOptions(nodes, gpus_per_node, partition, time, account, cpus_per_node, setup, more)
        print(launch_slurm(config, overrides or [], options, print_only))


@app.command()
def doctor(
    config: Annotated[
        Path | None,
        typer.Argument(parser=_path, help="a run file: its streams, disk room and run folder are checked too"),
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Check this machine: cores, memory, versions, devices, attention kernels, disk, data; and say what to do."""
    with plain_errors():
        from commands.doctor import doctor as run
        from flexbert_core.schema import plain_console
        from recipe.config import load_run_config
        from training.effects import check_effects

        checked = None if config is None else load_run_config(config, overrides or [])
        if checked is not None:
            check_effects(checked, config)
        fine = run(checked, plain_console())
    raise typer.Exit(0 if fine else 1)


@app.command()
def status(
    run: Annotated[Path, typer.Argument(parser=_path, help="a run folder: runs/NAME", metavar="RUN")],
    json: Annotated[bool, typer.Option("--json", help="one JSON object instead of a table")] = False,
) -> None:
    """Show where a run stands, live or dead: phase, loss, speed, ETA, newest checkpoint and whether it is whole."""
    with plain_errors():
        from commands.status import status as show
        from flexbert_core.schema import plain_console

        show(run, json, plain_console())


@app.command()
def report(
    run: Annotated[Path, typer.Argument(parser=_path, help="a run folder: runs/NAME", metavar="RUN")],
    output: Annotated[
        Path | None, typer.Option(parser=_path, metavar="FILE", help="the picture; default: RUN/curves.png")
    ] = None,
) -> None:
    """Draw a run's curves against tokens: loss, learning rate, batch size, RoPE theta, sequence length."""
    with plain_errors():
        from training.curves import report as draw

        print(draw(run, output))


@app.command()
def average(
    sources: Annotated[
        list[Path],
        typer.Argument(
            parser=_path, help="a run (runs/NAME), or checkpoints (.../tokens-N)", metavar="RUN|CHECKPOINT..."
        ),
    ],
    output: Annotated[
        Path, typer.Option(parser=_path, metavar="DIR", help="the folder to write, which transformers loads")
    ],
    last: Annotated[int | None, typer.Option(help="of a run: its newest K checkpoints", metavar="K")] = None,
    tokens: Annotated[str | None, typer.Option(help="of a run: those with these tokens", metavar="N1,N2,...")] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            help="a share for each, in the order of --tokens or of the checkpoints given, with --last oldest first; "
            "default: alike",
            metavar="W1,W2,...",
        ),
    ] = None,
) -> None:
    """Average the weights of checkpoints of one architecture and export the result."""
    with plain_errors():
        from commands.average import average as run
        from flexbert_core.schema import plain_console

        run(sources, output, last, tokens, weights, plain_console())


@app.command()
def export(
    model: Annotated[
        str,
        typer.Argument(
            help="a run (newest checkpoint, or RUN@tokens-N), a checkpoint, an export, a folder with a config.json, or "
            "hf:ORG/NAME",
            metavar="MODEL",
        ),
    ],
    output: Annotated[Path, typer.Option(parser=_path, metavar="DIR", help="the folder to write")],
    onnx: Annotated[
        bool, typer.Option("--onnx", help="a graph, model.onnx, checked in onnxruntime, in place of the weights")
    ] = False,
) -> None:
    """Write a model as a folder that transformers loads, or as an ONNX graph with its tokenizer."""
    with plain_errors():
        from commands.export import export as run
        from flexbert_core.schema import plain_console

        run(model, output, onnx, plain_console())


@app.command("eval")
def evaluate(
    names: Annotated[
        str,
        typer.Argument(help="evaluations of configs/eval, such as glue-quick,scifact, or files", metavar="NAME,..."),
    ],
    arguments: Annotated[
        list[str],
        typer.Argument(
            help="runs (newest checkpoint, or RUN@tokens-N), checkpoints, exports, folders with a config.json, "
            "hf:ORG/NAME; @random behind one: fresh weights. And values to set: key=value, of several evaluations "
            "NAME.key=value",
            metavar="MODEL... [KEY=VALUE]...",
        ),
    ],
    output: Annotated[
        Path, typer.Option(parser=_path, metavar="DIR", help="where results lie; what is done there is not done again")
    ] = Path("results"),
    group: Annotated[str | None, typer.Option(hidden=True)] = None,
    label: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Evaluate models: GLUE, retrieval, probes, speed. Finished parts are not done again; interrupted, it goes on."""
    with plain_errors():
        from commands.evaluate import run_eval
        from flexbert_core.schema import plain_console

        fine = run_eval(names, arguments, output, plain_console(), group, label)
    raise typer.Exit(0 if fine else 1)


@app.command()
def follow(
    run: Annotated[Path, typer.Argument(parser=_path, help="a run folder: runs/NAME", metavar="RUN")],
    watch: Annotated[bool, typer.Option("--watch", help="until the run is finished")] = False,
) -> None:
    """Evaluate a run's checkpoints as its `evaluations` say (entry `eval`). `train` starts this by itself."""
    with plain_errors():
        from evals.following import follow as run_it
        from flexbert_core.schema import plain_console

        fine = run_it(run, plain_console(), watch)
    raise typer.Exit(0 if fine else 1)


@app.command()
def publish(
    run: Annotated[Path, typer.Argument(parser=_path, help="a run folder: runs/NAME", metavar="RUN")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="keys of `publish` to set, such as publish.folder=DIR", metavar="[KEY=VALUE]..."),
    ] = None,
    only: Annotated[str | None, typer.Option(help="one revision: tokens-N, or tokens-N-ema")] = None,
    results: Annotated[
        list[Path] | None,
        typer.Option(
            parser=_path, metavar="DIR", help="where `eval` wrote results, for the model cards; may be repeated"
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="say what would be pushed, write nothing")] = False,
    background: Annotated[bool, typer.Option(hidden=True)] = False,
) -> None:
    """Push a run's exports to the hub, a folder or a URL, each as a revision. What is there already is left."""
    with plain_errors():
        from commands.publish import publish as push
        from flexbert_core.schema import plain_console

        push(run, overrides or [], only, results or [], dry_run, background, plain_console())


@app.command()
def schema(
    markdown: Annotated[bool, typer.Option("--markdown", help="every key: type, range, default, meaning")] = False,
    json: Annotated[bool, typer.Option("--json", help="a JSON Schema for each kind of file, for editors")] = False,
    output: Annotated[
        Path | None, typer.Option(help="Markdown: the file, else it is printed; JSON: the folder [configs/schema]")
    ] = None,
) -> None:
    """Write what run files, prepare files and model files may say, as Markdown or as JSON Schemas."""
    with plain_errors():
        from commands.write_schema import write_schema

        write_schema(markdown, json, output)


@app.command()
def demo() -> None:
    """Prepare the text this machine already holds, pretrain a small encoder on it, export it and fill masks."""
    with plain_errors():
        from commands.demo import run_demo

        run_demo()


if __name__ == "__main__":
    app()

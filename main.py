"""FlexBERT's front door: `python main.py COMMAND ...`.

Exit codes: 0 done, 1 failed while running, 2 wrong usage or config, 85 (training.signals) asked to stop and saved.
"""

import os
from pathlib import Path
from typing import Annotated

import typer

from commands.arguments import Config, Overrides, path, place, token_count
from commands.generate_app import generate
from commands.launch_app import launch_app
from commands.one_line import FROM_CELLS, FROM_CHECKPOINT, FROM_PUSHED, FROM_TASKS, OneLineUsage, plain_errors
from commands.speedrun_app import speedrun_app
from commands.steering_app import decay, phases
from commands.sweep_app import sweep_app

# OpenMP threads that wait by spinning take the cores from the loader and from other jobs: on two busy cores a demo step
# took 2.6 times as long (2026-11-23). Read once, when torch loads OpenMP.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
app = typer.Typer(
    cls=OneLineUsage,
    help="Pretrain BERT-family encoders from YAML.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

app.add_typer(launch_app, name="launch")
app.add_typer(sweep_app, name="sweep")
app.add_typer(speedrun_app, name="speedrun")


DataConfig = Annotated[
    Path, typer.Argument(parser=path, help="what to prepare, such as configs/data/demo.yaml", metavar="CONFIG")
]


@app.command()
def prepare(config: DataConfig, overrides: Overrides = None) -> None:
    """Turn documents into token shards, as configs/data/NAME.yaml says. Resumes where it was interrupted."""
    with plain_errors(FROM_TASKS):
        from data.preparation.dataset import load_prepare_config
        from data.preparation.dataset import prepare as run

        run(load_prepare_config(config, overrides or []))


@app.command()
def inspect(
    folder: Annotated[
        str,
        typer.Argument(
            parser=place,
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
        float | None,
        typer.Option(min=0, help="with --tokens-per-second or --device: of all machines together; gives the cost"),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="with --dry-run: predict speed, hours and cost on it, such as h100-sxm")
    ] = None,
    gpus: Annotated[int | None, typer.Option(min=1, help="with --device: so many of them [8]")] = None,
    efficiency: Annotated[
        float | None,
        typer.Option(min=1e-3, max=1, help="with --device: model FLOPs over the peak (MFU), instead of the prediction"),
    ] = None,
    until: Annotated[
        int | None,
        typer.Option(
            parser=token_count,
            metavar="TOKENS",
            help="pause there (150K): measure, save, exit with 0; the same command without it goes on",
        ),
    ] = None,
) -> None:
    """Pretrain an encoder, or continue where the same command was interrupted.

    SIGTERM, SIGUSR1, SIGUSR2, SIGHUP or Ctrl-C: it finishes the step, saves and exits with code 85. Ctrl-C twice: at
    once.
    """
    from training import signals

    with plain_errors(FROM_CHECKPOINT), signals.from_start_up():
        from flexbert_core.schema import ConfigError, plain_console

        if tokens_per_second is not None and not dry_run:
            raise ConfigError("--tokens-per-second: only says something with --dry-run")
        if device is not None and (not dry_run or tokens_per_second is not None):
            fix = "without --tokens-per-second, which says it already" if dry_run else "with --dry-run"
            raise ConfigError(f"--device: predicts the speed: give it {fix}")
        for name, value in (("--gpus", gpus), ("--efficiency", efficiency)):
            if value is not None and device is None:
                raise ConfigError(f"{name}: needs --device")
        if price_per_hour is not None and tokens_per_second is None and device is None:
            raise ConfigError("--price-per-hour: needs --tokens-per-second or --device")
        from recipe.config import load_run_config
        from training.effects import check_effects, ranks

        if until is not None and dry_run:
            raise ConfigError("--until: says nothing with --dry-run")
        run = load_run_config(config, overrides or [])
        check_effects(run, config)
        # Rank 0 speaks; the launchers set RANK.
        console = plain_console(quiet=os.environ.get("RANK", "0") != "0")
        if dry_run:
            from commands.dry_run import dry_run as show
            from commands.prediction import Target

            target = None if device is None else Target(device, 8 if gpus is None else gpus, efficiency)
            show(run, console, ranks(), tokens_per_second, price_per_hour, target)
            return
        from commands.start import start

        start(run, console, until)


app.command()(decay)
app.command()(phases)


@app.command()
def doctor(
    config: Annotated[
        Path | None,
        typer.Argument(parser=path, help="a run file: its streams, disk room and run folder are checked too"),
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
    run: Annotated[Path, typer.Argument(parser=path, help="a run folder: runs/NAME", metavar="RUN")],
    json: Annotated[bool, typer.Option("--json", help="one JSON object instead of a table")] = False,
) -> None:
    """Show where a run stands, live or dead: phase, loss, speed, ETA, newest checkpoint and whether it is whole."""
    with plain_errors():
        from commands.status import status as show
        from flexbert_core.schema import plain_console

        show(run, json, plain_console())


@app.command()
def report(
    sources: Annotated[
        list[Path],
        typer.Argument(
            parser=path, help="one sweep's folder, or one or more run folders: runs/NAME", metavar="SWEEP|RUN..."
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            parser=path,
            metavar="FILE",
            help="page (.html), tables (.md, .tex), or of one run a picture (.png, .pdf, .svg); default: "
            "FOLDER/report.html, and of a run curves.png beside it",
        ),
    ] = None,
    watch: Annotated[bool, typer.Option("--watch", help="write it again and again while something trains")] = False,
) -> None:
    """Show runs or a sweep on one page: verdicts, intervals, curves. One file, which asks nothing of the network."""
    with plain_errors():
        from commands.report import report as write

        for file in write(sources, output, watch):
            print(file)


@app.command()
def average(
    sources: Annotated[
        list[Path],
        typer.Argument(
            parser=path, help="a run (runs/NAME), or checkpoints (.../tokens-N)", metavar="RUN|CHECKPOINT..."
        ),
    ],
    output: Annotated[
        Path, typer.Option(parser=path, metavar="DIR", help="the folder to write, which transformers loads")
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
    output: Annotated[Path, typer.Option(parser=path, metavar="DIR", help="the folder to write")],
    onnx: Annotated[
        bool, typer.Option("--onnx", help="a graph, model.onnx, checked in onnxruntime, in place of the weights")
    ] = False,
) -> None:
    """Write a model as a folder that transformers loads, or as an ONNX graph with its tokenizer."""
    with plain_errors():
        from commands.export import export as run
        from flexbert_core.schema import plain_console

        run(model, output, onnx, plain_console())


app.command()(generate)


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
            "hf:ORG/NAME (hf+code:ORG/NAME runs the code that a model brings); @random behind one: fresh weights. And "
            "values to set: key=value, of several evaluations NAME.key=value",
            metavar="MODEL... [KEY=VALUE]...",
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            parser=path, metavar="DIR", help="where results lie; what is done there is not done again; default: results"
        ),
    ] = None,
    group: Annotated[str | None, typer.Option(hidden=True)] = None,
    label: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Evaluate models: glue, scifact, needle, efficiency, ... (configs/eval). Interrupted, the same command goes on."""
    with plain_errors(FROM_CELLS):
        from commands.evaluate import run_eval
        from flexbert_core.schema import plain_console

        fine = run_eval(names, arguments, output or Path("results"), plain_console(), group, label)
    raise typer.Exit(0 if fine else 1)


@app.command()
def follow(
    run: Annotated[Path, typer.Argument(parser=path, help="a run folder: runs/NAME", metavar="RUN")],
    watch: Annotated[bool, typer.Option("--watch", help="until the run is finished")] = False,
    only: Annotated[
        str | None,
        typer.Option(help="one entry, by its evaluations: glue-quick,scifact; default: all", metavar="NAME,..."),
    ] = None,
) -> None:
    """Evaluate a run's checkpoints as its `evaluations` say (entry `eval`). `train` starts this by itself."""
    with plain_errors(FROM_CELLS):
        from evals.follower import follow as run_it
        from flexbert_core.schema import plain_console

        fine = run_it(run, plain_console(), watch, only)
    raise typer.Exit(0 if fine else 1)


@app.command()
def publish(
    run: Annotated[Path, typer.Argument(parser=path, help="a run folder: runs/NAME", metavar="RUN")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="keys of `publish` to set, such as publish.folder=DIR", metavar="[KEY=VALUE]..."),
    ] = None,
    only: Annotated[str | None, typer.Option(help="one revision: tokens-N, or tokens-N-ema")] = None,
    results: Annotated[
        list[Path] | None,
        typer.Option(
            parser=path, metavar="DIR", help="where `eval` wrote results, for the model cards; may be repeated"
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="say what would be pushed, write nothing")] = False,
    background: Annotated[bool, typer.Option(hidden=True)] = False,
) -> None:
    """Push a run's exports to the hub, a folder or a URL, each as a revision. What is there already is left."""
    with plain_errors(FROM_PUSHED):
        from commands.publish import publish as push
        from flexbert_core.schema import plain_console

        push(run, overrides or [], only, results or [], dry_run, background, plain_console())


@app.command()
def schema(
    markdown: Annotated[bool, typer.Option("--markdown", help="every key: type, range, default, meaning")] = False,
    json: Annotated[bool, typer.Option("--json", help="a JSON Schema for each kind of file, for editors")] = False,
    output: Annotated[
        Path | None,
        typer.Option(help="Markdown: the file, else it is printed; JSON: the folder; default: configs/schema"),
    ] = None,
) -> None:
    """Write what run files, prepare files and model files may say, as Markdown or as JSON Schemas."""
    with plain_errors():
        from commands.write_schema import write_schema

        write_schema(markdown, json, output)


@app.command()
def demo() -> None:
    """Prepare the text this machine already holds, pretrain a small encoder on it, export it and fill masks."""
    with plain_errors(FROM_CHECKPOINT):
        from commands.demo import run_demo

        run_demo()


if __name__ == "__main__":
    app()

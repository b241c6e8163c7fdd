"""What a folder holds, for one that was given where another kind is wanted."""

from pathlib import Path

# The first that fits. A run's checkpoint and a sweep's folder hold no config.yaml.
_KINDS = (
    ("a run", ("config.yaml",)),
    ("a sweep", ("sweep.json",)),
    ("a checkpoint", ("manifest.json", "state.json")),
    ("a model", ("config.json",)),
    ("a dataset", ("prepare.json",)),
    ("a dataset", ("*/stream.json",)),
    ("a dataset", ("*/*/stream.json",)),
    ("a stream of a dataset", ("stream.json",)),
    ("a folder of runs", ("*/config.yaml",)),
)


def what_it_is(folder: Path) -> str | None:
    """Such as `a run`; None for a folder that holds none of what the commands write, and for what is no folder."""
    if not folder.is_dir():
        return None
    return next((kind for kind, files in _KINDS if all(any(folder.glob(file)) for file in files)), None)


def no_run(folder: Path) -> str:
    """What is wrong with a folder that is no run, and what to give."""
    kind = what_it_is(folder)
    if kind == "a checkpoint":
        return f"{folder}: this is a checkpoint, no run folder: give its run, {folder.parent.parent}"
    if kind == "a folder of runs":
        return f"{folder}: this is a folder of runs: give one, such as {min(folder.glob('*/config.yaml')).parent}"
    if kind is not None:
        return f"{folder}: this is {kind}, no run folder: give runs/NAME"
    return f"{folder}: no run folder (it holds no config.yaml): give runs/NAME"

"""Where the parallel work of `prepare` is done, each in its own file; `EXECUTORS` names them."""

from data.preparation.executors import local, ray, slurm  # noqa: F401 (imported to be registered)
from data.preparation.executors.base import EXECUTORS, Executor, Stage

__all__ = ["EXECUTORS", "Executor", "Stage"]

"""Slot `objective`: what a run trains a model to do, each in its own file."""

from training.objectives import clm, diffusion, distill, mlm, rtd  # noqa: F401 (imported to be registered)
from training.objectives.base import Loss, Objective

__all__ = ["Loss", "Objective"]

"""Composer's loggers of a run."""

import os
from pathlib import Path
from typing import Any

from training.config import RunConfig


def build_loggers(config: RunConfig, folder: Path) -> list[Any]:
    """TensorBoard in FOLDER/tensorboard, and wandb where the run file says so."""
    from composer.loggers import TensorboardLogger, WandBLogger

    loggers: list[Any] = [TensorboardLogger(log_dir=str(folder / "tensorboard"), flush_interval=1000)]
    wandb = config.wandb
    if wandb is not None:
        os.environ.setdefault("WANDB_DIR", str(folder))
        os.environ.setdefault("WANDB_SILENT", "true")
        loggers.append(
            WandBLogger(
                project=wandb.project,
                entity=wandb.entity,
                name=config.name,
                rank_zero_only=True,
                init_kwargs={
                    "mode": wandb.mode,
                    "id": config.name,
                    "resume": "allow",
                    "config": config.model_dump(mode="json"),
                },
            )
        )
    return loggers

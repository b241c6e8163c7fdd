"""A checkpoint goes on with the data that it was trained and measured on, and no other."""

from collections.abc import Mapping

from flexbert_core.schema import ConfigError
from training.checkpoints.files import Checkpoint


def check_same_data(checkpoint: Checkpoint, training: Mapping[str, str], held_out: Mapping[str, str]) -> None:
    """Raises ConfigError where the run's streams are not those of the checkpoint, in their order.

    training, held_out: fingerprints of the run's streams, by name.
    """
    before = checkpoint.state["data"]
    if before != training:
        changed = [name for name, value in training.items() if before.get(name) != value]
        raise ConfigError(
            f"data.streams.{changed[0] if changed else next(iter(before))}: its shards are not those that "
            f"{checkpoint.path} was trained on: restore them, or give the run another name"
        )
    if checkpoint.state.get("validation_data", held_out) != held_out:  # since 2026-11
        raise ConfigError(
            f"data.streams: the held-out shards are not those that {checkpoint.path} was measured on: restore "
            "them, or give the run another name"
        )
    if list(before) != list(training):  # lanes and passes know the streams by number
        raise ConfigError(
            f"data.streams: {', '.join(training)}: {checkpoint.path} was trained with them in the order "
            f"{', '.join(before)}: give them in that order"
        )

"""A model folder's weights in memory, by our runtime for architectures that it knows, else by transformers'."""

import json
from pathlib import Path
from typing import Any, Literal

import torch

from flexbert.hf.mappings import MAPPINGS
from flexbert_core.schema import ConfigError, RunError

Runtime = Literal["flexbert", "transformers"]
Precision = Literal["fp32", "bf16"]


def precision_of(wanted: Literal["auto", "fp32", "bf16"]) -> Precision:
    """auto: bf16 on a GPU, else fp32. Results are keyed by what comes of it, since auto means another thing on another
    machine."""
    if wanted == "auto":
        return "bf16" if torch.cuda.is_available() else "fp32"
    return wanted


def model_type(folder: Path) -> str:
    """The architecture's name in the folder's config.json."""
    return str(json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type"))


def known(folder: Path) -> bool:
    """Whether our runtime computes its architecture."""
    return model_type(folder) in (*MAPPINGS, "flexbert")


def runtime_of(folder: Path, wanted: Runtime | None) -> Runtime:
    """wanted: None: ours where it knows the architecture. Raises ConfigError where ours is asked for and does not."""
    if wanted == "flexbert" and not known(folder):
        raise ConfigError(f"runtime: flexbert does not know {model_type(folder)!r}: leave it out")
    return wanted or ("flexbert" if known(folder) else "transformers")


def load_transformers(
    folder: Path, auto_class: str, purpose: str, seed: int = 0, **options: Any
) -> tuple[Any, list[str]]:
    """A model of transformers' class for the folder, float32, and the names of weights that the folder has not.

    seed: of those weights. purpose: for the message of the ConfigError that it raises for a folder it cannot load.
    """
    import transformers

    with torch.random.fork_rng(devices=[]):  # what is fresh is drawn from the global generator
        torch.manual_seed(seed)
        try:
            model, about = getattr(transformers, auto_class).from_pretrained(
                folder,
                local_files_only=True,
                trust_remote_code=True,
                output_loading_info=True,
                dtype=torch.float32,
                **options,
            )
        except Exception as error:  # the loaders raise bare Exception among others
            said = (str(error) or type(error).__name__).splitlines()[0]
            raise ConfigError(f"{folder}: transformers cannot load it{purpose}: {said}") from None
    return model, sorted(about["missing_keys"])


def require_encoder(folder: Path, model: Any, missing: list[str]) -> None:
    """Raises RunError when weights of the encoder are missing: fresh ones would give numbers that mean nothing. Those
    of a head or pooler may be."""
    prefix = f"{model.base_model_prefix}."
    is_base = not hasattr(model, model.base_model_prefix)
    encoders = [name for name in missing if is_base or name.startswith(prefix)]
    if gone := [name for name in encoders if ".pooler." not in f".{name}"]:
        more = f" and {len(gone) - 1} more are" if gone[1:] else " is"
        raise RunError(f"{folder}: {gone[0]}{more} not in its weights: it is not whole")

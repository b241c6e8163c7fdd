"""A model of the Hugging Face hub as a folder: `hf:ORG/NAME`, or `hf:ORG/NAME@REVISION`."""

from pathlib import Path

from flexbert_core.schema import ConfigError

HUB = "hf:"


def of_hub(name: str, with_code: bool = False) -> Path:
    """The local copy of ORG/NAME[@REVISION], fetched if it is not there, of its Python files only with_code. Raises
    ConfigError when it cannot be had."""
    from huggingface_hub import snapshot_download

    repo, _, revision = name.partition("@")
    wanted = ["*.json", "*.txt", "*.model", "*.safetensors", *(["*.py"] if with_code else [])]
    try:
        return Path(snapshot_download(repo, revision=revision or None, allow_patterns=wanted))
    except Exception as error:  # the hub's client raises many kinds
        said = " ".join(str(error).split())[:300]
        raise ConfigError(f"{HUB}{name}: cannot be had from the Hugging Face hub: {said}") from None

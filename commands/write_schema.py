"""`main.py schema`: the configuration reference as a Markdown page, or the JSON Schemas that editors read."""

import sys
from pathlib import Path

from commands.reference import markdown as page
from commands.schema import FOLDER, KINDS, as_lines, json_schema
from flexbert_core.schema import ConfigError


def write_schema(markdown: bool, schemas: bool, output: Path | None) -> None:
    """Print or write the Markdown page, or write the JSON Schemas. Raises ConfigError unless it is one of both."""
    if markdown == schemas:
        raise ConfigError("schema: give --markdown or --json" + (", not both" if markdown else ""))
    if markdown:
        text = page()
        if output is None:
            sys.stdout.write(text)
            return
        files = {output: text}
    else:
        files = {(output or FOLDER) / f"{kind}.json": as_lines(json_schema(kind)) for kind in KINDS}
    for file, text in files.items():
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        except OSError as error:
            raise ConfigError(f"--output: {error.filename or file}: {error.strerror}") from None

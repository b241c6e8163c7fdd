"""`main.py generate ...`: its command line."""

from typing import Annotated

import typer

from commands.one_line import plain_errors


def generate(
    model: Annotated[
        str,
        typer.Argument(
            help="a run (newest checkpoint, or RUN@tokens-N), a checkpoint, an export, a folder of a masked language "
            "model, or hf:ORG/NAME",
            metavar="MODEL",
        ),
    ],
    prompt: Annotated[
        str, typer.Option(help="text that stays as it is, but for mask tokens in it, which are filled in")
    ] = "",
    tokens: Annotated[int, typer.Option(min=0, help="to draw behind the prompt")] = 32,
    steps: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=1_000_000,
            help="in which they are drawn: fewer are faster and worse; default: one for each token",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="the same seed gives the same text")] = 0,
    samples: Annotated[int, typer.Option(min=1, max=10_000, help="how many texts")] = 1,
    temperature: Annotated[
        float,
        typer.Option(min=0.01, max=1000, help="of the softmax: under 1 likely tokens come more often"),
    ] = 1.0,
    top_p: Annotated[
        float,
        typer.Option(
            min=0.001, max=1, help="draw from the fewest tokens that have so much of the probability together"
        ),
    ] = 1.0,
) -> None:
    """Write text with a masked language model, as masked diffusion samples it; one trained by objective `diffusion`."""
    with plain_errors():
        from commands.generate import generate as run
        from flexbert_core.schema import plain_console

        run(model, prompt, tokens, steps, seed, samples, temperature, top_p, plain_console())

"""The evaluations that come with the project: each of these modules registers some."""

from evals import glue  # noqa: F401

"""The evaluations that come with the project: each of these modules registers some."""

from evals import glue, needle, retrieval, sts  # noqa: F401

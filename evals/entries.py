"""The evaluations that come with the project: each of these modules registers some."""

from evals import (  # noqa: F401
    efficiency,
    embeddings,
    glue,
    linear_probe,
    masked,
    minimal_pairs,
    needle,
    ner,
    pseudo_perplexity,
    retrieval,
    sts,
)

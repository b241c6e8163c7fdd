"""`main.py generate`: text from a masked language model."""

import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from evals.models import resolve
from flexbert import from_hf
from flexbert.sampling import generate as fill
from flexbert_core.schema import ConfigError, named


def generate(
    source: str,
    prompt: str,
    tokens: int,
    steps: int | None,
    seed: int,
    samples: int,
    temperature: float,
    top_p: float,
    console: Console,
) -> None:
    """Print samples: the prompt, and so many tokens behind it. source: a model as `eval` takes it. prompt: may hold
    mask tokens, which are filled in, too. steps: None: one for each token.

    Raises ConfigError where the model or its tokenizer cannot do it, and for what is longer than the model reads.
    """
    with tempfile.TemporaryDirectory() as scratch:
        (found,) = resolve([source], Path(scratch))
        with named(source):
            model = from_hf(found.folder, trust_remote_code=True)
            tokenizer = _tokenizer(found.folder)
    begin, longest = [tokenizer.cls_token_id, *_encode(tokenizer, prompt)], model.config.max_position_embeddings
    masked = begin.count(tokenizer.mask_token_id) + tokens
    if not masked:
        raise ConfigError(f"--tokens: 0, and --prompt holds no {tokenizer.mask_token}: there is nothing to fill in")
    if len(begin) + tokens + 1 > longest:
        raise ConfigError(
            f"--tokens: {tokens} behind a prompt of {len(begin) - 1} are more than the {longest - 2} that {source} "
            "reads: lower it"
        )
    row = [*begin, *[tokenizer.mask_token_id] * tokens, tokenizer.sep_token_id]
    vocab_size = model.config.vocab_size
    never = _never(tokenizer, vocab_size)
    if len(never) == vocab_size:
        raise ConfigError(f"{source}: its tokenizer has special tokens only: there is nothing to draw")
    if max(row) >= vocab_size:
        raise ConfigError(f"{source}: its tokenizer gives id {max(row)}, the model has {vocab_size}: they do not match")
    if torch.cuda.is_available():
        model = model.to("cuda")
    rows = fill(
        model,
        [row] * samples,
        mask_token_id=tokenizer.mask_token_id,
        never=never,
        steps=masked if steps is None else steps,
        seed=seed,
        temperature=temperature,
        top_p=top_p,
    )
    for number, each in enumerate(rows, 1):
        if samples > 1:
            console.print(f"--- {number}")
        console.print(tokenizer.decode(each[1:-1], clean_up_tokenization_spaces=False), soft_wrap=True)


def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(str(folder))
    except Exception as error:  # the loaders raise many kinds
        raise ConfigError(f"its tokenizer cannot be loaded: {' '.join(str(error).split())[:300]}") from None
    for role in ("mask", "cls", "sep"):
        if getattr(tokenizer, f"{role}_token_id") is None:
            raise ConfigError(f"its tokenizer has no {role} token: give a masked language model")
    return tokenizer


def _encode(tokenizer: Any, prompt: str) -> list[int]:
    return tokenizer(prompt, add_special_tokens=False)["input_ids"] if prompt else []


def _never(tokenizer: Any, vocab_size: int) -> list[int]:
    """Special tokens, and ids that name no token."""
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    special |= set(tokenizer.all_special_ids)
    nameless = set(range(vocab_size)) - set(tokenizer.get_vocab().values())
    return sorted(token for token in special | nameless if token < vocab_size)

"""The last parallel part of preparing: the documents that the plan keeps become token shards.

    ReadUnits -> Select -> WriteShards       -> OUTPUT/STREAM/SPLIT/part-NNNNN, WORK/done/NNNNN.{json,npz}

A task's results are a function of its inputs; it is done when datatrove has marked it, and else redone from its start.
"""

import filecmp
import functools
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep
from numpy.typing import NDArray

from data.preparation.documents import SPLITS, Meter, load_task, numbered, save_arrays
from data.preparation.sources.text import shown
from data.store.manifest import describe_shard
from data.tokenizer import TokenizerFacts, cannot_encode, corpus_tokenizer, fingerprint, tokenizer_facts
from flexbert_core.durable import sync_folder, write_file
from flexbert_core.schema import RunError

# Text given to the tokenizer at once. Its result takes some 100 times as much memory: larger batches leave the caches
# and are slower; a document that is much longer is cut, and its pieces are tokenised one after the other.
BATCH_CHARACTERS = 2**18
CUT_CHARACTERS = 2**22
# The offsets in a shard are of 32 bits. What is left is more than a shard holds beside its tokens.
MAX_DOCUMENT_BYTES = 2**32 - 2**16
# Counting costs a pass over the vocabulary, which for one short document would be more than its tokenising.
_COUNTED_DOCUMENTS = 256


class WriteShards(PipelineStep):
    """Tokenise, and write one folder of MDS shards per split of the task."""

    type, name = "WRITER", "token shards"

    def __init__(self, work: Path, shard_bytes: int) -> None:
        super().__init__()
        self.work, self.shard_bytes = work, shard_bytes

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        output = self.work.parent
        task = load_task(self.work, rank)
        tokenizer, facts = _tokenizer(output / "tokenizer", fingerprint(output / "tokenizer"))
        # No piece of raw text may become a special token; only a vocabulary of whole words can still do that, and gets
        # [UNK] here. The same look-up gives the ids their final type.
        final_ids = np.arange(facts.vocab_size).astype(token_dtype(facts.vocab_size))
        if facts.unk_token_id is not None:
            final_ids[facts.special_ids] = facts.unk_token_id
        chunks = json.loads((self.work / "plan" / f"{task['stream']}.json").read_text(encoding="utf-8"))
        folder = f"part-{task['part']:05d}"
        parts = [
            Part(output / task["stream"] / split / folder, facts.vocab_size, self.shard_bytes, chunks[split])
            for split in SPLITS
        ]
        progress = Meter(self.work, rank)
        done = 0

        def tokens_of(document: Document, encoding: Any) -> NDArray[np.unsignedinteger]:
            tokens = np.array(encoding.ids, np.int64)
            if facts.unk_token_id is None and np.isin(tokens, facts.special_ids).any():
                raise _fault(document, "holds a special token as text, and the tokenizer has no unknown token for it")
            return final_ids[tokens]

        for batch in _batches(data):
            texts = [document.text for document in batch]
            if len(texts[0]) > CUT_CHARACTERS:  # it is alone in its batch
                pieces = cut_text(texts[0])
                found = [
                    np.concatenate([tokens_of(batch[0], _encode(tokenizer, batch, [piece])[0]) for piece in pieces])
                ]
            else:
                encodings = _encode(tokenizer, batch, texts)
                found = [tokens_of(*each) for each in zip(batch, encodings, strict=True)]
            for document, tokens in zip(batch, found, strict=True):
                if tokens.nbytes > MAX_DOCUMENT_BYTES:
                    raise _fault(document, f"gives {len(tokens):,} tokens, more than a shard can hold: divide it")
                parts[document.metadata["split"]].add(tokens, document.metadata["bytes"])
                done += document.metadata["bytes"]
            progress.set(done)
        for part in parts:
            part.finish()
        report = {split: part.report() for split, part in zip(SPLITS, parts, strict=True)}
        write_file(numbered(self.work / "done", rank, ".json"), json.dumps(report).encode())
        arrays = {split: part.token_counts for split, part in zip(SPLITS, parts, strict=True)}
        arrays |= {f"{split}_chunks": part.chunks for split, part in zip(SPLITS, parts, strict=True)}
        save_arrays(numbered(self.work / "done", rank, ".npz"), **arrays)
        yield from ()


def _encode(tokenizer: Any, batch: list[Document], texts: list[str]) -> list[Any]:
    """Encodings of texts, one of each document. Raises RunError naming the document of which the tokenizer makes
    nothing."""
    try:
        return tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    except BaseException as error:
        if not _is_of_tokenizers(error):
            raise
    for document, text in zip(batch, texts, strict=True):
        try:
            tokenizer.encode(text, add_special_tokens=False)
        except BaseException as error:
            if not _is_of_tokenizers(error):
                raise
            raise _fault(document, cannot_encode(tokenizer, text, error)) from None
    raise RunError(f"{batch[0].metadata['place']}: the tokenizer fails on these documents together, not on each alone")


def _is_of_tokenizers(error: BaseException) -> bool:
    """tokenizers raises bare Exceptions, and panics, which are none."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def _fault(document: Document, what: str) -> RunError:
    start = " ".join(document.text[:60].split())
    return RunError(shown(f"{document.metadata['place']}: document that begins {start!r}: {what}"))


@functools.lru_cache(maxsize=1)
def _tokenizer(folder: Path, wanted: str) -> tuple[Any, TokenizerFacts]:
    """A process loads a tokenizer (of this fingerprint) once: that takes as long as tokenising a megabyte."""
    tokenizer = corpus_tokenizer(folder)
    return tokenizer, tokenizer_facts(folder, tokenizer)


class Part:
    """What one task writes of one split: a folder of MDS shards, which appears under its name when it is whole."""

    def __init__(self, folder: Path, vocab_size: int, shard_bytes: int, chunk_documents: int) -> None:
        self.folder, self.shard_bytes, self.chunk_documents = folder, shard_bytes, chunk_documents
        self.chunks = np.zeros((0, 2), np.uint64)
        self.dtype = np.dtype(token_dtype(vocab_size))
        self.token_counts = np.zeros(vocab_size, np.uint64)
        self.lengths: list[int] = []
        self.bytes = self.empty_documents = 0
        self.shards: list[dict[str, Any]] = []
        self._partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
        self._writer: Any = None
        self._uncounted: list[NDArray[np.unsignedinteger]] = []

    def add(self, tokens: NDArray[np.unsignedinteger], size: int) -> None:
        """Append a document, tokens of the final type, `size` UTF-8 bytes; one without tokens is only counted."""
        if len(tokens) == 0:
            self.empty_documents += 1
            return
        if self._writer is None:
            from streaming import MDSWriter

            shutil.rmtree(self._partial, ignore_errors=True)
            self._writer = MDSWriter(
                out=str(self._partial),
                columns={"tokens": f"ndarray:{self.dtype}"},
                hashes=["xxh3_64"],
                size_limit=self.shard_bytes,
            )
        self._writer.write({"tokens": tokens})
        self._uncounted.append(tokens)
        if len(self._uncounted) == _COUNTED_DOCUMENTS:
            self._count()
        self.lengths.append(len(tokens))
        self.bytes += size

    def finish(self) -> None:
        """Close the shards and give the folder its name. One that is there and holds the same stays as it is."""
        if self._writer is None:
            shutil.rmtree(self.folder, ignore_errors=True)
            return
        self._count()
        finish_shards(self._writer)
        index = self._partial / "index.json"
        self.shards = json.loads(index.read_text(encoding="utf-8"))["shards"]
        index.unlink()  # the stream has one index; this one would be stale the moment the folder moves
        start = 0
        for shard in self.shards:
            data = (self._partial / shard["raw_data"]["basename"]).read_bytes()
            shard["raw_data"]["basename"] = f"{self.folder.name}/{shard['raw_data']['basename']}"
            shard["tokens"] = sum(self.lengths[start : start + shard["samples"]])
            start += shard["samples"]
            shard["header_xxh3_64"], chunks = describe_shard(data, self.dtype.itemsize, self.chunk_documents)
            self.chunks = np.concatenate([self.chunks, chunks])
        if _same_files(self._partial, self.folder):  # of a task that was killed before it was marked as done
            shutil.rmtree(self._partial)
            return
        sync_folder(self._partial)
        shutil.rmtree(self.folder, ignore_errors=True)
        self._partial.rename(self.folder)

    def _count(self) -> None:
        tokens = np.concatenate([np.zeros(0, self.dtype), *self._uncounted])
        self.token_counts += np.bincount(tokens, minlength=len(self.token_counts)).astype(np.uint64)
        self._uncounted = []

    def report(self) -> dict[str, Any]:
        """What the merge needs to know. `shards` are entries of index.json with `tokens` and the header's digest."""
        return {
            "documents": len(self.lengths),
            "tokens": sum(self.lengths),
            "bytes": self.bytes,
            "empty_documents": self.empty_documents,
            "length_histogram": np.bincount([length.bit_length() - 1 for length in self.lengths], minlength=1).tolist(),
            "shards": self.shards,
        }


def _same_files(folder: Path, other: Path) -> bool:
    """Whether two folders hold files of the same names and bytes."""
    if not other.is_dir():
        return False
    names, others = ({path.name for path in each.iterdir()} for each in (folder, other))
    return names == others and not any(filecmp.cmpfiles(folder, other, names, shallow=False)[1:])


def finish_shards(writer: Any) -> None:
    """What the finish() of an MDSWriter does, without the second that it sleeps where the thread that would upload the
    last shard has not taken it from its queue yet."""
    if writer.new_samples:
        writer.flush_shard()
        writer.new_samples = []
    writer.executor.submit(int).result()  # the queue is empty when this comes out of it
    writer.finish()


def token_dtype(vocab_size: int) -> str:
    """The smallest type that holds every id."""
    return "uint16" if vocab_size <= 2**16 else "uint32"


def _batches(documents: Any) -> Iterator[list[Document]]:
    """Documents that are tokenised at once; one that is to be cut is alone."""
    batch, characters = [], 0
    for document in documents:
        if batch and len(document.text) > CUT_CHARACTERS:
            yield batch
            batch, characters = [], 0
        batch.append(document)
        characters += len(document.text)
        if characters >= BATCH_CHARACTERS or len(document.text) > CUT_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def cut_text(text: str, most: int | None = None) -> Iterator[str]:
    """A text as pieces of at most so many characters (default: CUT_CHARACTERS): whole, or cut at line ends."""
    most = CUT_CHARACTERS if most is None else most
    start = 0
    while len(text) - start > most:
        stop = text.rfind("\n", start, start + most) + 1
        # A line end inside a run of blank characters would change how the run is tokenised.
        while stop > start and stop < len(text) and text[stop].isspace():
            stop = text.rfind("\n", start, stop - 1) + 1
        stop = stop if stop > start else start + most
        yield text[start:stop]
        start = stop
    yield text[start:]

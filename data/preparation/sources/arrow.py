"""Columns of Arrow tables (parquet files, saved datasets) as Python values, whatever type of Arrow's holds the text."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from data.preparation.sources.files import Fault
from data.preparation.sources.text import kind_of, not_utf8, to_text


def holds_text(kind: Any) -> bool:
    """Whether a column of this type holds text: strings or bytes in any layout, or nothing but nulls."""
    import pyarrow as pa

    if isinstance(kind, pa.BaseExtensionType):
        return holds_text(kind.storage_type)
    if pa.types.is_dictionary(kind) or pa.types.is_run_end_encoded(kind):
        return holds_text(kind.value_type)
    return pa.types.is_null(kind) or _is_string(kind) or _is_bytes(kind)


def rows(
    columns: dict[str, Any], column: str, names: Sequence[str], error: Callable[[int, str], Exception]
) -> Iterator[tuple[str, dict[str, Any]] | Fault]:
    """The texts of a batch, each with the values of `names`; a null is an empty text.

    Args:
        columns: Arrow arrays of `column` and `names`.
        error: what ends prepare for a row that holds no text: of its number in the batch, and what is wrong with it.
    """
    wanted = (column, *names)
    for index, values in enumerate(zip(*(_values(columns[name]) for name in wanted), strict=True)):
        at = partial(error, index)
        bad = next(((name, value) for name, value in zip(wanted, values, strict=True) if isinstance(value, _Bad)), None)
        text = values[0]
        if bad is not None:
            yield Fault(bad[1].reason, partial(at, f"column {bad[0]!r}: {bad[1].error}"))
        elif text is not None and not isinstance(text, str):
            kind = kind_of(text)
            yield Fault(f"text is {kind}", partial(at, f"column {column!r} holds {kind}, expected a string"))
        else:
            yield text or "", dict(zip(names, values[1:], strict=True))


class _Bad:
    """A value that Python cannot hold."""

    def __init__(self, reason: str, error: str) -> None:
        self.reason, self.error = reason, error


def _values(array: Any) -> Iterator[Any]:
    """Strings are decoded here: Arrow takes any bytes for a string, and its own conversion raises without a place."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if isinstance(array, pa.ChunkedArray):
        for chunk in array.chunks:
            yield from _values(chunk)
        return
    if isinstance(array.type, pa.BaseExtensionType):
        array = array.storage
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    elif pa.types.is_run_end_encoded(array.type):
        array = pc.call_function("run_end_decode", [array])
    if not (_is_string(array.type) or _is_bytes(array.type)):
        yield from map(_plain, array)
        return
    plain = array.cast(pa.large_binary())
    plain.validate(full=True)  # offsets that lead out of the file would end the process
    for content in plain.to_pylist():
        if content is None:
            yield None
            continue
        try:
            yield to_text(content)
        except UnicodeDecodeError as error:
            yield _Bad("not UTF-8", not_utf8(content, error))


def _plain(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except (ValueError, OverflowError, ImportError) as error:  # dates that Python does not know, strings in lists
        return _Bad("value that cannot be read", str(error).splitlines()[0])


def _is_string(kind: Any) -> bool:
    import pyarrow as pa

    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _is_bytes(kind: Any) -> bool:
    import pyarrow as pa

    views = pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)
    return views or pa.types.is_fixed_size_binary(kind)

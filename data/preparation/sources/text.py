"""Bytes to text, one rule for every source: UTF-8 without a byte-order mark; lone surrogates become U+FFFD.

Python, JavaScript and Java write half an emoji as a lone surrogate, in JSON as an escape, elsewhere as three bytes that
strict UTF-8 does not know. What else is not UTF-8 is an error, never replaced: it may be another encoding.
"""

_WIDE = (b"\xff\xfe", b"\xfe\xff")


def to_text(content: bytes) -> str:
    """The text of these bytes. Raises UnicodeDecodeError when they are not UTF-8."""
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        try:
            text = content.decode("utf-8", "surrogatepass")
        except UnicodeDecodeError:
            raise error from None
    return mend_surrogates(text.removeprefix("\ufeff"))


def mend_surrogates(text: str) -> str:
    """The same text with U+FFFD for each lone surrogate, and one character for each pair."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def not_utf8(content: bytes, error: UnicodeDecodeError) -> str:
    """What is wrong with bytes that to_text refuses."""
    kind = ", UTF-16 by its first bytes" if content.startswith(_WIDE) else ""
    return f"not UTF-8 text ({error.reason} at byte {error.start}{kind}): convert it first"


def kind_of(value: object) -> str:
    """What a value is, in the words of JSON."""
    names = {bool: "a boolean", int: "a number", float: "a number", list: "a list", dict: "an object", str: "a string"}
    return "null" if value is None else names.get(type(value), type(value).__name__)


def shown(path: str) -> str:
    """A path as it can stand in one line: what cannot be printed is escaped."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in path)

"""How a number that may not be there is printed."""


def figure(value: float | None, form: str) -> str:
    """By a format such as .3f; a dash for None."""
    return "-" if value is None else format(value, form)

"""Arguments of the objects that answer: what is of another type than it should be is refused in one sentence."""

import operator
from typing import Any


def require_count(name: str, value: Any, minimum: int = 1) -> None:
    """Refuse what is not an integer, or too small a one.

    Args:
        name: Of the argument.
        value: Of it; `None` leaves the choice to the callee.
        minimum: Smallest number that will do.

    Raises:
        TypeError: If it is not an integer.
        ValueError: If it is below `minimum`.
    """
    if value is None:
        return
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r} of type {type(value).__name__}.") from None
    if number < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}.")


def require_string(name: str, value: Any, advice: str) -> None:
    """Refuse what is not a text, and an empty one.

    Args:
        name: Of the argument.
        value: Of it.
        advice: What it should say; ends the message about an empty one.

    Raises:
        TypeError: If it is not a text.
        ValueError: If it is empty, or was not UTF-8.
    """
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a text, got {value!r} of type {type(value).__name__}.")
    if not value.strip():
        raise ValueError(f"The {name} is empty; {advice}")
    if value != value.encode(errors="replace").decode():  # as the shell hands over bytes of another encoding
        raise ValueError(f"The {name} {ascii(value)} is not UTF-8: set the terminal's encoding to UTF-8.")

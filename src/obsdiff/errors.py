"""The one exception type for mistakes a user can make."""


class UserError(ValueError):
    """A request that cannot be met: one line saying what, where and what to do (exit code 2 at the command line)."""


MALFORMED = (KeyError, IndexError, TypeError, AttributeError, ValueError, OverflowError, RecursionError)
"""What reading a file raises whose values are of other kinds than they should be; a :class:`UserError` among them."""


def brief(value: object, longest: int = 100) -> str:
    """A value or an error as one line that is not too long, for messages."""
    try:
        text = " ".join((value if isinstance(value, str) else repr(value)).split())
    except ValueError:  # Python does not write out whole numbers of thousands of digits
        return "a very long number"
    return text if len(text) <= longest else f"{text[: longest - 3]}..."

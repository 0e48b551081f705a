"""The one exception that means: this input cannot be used; and text as a terminal may have it."""

import re

# But for tabs and line ends; with what turns the direction of text, or ends a line in some programs alone.
CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")


class InputError(ValueError):
    """What the user gave cannot be used: one line that says what was expected, what was got and where."""


def printable(text: str, encoding: str = "utf-8") -> str:
    """The text with escapes for its control characters, as \\x1b, and for what the encoding lacks.

    Data and names may come from anybody, and a terminal does what control characters say.
    """
    shown = CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)
    return shown.encode(encoding, "backslashreplace").decode(encoding)

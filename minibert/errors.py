"""The one exception that means: this input cannot be used."""


class InputError(ValueError):
    """What the user gave cannot be used: one line that says what was expected, what was got and where."""

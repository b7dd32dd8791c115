"""The one error type that a user is meant to read."""


class InputError(ValueError):
    """Something a user, a device or a file supplied is wrong.

    The message is complete on its own: it names the thing, what was found and what was expected.
    Programs print it without a traceback and exit with code 2.
    """

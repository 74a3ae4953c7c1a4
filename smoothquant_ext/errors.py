"""The one exception that callers are meant to read."""


class SmoothQuantError(ValueError):
    """Bad input, said in one sentence that names the culprit and what to do about it.

    The command line prints the sentence and exits with code 2; library users may catch it as a ``ValueError``.
    """

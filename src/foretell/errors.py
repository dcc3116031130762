"""The one exception that foretell raises on purpose: its message is a sentence that says what to do next."""


class ForetellError(Exception):
    """Bad input or an unsupported model. The command line prints the message and exits with code 2."""

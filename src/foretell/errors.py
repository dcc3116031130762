"""The one exception that foretell raises on purpose: its message is a sentence that says what to do next."""

HEADING = 6  # words, as in "404 Client Error. (Request ID: abc)"


class ForetellError(Exception):
    """Bad input or an unsupported model. The command line prints the message and exits with code 2."""


def reason_of(error: BaseException) -> str:
    """What another library's error says, in one line: its first, and the next where that is but a heading.

    The Hub's errors begin with "404 Client Error.", and what is missing stands below.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    heading = len(lines[0].split()) <= HEADING
    return " ".join(lines[: 2 if heading else 1]).rstrip(".")

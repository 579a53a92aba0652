"""How a command ends badly.

A foreseeable failure (bad input, full disk, interruption, non-finite loss) is a :class:`UserError`: one line,
exit code 2. Anything else that escapes is a defect of this project, keeps its traceback and exits with 1.
"""

import re

MAX_LENGTH = 3000


class UserError(Exception):
    """The message says what is wrong, where, and what to do, on one line.

    It quotes names and libraries' messages: their line breaks become spaces, and what is longer than
    ``MAX_LENGTH`` is cut.
    """

    exit_code = 2

    def __str__(self) -> str:
        text = re.sub(r"\s*[\n\r]\s*", " ", super().__str__())
        return text if len(text) <= MAX_LENGTH else f"{text[:MAX_LENGTH]} ..."


class Diverged(UserError):
    """A run ended by a loss, gradient or weight that is not finite: its settings are at fault."""

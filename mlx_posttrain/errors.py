"""How a command ends badly.

A foreseeable failure (bad input, full disk, interruption, non-finite loss) is a :class:`UserError`: one line,
exit code 2. Anything else that escapes is a defect of this project, keeps its traceback and exits with 1.
"""

import re


class UserError(Exception):
    """The message says what is wrong, where, and what to do, on one line.

    Line breaks of names and of libraries' messages that it quotes become spaces.
    """

    exit_code = 2

    def __str__(self) -> str:
        return re.sub(r"\s*[\n\r]\s*", " ", super().__str__())

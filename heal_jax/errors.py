"""The two ways a command ends badly, and one of their reasons."""


class InputError(Exception):
    """Something the user gave is wrong: config, problem file, model folder, run directory.

    The message is one line that says what is wrong and what to do. Exit status 2.
    """


class RunError(Exception):
    """A run that started well could not go on. One line; exit status 1."""


def out_of_memory(error: BaseException) -> bool:
    """Whether the host's memory or, in XLA's words, a device's has run out."""
    return isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)


def one_line(text: object) -> str:
    """Text on one line; what a terminal would obey, or cannot show, is escaped."""
    line = " ".join(str(text).split())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)

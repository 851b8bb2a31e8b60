"""The two ways a command ends badly."""


class InputError(Exception):
    """Something the user gave is wrong: config, problem file, model folder, run directory.

    The message is one line that says what is wrong and what to do. Exit status 2.
    """


class RunError(Exception):
    """A run that started well could not go on. One line; exit status 1."""

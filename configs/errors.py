"""Exceptions whose cause a user can fix. The command line prints each as one message, with its exit code."""


class TrainshortError(Exception):
    """Base class. The message says what is wrong, the value seen and what to do."""

    exit_code = 1


class InputError(TrainshortError):
    """The user's input is wrong: a run file, an option, a data file, a folder."""

    exit_code = 2


class MachineError(TrainshortError):
    """The machine lacks something: a library, a device, memory, disk."""

    exit_code = 3

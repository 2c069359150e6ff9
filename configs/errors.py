"""The exceptions whose cause a user can mend. The command line prints each as one line."""


class TrainshortError(Exception):
    """What is wrong, the value seen, what to do: one line each."""

    exit_code = 1


class InputError(TrainshortError):
    """The user's input is wrong: a run file, an option, a data file, a folder."""

    exit_code = 2


class MachineError(TrainshortError):
    """The machine lacks something: a library, a device, memory, disk."""

    exit_code = 3

"""Errors that the command line tells apart; imports nothing heavy."""


class RunFailed(RuntimeError):
    """The run broke while it was running: a disk, a device or another process."""


class NoUsableCheckpoint(FileNotFoundError):
    """No checkpoint of a run can be read, or there is none."""

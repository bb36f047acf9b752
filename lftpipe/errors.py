"""The errors a user can cause and cure.

Every message is one line in three parts: what was given, what was expected, what to do.
Anything else that is raised is a defect of lftpipe, and is shown with its traceback.
"""


class LftpipeError(Exception):
    """Base of all errors that the command line prints as one line, with exit status 1."""

    def __init__(self, given: str, expected: str, do: str) -> None:
        # A name or a library's reason may have line ends in it.
        given, expected, do = (" ".join(part.split()) for part in (given, expected, do))
        super().__init__(f"given: {given} / expected: {expected} / do: {do}")
        self.given = given
        self.expected = expected
        self.do = do

    def __reduce__(self) -> tuple[type["LftpipeError"], tuple[str, str, str]]:
        return type(self), (self.given, self.expected, self.do)


class CorpusError(LftpipeError):
    """The text is missing, unreadable, or too little."""


class TeacherError(LftpipeError):
    """The teacher cannot be found, loaded, or used."""


class StoreError(LftpipeError):
    """The store is missing, incomplete, damaged, busy, or of another identity."""


class StoreBusyError(StoreError):
    """Another process writes the store."""


class SettingsError(LftpipeError):
    """A setting, or a combination of settings, makes no sense."""


class RunError(LftpipeError):
    """A training run is missing, damaged, or does not fit what is asked of it."""


class DivergenceError(RunError):
    """The loss or the gradient of a run is no longer finite."""

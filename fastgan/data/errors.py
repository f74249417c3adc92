"""What is wrong with a user's images."""


class DataError(ValueError):
    """A fault in the user's images or folders: one line that names the place and says what to do."""


class TooLarge(DataError):
    """A file of more pixels than are allowed."""

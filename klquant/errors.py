"""The one exception a user may cause."""


class UserError(Exception):
    """Something the user can mend.

    The message is one line that names the file, tensor or key and what to do. The CLI prints it without a
    traceback and exits with code 2; everything else that escapes is a bug and keeps its traceback.
    """

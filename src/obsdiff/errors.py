"""The one exception type for mistakes a user can make."""


class UserError(ValueError):
    """A request that cannot be met: one line saying what, where and what to do (exit code 2 at the command line)."""

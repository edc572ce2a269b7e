"""Everything around a method: flags, data, teachers, optimizer, engine, run folder, evaluation, comparison."""


class UserError(ValueError):
    """A mistake that the user can mend: one line that names the value and what is allowed; never a traceback."""

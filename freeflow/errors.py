"""Errors that users meet. Each message is one line: what is wrong, where, and how to mend it."""


class FreeflowError(Exception):
    """Base of every error that freeflow raises on purpose; the command line prints it as one line."""

    exit_status = 2


class InputError(FreeflowError):
    """The input (a file, an option, an argument) cannot be used as it stands."""


class UnstableCrystalError(InputError):
    """The lattice is not a minimum of the potential energy; imaginary modes are named."""


class LostCrystalError(FreeflowError):
    """Samples that were to be of a crystal are not of it: it melted, or its atoms have changed places."""

    exit_status = 3


class PrecisionError(FreeflowError):
    """An estimator was handed numbers in less than double precision."""


class UnavailableError(FreeflowError):
    """An ensemble or a transport was asked for something that it cannot do."""


class CalculatorError(FreeflowError):
    """Another program that was to give energies did not: it failed, or its process died."""

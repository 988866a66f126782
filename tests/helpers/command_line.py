"""Calling the command line in this process."""

from jmp_train.cli.main import main


def call(capsys, *arguments):
    """Return the exit status, standard output and standard error of a command."""
    try:
        status = main(arguments)
    except SystemExit as stop:
        status = stop.code or 0
    return status, *capsys.readouterr()

"""`python -m jmp_train`: the command line."""

from jmp_train.cli.main import console_script

if __name__ == "__main__":
    console_script()

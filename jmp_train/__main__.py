"""`python -m jmp_train`: the command line."""

from jmp_train.cli.main import run

if __name__ == "__main__":
    run()

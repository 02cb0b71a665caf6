"""`python -m molora` and `torchrun -m molora`: the same as the command `molora`."""

from molora.cli.commands import main

if __name__ == "__main__":
    main()

"""`python -m rlcs`, which torchrun can start too: the `rlcs` command."""

from .cli import main

if __name__ == "__main__":
    main()

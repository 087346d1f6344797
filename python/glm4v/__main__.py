"""`python -m glm4v`: the `glm4v` command."""

from .cli import main

if __name__ == "__main__":
    main()

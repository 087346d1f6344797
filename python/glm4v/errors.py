"""What is raised when a person's input is at fault: a file, a prompt, an option."""


class InputError(ValueError):
    """One line that names the input and what is wrong with it. The command line prints it and exits with 2."""

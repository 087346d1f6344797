"""``python -m bench compare A.json B.json`` and ``python -m bench page RESULTS.json``; ``--help`` of each says more."""

import sys


def main() -> int:
    command, *arguments = sys.argv[1:] or [""]
    if command in ("-h", "--help"):
        print(__doc__)
        return 0
    if command == "compare":
        from bench.compare import main as run
    elif command == "page":
        from bench.page import main as run
    else:
        print(f"bench: the command must be compare or page, got {command!r}", file=sys.stderr)
        return 2
    return run(arguments)


if __name__ == "__main__":
    sys.exit(main())

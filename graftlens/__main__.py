"""`python -m graftlens` is the command line."""

from graftlens.cli import main

if __name__ == "__main__":
    main()

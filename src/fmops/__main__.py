"""`python -m fmops`, the same as `fmops`."""

from fmops.cli import main

if __name__ == "__main__":
    main()

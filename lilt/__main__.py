"""`python -m lilt` is `lilt`."""

from lilt.cli import main

if __name__ == "__main__":
    raise SystemExit(main())

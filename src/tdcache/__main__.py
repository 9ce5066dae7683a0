"""``python -m tdcache``: the command line."""

import sys

from tdcache.cli import main

if __name__ == "__main__":
    sys.exit(main())

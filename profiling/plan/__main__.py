"""python -m profiling.plan: see command.py."""

import sys

from profiling.plan.command import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

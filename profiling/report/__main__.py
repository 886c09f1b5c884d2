"""python -m profiling.report: see page.py."""

import sys

from profiling.report.page import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

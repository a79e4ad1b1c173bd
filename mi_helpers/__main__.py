"""`python -m mi_helpers COMMAND …`."""

import sys

from mi_helpers.course.cli import main

if __name__ == "__main__":
    sys.exit(main())

"""Starts the launch given as arguments as `lavin-ds train` does, for tests that send it signals."""

import sys

from lavin_ds.launching.process import run_to_the_end

if __name__ == "__main__":
    sys.exit(run_to_the_end(sys.argv[1:]))

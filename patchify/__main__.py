"""`python -m patchify` is the command line."""
import sys

from patchify.cli import main

sys.exit(main())

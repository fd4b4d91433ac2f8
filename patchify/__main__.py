"""`python -m patchify` is the command line."""
import sys

from patchify_retrieval import main

sys.exit(main())

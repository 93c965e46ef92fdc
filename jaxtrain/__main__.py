"""Makes `python -m jaxtrain COMMAND` the same as `jaxtrain COMMAND`."""

import sys

from jaxtrain.cli import main

if __name__ == "__main__":
    sys.exit(main())

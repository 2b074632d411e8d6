"""`python -m jaxllm`: the command line, where its script is not on the path."""

import sys

from jaxllm.cli import main

sys.exit(main())

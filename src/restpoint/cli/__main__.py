"""`python -m restpoint.cli`."""

import sys

from restpoint.cli import main

sys.exit(main())

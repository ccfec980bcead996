"""python -m osmium"""

import sys

from osmium.cli import main

sys.exit(main())

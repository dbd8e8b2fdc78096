"""Makes `python -m kvfold_client.cli` the same as `kvfold`, for programs that must not depend on PATH."""

import sys

from kvfold_client.cli.main import main

sys.exit(main())

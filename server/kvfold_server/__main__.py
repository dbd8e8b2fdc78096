"""`python -m kvfold_server`: the same as `kvfold serve`, for where a process must be the server itself."""

from __future__ import annotations

import argparse
import sys

from kvfold_server.commands import serve

if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="kvfold_server", description=serve.__doc__)
    serve.configure(parser)
    sys.exit(serve.run(parser.parse_args()))

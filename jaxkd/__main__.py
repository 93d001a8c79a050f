"""The command line: `jaxkd` and `python -m jaxkd`."""

import sys

from jaxkd.runtime import cluster, extras


def console() -> None:
    """Run the command line; what is not installed is one sentence that names the extra."""
    cluster.avoid_absent_tpu()
    try:
        from jaxkd.cli import main
    except ModuleNotFoundError as error:
        sys.exit(f"jaxkd: error: {extras.explain(error)}")
    main.console()


if __name__ == "__main__":
    console()

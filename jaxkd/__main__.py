"""`python -m jaxkd`, the same as the console script."""

from jaxkd.cli.main import console

console()

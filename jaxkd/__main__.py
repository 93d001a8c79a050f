"""`python -m jaxkd`, the same as the console script."""

from jaxkd.main import console

console()

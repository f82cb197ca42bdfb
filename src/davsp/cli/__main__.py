"""`python -m davsp.cli`."""

from davsp.cli import main

main()

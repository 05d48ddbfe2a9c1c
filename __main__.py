"""`python -m kvarto` is the `kvarto` command."""

from .cluster.cli import main

main()

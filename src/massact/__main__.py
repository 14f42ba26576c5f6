"""`python -m massact` is `massact`."""

from massact.cli import main

main()

"""`python -m lmerge`, which strategies can start again in other processes."""

from lmerge.cli import main

if __name__ == "__main__":
    main()

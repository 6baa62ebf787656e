"""`python train.py ...` is the same as `lmerge ...`."""

from lmerge.cli import main

if __name__ == "__main__":
    main()

"""Prune: ``python prune.py --config configs/prune/digits.yaml``."""

from obsdiff.cli.prune import main

if __name__ == "__main__":
    main()

"""Train: ``python train.py fit --config configs/pretrain/digits_sd3.yaml``."""

from obsdiff.cli.train import main

if __name__ == "__main__":
    main()

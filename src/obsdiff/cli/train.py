"""``obsdiff train``: Lightning's own command line over obsdiff's modules."""

from __future__ import annotations


def main(args: list[str] | None = None) -> None:
    """Run ``fit``, ``validate``, ``test`` or ``predict``; see ``train.py fit --help``."""
    from lightning.pytorch.cli import LightningCLI

    LightningCLI(save_config_kwargs={"overwrite": True}, args=args)

"""Drivers of one-shot pruning: plan, calibrate, solve, apply or shrink, and the record of what was done."""

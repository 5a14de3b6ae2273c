"""The embedded pipelines: their builders, the digits they draw, the classifier that reads them, and their training."""

"""Command lines: argument objects in, one call out, no logic of their own."""

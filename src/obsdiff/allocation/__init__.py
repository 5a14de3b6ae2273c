"""Spending one budget where it hurts least: sensitivity scan, curves, exact allocator, OWL."""

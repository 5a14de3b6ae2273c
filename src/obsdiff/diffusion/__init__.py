"""Numerics of diffusion, torch only: objectives and the Fréchet distance."""

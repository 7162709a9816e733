"""Running items through systems."""

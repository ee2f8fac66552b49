"""Weights in other tools' quantisations, read as floats: a file each, and a line in `known.READERS`."""

"""Pairs for other programs: written in the formats that these read."""

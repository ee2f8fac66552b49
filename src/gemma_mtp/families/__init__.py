"""Families of models as tables of data: one file each, and one line in `known.FAMILIES`."""

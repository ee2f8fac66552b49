"""Weights in the formats that they are kept in, behind one interface: rows looked up, products, the float matrix."""

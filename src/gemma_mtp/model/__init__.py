"""The models' math: no requests, no files."""

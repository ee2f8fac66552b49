"""Files: written whole or not at all, read a piece at a time, and the safetensors format. Knows no torch."""

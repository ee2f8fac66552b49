"""What must be set before PyTorch is imported; imported before everything that does."""

import os

# PyTorch's idle threads would otherwise spin, and take the cores from the native operators' threads: 26 GB/s instead of
# 48 on two cores, with both in use
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

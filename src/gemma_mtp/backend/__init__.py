"""Where a pair runs: `base` says what a backend does, each other module is one, `select` chooses."""

"""Keys and values: block bookkeeping in integers (`blocks`), and the tensors they stand for (`pool`)."""

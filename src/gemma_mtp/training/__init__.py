"""Training of the bundled pair: corpus, tokenizer, target, drafter and their evaluation."""

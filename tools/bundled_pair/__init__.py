"""What only the bundled pair is made with: its corpus, tokenizer, target, bundle and card. See make_pair.py."""

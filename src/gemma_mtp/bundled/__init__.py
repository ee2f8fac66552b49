"""The pair that ships with the package: `target/` and `drafter/` in the official layout, and MODEL_CARD.md."""

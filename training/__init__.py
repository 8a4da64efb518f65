"""Makes the built-in pair: the tokenizer, the full model, and the tiny model distilled from it."""

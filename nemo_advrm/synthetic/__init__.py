"""The embedded language: a corpus, a tokenizer and a programmatic gold reward on which over-optimisation is visible."""

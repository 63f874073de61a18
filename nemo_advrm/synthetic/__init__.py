"""The synthetic language: a corpus, a tokenizer and a programmatic gold reward that make over-optimisation visible."""

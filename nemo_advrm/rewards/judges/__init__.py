"""Judges that read a response: language models behind OpenAI-compatible endpoints, and people with a sheet."""

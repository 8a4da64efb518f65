"""The built-in pair of models, in Hugging Face layout, one folder each."""

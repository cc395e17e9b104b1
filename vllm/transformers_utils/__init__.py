"""Finding a model and reading all but its weights: path, configuration, tokenizer. No torch."""

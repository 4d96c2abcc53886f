"""The parts of the tokenizer: the vocabulary of a file, and one encoder per kind of vocabulary."""

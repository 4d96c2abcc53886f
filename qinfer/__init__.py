"""Runs large language models from GGUF files on the machine you have."""

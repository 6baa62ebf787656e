"""Questions, prompts, texts and the data module."""

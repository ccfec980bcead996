"""Text: tokenizer, chat template, and reasoning split from the answer."""

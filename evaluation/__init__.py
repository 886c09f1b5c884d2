"""What a trained tokenizer is worth."""

"""BERT by hand: model, pooling, weights, tokenizer, and where checkpoints come from."""

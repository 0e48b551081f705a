"""One run: its settings, its loop, its folder. `train.py` and `predict.py` are the doors to it."""

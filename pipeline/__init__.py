"""The rooms around the model: corpus, run loop, checkpoints, pictures. None imports phase 10."""

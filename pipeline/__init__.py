"""What surrounds the model: corpus, run loop, checkpoint files, pictures. Knows no phase script."""

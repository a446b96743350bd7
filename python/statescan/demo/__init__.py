"""`statescan demo`: a trained Mamba-2 language model reads a file, scores it, and continues it, on statescan's ops alone."""

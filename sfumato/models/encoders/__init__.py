"""Text encoders and tokenizers that families share, one kind a file."""

"""How latents are noised."""

"""FLUX.1: dev, schnell and what was made of them."""

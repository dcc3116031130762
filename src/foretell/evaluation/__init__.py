"""Measuring: prompt sets, acceptance, wall-clock against plain decoding and Hugging Face `generate()`, exact answers."""

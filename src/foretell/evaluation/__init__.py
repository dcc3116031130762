"""Measuring: prompt sets, acceptance, seconds beside plain decoding and Hugging Face `generate()`, exact answers."""

"""Methods through Hugging Face's Trainer: behind ``neuroada bench peers-training``."""

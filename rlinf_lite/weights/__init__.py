"""A model's weights by name: read from a Hugging Face directory, a checkpoint or a live model, and sent to engines."""

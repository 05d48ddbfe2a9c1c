"""Text at the frontend's edge: tokens to text and back, chat templates, stop strings."""

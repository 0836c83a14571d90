"""Methods, pictures and prompts in; their images, what these are worth, and a report out."""

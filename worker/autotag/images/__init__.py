"""From where an image is stored to the pixels that the model sees."""

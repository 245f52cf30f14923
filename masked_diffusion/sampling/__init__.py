"""From sample numbers to images, files and pictures."""

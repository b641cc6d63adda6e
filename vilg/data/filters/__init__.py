"""What decides whether a pair is kept: captions, images, duplicates, similarity."""

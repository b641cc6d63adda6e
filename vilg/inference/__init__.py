"""Pictures from text and text from pictures, from one export folder."""

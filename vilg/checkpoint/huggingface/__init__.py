"""What makes an export a Hugging Face folder. `*_vilg.py` are shipped with it and import nothing of this project."""

"""Small tools around a run: sheets of pictures, checks, plans."""

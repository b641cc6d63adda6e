"""Ratings by people: blinded sheets that a browser shows, and what they add up to."""

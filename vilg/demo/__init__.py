"""The demo: a small real data set of emoji scenes with captions, and one command that walks through the whole house."""
